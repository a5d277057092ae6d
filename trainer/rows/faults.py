"""Rows of an input that cannot be used: an error, or, for who wants an answer for every row, a note that says why."""

from collections.abc import Iterable

import pyarrow as pa

from trainer.base.errors import UserError

Faults = dict[int, str]  # by row, what is wrong with it
SHOWN = 200  # characters of a row that could not be read


def fault(faults: Faults | None, place: str, row: int, what: str, raw: str = "") -> None:
    """Notes what is wrong with a row, and of one that could not be read how it begins.

    Raises UserError naming it where no faults are collected.
    """
    if faults is None:
        raise UserError(f"{place}, row {row}: {what}")
    faults[row] = f"{what}: {raw[:SHOWN]}" if raw else what


def with_faults(batch: pa.RecordBatch, start: int, faults: Faults, at_end: bool = False) -> pa.RecordBatch:
    """Rows from `start` on, with one of nulls for each that is noted in `faults` between them, or `at_end` behind."""
    places: list[int | None] = []
    taken = 0
    for row in sorted(row for row in faults if row >= start):
        before = row - start - len(places)
        if taken + before >= batch.num_rows and not at_end:
            break
        places += [*range(taken, taken + before), None]
        taken += before
    if not places:
        return batch
    return batch.take(pa.array([*places, *range(taken, batch.num_rows)], pa.int64()))


def with_columns(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """The table, with nulls for columns that it lacks."""
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    return table
