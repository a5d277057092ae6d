"""Data sets of several splits, from the hub or a folder of `save_to_disk`: which split is which."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from trainer.base.environment import offline
from trainer.base.errors import UserError, first_line
from trainer.base.files import json_object, lost_folder
from trainer.base.log import log
from trainer.rows import limits

Role = Literal["train", "dev", "test"]
# Each role's first split that can be used is its split.
NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "dev": ("validation", "valid", "val", "dev", "development", "eval", "evaluation", "validation_matched",
            "dev_matched"),
    "test": ("test", "testing", "validation_mismatched", "dev_mismatched", "test_matched", "test_mismatched"),
}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A split of a data set, opened: what messages call it, and its rows."""

    place: str
    rows: Any

    @property
    def names(self) -> list[str]:
        return list(self.rows.column_names)

    @property
    def own_names(self) -> dict[str, list[str]]:
        """The class names of those columns whose integers have names."""
        return {column: own.names for column, own in self.rows.features.items() if hasattr(own, "names")}

    @property
    def identity(self) -> str:
        """datasets' own: another one when the rows are."""
        return str(self.rows._fingerprint)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows."""
        return self.rows.select_columns([name]).with_format("arrow")[:][name]

    def parts(self, columns: Collection[str]) -> Iterator[pa.Table]:
        """Some rows at a time, of these columns where it has them."""
        rows = self.rows.select_columns([name for name in self.names if name in columns]).with_format("arrow")
        yield from rows.iter(limits.ROWS)


def from_folder(path: Path, role: Role) -> Opened:
    """The role's split of a folder that was given as its file; a folder of one split is that split."""
    loaded = _open_saved(path)
    if not isinstance(loaded, dict):
        return Opened(str(path), loaded)
    split = next(iter(_candidates(loaded, role)), None)
    if split is None:
        raise UserError(f"{path} has no {role} split; it has {', '.join(loaded)}")
    return Opened(f"{path} {split}", loaded[split])


def from_data_set(name: str, configuration: str | None, revision: str | None, role: Role) -> Iterator[Opened]:
    """The splits that can be the role's, the best one first."""
    loaded = _load(name, configuration, revision)
    if not isinstance(loaded, dict):
        loaded = {re.split(r"\W", str(loaded.split or "train"))[0]: loaded}  # it may be called train[:1000]
    roles: tuple[Role, ...] = ("train", "dev", "test")
    splits = {role: _candidates(loaded, role) for role in roles}
    if role == "train" and not splits["train"]:
        raise UserError(f"{name} has no train split; it has {', '.join(loaded)}. Save one as a file for --train_file")
    if role == "dev":  # every verb asks for it once
        _say_unused(name, loaded, list(splits.values()))
    for split in splits[role]:
        yield Opened(f"{name} {split}", loaded[split])


def named_sets(items: list[str], configuration: str | None) -> list[tuple[str, str, str | None]]:
    """Title, name and configuration of each `name` or `name:config`; `configuration` is that of those without.

    The title is the name's last part, with the configuration where that is another one's too. Raises UserError for
    one twice.
    """
    found = []
    for item in items:
        name, colon, own = item.rpartition(":")
        found.append((name, own) if colon and name and not Path(item).exists() else (item, configuration))
    if twice := next((item for item, count in Counter(found).items() if count > 1), None):
        raise UserError(f"dataset_name names {':'.join(filter(None, twice))} twice; leave one out")
    bare = [Path(name.rstrip("/")).name for name, _ in found]
    full = [f"{title}-{own}" if own else title for title, (_, own) in zip(bare, found, strict=True)]
    titles = [long if bare.count(title) > 1 else title for title, long in zip(bare, full, strict=True)]
    if len(set(titles)) < len(titles):  # of two owners, or two folders
        titles = [name.strip("/").replace("/", "-") + (f"-{own}" if own else "") for name, own in found]
    return [(title, *own) for title, own in zip(titles, found, strict=True)]


def _say_unused(name: str, loaded: dict[str, Any], splits: list[list[str]]) -> None:
    for split in loaded:
        if first := next((own[0] for own in splits if split in own), None):
            reason = f"is used only if {first!r} has no labels"
        else:
            reason = "is not used; save it as a file to give it as --validation_file or --test_file"
        if first != split:
            log.info(f"{name}: split {split!r} {reason}")


def _candidates(loaded: dict[str, Any], role: Role) -> list[str]:
    by_name = {split.lower().replace("-", "_"): split for split in loaded}
    return [by_name[name] for name in NAMES[role] if name in by_name]


def is_saved(path: Path) -> bool:
    """Whether it is a folder of `save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _open_saved(path: Path) -> Any:
    import datasets

    def load(folder: Path) -> Any:
        try:
            return datasets.load_from_disk(str(folder))
        except IndexError:  # it has no file, since it has no rows
            return datasets.Dataset.from_dict({})

    try:
        listed = path / "dataset_dict.json"
        if not listed.is_file():
            return load(path)
        return {split: load(path / split) for split in json_object(listed.read_text(encoding="utf-8"))["splits"]}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a folder of datasets' save_to_disk: {error}") from None


def _load(name: str, configuration: str | None, revision: str | None) -> Any:
    import datasets

    if is_saved(Path(name)):
        return _open_saved(Path(name))
    if lost := lost_folder(name):
        raise UserError(lost)
    try:
        return datasets.load_dataset(name, configuration, revision=revision)
    except Exception as error:  # the hub's client raises many kinds; none means anything to the user but this
        forbidden = "; HF_HUB_OFFLINE is set" if offline() else ""
        raise UserError(
            f"data set {name!r} is no folder here, and could not be loaded from the hub{forbidden} ("
            f"{first_line(error)}). Without network, give --train_file, --validation_file and --test_file, "
            f"or a folder saved with save_to_disk as --dataset_name"
        ) from None
