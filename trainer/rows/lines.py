"""Text line by line: unpacked, checked, and of jsonl the object that each line holds."""

import gzip
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.faults import Faults, fault

EMPTY = "an empty line; each line is a pair, so remove it or fill it in"


def unpacked(path: Path) -> BinaryIO:
    """The file's bytes, without gzip's packing."""
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def check_encoding(beginning: bytes, place: str) -> None:
    """By the first two bytes: a mark, or the empty half of a plain letter."""
    if beginning in (b"\xff\xfe", b"\xfe\xff") or b"\0" in beginning:
        raise UserError(f"{place}: text in UTF-16; save it as UTF-8")


def lines(
    file: BinaryIO, place: str, every_line: bool = False, faults: Faults | None = None, rows: int | None = None
) -> Iterator[list[tuple[int, str]]]:
    """Lists of (row, line), without empty lines, which are no rows.

    They are of `rows`, None = ROWS, and about LONGEST_ROW bytes at most. `every_line`: an empty line is an error. With
    `faults`, a line that cannot be used is noted there, and empty.
    """
    part: list[tuple[int, str]] = []
    row = size = 0
    while raw := file.readline(limits.LONGEST_ROW + 1):
        line, what = _decoded(raw, row == 0)
        if what == EMPTY and not every_line:
            continue
        if what:
            fault(faults, place, row, what)
        part.append((row, line))
        row, size = row + 1, size + len(raw)
        while len(raw) > limits.LONGEST_ROW and not raw.endswith(b"\n"):  # the rest of one that is too long
            raw = file.readline(limits.LONGEST_ROW + 1)
        if len(part) == (rows or limits.ROWS) or size > limits.LONGEST_ROW:
            yield part
            part, size = [], 0
    if part:
        yield part


def _decoded(raw: bytes, first: bool) -> tuple[str, str]:
    """A line's text, and what is wrong with it."""
    if len(raw) > limits.LONGEST_ROW:
        return "", limits.too_long()
    try:
        line = raw.decode("utf-8").removeprefix("\ufeff" if first else "").rstrip("\r\n")
    except UnicodeDecodeError:
        return "", "not UTF-8 text"
    return line, "" if line.strip(" \r\n") else EMPTY  # a tab stands between two texts, empty ones as well


Objects = list[tuple[int, dict[str, Any]]]  # (row, object)


def objects(
    file: BinaryIO,
    place: str,
    every_line: bool = False,
    faults: Faults | None = None,
    columns: Collection[str] | None = None,
    rows: int | None = None,
) -> Iterator[Objects]:
    """Of each line its row and object, of which only `columns` stay; parts as of `lines`, or of `rows`.

    Raises UserError naming the row, unless `faults` are collected; then such an object is empty.
    """
    for part in lines(file, place, every_line, faults, rows):
        found = []
        for row, line in part:
            value = _object(line, place, row, faults)
            if len(value) > limits.MOST_COLUMNS:
                fault(faults, place, row, limits.too_many_columns(len(value)))
                value = {}
            if columns is not None:
                value = {name: own for name, own in value.items() if name in columns}
            found.append((row, value))
        yield found


class _Doubled(dict[str, Any]):
    """An object with `key` twice; of an object inside a column that nothing reads, that does no harm."""

    key: str


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        made, names = _Doubled(made), [name for name, _ in pairs]
        seen: set[str] = set()
        made.key = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
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
            error = f"the key {value.key[:80]!r} twice"
    except (ValueError, RecursionError) as found:
        error = found
    fault(faults, place, row, f"not a JSON object ({error}); write one object a line", line)
    return {}
