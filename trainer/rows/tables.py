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
from trainer.rows.faults import Faults, fault, with_faults
from trainer.rows.quotes import check_quotes, plain_tabs

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


def read_parts(path: Path, every_line: bool = False, faults: Faults | None = None) -> Iterator[pa.Table]:
    """The rows in parts of ROWS at most, in constant memory. Raises UserError as read_table does.

    `every_line`: an empty line is an error, not skipped. With `faults`, a row that cannot be read is null in all
    columns, and noted there, in place of an error.
    """
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in CSV:
            yield from _csv(path, kind != ".csv", every_line, faults)
        else:
            with _binary(path) as file:
                yield from jsonl(file, str(path), every_line, faults)


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


def _csv(path: Path, tabs: bool, every_line: bool, faults: Faults | None) -> Iterator[pa.Table]:
    """All columns text."""
    done = 0
    try:
        quoted = check_quotes(lambda: _binary(path), str(path), "\t" if tabs else ",", LONGEST_ROW)
        with _open_csv(path, tabs, quoted, every_line, faults) as reader:
            for batch in reader:
                whole = with_faults(batch if quoted else plain_tabs(batch), done, faults or {})
                yield from _cut(whole)
                done += whole.num_rows
            nothing = pa.RecordBatch.from_pylist([], reader.schema)
            yield from _cut(with_faults(nothing, done, faults or {}, at_end=True))
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            quote = "" if tabs else ", or a quote in it is never closed"
            raise UserError(f"{path}, row {done}: {too_long(quote)}") from None
        raise


def _open_csv(path: Path, tabs: bool, quoted: bool, every_line: bool, faults: Faults | None) -> Any:
    from pyarrow import csv

    def note(row: Any) -> str:
        what = f"expected {row.expected_columns} fields, found {row.actual_columns}"
        fault(faults, str(path), row.number - 2, what, row.text)  # it counts from 1, the header among them
        return "skip"

    parsing = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char='"' if quoted else False,
        newlines_in_values=quoted,
        ignore_empty_lines=not every_line,
        invalid_row_handler=None if faults is None else note,
    )
    # Several threads do not know the row's number.
    one_thread = csv.ReadOptions(use_threads=False, block_size=LONGEST_ROW)
    with csv.open_csv(path, one_thread, parsing) as reader:
        header = reader.schema.names
    as_text = csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    return csv.open_csv(path, one_thread, parsing, as_text)


def too_long(other: str = "") -> str:
    return f"longer than {LONGEST_ROW:,} bytes{other}; shorten it"


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


EMPTY = "an empty line; each line is a pair, so remove it or fill it in"


def lines(
    file: BinaryIO, place: str, every_line: bool = False, faults: Faults | None = None
) -> Iterator[list[tuple[int, str]]]:
    """Lists of (row, line), of ROWS and about LONGEST_ROW bytes at most, without empty lines; these are no rows.

    `every_line`: an empty line is an error. With `faults`, a line that cannot be used is noted there, and empty.
    """
    part: list[tuple[int, str]] = []
    row = size = 0
    while raw := file.readline(LONGEST_ROW + 1):
        line, what = _decoded(raw, row == 0)
        if what == EMPTY and not every_line:
            continue
        if what:
            fault(faults, place, row, what)
        part.append((row, line))
        row, size = row + 1, size + len(raw)
        while len(raw) > LONGEST_ROW and not raw.endswith(b"\n"):  # the rest of one that is too long
            raw = file.readline(LONGEST_ROW + 1)
        if len(part) == ROWS or size > LONGEST_ROW:
            yield part
            part, size = [], 0
    if part:
        yield part


def _decoded(raw: bytes, first: bool) -> tuple[str, str]:
    """A line's text, and what is wrong with it."""
    if len(raw) > LONGEST_ROW:
        return "", too_long()
    try:
        line = raw.decode("utf-8").removeprefix("\ufeff" if first else "").rstrip("\r\n")
    except UnicodeDecodeError:
        return "", "not UTF-8 text"
    return line, "" if line.strip(" \r\n") else EMPTY  # a tab stands between two texts, empty ones as well


def jsonl(file: BinaryIO, place: str, every_line: bool = False, faults: Faults | None = None) -> Iterator[pa.Table]:
    """One object a line. Raises UserError naming the row, unless `faults` are collected; see lines."""
    for part in lines(file, place, every_line, faults):
        rows = [_object(line, place, row, faults) for row, line in part]
        names = dict.fromkeys(name for row in rows for name in row)
        if faults is not None and not names:  # a table has no rows without columns
            names = dict.fromkeys(("premise", "hypothesis"))
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


def _object(line: str, place: str, row: int, faults: Faults | None) -> dict[str, Any]:
    """Without anything where there is a fault."""
    if faults and row in faults:
        return {}
    try:
        value = DECODER.decode(line)
        if type(value) is dict:
            return value
        error: Exception | str = f"a {type(value).__name__}"
        if isinstance(value, _Doubled):
            error = f"the key {value.key!r} twice"
    except (ValueError, RecursionError) as found:
        error = found
    fault(faults, place, row, f"not a JSON object ({error}); write one object a line", line)
    return {}


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
