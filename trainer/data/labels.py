"""From a column of class names or numbers to class numbers, with the classes' names.

A label means the same in every kind of file: 1, 1.0 and "1" are one class, -1 and "-" are no consensus. So a column
becomes text first, and all is decided on its distinct values.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError, unknown
from trainer.data.tables import MIXED

NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = ("-", "-1")
MANY = 100  # classes: of so many, some may well be in one row only
MISSING = {"": "empty", "nan": "missing (nan)", "<na>": "missing (<NA>)", "null": "null"}


@dataclass(frozen=True)
class Labels:
    """A column as its distinct values. `values` (None = null) are in the order of their first rows."""

    place: str
    values: list[str | None]
    codes: np.ndarray  # (n,) positions in `values`

    def at(self, value: str | None) -> str:
        """The first row that has it."""
        return f"{self.place}, row {int(np.argmax(self.codes == self.values.index(value)))}"

    def count(self, value: str | None) -> int:
        return int((self.codes == self.values.index(value)).sum())

    @property
    def missing(self) -> bool:
        """Whether no row says anything of its class."""
        return all(v is None or v in NO_CONSENSUS or v.lower() in MISSING for v in self.values)


def read_labels(column: pa.ChunkedArray, place: str) -> Labels:
    """Raises UserError where a row's label is neither text nor number."""
    if column.type == MIXED:
        column = _scalars(column, place)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):  # as a csv file says it
        column = pc.if_else(column, "True", "False")
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    except pa.ArrowException:
        rows = np.flatnonzero(column.is_valid().to_numpy())
        raise UserError(
            f"{place}, row {rows[0] if len(rows) else 0}: label must be a class name or number, found {column.type}"
        ) from None
    distinct = texts.unique()
    codes = pc.index_in(texts, distinct).to_numpy()
    values = [None if v is None else _plain(v) for v in distinct.to_pylist()]
    position = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return Labels(place, list(position), np.array([position[value] for value in values], np.int64)[codes])


