"""Pairs from stdin, and predictions into files of any size: a part at a time, in order, in constant memory."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError, reason
from trainer.base.files import naming, replacing
from trainer.base.log import log
from trainer.data.columns import HYPOTHESIS, PREMISE
from trainer.data.tables import check_encoding, jsonl, lines, values_of

# The columns by which a row may be known, the best one first.
IDS = ("id", "idx", "index", "pairid", "guid")
TEXTS = [[name.lower() for name in names] for names in (PREMISE, HYPOTHESIS)]
Write = Callable[[pa.ChunkedArray, np.ndarray], None]  # takes ids (n,) and probabilities (n, classes)


def stream_stdin() -> Iterator[pa.Table]:
    """jsonl, or premise and hypothesis separated by a tab. An empty line between others is an error."""
    if sys.stdin is None:
        raise UserError("stdin is closed; give the pairs there, or a file as --input")
    if sys.stdin.isatty():
        log.info("reading pairs from the terminal: premise, tab, hypothesis on each line; Ctrl-D ends them")
    source: Any = sys.stdin.buffer
    beginning = source.peek(16)[:16].removeprefix(b"\xef\xbb\xbf")
    check_encoding(beginning[:2], "stdin")
    return jsonl(source, "stdin", True) if beginning.lstrip().startswith(b"{") else _tabs(source)


def id_column(table: pa.Table) -> str | None:
    """The column that says which row is which, where there is one."""
    found = {name.lower(): name for name in table.column_names if table.column_names.count(name) == 1}
    return next((found[name] for name in IDS if name in found), None)


def ids_of(table: pa.Table, name: str | None, start: int) -> pa.ChunkedArray:
    """Column `name`, or without one the rows' numbers, of which the first is `start`."""
    if name is None:
        return pa.chunked_array([pa.array(range(start, start + table.num_rows), pa.int64())])
    return table[name] if name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])


def _tabs(file: BinaryIO) -> Iterator[pa.Table]:
    for part in lines(file, "stdin", every_line=True):
        rows = [(row, line.split("\t")) for row, line in part]
        for row, cells in rows:
            if len(cells) != 2:
                raise UserError(
                    f"stdin, row {row}: expected premise<TAB>hypothesis or jsonl, found {len(cells)} columns"
                )
        if rows[0][0] == 0 and all(
            cell.strip().lower() in names for cell, names in zip(rows[0][1], TEXTS, strict=True)
        ):
            raise UserError(f"stdin, row 0: {' and '.join(rows[0][1])} are a header, and stdin takes none; leave the "
                            "line out, or give the file as --input")  # fmt: skip
        yield pa.table({name: [cells[i] for _, cells in rows] for i, name in enumerate(("premise", "hypothesis"))})


@contextmanager
def open_output(output: str | None, label_names: list[str], id_name: str) -> Iterator[Write]:
    """A function that appends a row a pair: its id, its class, and the probability of each. None: nothing is written.

    A file gets its name when it is complete. Raises UserError where it can't be written.
    """
    if output is None:
        yield lambda ids, probabilities: None
        return
    if output == "-":
        if sys.stdout is None:
            raise UserError("stdout is closed; give --output FILE")
        with _jsonl_writer(sys.stdout, label_names, id_name) as write:

            def named(ids: pa.ChunkedArray, probabilities: np.ndarray) -> None:
                with naming(Path("stdout")):
                    write(ids, probabilities)
                    sys.stdout.flush()

            yield named
        return
    path = Path(output)
    try:
        kind = WRITERS[path.suffix]
        made = replacing(path, durable=False)
        with made as temporary, temporary.open("wb") as file, kind(file, label_names, id_name) as write:
            yield write
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != path.parent:
            raise
        raise UserError(f"cannot write {output}: {reason(error)}") from None


@contextmanager
def _jsonl_writer(file: Any, label_names: list[str], id_name: str) -> Iterator[Write]:
    def write(ids: pa.ChunkedArray, probabilities: np.ndarray) -> None:
        for own, row in zip(values_of(ids), probabilities, strict=True):
            scores = {name: round(float(p), 6) for name, p in zip(label_names, row, strict=True)}
            if isinstance(own, float) and not math.isfinite(own):
                own = None if math.isnan(own) else str(own)  # JSON has no such numbers
            shown = {id_name: own, "label": label_names[int(row.argmax())], "scores": scores}
            file.write(_printable(json.dumps(shown, ensure_ascii=False, default=str)) + "\n")

    yield write


def _printable(text: str) -> str:
    """Halves of surrogate pairs, which an id may hold, as JSON's escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def _jsonl_file(file: BinaryIO, label_names: list[str], id_name: str) -> Iterator[Write]:
    with io.TextIOWrapper(file, "utf-8") as text, _jsonl_writer(text, label_names, id_name) as write:
        yield write


def _as_text(ids: pa.ChunkedArray) -> list[str | None]:
    values = values_of(ids)
    return [
        v if v is None else _printable(v if isinstance(v, str) else json.dumps(v, default=str, ensure_ascii=False))
        for v in values
    ]


@contextmanager
def _csv_file(file: BinaryIO, label_names: list[str], id_name: str, separator: str = ",") -> Iterator[Write]:
    with io.TextIOWrapper(file, "utf-8", newline="") as text:
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerow([id_name, "label", *(f"score_{name}" for name in label_names)])

        def write(ids: pa.ChunkedArray, probabilities: np.ndarray) -> None:
            writer.writerows(
                [own, label_names[int(row.argmax())], *(f"{p:.6f}" for p in row)]
                for own, row in zip(_as_text(ids), probabilities, strict=True)
            )

        yield write


@contextmanager
def _parquet_file(file: BinaryIO, label_names: list[str], id_name: str) -> Iterator[Write]:
    """Ids are integers if the first part's are, and else text: the kind of a column cannot change later."""
    from pyarrow import parquet

    with ExitStack() as stack:
        made: list[Any] = []

        def write(ids: pa.ChunkedArray, probabilities: np.ndarray) -> None:
            if not made:
                kind = ids.type if pa.types.is_integer(ids.type) else pa.string()
                columns = [pa.field(f"score_{name}", pa.float64()) for name in label_names]
                schema = pa.schema([pa.field(id_name, kind), pa.field("label", pa.string()), *columns])
                made.append(stack.enter_context(parquet.ParquetWriter(file, schema)))
            schema = made[0].schema
            own = ids if pa.types.is_integer(schema.types[0]) else pa.array(_as_text(ids), pa.string())
            try:
                own = own.cast(schema.types[0])
            except pa.ArrowException:
                raise UserError(
                    f"{id_name} is a number in the first rows and no number in later ones, which a parquet file cannot "
                    "hold; choose another kind of --output"
                ) from None
            labels = [label_names[i] for i in probabilities.argmax(1)]
            made[0].write_table(pa.table([own, labels, *probabilities.T], schema=schema))

        yield write


WRITERS: dict[str, Callable[[BinaryIO, list[str], str], AbstractContextManager[Write]]] = {
    ".jsonl": _jsonl_file,
    ".csv": _csv_file,
    ".tsv": partial(_csv_file, separator="\t"),
    ".parquet": _parquet_file,
}
