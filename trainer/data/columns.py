"""Which columns of a table hold the texts and the label, and the texts, checked row by row."""

import json
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError
from trainer.data.places import at
from trainer.data.tables import LONGEST_ROW, MIXED, too_long, values_of

# What corpora of NLI call them: SNLI and MultiNLI, SICK, ANLI, WANLI. The first one that a table has is meant.
PREMISE = ("premise", "sentence1", "sentence_A", "context")
HYPOTHESIS = ("hypothesis", "sentence2", "sentence_B")
LABEL = ("label", "gold_label", "entailment_judgment", "entailment_label", "gold")


def text_columns(
    table: pa.Table, place: str, premise_column: str | None, hypothesis_column: str | None
) -> tuple[str, str]:
    premise = column_named(table.column_names, place, "premise_column", premise_column, PREMISE)
    hypothesis = column_named(table.column_names, place, "hypothesis_column", hypothesis_column, HYPOTHESIS)
    if premise == hypothesis:
        raise UserError(f"{place}: premise and hypothesis are both column {premise!r}; name two columns")
    return premise, hypothesis


def column_named(names: list[str], place: str, field: str, name: str | None, usual: tuple[str, ...]) -> str:
    """The one of `names` that the user gives as `name`, or else the first of the `usual` ones. Raises UserError."""
    wanted = (name,) if name else usual
    for candidate in wanted:
        if names.count(candidate) > 1:
            raise UserError(f"{place}: two columns are called {candidate!r}; rename one")
        if candidate in names:
            return candidate
    raise UserError(
        f"{place}: no column {' or '.join(map(repr, wanted))}; it has {', '.join(names)}. "
        f"Name the right one with --{field}"
    )


def only(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """`rows`, which ascend. Chunk by chunk: `take` would make one chunk of them, which more than 2 GB do not fit."""
    mask = np.zeros(len(column), dtype=bool)
    mask[rows] = True
    return column.filter(pa.array(mask))


def texts_of(column: pa.ChunkedArray, place: str, field: str, rows: np.ndarray, start: int = 0) -> list[str]:
    if column.type == MIXED:
        _raise_no_text(values_of(column), place, field, start)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count == len(column):
        column = pa.chunked_array([pa.nulls(len(column), pa.large_string())])
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        first = int(np.flatnonzero(column.is_valid().to_numpy())[0])
        raise UserError(f"{at(place, start + first)}: {field} must be text, found {column.type}")
    column = only(column.cast(pa.large_string()), rows)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()
    if blank.any():
        first = int(np.flatnonzero(blank)[0])
        what = "null" if column[first].as_py() is None else "empty"
        raise UserError(
            f"{at(place, start + rows[first])}: {field} is {what} (of {int(blank.sum())} such rows the first)"
        )
    lengths = pc.binary_length(column).to_numpy()
    if (lengths > LONGEST_ROW).any():
        raise too_long(f"{at(place, start + rows[int(lengths.argmax())])}, {field}")
    return column.to_pylist()


def _raise_no_text(values: list[Any], place: str, field: str, start: int) -> NoReturn:
    """Names the first of `values` that a column of text cannot hold."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{at(place, start + row)}: {field} must be text, found {json.dumps(value)[:80]}")
        if value and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{at(place, start + row)}: {field} holds half of a surrogate pair, which is no character; remove it"
            )
    raise AssertionError("text in a column of no text")
