"""One table a file: parquet, csv, tsv, txt and jsonl, each also gzipped, read in full or in parts of some rows.

Text stays text: a premise that says "1", "null" or "2024-01-01" is no number, no gap and no date. Rows count from 0,
header and empty lines excluded. Where every row is to be answered, an empty line is an error.
"""

import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from trainer.base.errors import UserError
from trainer.data.quotes import check_quotes, plain_tabs

LONGEST_ROW = 1 << 26  # bytes
ROWS = 1 << 14  # a part: enough to sort by length and to deal to ranks
SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".gz")
# What no type of a table holds, as JSON: values of several kinds, numbers beyond 64 bits, halves of surrogate pairs.
# No file has such a column of its own.
MIXED = pa.struct([("crossrank's own: any value, as JSON", pa.large_string())])
CSV, JSONL = (".csv", ".tsv", ".txt"), (".jsonl", ".json", ".ndjson")


def read_table(path: Path) -> pa.Table:
    """All rows. Raises UserError naming the file, and a row that is damaged."""
    parts = list(read_parts(path))
    if not parts:
        raise nothing_in(path)
    return joined(parts)


def nothing_in(path: Path) -> UserError:
    """What to say of a file without rows."""
    header = "; the first line of such a file is its header" if {*path.suffixes} & {*CSV} else ""
    return UserError(f"{path}: no rows{header}")


def read_parts(path: Path, every_line: bool = False) -> Iterator[pa.Table]:
    """The rows in parts of ROWS at most, in constant memory. Raises UserError as read_table does.

    `every_line`: an empty line is an error, not skipped.
    """
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in CSV:
            yield from _csv(path, kind != ".csv", every_line)
        else:
            with _binary(path) as file:
                yield from jsonl(file, str(path), every_line)


def kind_of(path: Path) -> str:
    """The ending of a file. Raises UserError where nothing can be read from such a file."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    kind = ending(path)
    if kind not in (".parquet", *CSV, *JSONL):
        raise UserError(f"{path}: unknown kind of file; use .parquet, .csv, .tsv, .txt or .jsonl, each also with .gz")
    if kind != ".parquet":
        with readable(path, kind), _binary(path) as file:
            check_encoding(file.read(2), str(path))
    return kind


def ending(path: Path) -> str:
    """The file's ending, without .gz."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")


def check_encoding(beginning: bytes, place: str) -> None:
    """By the first two bytes: a mark, or the empty half of a plain letter."""
    if beginning in (b"\xff\xfe", b"\xfe\xff") or b"\0" in beginning:
        raise UserError(f"{place}: text in UTF-16; save it as UTF-8")


def _binary(path: Path) -> BinaryIO:
    """The file, unpacked."""
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


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


def _csv(path: Path, tabs: bool, every_line: bool) -> Iterator[pa.Table]:
    """All columns text."""
    done = 0
    try:
        quoted = check_quotes(lambda: _binary(path), str(path), "\t" if tabs else ",", LONGEST_ROW)
        with _open_csv(path, tabs, quoted, every_line) as reader:
            for batch in reader:
                yield from _cut(batch if quoted else plain_tabs(batch))
                done += batch.num_rows
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            quote = "" if tabs else ", or a quote in it is never closed"
            raise too_long(f"{path}, row {done}", quote) from None
        raise


def _open_csv(path: Path, tabs: bool, quoted: bool, every_line: bool) -> Any:
    from pyarrow import csv

    parsing = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char='"' if quoted else False,
        newlines_in_values=quoted,
        ignore_empty_lines=not every_line,
    )
    # Several threads do not know the row's number.
    one_thread = csv.ReadOptions(use_threads=False, block_size=LONGEST_ROW)
    with csv.open_csv(path, one_thread, parsing) as reader:
        header = reader.schema.names
    as_text = csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    return csv.open_csv(path, one_thread, parsing, as_text)


def too_long(place: str, other: str = "") -> UserError:
    return UserError(f"{place}: longer than {LONGEST_ROW:,} bytes{other}; shorten it")


def _parquet(path: Path) -> Iterator[pa.Table]:
    from pyarrow import parquet

    if path.suffix != ".gz":
        for batch in parquet.ParquetFile(path).iter_batches(ROWS):
            yield from _cut(batch)
        return
    with tempfile.TemporaryFile() as plain, gzip.open(path) as packed:  # its index is at the end
        shutil.copyfileobj(packed, plain)
        for batch in parquet.ParquetFile(plain).iter_batches(ROWS):
            yield from _cut(batch)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.Table]:
    for start in range(0, batch.num_rows, ROWS):
        yield pa.Table.from_batches([batch.slice(start, ROWS)])


def lines(file: BinaryIO, place: str, every_line: bool = False) -> Iterator[list[tuple[int, str]]]:
    """Lists of (row, line), of ROWS and about LONGEST_ROW bytes at most, without empty lines; these are no rows.

    `every_line`: an empty line is an error.
    """
    part: list[tuple[int, str]] = []
    row = size = 0
    while raw := file.readline(LONGEST_ROW + 1):
        if len(raw) > LONGEST_ROW:
            raise too_long(f"{place}, row {row}")
        try:
            line = raw.decode("utf-8").removeprefix("\ufeff" if row == 0 else "")
        except UnicodeDecodeError:
            raise UserError(f"{place}, row {row}: not UTF-8 text") from None
        full = bool(line.strip(" \r\n"))  # a tab stands between two texts, empty ones as well
        if not full and every_line:
            raise UserError(f"{place}, row {row}: an empty line; each line is a pair, so remove it or fill it in")
        if full:
            part.append((row, line.rstrip("\r\n")))
            row, size = row + 1, size + len(raw)
        if len(part) == ROWS or size > LONGEST_ROW:
            yield part
            part, size = [], 0
    if part:
        yield part


def jsonl(file: BinaryIO, place: str, every_line: bool = False) -> Iterator[pa.Table]:
    """One object a line. Raises UserError naming the row."""
    for part in lines(file, place, every_line):
        rows = [_object(line, f"{place}, row {row}") for row, line in part]
        names = dict.fromkeys(name for row in rows for name in row)
        try:
            yield pa.table({name: column_of([row.get(name) for row in rows]) for name in names})
        except UnicodeEncodeError:
            raise UserError(f"{place}, rows {part[0][0]} to {part[-1][0]}: a key that is no text") from None


class _Doubled(dict[str, Any]):
    """An object with `key` twice; of an object inside a column that nothing reads, that does no harm."""

    key: str


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        made, names = _Doubled(made), [name for name, _ in pairs]
        made.key = next(name for name in names if names.count(name) > 1)
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = DECODER.decode(line)
        if type(value) is not dict:
            twice = isinstance(value, _Doubled)
            raise ValueError(f"the key {value.key!r} twice" if twice else f"a {type(value).__name__}")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a JSON object ({error}); write one object a line") from None


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
