"""Pairs that a Python program has: in tuples, dicts, data frames or data sets."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from trainer.base.errors import UserError
from trainer.data.sources import text_columns
from trainer.data.tables import column_of

PLACE = "pairs"  # what messages call them


def is_pair(given: Any) -> bool:
    """Whether it is a premise and a hypothesis, and no list of pairs."""
    return isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(text, str) for text in given)


def table_of(given: Any, premise_column: str | None = None, hypothesis_column: str | None = None) -> pa.Table:
    """The columns premise and hypothesis of tuples, of dicts, or of what has columns. Raises UserError naming a row."""
    names = getattr(given, "column_names", getattr(given, "columns", None))  # of a data set, of a data frame
    if names is None:
        rows = _rows(given)
        if not rows or not isinstance(rows[0], Mapping):
            return _table(list(zip(*map(_pair, range(len(rows)), rows), strict=True)) or [(), ()])
        names = dict.fromkeys(name for row in rows for name in row)
        given = {name: [row.get(name) for row in rows] for name in names}
    names = list(map(str, names))
    nothing = pa.schema([(name, pa.null()) for name in names]).empty_table()
    texts = text_columns(nothing, PLACE, premise_column, hypothesis_column)
    if isinstance(given, pa.Table):
        return given.select(texts).rename_columns(["premise", "hypothesis"])
    return _table([list(given[name]) for name in texts])


def _rows(given: Any) -> list[Any]:
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise UserError(f"{PLACE} must be a list of (premise, hypothesis), got {repr(given)[:80]}")
    rows = list(given)
    for row, own in enumerate(rows):
        if isinstance(own, Mapping) != isinstance(rows[0], Mapping):
            raise UserError(f"{PLACE}, row {row}: expected what row 0 is, a {type(rows[0]).__name__}, found "
                            f"{repr(own)[:80]}")  # fmt: skip
    return rows


def _pair(row: int, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UserError(f"{PLACE}, row {row}: expected (premise, hypothesis), found {repr(pair)[:80]}")
    return pair[0], pair[1]


def _table(columns: list[Any]) -> pa.Table:
    made = {}
    for field, values in zip(("premise", "hypothesis"), columns, strict=True):
        # A data frame has NaN where there is nothing.
        texts = [None if isinstance(value, float) and value != value else value for value in values]
        for row, text in enumerate(texts):
            if not (text is None or isinstance(text, str)):
                raise UserError(f"{PLACE}, row {row}: {field} must be text, found {repr(text)[:80]}")
        made[field] = column_of(texts)
    return pa.table(made)
