"""Which files a field names, and what the sources in them are called.

An item of a field is a file, a glob, a folder of shards or of `save_to_disk`, or a pipe, and each of them also as
NAME=PATH. A source is one file, or several that differ in nothing but the number of a shard, or all that a NAME stands
for. It is called by that NAME, else by its file's stem, else by its folder: see `_choices`.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.base.errors import UserError
from trainer.base.folders import caches
from trainer.rows.pipes import is_stream
from trainer.rows.splits import NAMES, is_saved
from trainer.rows.tables import SUFFIXES, ending

ROLES = {word: role for role, words in NAMES.items() for word in words}
# What says nothing of the data in it.
MERE = {"", *ROLES, "data", "default", "part", "shard", "chunk"}
NO_DATA = re.compile(r"\..*|README.*|LICEN[CS]E.*|.*\.md|dataset_infos\.json", re.IGNORECASE)
# Names of shards: train-00000-of-00004, part-1, part-00000-UUID-c000, 0000. The last form counts only if one of the
# numbers begins with 0; news-2019 and news-2020 are no shards.
SHARD = re.compile(
    r"(?P<of>.*?)[-_.]?\d+[-_.]of[-_.]\d+|(?P<word>.*?)[-_.]?(?:part|shard|chunk)[-_.]?\d+(?:-[0-9a-f-]{36}.*)?"
    r"|(?P<bare>.*?)[-_.]?(?<!\d)(?P<number>\d{2,})"
)


@dataclass(frozen=True)
class Source:
    """Files of one source, in order."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class _File:
    path: Path
    title: str | None  # NAME of NAME=PATH
    stem: str

    @property
    def key(self) -> tuple[object, ...]:
        """What files of one source share, if `number` is that of a shard."""
        found = SHARD.fullmatch(self.stem)
        if self.title is not None:
            return ("title", self.title)
        if found is None:
            return (self.path.parent, self.stem)
        if found["number"]:
            return (self.path.parent, found["bare"], len(found["number"]))
        return (self.path.parent, found["of"] or found["word"] or "", "shard")

    @property
    def begins_with_zero(self) -> bool:
        found = SHARD.fullmatch(self.stem)
        return found is not None and (found["number"] or "0").startswith("0")


def kept_folder() -> Path:
    """Where pairs that a Python program has in memory become files: see given.py."""
    return caches(os.environ)["CROSSRANK_CACHE"] / "data"


def is_kept(path: Path) -> bool:
    """Whether it is one of those, whose name nobody knows."""
    return path.parent.parent == kept_folder()


def find_sources(items: list[str], field: str) -> list[Source]:
    """In the order of `items`. Raises UserError where there is no such file, one twice, or two sources of one name."""
    titles = [title for title, _ in map(_titled, items) if title is not None]
    if twice := [title for title, count in Counter(titles).items() if count > 1]:
        raise UserError(f"{field} has two files called {twice[0]!r}; give them two names, or one glob or folder")
    files = [_File(path, title, _stem(path)) for item in items for title, path in _files(item)]
    seen: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"{field} names the same file twice: {seen[real]} and {file.path}; leave one out")
        seen[real] = file.path
    shards = {file.key for file in files if file.title or file.begins_with_zero}
    groups: dict[tuple[object, ...], list[_File]] = {}
    for file in files:
        groups.setdefault(file.key if file.key in shards else (file.path,), []).append(file)
    choices = [_choices(key, own, len(groups) == 1) for key, own in groups.items()]
    names = _names(choices, [own[0].path for own in groups.values()], field)
    return [Source(name, tuple(file.path for file in own)) for name, own in zip(names, groups.values(), strict=True)]


def _titled(item: str) -> tuple[str | None, str]:
    """NAME and PATH of an item; a path that is there as it is written has no NAME."""
    name, equals, path = item.partition("=")
    if not equals or "/" in name or os.path.lexists(item) or glob.glob(item, recursive=True):
        return None, item
    if not path or not may_be_title(name):
        raise UserError(f"{item!r} is no file here, and as NAME=PATH it has no name that a file may have")
    return name, path


def may_be_title(name: str) -> bool:
    """Whether it may stand before the = of NAME=PATH, and be the name of a file."""
    return name.isprintable() and re.fullmatch(r"[^.\s/\\=](?:[^/\\=]*[^\s/\\=])?", name) is not None


