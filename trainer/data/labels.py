"""From a column of class names or numbers to class numbers, with the classes' names."""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError, unknown

NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = "-"


def class_numbers(
    column: pa.ChunkedArray, place: str, label_names: Sequence[str] | None, own_names: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, -1 where there is no consensus; and the classes' names."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"{place}, row {row}: label is null")
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return _from_integers(column, place, label_names, own_names)
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except pa.ArrowException:
        raise UserError(f"{place}: label must be a class name or number, found {column.type}") from None
    seen = set(texts.unique().to_pylist()) - {NO_CONSENSUS}
    if "" in seen:
        raise UserError(f"{place}, row {texts.index('').as_py()}: label is empty")
    if seen and all(_is_fraction(text) for text in seen):
        raise UserError(f"{place}: labels such as {min(seen)} are scores, not classes; crossrank trains classifiers")
    if seen and all(re.fullmatch("-?[0-9]{1,18}", text) for text in seen):  # integers in a csv file
        integers = pc.replace_substring_regex(texts, "^-$", "-1").cast(pa.int64())
        return _from_integers(integers, place, label_names, own_names)
    names = tuple(label_names or (NLI if seen <= set(NLI) else _nli_order(sorted(seen))))
    encoded = pc.index_in(texts, pa.array(names, pa.string()))
    wrong = (encoded.is_null().to_numpy()) & (pc.not_equal(texts, NO_CONSENSUS).to_numpy())
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(f"{place}, row {row}: {unknown('label', texts[row].as_py(), names)}")
    return pc.fill_null(encoded, -1).to_numpy().astype(np.int64), names


def _nli_order(names: list[str]) -> list[str]:
    """`names` as entailment, neutral, contradiction if they are that in any case and order; else as they are."""
    return sorted(names, key=lambda n: NLI.index(n.lower())) if {n.lower() for n in names} == set(NLI) else names


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:
        return False


def _from_integers(
    column: pa.ChunkedArray, place: str, label_names: Sequence[str] | None, own_names: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if not own_names and label_names:
        own_names = _nli_order(list(label_names))
    values = column.to_numpy()
    numbers = values.astype(np.int64)
    found = np.unique(numbers[numbers >= 0])
    if not (own_names or label_names) and len(found) and len(found) <= found[-1]:
        shown = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
        raise UserError(
            f"{place}, row {int(numbers.argmax())}: class numbers must run from 0 without gaps, found {shown}; "
            f"name all classes with --label_names"
        )
    names = tuple(own_names or label_names or (NLI if len(found) == 3 else [f"LABEL_{i}" for i in range(len(found))]))
    wrong = (numbers != values) | (numbers < -1) | (numbers >= len(names))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{place}, row {row}: label {values[row]} is outside the classes 0..{len(names) - 1} ({', '.join(names)})"
        )
    if own_names and label_names and list(label_names) != own_names:
        numbers = _renumber(numbers, own_names, list(label_names), place)
        names = tuple(label_names)
    return numbers, names


def _renumber(numbers: np.ndarray, own_names: list[str], label_names: list[str], place: str) -> np.ndarray:
    """The data set's own class numbers in the order of `label_names`."""
    missing = [name for name in own_names if name not in label_names]
    if missing:
        raise UserError(f"{place}: its classes {own_names} include {missing}, which are not among {label_names}")
    order = np.array([label_names.index(name) for name in own_names] + [-1])
    return order[numbers]
