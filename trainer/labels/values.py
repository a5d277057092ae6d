"""A column of labels, as its distinct values. What they mean is decided in classes.py.

A label means the same in every kind of file: 1, 1.0 and "1" are one class, -1 and "-" are no consensus. So a column
becomes text first, and all is decided on its distinct values.
"""

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.arrays import smallest, taken
from trainer.base.errors import UserError
from trainer.rows.places import at
from trainer.rows.tables import MIXED, values_of

LARGEST = float(np.finfo(np.float32).max)
NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = ("-", "-1")
MISSING = ("", "nan", "<na>", "null", "none", "na", "n/a", "#n/a", "?")


@dataclass(frozen=True)
class Labels:
    """A column as its distinct values. `values` (None = null) are in the order of their first rows.

    Where there are very many, and all are finite numbers, `scores` (n,), float32, has each row's, and `values` none.
    """

    place: str
    values: list[str | None]
    codes: np.ndarray  # (n,) positions in `values`, in some type of integers
    scores: np.ndarray | None = None

    def at(self, value: str | None) -> str:
        """The first row that has it."""
        return at(self.place, int(np.argmax(self.codes == self.values.index(value))))

    def count(self, value: str | None) -> int:
        return int((self.codes == self.values.index(value)).sum())

    def renamed(self, names: Sequence[str | None]) -> "Labels":
        """The same rows, with a name in place of each value; values of the same name become one."""
        position = {name: i for i, name in enumerate(dict.fromkeys(names))}
        codes = np.array([position[name] for name in names], smallest(len(position)))
        return replace(self, values=[*position], codes=taken(codes, self.codes))

    @property
    def numbered(self) -> bool:
        """Whether a class is called by a number."""
        return any(value not in (None, *NO_CONSENSUS) and number_in(value) is not None for value in self.values)

    @property
    def missing(self) -> bool:
        """Whether no row says anything of its class."""
        return all(v is None or v in NO_CONSENSUS or v.lower() in MISSING for v in self.values)


@dataclass(frozen=True)
class Targets:
    """What n rows are labelled with.

    Of one score the targets are a small table of numbers, and each pair has its place there. So a batch carries an
    integer a pair whatever is learned, and -100 for a pair that only fills up.

    Attributes:
        label: (n,) class numbers, or places in `values`; -1 where there is no consensus.
        names: of the classes, or of the labels 0 and 1; of numbers none.
        values: float32, ascending; None = there are classes.
        said: the classes as the data names them, before any map.
        of_class, mapped: as in pairs.Pairs.
    """

    label: np.ndarray
    names: tuple[str, ...]
    values: np.ndarray | None = None
    said: tuple[str, ...] = ()
    of_class: np.ndarray | None = None
    mapped: str = ""

    @classmethod
    def joined(cls, parts: Sequence["Targets"], rows: Sequence[np.ndarray]) -> "Targets":
        """Those of some rows of each part, one part after the other. Of numbers only those that occur are kept."""
        first = parts[0]
        if first.values is None or first.names:
            found = [taken(own.label, i) for own, i in zip(parts, rows, strict=True)]
            values, label = first.values, np.concatenate(found)
        else:
            numbers = [
                taken(own.values, taken(own.label, i))
                for own, i in zip(parts, rows, strict=True)
                if own.values is not None
            ]
            values, label = np.unique(np.concatenate(numbers), return_inverse=True)
        said = tuple(dict.fromkeys(name for own in parts for name in own.said))
        words = "; ".join(dict.fromkeys(own.mapped for own in parts if own.mapped))
        return cls(label, first.names, values, said, first.of_class, words)


def read_labels(column: pa.ChunkedArray, place: str, start: int = 0) -> Labels:
    """Raises UserError where a row's label is neither text nor number. `start` is the first row's number."""
    if column.type == MIXED:
        column = _scalars(column, place, start)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):  # as a csv file says it
        column = pc.if_else(column, "True", "False")
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    except pa.ArrowException:
        rows = np.flatnonzero(column.is_valid().to_numpy())
        first = start + (rows[0] if len(rows) else 0)
        raise UserError(f"{at(place, first)}: label must be a class name or number, found {column.type}") from None
    distinct = texts.unique()
    codes = pc.index_in(texts, distinct).to_numpy()
    values = distinct.to_pylist()
    return Labels(place, values, codes).renamed([None if v is None else plain(v) for v in values])


def _scalars(column: pa.ChunkedArray, place: str, start: int) -> pa.ChunkedArray:
    values = values_of(column)
    for row, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise UserError(
                f"{at(place, start + row)}: label must be a class name or number, found {json.dumps(value)}"
            )
    return pa.chunked_array([pa.array([_text(v) for v in values], pa.large_string())])


def _text(value: str | float | None) -> str | None:
    """Half of a surrogate pair is no text: it becomes a name that says so."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def number_in(text: str) -> float | int | None:
    """What a number says; None for a name, and for python's own spellings such as 1_000 and nan."""
    try:
        number = float(text)
    except ValueError:
        return None
    if math.isnan(number) or "_" in text:
        return None
    if not number.is_integer():
        return number
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def finite(text: str | None) -> float:
    """The number that a label says, where float32 holds it; else nan."""
    try:
        number = float("nan" if text is None or "_" in text else text)
    except ValueError:
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def plain(text: str) -> str:
    """1.0, 01 and +1 are 1; an accent is a part of its letter, however the file writes it."""
    number = number_in(text)
    return str(number) if isinstance(number, int) else unicodedata.normalize("NFC", text)
