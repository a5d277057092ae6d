"""Tables into a file of any kind: a part at a time, in constant memory.

A value stays what it is where the kind of file can hold it: text, numbers of their own type, and in parquet and jsonl
also lists and objects. Where it cannot, JSON stands for it. The columns of csv and parquet are those of the first part.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from trainer.base.errors import UserError, reason
from trainer.base.files import naming, replacing
from trainer.base.log import log
from trainer.rows.tables import MIXED, values_of

# Takes the columns that came in, and those that are new, of the same rows. Scores are among the latter: text shows six
# digits behind the point of them.
Write = Callable[[pa.Table, pa.Table], None]
DIGITS = 6


@contextmanager
def open_output(output: str | None, defuse: bool = True) -> Iterator[Write]:
    """A function that appends rows to `output`, - = jsonl on stdout; None: nothing is written.

    A file gets its name when it is complete. `defuse`: see Csv. Raises UserError where it can't be written.
    """
    if output is None:
        yield lambda given, new: None
        return
    if output == "-":
        yield _stdout()
        return
    path = Path(output)
    try:
        kind = WRITERS[path.suffix]
        made = replacing(path, durable=False)
        with made as temporary, temporary.open("wb") as file, kind(file, defuse) as write:
            yield write
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != path.parent:
            raise
        raise UserError(f"cannot write {output}: {reason(error)}") from None


def _stdout() -> Write:
    import sys

    if sys.stdout is None:
        raise UserError("stdout is closed; give --output FILE")

    def write(given: pa.Table, new: pa.Table) -> None:
        with naming(Path("stdout")):
            sys.stdout.writelines(_json_lines(given, new))
            sys.stdout.flush()

    return write


def _json_lines(given: pa.Table, new: pa.Table) -> Iterator[str]:
    names = [*given.column_names, *new.column_names]
    columns = [values_of(column) for column in given.columns]
    columns += [[_rounded(value) for value in column.to_pylist()] for column in new.columns]
    for row in zip(*columns, strict=True):
        yield printable(_as_json(dict(zip(names, row, strict=True)))) + "\n"


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_named, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_named)


def _named(value: Any) -> str:
    """Bytes as the text that they are; dates and decimal numbers as they are written."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no number for what is none, nor for infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    return [_finite(own) for own in value] if isinstance(value, (list, tuple)) else value


def printable(text: str) -> str:
    """Halves of surrogate pairs, which JSON may hold, as its escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text(value: Any) -> str | None:
    """In a cell; None is an empty one."""
    if value is None or isinstance(value, str):
        return value and printable(value)
    if isinstance(value, float):
        return repr(value)
    return printable(_as_json(value) if isinstance(value, (bool, int, list, tuple, dict)) else _named(value))


@contextmanager
def _jsonl_file(file: BinaryIO, defuse: bool) -> Iterator[Write]:
    with TextIOWrapper(file, "utf-8") as text:
        yield lambda given, new: text.writelines(_json_lines(given, new))


class Columns:
    """The columns of a file, which the first part settles.

    Raises UserError where a later part has another one.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.done = 0

    def of(self, table: pa.Table) -> list[pa.ChunkedArray]:
        """The table's columns in the file's order; one that it lacks is null."""
        self.names = self.names or table.column_names
        if more := [name for name in table.column_names if name not in self.names]:
            raise UserError(f"column {more[0]!r} comes first in rows {self.done} to {self.done + table.num_rows - 1}, "
                            "and the columns of such a file are those of its first rows; choose an --output that ends "
                            "in .jsonl")  # fmt: skip
        self.done += table.num_rows
        nothing = pa.chunked_array([pa.nulls(table.num_rows)])
        return [table[name] if name in table.column_names else nothing for name in self.names]


# With what a formula may begin (OWASP, "CSV Injection"), unless it is all, such as the label "-"; numbers do, too.
FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20].", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?")


class Csv:
    """Lines of cells. With `defuse`, text that a spreadsheet would take for a formula has a ' before it."""

    def __init__(self, file: Any, separator: str, defuse: bool) -> None:
        self.file, self.separator, self.defuse = file, separator, defuse
        self.enclosed = re.compile(f'["\r\n{separator}]')
        self.columns, self.new_columns = Columns(), Columns()
        self.defused = 0

    def write(self, given: pa.Table, new: pa.Table) -> None:
        names = [] if self.columns.names else [*given.column_names, *new.column_names]
        columns = [[self._cell(_text(value)) for value in values_of(own)] for own in self.columns.of(given)]
        columns += [[self._own(value) for value in own.to_pylist()] for own in self.new_columns.of(new)]
        if names:
            # Tab-separated files have quotes that are text; those around a header say that they enclose cells.
            broken = self.separator == "\t" and any(c in cell for own in columns for cell in own for c in "\t\r\n")
            self._line(self._cell(name, always=broken) for name in names)
        for row in zip(*columns, strict=True):
            self._line(row)

    def _own(self, value: Any) -> str:
        return f"{value:.{DIGITS}f}" if isinstance(value, float) else self._cell(_text(value))

    def _line(self, cells: Any) -> None:
        self.file.write(self.separator.join(cells) + "\n")

    def _cell(self, text: str | None, always: bool = False) -> str:
        text = text or ""
        if self.defuse and FORMULA.match(text) and not NUMBER.fullmatch(text):
            text = "'" + text
            self.defused += 1
        return '"' + text.replace('"', '""') + '"' if always or self.enclosed.search(text) else text


@contextmanager
def _csv_file(file: BinaryIO, defuse: bool, separator: str = ",") -> Iterator[Write]:
    with TextIOWrapper(file, "utf-8", newline="") as text:
        made = Csv(text, separator, defuse)
        yield made.write
    if made.defused:
        log.warning(f"{made.defused:,} cells begin as a formula does, and have a ' before that; --csv_formulas keep "
                    "leaves them as they came")  # fmt: skip


@contextmanager
def _parquet_file(file: BinaryIO, defuse: bool) -> Iterator[Write]:
    """The types of the first part's columns stay. Text holds whatever comes later, numbers hold numbers."""
    from pyarrow import parquet

    with ExitStack() as stack:
        made: list[Any] = []
        columns = Columns()

        def write(given: pa.Table, new: pa.Table) -> None:
            own = columns.of(given)
            if not made:
                kinds = [pa.string() if column.type == MIXED else column.type for column in own]
                fields = [pa.field(name, kind) for name, kind in zip(columns.names, kinds, strict=True)]
                schema = pa.schema([*fields, *new.schema])
                made.append(stack.enter_context(parquet.ParquetWriter(file, schema)))
            schema = made[0].schema
            fitting = [_fitting(column, schema.field(i)) for i, column in enumerate(own)]
            made[0].write_table(pa.table([*fitting, *new.columns], schema=schema))

        yield write


def _fitting(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The column in the type of the first part's."""
    if column.type == field.type:
        return column
    if pa.types.is_string(field.type):
        return pa.chunked_array([pa.array(map(_text, values_of(column)), pa.string())])
    try:
        return column.cast(field.type)
    except pa.ArrowException:
        raise UserError(f"column {field.name!r} is {field.type} in the first rows and something else in later ones, "
                        "which a parquet file cannot hold; choose another kind of --output") from None  # fmt: skip


WRITERS: dict[str, Callable[[BinaryIO, bool], AbstractContextManager[Write]]] = {
    ".jsonl": _jsonl_file,
    ".csv": _csv_file,
    ".tsv": partial(_csv_file, separator="\t"),
    ".parquet": _parquet_file,
}
