"""Sentence pairs as plain arrays: those of a split, and those that are to be predicted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.base.arrays import counted, parts
from trainer.data.spool import Spool, open_spool
from trainer.rows.places import at, rows_at

SHOWN = 8  # sources that a line says


@dataclass(frozen=True)
class Rows:
    """Which rows n pairs are.

    Attributes:
        name: where they come from, for messages; see places.Place.
        row: (n,) the number that each has among all rows of the source, file after file.
    """

    name: str
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def at(self, number: int) -> str:
        """The pair's file and the row that it has there, for messages."""
        return at(self.name, self.row[number])

    def all_at(self, numbers: Iterable[int], most: int = 16) -> str:
        """The rows of several pairs, and their files."""
        return rows_at(self.name, (self.row[number] for number in numbers), most)


@dataclass(frozen=True)
class Texts(Rows):
    """Pairs without labels, in memory."""

    premise: list[str]
    hypothesis: list[str]

    def between(self, start: int, end: int) -> Iterator[tuple[list[str], list[str]]]:
        """Premises and hypotheses of pairs `start` to `end`, some at a time."""
        yield self.premise[start:end], self.hypothesis[start:end]

    def some(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Those of a few pairs."""
        return [(self.premise[number], self.hypothesis[number]) for number in numbers]


@dataclass(frozen=True)
class Spooled:
    """The texts of a split's pairs, on disk: the spools of its sources, and the `row` (n,) of each pair in them all."""

    paths: tuple[Path, ...]
    row: np.ndarray

    @cached_property
    def spools(self) -> list[Spool]:
        return [open_spool(path) for path in self.paths]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each spool, and their end."""
        return np.cumsum([0, *(spool.num_rows for spool in self.spools)])

    def between(self, start: int, end: int) -> Iterator[tuple[list[str], list[str]]]:
        """As Texts has it."""
        for part in parts(end, start):
            rows = self.row[part].astype(np.int64)
            for spool, first, low, high in zip(self.spools, self.starts, *self._cuts(rows), strict=False):
                yield from spool.texts(rows[low:high] - first)

    def some(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """As Texts has it."""
        rows, places = np.unique(self.row[np.asarray(numbers, np.int64)], return_inverse=True)
        found: list[tuple[str, str]] = []
        for spool, first, low, high in zip(self.spools, self.starts, *self._cuts(rows), strict=False):
            for texts in spool.texts(rows[low:high] - first, spool.mapped):
                found += zip(*texts, strict=True)
        return [found[place] for place in places]

    def _cuts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the part of each spool begins and ends in ascending rows."""
        cuts = np.searchsorted(rows, self.starts)
        return cuts[:-1], cuts[1:]

    def hold(self) -> None:
        """Keeps the files, whoever may remove their names from the cache while the run lasts."""
        for spool in self.spools:
            _ = spool.mapped


@dataclass(frozen=True)
class Pairs(Rows):
    """The pairs of one split. All sequences have the same length n.

    Attributes:
        texts: of the pairs, which no rank keeps in memory.
        label: (n,) class numbers, or where `values` is given the places of the pairs' targets in it.
        source: (n,) the source of each, a place in `source_names`; None = there are no sources.
        label_names: of the classes, or of the labels 0 and 1; empty = the targets are numbers.
        source_names: in the order of their first pairs.
        split: what reports, file names and metrics call them, such as AllNLI-dev.
        values: targets of one score, float32, ascending; None = there are classes.
        of_class: (classes of the model,) the class of `label_names` that each is taken as; None = the classes are the
            model's.
        mapped: in words, which classes are taken as which; empty = none.
        said: the classes as the sources name them, before any map.
        files: the names of their files, without folders; empty = they are of no file.
    """

    texts: Texts | Spooled
    label: np.ndarray
    source: np.ndarray | None
    label_names: tuple[str, ...]
    source_names: tuple[str, ...] = ()
    num_dropped: int = 0
    num_available: int = 0  # pairs with a label in the source, of which these are the first
    columns: tuple[str, ...] = ("premise", "hypothesis", "label")  # as the source calls them
    split: str = ""
    values: np.ndarray | None = None
    of_class: np.ndarray | None = None
    mapped: str = ""
    said: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def targets(self) -> np.ndarray:
        """(n,) class numbers, or 0 and 1, or where the labels have no names the numbers that they are."""
        return self.targets_of(slice(None))

    def targets_of(self, numbers: slice | int) -> np.ndarray:
        """Those of some pairs."""
        return self.label[numbers] if self.values is None or self.label_names else self.values[self.label[numbers]]

    def target(self, number: int) -> str:
        """What the pair is labelled with."""
        return repr(self.label_names[self.label[number]]) if self.label_names else f"{self.targets_of(number):g}"

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many pairs each source has, in the order of their first ones; empty = there are no sources."""
        if self.source is None:
            return {}
        counts = counted(self.source, len(self.source_names)).tolist()
        return dict(zip(self.source_names, map(int, counts), strict=True))

    def source_of(self, number: int) -> str | None:
        """What the pair's source is called."""
        return None if self.source is None else self.source_names[self.source[number]]

    def describe(self) -> str:
        """How many there are, and what is not among them."""
        of = (
            f"the first {len(self):,} of {self.num_available:,}" if self.num_available > len(self) else f"{len(self):,}"
        )
        dropped = f" ({self.num_dropped:,} more dropped: no consensus label)" if self.num_dropped else ""
        sizes = self.sizes
        each = ", ".join(f"{name} {size:,}" for name, size in list(sizes.items())[:SHOWN])
        shown = f" of {each}{', ...' if len(sizes) > SHOWN else ''}" if len(sizes) > 1 else ""
        return f"{self.name}: {of} pairs{shown}{dropped}"
