"""A source's rows as they were read once, on disk: their texts, and codes for what is said of each.

Files are read in parts, checked, and written as an Arrow file of the two texts, so memory does not grow with them. What
the labels mean, and which pairs are used, is decided later, on codes alone: see join.py.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.files import naming, remove_remains
from trainer.data.stored import Stored, blocks, store, stored
from trainer.labels.values import Labels, read_labels
from trainer.rows.columns import Wanted, column_named, text_columns
from trainer.rows.faults import Faults
from trainer.rows.places import Place
from trainer.rows.tables import values_of
from trainer.rows.texts import checked

FORMAT = 1
SPLITS = "SemEval_set"  # a column of SICK.txt
SOURCES = ("source", "genre")
CODED = (*SOURCES, SPLITS)
TEXTS = "texts"  # the Arrow file, as an array of bytes
MOST_FAULTS = 100_000  # rows without text, each of which may be left out since it has no label
SCHEMA = pa.schema([("premise", pa.large_string()), ("hypothesis", pa.large_string())])


@dataclass(frozen=True)
class Columns:
    """The names that each column may have, the best one first; None = the usual ones."""

    premise: Wanted
    hypothesis: Wanted
    label: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What there is to be read of a source.

    Attributes:
        places: its files, or what else its rows are of, as messages call them.
        parts: (number of the place, some rows) in order, as often as it is called.
        own_names: what the columns say themselves that their numbers mean.
    """

    places: list[str]
    parts: Callable[[], Iterator[tuple[int, pa.Table]]]
    own_names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spool:
    """The rows of a source on disk."""

    held: Stored

    @property
    def num_rows(self) -> int:
        return len(self.held.arrays["label"])

    @property
    def sha256(self) -> str:
        """Of texts, labels and sources, whatever files they came in."""
        return str(self.held.facts["sha256"])

    @property
    def columns(self) -> tuple[str, str, str]:
        """Of premise, hypothesis and label."""
        premise, hypothesis, label = self.held.facts["columns"]
        return premise, hypothesis, label

    @property
    def own_names(self) -> list[str] | None:
        """What the label's column says that its numbers mean."""
        names: list[str] | None = self.held.facts["own_names"]
        return names

    @cached_property
    def place(self) -> Place:
        return Place.joined(self.held.facts["places"], self.held.facts["sizes"])

    @property
    def labels(self) -> Labels:
        return Labels(self.place, self.held.facts["labels"], self.held.arrays["label"])

    @property
    def splits(self) -> list[str]:
        """Names of splits that a column says; empty = no such column."""
        return list(self.held.facts["coded"].get(SPLITS, []))

    def coded(self, name: str) -> tuple[list[str], np.ndarray] | None:
        """The distinct values of a column in the order of their first rows, and each row's place among them."""
        values = self.held.facts["coded"].get(name)
        return None if values is None else (values, self.held.arrays[name])

    @cached_property
    def faults(self) -> Faults:
        """Rows that have no text, and why."""
        return {int(row): what for row, what in self.held.facts["faults"].items()}

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each batch of the Arrow file."""
        return list(self.held.facts["starts"])

    @cached_property
    def mapped(self) -> Any:
        """Its reader, by mapping: of many batches only those count as memory that are looked at."""
        return pa.ipc.open_file(pa.memory_map(str(self._file)))

    @property
    def _file(self) -> Path:
        return self.held.path / f"{TEXTS}.bin"

    def texts(self, rows: np.ndarray, reader: Any = None) -> Iterator[tuple[list[str], list[str]]]:
        """Premises and hypotheses of `rows` (n,), which ascend, some at a time; all by `mapped` would count for long."""
        if not len(rows):
            return
        with ExitStack() as stack:
            if reader is None:
                reader = stack.enter_context(pa.ipc.open_file(stack.enter_context(pa.OSFile(str(self._file)))))
            for number in range(bisect_right(self._starts, int(rows[0])) - 1, len(self._starts)):
                start, end = [*self._starts[number : number + 2], self.num_rows][:2]
                low, high = np.searchsorted(rows, (start, end))
                if low == len(rows):
                    return
                if high > low:
                    batch = reader.get_batch(number)
                    if high - low < batch.num_rows:
                        batch = batch.take(pa.array(rows[low:high] - start))
                    yield batch["premise"].to_pylist(), batch["hypothesis"].to_pylist()


def open_spool(path: Path) -> Spool:
    """One that this process or another one of the node has read or written just now. Raises OSError."""
    held = stored(path, verify=None)
    if held is None:
        raise FileNotFoundError(2, "the cache of the texts is gone", str(path))
    return Spool(held)


class _Writer:
    """Collects the parts of a source in a folder; see write_spool."""

    def __init__(self, folder: Path, reading: Reading, columns: Columns) -> None:
        self.folder, self.reading, self.wanted = folder, reading, columns
        self.sizes = [0] * len(reading.places)
        self.starts: list[int] = []
        self.faults: Faults = {}
        self.labels: dict[str | None, int] = {}
        self.values: dict[str, dict[str, int]] = {}
        self.columns: tuple[str, str, str] | None = None
        self.num_rows = 0
        # Of lengths and of bytes apart, so that it does not depend on the parts that the rows came in.
        self.digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in ("premise", "hypothesis")}

    def write(self) -> None:
        with ExitStack() as stack:
            sink = stack.enter_context(pa.OSFile(str(self.folder / f"{TEXTS}.part"), "wb"))
            writer = stack.enter_context(pa.ipc.new_file(sink, SCHEMA))
            self.files = {"label": stack.enter_context((self.folder / "label.part").open("wb"))}
            seen = -1
            for number, table in self.reading.parts():
                place = self.reading.places[number]
                if number != seen:
                    self._settle(table, place, stack)
                seen = number
                self._add(table, number, place, writer)

    def _settle(self, table: pa.Table, place: str, stack: ExitStack) -> None:
        """Which columns are read: those of the first file, which all others have too."""
        names = table.column_names
        if self.columns is None:
            texts = text_columns(table, place, self.wanted.premise, self.wanted.hypothesis)
            label = column_named(names, place, "label_column", list(self.wanted.label), ())
            self.columns = (*texts, label)
            self.values = {name: {} for name in CODED if names.count(name) == 1}
            self.files |= {n: stack.enter_context((self.folder / f"{n}.part").open("wb")) for n in self.values}
            return
        first = self.reading.places[0]
        for name in (*self.columns, *self.values):
            if name not in names:
                raise UserError(f"{place}: no column {name!r}, which {first} has; it has {', '.join(names)}. Files of "
                                "one source need the same columns: give this one another name, as in NAME=PATH, or "
                                "mend it")  # fmt: skip
        for name in SOURCES:
            if name in names and name not in self.values:
                raise UserError(f"{place}: a column {name!r}, which {first} does not have; files of one source need "
                                "the same columns")  # fmt: skip

    def _add(self, table: pa.Table, number: int, place: str, writer: Any) -> None:
        assert self.columns
        start, own = self.num_rows, self.sizes[number]  # of all files, and of this one
        premise, hypothesis, label = (self._column(table, name) for name in self.columns)
        found = {}
        for name, column in (("premise", premise), ("hypothesis", hypothesis)):
            texts, wrong = checked(column, name)
            for row, what in wrong.items():
                self.faults.setdefault(start + row, what)
            found[name] = _whole(texts)
            self._digest(name, found[name])
        if len(self.faults) > MOST_FAULTS:
            row, what = next(iter(self.faults.items()))
            raise UserError(f"{Place.joined(self.reading.places, self.sizes)}: more than {MOST_FAULTS:,} rows without "
                            f"text, the first of them row {row}: {what}")  # fmt: skip
        writer.write_batch(pa.record_batch(list(found.values()), schema=SCHEMA))
        labels = read_labels(label, place, own)
        self._codes("label", self.labels, labels.values, labels.codes)
        for name, known in self.values.items():
            coded = _as_names(self._column(table, name)).dictionary_encode()
            self._codes(name, known, coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False))
        self.starts.append(start)
        self.num_rows, self.sizes[number] = start + table.num_rows, own + table.num_rows

    def _column(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        """Null where the part of a jsonl file lacks it."""
        return table[name] if name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])

    def _codes(self, name: str, known: dict[Any, int], values: Sequence[Any], codes: np.ndarray) -> None:
        """`values` are in the order of their first rows."""
        places = np.array([known.setdefault(value, len(known)) for value in values], np.int32)
        self.files[name].write(places[codes].tobytes())

    def _digest(self, name: str, column: pa.Array) -> None:
        lengths, content = self.digests[name]
        column = column.fill_null("")
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
        lengths.update(np.diff(offsets).tobytes())
        if len(column) and offsets[-1] > offsets[0]:
            content.update(memoryview(column.buffers()[2])[int(offsets[0]) : int(offsets[-1])])

    def sha256(self, files: dict[str, Path]) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, list(self.labels), self._coded()]).encode())
        for pair in self.digests.values():
            for part in pair:
                digest.update(part.digest())
        for name in sorted(files):
            for block in blocks(files[name]):
                digest.update(block)
        return digest.hexdigest()

    def _coded(self) -> dict[str, list[str]]:
        return {name: list(known) for name, known in self.values.items()}

    def facts(self) -> dict[str, Any]:
        assert self.columns
        return {
            "places": list(self.reading.places),
            "sizes": self.sizes,
            "columns": list(self.columns),
            "labels": list(self.labels),
            "own_names": self.reading.own_names.get(self.columns[2]),
            "coded": self._coded(),
            "starts": self.starts,
            "faults": {str(row): what for row, what in self.faults.items()},
        }


def _whole(texts: pa.ChunkedArray) -> pa.Array:
    """As one array; combine_chunks of no chunk is none."""
    return pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.large_string())


def _as_names(column: pa.ChunkedArray) -> pa.Array:
    """What a column says of its rows, whatever it is, as text."""
    return pa.array([str(value) for value in values_of(column)], pa.large_string())


def write_spool(path: Path, reading: Reading, columns: Columns, facts: dict[str, Any]) -> Spool:
    """Reads a source into the folder `path`; `facts` are kept with it. Nobody else may be writing it.

    Raises UserError where a file cannot be read, or lacks a column; OSError where nothing can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(path)
    folder = path.with_name(f".{path.name}.reading.{os.getpid()}")
    folder.mkdir()
    try:
        with naming(path):
            writer = _Writer(folder, reading, columns)
            writer.write()
            if not writer.num_rows:
                raise UserError(f"{Place.joined(reading.places, writer.sizes)}: no rows")
            parts = {name: folder / f"{name}.part" for name in writer.files}
            facts = {**writer.facts(), **facts, "sha256": writer.sha256(parts)}
            kinds: dict[str, Any] = {name: (np.int32, [part]) for name, part in parts.items()}
            return Spool(store(path, {}, facts, kinds | {TEXTS: (np.uint8, [folder / f"{TEXTS}.part"])}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
