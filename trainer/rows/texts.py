"""A column's texts, checked row by row."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.faults import Faults
from trainer.rows.places import at
from trainer.rows.tables import MIXED, values_of


def texts_of(column: pa.ChunkedArray, place: str, field: str, rows: np.ndarray, start: int = 0) -> list[str]:
    """Those of `rows`, which ascend. Raises UserError naming the first row that has none.

    `start` is the first row's number in its file.
    """
    texts, wrong = checked(only(column, rows), field)
    if wrong:
        first = min(wrong)
        others = f" (of {len(wrong)} such rows the first)" if len(wrong) > 1 else ""
        raise UserError(f"{at(place, start + rows[first])}: {wrong[first]}{others}")
    return texts.to_pylist()


def checked(column: pa.ChunkedArray, field: str) -> tuple[pa.ChunkedArray, Faults]:
    """The column as text, and what is wrong with its values, by their place in it."""
    column, wrong = _as_text(column, field)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()
    for place in np.flatnonzero(blank).tolist():
        wrong.setdefault(place, f"{field} is {'empty' if column[place].is_valid else 'null'}")
    lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    for place in np.flatnonzero(lengths > limits.LONGEST_ROW).tolist():
        wrong[place] = f"{field} is {limits.too_long()}"
    return column, wrong


def _as_text(column: pa.ChunkedArray, field: str) -> tuple[pa.ChunkedArray, Faults]:
    """The same without a look into the texts; null where there is none."""
    if column.type == MIXED:
        values = values_of(column)
        wrong = {place: f"{field} {what}" for place, value in enumerate(values) if (what := _no_text(value))}
        texts = [None if place in wrong else value for place, value in enumerate(values)]
        return pa.chunked_array([pa.array(texts, pa.large_string())]), wrong
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.large_string()), {}
    found = np.flatnonzero(column.is_valid().to_numpy()).tolist()
    nothing = pa.chunked_array([pa.nulls(len(column), pa.large_string())])
    return nothing, dict.fromkeys(found, f"{field} must be text, found {column.type}")


def _no_text(value: Any) -> str | None:
    """Why a column of text cannot hold this."""
    if value is not None and not isinstance(value, str):
        return f"must be text, found {json.dumps(value)[:80]}"
    if value and any("\ud800" <= c <= "\udfff" for c in value):
        return "holds half of a surrogate pair, which is no character; remove it"
    return None


def only(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """`rows`, which ascend. Chunk by chunk: `take` would make one chunk of them, which more than 2 GB do not fit."""
    mask = np.zeros(len(column), dtype=bool)
    mask[rows] = True
    return column.filter(pa.array(mask))
