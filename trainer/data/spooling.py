"""Reads a source once, in constant memory, into its spool."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.base.arrays import taken
from trainer.base.errors import UserError
from trainer.base.files import naming, remove_remains
from trainer.data.spool import CODED, FORMAT, LISTS, SOURCES, TEXTS, Spool
from trainer.data.stored import blocks, store
from trainer.labels.values import Labels, finite, read_labels
from trainer.rows.columns import HYPOTHESIS, PREMISE, Wanted, candidates, column_named, text_columns
from trainer.rows.faults import Faults
from trainer.rows.places import Place, at
from trainer.rows.tables import values_of
from trainer.rows.texts import checked

MOST_LABELS = 100_000  # that are kept as text: more are scores
MOST_SOURCES = 10_000  # that a column may tell apart: more are documents, authors or the like
MOST_FAULTS = 100_000  # rows without text, each of which may be left out since it has no label
SCHEMA = pa.schema([("premise", pa.large_string()), ("hypothesis", pa.large_string())])


@dataclass(frozen=True)
class Columns:
    """The names that each column may have, the best one first; None = the usual ones."""

    premise: Wanted
    hypothesis: Wanted
    label: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Every column that may be of use."""
        wanted = (candidates(self.premise, PREMISE), candidates(self.hypothesis, HYPOTHESIS), self.label, CODED)
        return list(dict.fromkeys(name for names in wanted for name in names))


@dataclass(frozen=True)
class Reading:
    """What there is to be read of a source.

    Attributes:
        places: its files, or what else its rows are of, as messages call them.
        names: the columns of a place, by its number.
        parts: (number of the place, some rows), in order; of these columns, where it likes only of these.
        own_names: what the columns say themselves that their numbers mean.
        identity: what is another one when the rows are; None = nobody can tell.
    """

    places: list[str]
    names: Callable[[int], list[str]]
    parts: Callable[[Collection[str]], Iterator[tuple[int, pa.Table]]]
    own_names: dict[str, list[str]] = field(default_factory=dict)
    identity: Any = None


class _Writer:
    """Collects the parts of a source in a folder; see write_spool."""

    def __init__(self, folder: Path, reading: Reading, columns: Columns) -> None:
        self.folder, self.reading, self.wanted = folder, reading, columns
        self.sizes = [0] * len(reading.places)
        self.starts: list[int] = []
        self.faults: Faults = {}
        self.labels: dict[str | None, int] | None = {}  # None = there are too many: each row's is written as a number
        self.values: dict[str, dict[str, int]] = {}
        self.uncounted: list[str] = []
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
            for number, table in self.reading.parts(self.wanted.all):
                place = self.reading.places[number]
                if number != seen:
                    own = self.reading.names(number)
                    self._settle([*own, *(name for name in table.column_names if name not in own)], place, stack)
                seen = number
                self._add(table, number, place, writer)

    def _settle(self, names: list[str], place: str, stack: ExitStack) -> None:
        """Which columns are read: those of the first file, which all others have too."""
        if self.columns is None:
            texts = text_columns(names, place, self.wanted.premise, self.wanted.hypothesis)
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
            if name in names and name not in (*self.values, *self.uncounted):
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
        self._add_labels(labels, number)
        for name, known in list(self.values.items()):
            coded = _as_names(self._column(table, name)).dictionary_encode()
            self._codes(name, known, coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False))
            if name in SOURCES and len(known) > MOST_SOURCES:
                del self.values[name], self.files[name]
                self.uncounted.append(name)
        self.starts.append(start)
        self.num_rows, self.sizes[number] = start + table.num_rows, own + table.num_rows

    def _add_labels(self, labels: Labels, number: int) -> None:
        if self.labels is None:
            self.files["label"].write(_scores(labels, self.sizes[number]).tobytes())
            return
        self._codes("label", self.labels, labels.values, labels.codes)
        if len(self.labels) > MOST_LABELS:
            file = self.files["label"]
            file.flush()
            codes = np.fromfile(file.name, np.int32)
            read = number + 1
            place = Place.joined(self.reading.places[:read], self.sizes[:read])
            scores = _scores(Labels(place, list(self.labels), codes), 0)
            file.seek(0)
            file.write(scores.tobytes())  # of as many bytes
            self.labels = None

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
        digest = hashlib.sha256(json.dumps([FORMAT, list(self.labels or ()), self._coded()]).encode())
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
            "own_names": self.reading.own_names.get(self.columns[2]),
            "starts": self.starts,
            "uncounted": self.uncounted,
        }

    def lists(self) -> np.ndarray:
        faults = {str(row): what for row, what in self.faults.items()}
        lists = {"labels": list(self.labels or ()), "coded": self._coded(), "faults": faults}
        return np.frombuffer(json.dumps(lists).encode(), np.uint8)


def _scores(labels: Labels, start: int) -> np.ndarray:
    """(n,) float32. Raises UserError for a label that is no finite number. `start` is the first row's number."""
    table = np.array([finite(value) for value in labels.values], np.float32)
    scores = taken(table, labels.codes)
    if np.isnan(table).any():
        row = int(np.argmax(np.isnan(scores)))
        value = labels.values[labels.codes[row]]
        said = "null" if value is None else repr(value)
        raise UserError(f"{at(labels.place, start + row)}: label is {said}, and there are more than {MOST_LABELS:,} "
                        "different labels: these can be scores, of which each is a finite number; mend the row, or "
                        "name another column with --label_column")  # fmt: skip
    return scores


def _whole(texts: pa.ChunkedArray) -> pa.Array:
    """As one array; combine_chunks of no chunk is none."""
    return pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.large_string())


def _as_names(column: pa.ChunkedArray) -> pa.Array:
    """What a column says of its rows, whatever it is, as text."""
    return pa.array([str(value) for value in values_of(column)], pa.large_string())


def write_spool(path: Path, reading: Reading, columns: Columns) -> Spool:
    """Reads a source into the folder `path`. Nobody else may be writing it.

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
            facts = {**writer.facts(), "sha256": writer.sha256(parts)}
            kinds: dict[str, Any] = {name: (np.int32, [part]) for name, part in parts.items()}
            if writer.labels is None:
                kinds["label"] = (np.float32, [parts["label"]])
            return Spool(
                store(path, {LISTS: writer.lists()}, facts, kinds | {TEXTS: (np.uint8, [folder / f"{TEXTS}.part"])})
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
