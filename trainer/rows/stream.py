"""Pairs from stdin: a part at a time, in order, in constant memory."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.rows.columns import HYPOTHESIS, PREMISE
from trainer.rows.faults import Faults, fault
from trainer.rows.lines import check_encoding, lines
from trainer.rows.tables import jsonl

TEXTS = [[name.lower() for name in names] for names in (PREMISE, HYPOTHESIS)]


def stream_stdin(faults: Faults | None = None) -> Iterator[pa.Table]:
    """jsonl, or premise and hypothesis separated by a tab. A line that is neither, or empty, is an error.

    With `faults` it is noted there, and null in all columns.
    """
    if sys.stdin is None:
        raise UserError("stdin is closed; give the pairs there, or a file as --input")
    if sys.stdin.isatty():
        log.info("reading pairs from the terminal: premise, tab, hypothesis on each line; Ctrl-D ends them")
    source: Any = sys.stdin.buffer
    beginning = source.peek(16)[:16].removeprefix(b"\xef\xbb\xbf")
    check_encoding(beginning[:2], "stdin")
    is_jsonl = beginning.lstrip().startswith(b"{")
    return jsonl(source, "stdin", True, faults) if is_jsonl else _tabs(source, faults)


def _tabs(file: BinaryIO, faults: Faults | None) -> Iterator[pa.Table]:
    for part in lines(file, "stdin", True, faults):
        rows = [_pair(line, row, faults) for row, line in part]
        if part[0][0] == 0 and all(
            text is not None and text.strip().lower() in names for text, names in zip(rows[0], TEXTS, strict=True)
        ):
            raise UserError(f"stdin, row 0: {' and '.join(map(str, rows[0]))} are a header, and stdin takes none; "
                            "leave the line out, or give the file as --input")  # fmt: skip
        yield pa.table({name: pa.array([row[i] for row in rows], pa.string())
                        for i, name in enumerate(("premise", "hypothesis"))})  # fmt: skip


def _pair(line: str, row: int, faults: Faults | None) -> Sequence[str | None]:
    cells = line.split("\t")
    if len(cells) == 2:
        return cells
    if not (faults and row in faults):
        what = f"expected premise<TAB>hypothesis or jsonl, found {len(cells)} columns"
        fault(faults, "stdin", row, what, line)
    return None, None
