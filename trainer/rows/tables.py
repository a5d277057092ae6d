"""One table a file: parquet, csv, tsv, txt and jsonl, each also gzipped, read in full or in parts of some rows.

Text stays text: a premise that says "1", "null" or "2024-01-01" is no number, no gap and no date. Rows count from 0,
header and empty lines excluded. Where every row is to be answered, an empty line is an error.
"""

import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.columnar import parquet_batches, parquet_names
from trainer.rows.faults import Faults
from trainer.rows.limits import LONGEST_ROW as LONGEST_ROW
from trainer.rows.lines import check_encoding, objects, unpacked
from trainer.rows.separated import SEPARATORS, csv_batches, csv_names

SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".gz")
# What no type of a table holds, as JSON: values of several kinds, numbers beyond 64 bits, halves of surrogate pairs.
# No file has such a column of its own.
MIXED = pa.struct([("crossrank's own: any value, as JSON", pa.large_string())])
JSONL = (".jsonl", ".json", ".ndjson")


def read_table(path: Path) -> pa.Table:
    """All rows. Raises UserError naming the file, and a row that is damaged."""
    parts = list(read_parts(path))
    if not parts:
        raise nothing_in(path)
    return joined(parts)


def nothing_in(path: Path) -> UserError:
    """What to say of a file without rows."""
    header = "; the first line of such a file is its header" if {*path.suffixes} & {*SEPARATORS} else ""
    return UserError(f"{path}: no rows{header}")


def names_of(path: Path) -> list[str]:
    """The columns of a file, whose rows are not read. Raises UserError as read_table does, also where there are none.

    Those of jsonl are the keys of its first object: what comes first in a later row is not among them.
    """
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            return parquet_names(path)
        if kind in SEPARATORS:
            return csv_names(path, SEPARATORS[kind])
        with unpacked(path) as file:
            first = next(objects(file, str(path), rows=1), None)
    if first is None:
        raise nothing_in(path)
    return [*first[0][1]]


def read_parts(
    path: Path, every_line: bool = False, faults: Faults | None = None, columns: Collection[str] | None = None
) -> Iterator[pa.Table]:
    """The rows in parts of ROWS at most, in constant memory. Raises UserError as read_table does.

    `every_line`: an empty line is an error, not skipped. With `faults`, a row that cannot be read is null in all
    columns, and noted there, in place of an error. `columns`: those to read, in the file's order; None = all. One that
    the file lacks is absent.
    """
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            yield from _in_parts(parquet_batches(path, columns))
        elif kind in SEPARATORS:
            yield from _in_parts(csv_batches(path, SEPARATORS[kind], every_line, faults, columns))
        else:
            with unpacked(path) as file:
                yield from jsonl(file, str(path), every_line, faults, columns)


def _in_parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of ROWS, or of about LONGEST_ROW bytes where these are fewer."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            held.append(batch.slice(start, limits.ROWS - rows))
            start, rows, size = start + held[-1].num_rows, rows + held[-1].num_rows, size + held[-1].nbytes
            if rows == limits.ROWS or size > limits.LONGEST_ROW:
                yield pa.Table.from_batches(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)


def kind_of(path: Path) -> str:
    """The ending of a file. Raises UserError where nothing can be read from such a file."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    kind = ending(path)
    if kind not in (".parquet", *SEPARATORS, *JSONL):
        raise UserError(f"{path}: unknown kind of file; use .parquet, .csv, .tsv, .txt or .jsonl, each also with .gz")
    if kind != ".parquet":
        with readable(path, kind), unpacked(path) as file:
            check_encoding(file.read(2), str(path))
    return kind


def ending(path: Path) -> str:
    """The file's ending, without .gz."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turns what a reader says of a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        # pyarrow counts the lines of a csv file from 1, the header among them.
        reason = re.sub(r"Row #(\d+)", lambda row: f"row {int(row[1]) - 2}", reason)
        raise UserError(f"{path}: cannot be read as {kind[1:]}: {reason}; repair the file, or get a new copy") from None


def jsonl(
    file: BinaryIO,
    place: str,
    every_line: bool = False,
    faults: Faults | None = None,
    columns: Collection[str] | None = None,
) -> Iterator[pa.Table]:
    """One object a line. Raises UserError naming the row, unless `faults` are collected; see lines.objects."""
    for part in objects(file, place, every_line, faults, columns):
        rows = [own for _, own in part]
        names = dict.fromkeys(name for row in rows for name in row)
        where = f"{place}, rows {part[0][0]} to {part[-1][0]}"
        if len(names) > limits.MOST_COLUMNS:
            raise UserError(f"{where}: {limits.too_many_columns(len(names))}")
        if not names and (faults is not None or columns is not None):  # a table has no rows without columns
            names = dict.fromkeys(("premise", "hypothesis"))
        try:
            yield pa.table({name: column_of([row.get(name) for row in rows]) for name in names})
        except UnicodeEncodeError:
            raise UserError(f"{where}: a key that is no text") from None


def column_of(values: list[Any]) -> pa.Array:
    """Text, or numbers of one kind; MIXED for all else, and for what a table cannot hold: values stay as they came."""
    kinds = {type(value) for value in values if value is not None}
    try:
        if not kinds:
            return pa.nulls(len(values), pa.string())
        if len(kinds) == 1 and kinds <= {str, int, float, bool}:
            return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    name = MIXED[0].name
    return pa.array([None if value is None else {name: json.dumps(value)} for value in values], MIXED)


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """What column_of was given."""
    values = column.to_pylist()
    return [v and json.loads(v[MIXED[0].name]) for v in values] if column.type == MIXED else values


def joined(parts: list[pa.Table]) -> pa.Table:
    """One table of all columns; one that a part lacks is null there."""
    if all(part.schema == parts[0].schema for part in parts):
        return pa.concat_tables(parts)
    names = list(dict.fromkeys(name for part in parts for name in part.column_names))
    return pa.table({name: _joined_column(name, parts) for name in names})


def _joined_column(name: str, parts: list[pa.Table]) -> pa.ChunkedArray:
    found = [p[name] if name in p.column_names else pa.chunked_array([pa.nulls(p.num_rows)]) for p in parts]
    kinds = {column.type for column in found if not pa.types.is_null(column.type)}
    if len(kinds) < 2:
        kind = kinds.pop() if kinds else pa.null()
        return pa.chunked_array([c for column in found for c in column.cast(kind).chunks], kind)
    joined = column_of([value for column in found for value in values_of(column)])
    return joined if isinstance(joined, pa.ChunkedArray) else pa.chunked_array([joined])
