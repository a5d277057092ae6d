"""Sentence pairs as plain arrays: those of a split, and those that are to be predicted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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


@dataclass(frozen=True)
class Pairs(Texts):
    """The pairs of one split. All sequences have the same length n.

    Attributes:
        split: what reports, file names and metrics call them, such as AllNLI-dev.
        label: (n,) class numbers, or where `values` is given the places of the pairs' targets in it.
        values: targets of one score, float32, ascending; None = there are classes.
        label_names: of the classes, or of the labels 0 and 1; empty = the targets are numbers.
        of_class: (classes of the model,) the class of `label_names` that each is taken as; None = the classes are the
            model's.
        mapped: in words, which classes are taken as which; empty = none.
        said: the classes as the sources name them, before any map.
        files: the names of their files, without folders; empty = they are of no file.
    """

    label: np.ndarray
    source: list[str] | None
    label_names: tuple[str, ...]
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
        return self.label if self.values is None or self.label_names else self.values[self.label]

    def target(self, number: int) -> str:
        """What the pair is labelled with."""
        return repr(self.label_names[self.label[number]]) if self.label_names else f"{self.targets[number]:g}"

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many pairs each source has, in the order of their first ones; empty = there are no sources."""
        return dict(Counter(self.source or ()))

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
