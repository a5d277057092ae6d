"""Comma- and tab-separated files: a block at a time, all columns text."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.faults import Faults, fault, with_faults
from trainer.rows.lines import unpacked
from trainer.rows.quotes import check_quotes, encloses, plain_tabs

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def csv_names(path: Path, separator: str) -> list[str]:
    """The columns, as the header calls them."""
    with _opened(path, separator, encloses(path, separator), False, None, None) as reader:
        return reader.schema.names


def csv_batches(
    path: Path, separator: str, every_line: bool, faults: Faults | None, columns: Collection[str] | None
) -> Iterator[pa.RecordBatch]:
    """The rows, with one of nulls for each that `faults` notes."""
    done = 0
    quoted = encloses(path, separator)
    if quoted:
        check_quotes(path, separator)
    try:
        with _opened(path, separator, quoted, every_line, faults, columns) as reader:
            for batch in reader:
                whole = with_faults(batch if quoted else plain_tabs(batch), done, faults or {})
                yield whole
                done += whole.num_rows
            nothing = pa.RecordBatch.from_pylist([], reader.schema)
            yield with_faults(nothing, done, faults or {}, at_end=True)
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            quote = ", or a quote in it is never closed" if quoted else ""
            raise UserError(f"{path}, row {done}: {limits.too_long(quote)}") from None
        raise


def _opened(
    path: Path, separator: str, quoted: bool, every_line: bool, faults: Faults | None, columns: Collection[str] | None
) -> Any:
    """pyarrow's reader."""
    from pyarrow import csv

    def note(row: Any) -> str:
        what = f"expected {row.expected_columns} fields, found {row.actual_columns}"
        fault(faults, str(path), row.number - 2, what, row.text)  # it counts from 1, the header among them
        return "skip"

    _check_header(path, separator, quoted)
    parsing = csv.ParseOptions(
        delimiter=separator,
        quote_char='"' if quoted else False,
        newlines_in_values=quoted,
        ignore_empty_lines=not every_line,
        invalid_row_handler=None if faults is None else note,
    )
    # Several threads do not know the row's number.
    one_thread = csv.ReadOptions(use_threads=False, block_size=limits.LONGEST_ROW)
    with csv.open_csv(path, one_thread, parsing) as reader:
        header = reader.schema.names
    unique = len(set(header)) == len(header)  # else whoever asked for one of two is told so
    wanted = [name for name in header if name in columns] if columns is not None and unique else []
    as_text = csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False, include_columns=wanted
    )
    return csv.open_csv(path, one_thread, parsing, as_text)


def _check_header(path: Path, separator: str, quoted: bool) -> None:
    """Raises UserError where it is too long for one: pyarrow takes kilobytes for each column."""
    with unpacked(path) as file:
        beginning = file.read(limits.LONGEST_HEADER + 1)
    data = np.frombuffer(beginning.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n"), np.uint8)
    outside = np.cumsum(data == ord('"')) % 2 == 0 if quoted else np.ones(len(data), dtype=bool)
    ends = np.flatnonzero(((data == ord("\n")) | (data == ord("\r"))) & outside)
    header = slice(ends[0] if len(ends) else None)
    count = 1 + int(((data == ord(separator)) & outside)[header].sum())
    if count > limits.MOST_COLUMNS:
        raise UserError(f"{path}: its first line, the header, has {limits.too_many_columns(count)}")
    if not len(ends) and len(beginning) > limits.LONGEST_HEADER:
        raise UserError(f"{path}: its first line, the header, is longer than {limits.LONGEST_HEADER:,} bytes")
