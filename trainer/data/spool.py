"""A source's rows as they were read once, on disk: their texts, and codes for what is said of each.

Files are read in parts, checked, and written as an Arrow file of the two texts, so memory does not grow with them. What
the labels mean, and which pairs are used, is decided later, on codes alone: see join.py.
"""

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.data.stored import Stored, reopened, stored
from trainer.labels.values import Labels
from trainer.rows.faults import Faults
from trainer.rows.places import Place

FORMAT = 2
SPLITS = "SemEval_set"  # a column of SICK.txt
SOURCES = ("source", "genre")
CODED = (*SOURCES, SPLITS)
TEXTS = "texts"  # the Arrow file, as an array of bytes
LISTS = "lists"  # JSON, as an array of bytes


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
        own = self.held.arrays["label"]
        if own.dtype == np.float32:
            return Labels(self.place, [], np.empty(0, np.int8), own)
        return Labels(self.place, self._lists["labels"], own)

    @cached_property
    def _lists(self) -> dict[str, Any]:
        """Distinct labels and sources, which may be as many as there are rows: for the process that joins sources."""
        return dict(json.loads(self.held.arrays[LISTS].tobytes()))

    @property
    def splits(self) -> list[str]:
        """Names of splits that a column says; empty = no such column."""
        return list(self._lists["coded"].get(SPLITS, []))

    def coded(self, name: str) -> tuple[list[str], np.ndarray] | None:
        """The distinct values of a column in the order of their first rows, and each row's place among them."""
        values = self._lists["coded"].get(name)
        return None if values is None else (values, self.held.arrays[name])

    @property
    def uncounted(self) -> list[str]:
        """Columns of sources that say too many to be told apart."""
        return list(self.held.facts.get("uncounted", []))  # an older version counted all

    @cached_property
    def faults(self) -> Faults:
        """Rows that have no text, and why."""
        return {int(row): what for row, what in self._lists["faults"].items()}

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each batch of the Arrow file."""
        return list(self.held.facts["starts"])

    def verify(self) -> None:
        """Before all texts are used. Raises UserError where they are damaged, and removes them."""
        if stored(self.held.path, verify=True, quiet=True) is None:
            shutil.rmtree(self.held.path, ignore_errors=True)
            raise UserError(f"the cache of the texts of {self.place} was damaged, and is removed; start the same "
                            "command again")  # fmt: skip

    @cached_property
    def mapped(self) -> Any:
        """Its reader, by mapping: of many batches only those count as memory that are looked at."""
        return pa.ipc.open_file(pa.memory_map(str(self._file)))

    @property
    def _file(self) -> Path:
        return self.held.path / f"{TEXTS}.bin"

    def texts(self, rows: np.ndarray, reader: Any = None) -> Iterator[tuple[list[str], list[str]]]:
        """Premises and hypotheses of `rows` (n,), which ascend, some at a time.

        By `mapped` only if they are few: what is mapped counts as this process's memory.
        """
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
    """One that this process or another one of the node has read or written just now. Raises UserError."""
    return Spool(reopened(path))
