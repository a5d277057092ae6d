"""What quotes mean in csv and tab-separated files. pyarrow reads any, and changes the text where it guesses wrong.

csv: a text in quotes ends at the next quote that is not doubled, as in RFC 4180. What follows is a comma or the end of
the line; where it is anything else, the file means something else, such as a backslash before the quote.

Tab-separated: those of NLI corpora have stray quotes, which are text. Those of pandas and of Python's csv module quote
as csv does: a doubled quote inside of a text in quotes is theirs. A text in quotes without one may be either's, and
stays as it is, unless the header is in quotes, too.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.lines import unpacked

# A whole field in quotes, with one inside, which is doubled as are all.
QUOTED = r'^"[^"]*""(?:[^"]|"")*"$'


def encloses(path: Path, separator: str) -> bool:
    """Whether quotes enclose a file's fields: always in csv; in others if its header's are enclosed."""
    if separator == ",":
        return True
    with unpacked(path) as file:
        return file.read(4).removeprefix(b"\xef\xbb\xbf").startswith(b'"')


def check_quotes(path: Path, separator: str) -> None:
    """Raises UserError naming the row where something follows a closing quote; of a file whose quotes enclose."""
    with unpacked(path) as file:
        if not _doubtful(file, separator):
            return
    row = -1  # the header
    csv.field_size_limit(limits.LONGEST_ROW)
    with unpacked(path) as file:
        try:
            for cells in csv.reader(_lines(file, limits.LONGEST_ROW), delimiter=separator, strict=True):
                row += bool(cells)
        except csv.Error as error:
            if "expected after" in str(error):
                raise UserError(f"{path}, row {row}: text follows a closing quote; write a quote inside of a "
                                'quoted text twice (""), not with a backslash') from None  # fmt: skip


def _doubtful(file: BinaryIO, separator: str) -> bool:
    """Whether a quote stands where no csv writer puts one: opening, not behind a separator; closing, not before one.

    Every other quote opens a text; a doubled one closes and opens it.
    """
    borders = np.isin(np.arange(256), list(f'"{separator}\r\n'.encode()))
    before, count, block = b"\n", 0, b"-"
    while block:
        block = file.read(1 << 20)
        data = np.frombuffer(before + (block or b"\n"), np.uint8)
        at = np.flatnonzero(data[1:-1] == ord('"')) + 1
        closing = (count + np.arange(len(at))) % 2 == 1
        if not (borders[data[at[closing] + 1]].all() and borders[data[at[~closing] - 1]].all()):
            return True
        before, count = data[-2:].tobytes(), count + len(at)
    return False


def _lines(file: BinaryIO, longest: int) -> Iterator[str]:
    """Up to one that is too long, which pyarrow will name."""
    with io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as text:
        while (line := text.readline(longest)) and len(line) < longest:
            yield line


def plain_tabs(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without the quotes of fields that a csv writer has enclosed; all others as they are."""
    columns = []
    for column in batch.columns:
        quoted = pc.match_substring_regex(column, QUOTED)
        if pc.any(quoted).as_py():
            text = pc.replace_substring(pc.utf8_slice_codeunits(column, 1, -1), '""', '"')
            column = pc.if_else(quoted, text, column)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