def _scalars(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    values = [None if v is None else json.loads(v["json"]) for v in column.to_pylist()]
    for row, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise UserError(f"{place}, row {row}: label must be a class name or number, found {json.dumps(value)}")
    return pa.chunked_array([pa.array([_text(v) for v in values], pa.large_string())])


def _text(value: str | float | None) -> str | None:
    """Half of a surrogate pair is no text: it becomes a name that says so."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _number(text: str) -> float | int | None:
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


def _plain(text: str) -> str:
    """1.0, 01 and +1 are 1."""
    number = _number(text)
    return str(number) if isinstance(number, int) else text


def class_numbers(
    labels: Labels, label_names: Sequence[str] | None, own_names: list[str] | None, of_model: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, -1 where there is no consensus; and the classes' names.

    Args:
        label_names: the classes to use; None = what the column holds.
        own_names: what the column's own numbers mean.
        of_model: `label_names` are a model's, so that numbers may be those of other classes.
    """
    seen = [value for value in labels.values if value not in NO_CONSENSUS]
    known = label_names or ()
    for value in seen:
        if value not in known and (value is None or value.lower() in MISSING):
            what = "null" if value is None else MISSING[value.lower()]
            raise UserError(f"{labels.at(value)}: label is {what}; write -1 where a pair has none, and it is left out")
    texts = [value for value in seen if value is not None]
    numbers = {text: number for text in texts if (number := _number(text)) is not None}
    if texts and set(texts) <= set(known) and own_names is None:
        meaning, names = {text: known.index(text) for text in texts}, tuple(known)
    elif numbers and len(numbers) < len(texts):
        name = next(text for text in texts if text not in numbers)
        first = next(iter(numbers))
        raise UserError(
            f"{labels.at(first)}: label {first} is a number, and {name!r} in {labels.at(name).split(', ')[-1]} is a "
            "name; write all labels as names, or all as numbers"
        )
    elif numbers or not texts:
        meaning, names = _from_numbers(labels, numbers, label_names, own_names, of_model)
    else:
        names = tuple(known) or _names(labels, texts)
        for text in texts:
            if text not in names:
                raise UserError(f"{labels.at(text)}: {unknown('label', text, names)}")
        meaning = {text: names.index(text) for text in texts}
    table = np.array([-1 if value is None else meaning.get(value, -1) for value in labels.values], np.int64)
    return table[labels.codes], names


def _names(labels: Labels, texts: list[str]) -> tuple[str, ...]:
    """The classes that names without a list of classes make. Raises UserError where one seems to be a slip."""
    if {text.lower() for text in texts} <= {"true", "false"}:
        raise UserError(
            f"{labels.at(texts[0])}: label is {texts[0]}, which says nothing of the classes; write names, or give "
            "--label_names False,True"
        )
    _check_strays(labels, texts)
    return NLI if set(texts) <= set(NLI) else tuple(_nli_order(sorted(texts)))


def _check_strays(labels: Labels, texts: list[str]) -> None:
    """Raises UserError for a name that is hardly a class: another one misspelt, or in next to no row."""
    if not 2 <= len(texts) <= MANY:
        return
    counts = {text: labels.count(text) for text in texts}
    usual = median(counts.values())
    for text in sorted(texts, key=counts.__getitem__):
        others = [other for other in texts if other != text and counts[other] >= counts[text]]
        same = [other for other in others if _bare(other) == _bare(text)]
        likely = (*NLI, *(other for other in others if counts[other] >= 10 * counts[text]))
        near = difflib.get_close_matches(text.lower(), likely, 1, 0.9) if text.lower() not in NLI else []
        # What differs in nothing but a number, as class_11 and class_12, is no slip.
        meant = same or [other for other in near if re.sub("[0-9]", "", other) != re.sub("[0-9]", "", text)]
        if meant or (len(texts) > 2 and counts[text] <= usual / 100):
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            raise UserError(
                f"{labels.at(text)}: label {text!r} is in {counts[text]:,} of {len(labels.codes):,} rows{hint}; mend "
                "it, or name all classes with --label_names"
            )


def _bare(text: str) -> str:
    """A name as anyone may write it."""
    return re.sub("[ _-]", " ", text.lower())


def _nli_order(names: list[str]) -> list[str]:
    """`names` as entailment, neutral, contradiction if they are that in any case and order; else as they are."""
    return sorted(names, key=lambda n: NLI.index(n.lower())) if {n.lower() for n in names} == set(NLI) else names


def _from_numbers(
    labels: Labels,
    numbers: dict[str, int | float],
    label_names: Sequence[str] | None,
    own_names: list[str] | None,
    of_model: bool,
) -> tuple[dict[str, int], tuple[str, ...]]:
    for text, number in numbers.items():
        if not isinstance(number, int):
            raise UserError(
                f"{labels.at(text)}: labels such as {text} are scores, not classes; crossrank trains classifiers: "
                "make classes of them, numbered from 0"
            )
    found = sorted(int(number) for number in numbers.values() if number >= 0)
    named = own_names or label_names
    if not named and found and len(found) <= found[-1]:
        shown = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
        raise UserError(
            f"{labels.at(str(found[-1]))}: class numbers must run from 0 without gaps, found {shown}; "
            f"name all classes with --label_names"
        )
    if of_model and label_names and not own_names and 0 < len(found) == found[-1] + 1 < len(label_names):
        raise UserError(
            f"{labels.place}: its labels are the numbers {', '.join(map(str, found[:5]))}, the model has "
            f"{len(label_names)} classes ({_shown(label_names)}); say what the numbers mean with --label_names"
        )
    if not own_names and label_names:
        own_names = _nli_order(list(label_names))
    names = tuple(own_names or (NLI if len(found) == 3 else [f"LABEL_{i}" for i in range(len(found))]))
    for text, number in numbers.items():
        if not 0 <= number < len(names):
            raise UserError(
                f"{labels.at(text)}: label {text} is outside the classes 0..{len(names) - 1} ({_shown(names)}); "
                "-1 is a pair without label"
            )
    if not named:
        _check_strays(labels, list(numbers))
    meaning = {text: int(number) for text, number in numbers.items()}
    if not own_names or not label_names or list(label_names) == own_names:
        return meaning, names
    if missing := [name for name in own_names if name not in label_names]:
        raise UserError(
            f"{labels.place}: its classes {own_names} include {missing}, which are not among {list(label_names)}"
        )
    return {text: label_names.index(own_names[number]) for text, number in meaning.items()}, tuple(label_names)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
