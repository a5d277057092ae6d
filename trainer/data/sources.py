"""From what the fields name to the spools of its sources: files, `save_to_disk` folders, the hub, the embedded pairs.

A source is read once, by one process of a node, and whoever needs it later has it from the cache: see spool.py. A file
is known there by path, size and modification time, so a start with a cache reads no text; `verify_data` reads all.
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.folders import caches
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data import builtin
from trainer.data.spool import FORMAT, TEXTS, Spool
from trainer.data.spooling import Columns, Reading, write_spool
from trainer.data.stored import Check, locked, prune, stored
from trainer.labels.values import read_labels
from trainer.options import Objective
from trainer.rows.columns import LABELS, candidates
from trainer.rows.files import Source, find_sources, is_kept
from trainer.rows.pipes import as_file, is_stream
from trainer.rows.splits import Opened, Role, from_data_set, from_folder, is_saved, named_sets
from trainer.rows.tables import names_of, nothing_in, read_parts


@dataclass(frozen=True)
class Origin:
    """A source of a split.

    Attributes:
        name: what it is called.
        read: opens it; None where it has no split of the role that can be used.
        paths: its files and folders, by which the cache knows it; none = it has to be opened for that.
        known_as: what else tells it from others of this name.
    """

    name: str
    read: Callable[[], Reading | None]
    paths: tuple[Path, ...] = ()
    known_as: tuple[str | None, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        return tuple(path.name for path in self.paths)


def origins_of(config: DataConfig, role: Role, objective: Objective) -> list[Origin]:
    """The sources of a role. Raises UserError for a field that names nothing."""
    return list(_of_files(config, role) if config.has_files else _of_data_sets(config, role, objective))


def columns_of(config: DataConfig, objective: Objective) -> Columns:
    return Columns(config.premise_column, config.hypothesis_column, candidates(config.label_column, LABELS[objective]))


def spool_of(origin: Origin, columns: Columns, role: Role, verify: bool, check: Check) -> Spool | None:
    """The rows of a source, from the cache if it has them and `verify` does not ask for more.

    None where there is no such split. Raises UserError where they cannot be read, or change while they are; OSError
    where the cache cannot be written.
    """
    before, reading = _stamps(origin.paths), None
    if before is None:
        reading = origin.read()
        if reading is None:
            return None
        before = reading.identity
    paths = [str(path.absolute()) for path in origin.paths]
    title = _short([FORMAT, role, paths or [origin.name, *origin.known_as], repr(columns)])
    place = caches(os.environ)["CROSSRANK_CACHE"] / "texts"
    if before is None:  # nobody can have it from the cache
        place = Path(tempfile.mkdtemp(prefix="crossrank-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    path = place / f"{title}-{_short(before)}"
    with locked(path, check):
        held = stored(path, unread=[TEXTS]) if before is not None else None
        if held is not None and not verify:
            return Spool(held)
        reading = reading or origin.read()
        if reading is None:
            return None
        made = write_spool(path, reading, columns)
    if origin.paths and before is not None and _stamps(origin.paths) != before:
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"{made.place}: it changed while it was read; start again when it is complete")
    if held is not None and held.facts["sha256"] != made.sha256:
        log.warning(f"{made.place}: not what it was when it was first read, though size and modification time are the "
                    "same; what it holds now is taken")  # fmt: skip
    prune(place)
    prune(place, days=1, beginning=f"{title}-")  # what these files once held, which nobody has used today
    return made


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _stamps(paths: tuple[Path, ...]) -> list[tuple[str, int, int]] | None:
    """Size and modification time of every file; None of what can be read only once, or is not there."""
    found = []
    for path in paths:
        if is_stream(path):
            return None
        for file in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
            try:
                known = file.stat()
            except OSError:
                return None
            if not file.is_dir():
                found.append((str(file.absolute()), known.st_size, known.st_mtime_ns))
    return found or None


def _of_files(config: DataConfig, role: Role) -> Iterator[Origin]:
    field = {"train": "train_file", "dev": "validation_file", "test": "test_file"}[role]
    for source in find_sources(config.files(role) or [], field):
        yield Origin(source.name, partial(_read_files, source, role), source.paths)


def _read_files(source: Source, role: Role) -> Reading:
    """All shards of a source, as one."""
    if len(source.paths) == 1 and is_saved(source.paths[0]):
        return _reading(from_folder(source.paths[0], role))
    places = [_of_program(path, source.name) if is_kept(path) else str(path) for path in source.paths]
    found: dict[int, list[str]] = {}

    def parts(columns: Collection[str]) -> Iterator[tuple[int, pa.Table]]:
        for number, path in enumerate(source.paths):
            with as_file(path) as file:
                found[number] = names_of(file)
                tables = read_parts(file, columns=columns)
                first = next(tables, None)
                if first is None:
                    raise nothing_in(file)
                for table in chain([first], tables):
                    yield number, table

    return Reading(places, lambda number: found[number], parts)


def _of_program(path: Path, name: str) -> str:
    """What a Python program calls the pairs that given.py has written there."""
    argument = f"{ {'dev': 'eval'}.get(path.stem, path.stem) }_dataset"
    return argument if name == path.stem else f"{argument}[{name!r}]"


def _of_data_sets(config: DataConfig, role: Role, objective: Objective) -> Iterator[Origin]:
    found = named_sets(config.dataset_name or [], config.dataset_config_name)
    if config.dataset_revision is not None and len(found) > 1:
        raise UserError("dataset_revision is that of one data set, and dataset_name has several; leave it out")
    for title, name, configuration in found:
        if name == "builtin":
            yield Origin(name, partial(_read_builtin, role))
        else:
            folder = (Path(name),) if is_saved(Path(name)) else ()
            read = partial(_read_data_set, config, name, configuration, role, objective)
            yield Origin(title, read, folder, (name, configuration, config.dataset_revision))


def _read_builtin(role: Role) -> Reading:
    def parts(_: Collection[str]) -> Iterator[tuple[int, pa.Table]]:
        yield 0, pa.Table.from_pylist(builtin.pairs(role))

    identity = hashlib.sha256(Path(builtin.__file__).read_bytes()).hexdigest()
    names = ["premise", "hypothesis", "label", "source"]
    return Reading([f"builtin {role}"], lambda _: names, parts, {"label": list(builtin.LABEL_NAMES)}, identity)


def _read_data_set(
    config: DataConfig, name: str, configuration: str | None, role: Role, objective: Objective
) -> Reading | None:
    for opened in from_data_set(name, configuration, config.dataset_revision, role):
        # Many test splits on the hub come without their labels.
        labels = candidates(config.label_column, LABELS[objective])
        if role != "train" and (lack := lack_of(len(opened.rows), opened.names, opened.column, labels, opened.place)):
            log.info(f"{opened.place} is left out: {lack}")
            continue
        return _reading(opened)
    return None


def _reading(opened: Opened) -> Reading:
    def parts(columns: Collection[str]) -> Iterator[tuple[int, pa.Table]]:
        for table in opened.parts(columns):
            yield 0, table

    return Reading([opened.place], lambda _: opened.names, parts, opened.own_names, opened.identity)


def lack_of(
    num_rows: int, names: Collection[str], column: Callable[[str], pa.ChunkedArray], labels: tuple[str, ...], place: str
) -> str | None:
    """Why nothing can be scored on this split of columns `names`, whose labels are in one of `labels`."""
    if num_rows == 0:
        return "it has no rows"
    name = next((name for name in labels if name in names), None)
    if name is None:
        return f"it has no column {' or '.join(labels)}"
    return "it has no labels" if read_labels(column(name), place).missing else None