def _files(item: str) -> Iterator[tuple[str | None, Path]]:
    title, text = _titled(item)
    path = Path(text)
    if path.is_dir():
        found = [path] if is_saved(path) else _of_folder(path)
    elif not os.path.lexists(path) and glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        found = [own for own in found if not NO_DATA.fullmatch(own.name)]
        if "**" in text:  # the files in a folder match as well
            found = [own for own in found if own.is_file()]
        if not found:
            raise UserError(f"{text}: no file matches")
        _check_no_folder([own for own in found if not is_saved(own)], text)
        _check_kinds([own for own in found if own.is_file()], text)
    else:
        found = [path]
    yield from ((title, own) for own in found)


def _of_folder(folder: Path) -> list[Path]:
    """The data files in it. Raises UserError where they are none, or seem to be of several kinds or splits."""
    found = sorted(path for path in folder.iterdir() if not NO_DATA.fullmatch(path.name))
    files = [path for path in found if path.is_file()]
    if not files:
        inner = next((path for path in found if path.is_dir()), None)
        hint = f"; it has folders: give one of them, or {folder / '**' / '*'}" if inner else ""
        raise UserError(f"{folder}: a folder without data files, and none of datasets' save_to_disk{hint}")
    _check_no_folder(found, str(folder))
    _check_kinds(files, str(folder))
    splits: dict[str, tuple[str, str]] = {}
    for path in files:
        for word in re.split(r"[^a-z]+", path.name.lower()):
            if word in ROLES:
                splits.setdefault(ROLES[word], (path.name, word))
    if len(splits) > 1:
        (one, _), (other, word) = list(splits.values())[:2]
        raise UserError(f"{folder} holds several splits, as {one} and {other}; name the files of one by a glob, such "
                        f"as {folder}/*{word}*")  # fmt: skip
    return files


def _check_no_folder(found: list[Path], place: str) -> None:
    """A folder beside files would be left out, or be the same data twice."""
    folder = next((path for path in found if path.is_dir()), None)
    if folder:
        some, all_of_them = folder.parent / "*.jsonl", folder.parent / "**" / "*"
        raise UserError(f"{place} holds the folder {folder.name} beside files, and it is not clear whether what is in "
                        f"it is meant; say which files are, as {some} or {all_of_them}")  # fmt: skip


def _check_kinds(files: list[Path], place: str) -> None:
    """What lies beside each other in two kinds may well be the same data twice."""
    kinds = {ending(path): path.name for path in reversed(files)}
    if len(kinds) > 1:
        one, other = sorted(kinds.values())[:2]
        raise UserError(f"{place} holds files of several kinds, as {one} and {other}; name those of one kind by a glob")


def _stem(path: Path) -> str:
    """The name without its endings; a stream has none that says anything."""
    if is_stream(path):
        return "stdin" if path.name == "stdin" else "pipe"
    name = path.name or path.absolute().name
    while Path(name).suffix in SUFFIXES:
        name = name.removesuffix(Path(name).suffix)
    return name


def _choices(key: tuple[object, ...], files: list[_File], alone: bool) -> list[str]:
    """What a source may be called, the best name first; `alone`: there is nothing to tell it from."""
    first = files[0]
    if first.title is not None:
        return [first.title]
    is_shard = len(key) > 1
    stem = str(key[1]) if is_shard else first.stem
    if alone and not is_shard:
        return [stem]
    folders = (parent.name for parent in first.path.absolute().parents)
    parent = next((name for name in folders if name.lower() not in MERE), "")
    own = [stem] if stem.lower() not in MERE else []
    return [*own, *([parent, f"{parent}-{stem or 'data'}"] if parent else [stem or "data"])]


def _names(choices: list[list[str]], paths: list[Path], field: str) -> list[str]:
    """The first choice of each that no other one takes. Raises UserError."""
    level = [0] * len(choices)
    while True:
        names = [own[place] for own, place in zip(choices, level, strict=True)]
        counts = Counter(name.lower() for name in names)  # there are disks to which X and x are one file
        doubled = [number for number, name in enumerate(names) if counts[name.lower()] > 1]
        free = [number for number in doubled if level[number] + 1 < len(choices[number])]
        if doubled and not free:
            one, other = [n for n in doubled if names[n].lower() == names[doubled[0]].lower()][:2]
            raise UserError(f"{field}: {paths[one]} and {paths[other]} would both be called {names[one]!r}; give them "
                            "names, as in NAME=PATH")  # fmt: skip
        if not doubled:
            return names
        for number in free:
            level[number] += 1
