"""Files of any size, in and out: a part at a time, in order, in constant memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from trainer.config import UserError
from trainer.data.sources import CSV, kind_of, open_csv, readable

ROWS = 1 << 14  # a part: enough to sort by length and to share among ranks
Write = Callable[[np.ndarray], None]  # takes probabilities (n, classes)


def stream(path: Path) -> Iterator[pa.Table]:
    """The rows of a file in parts of ROWS at most. Raises UserError naming the file, and a row that is damaged."""
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in CSV:
            with open_csv(path, tabs=kind != ".csv") as reader:
                for batch in reader:
                    yield from _cut(batch)
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield from _jsonl(file, str(path))  # type: ignore[arg-type]


def stream_stdin() -> Iterator[pa.Table]:
    """jsonl, or premise and hypothesis separated by a tab."""
    source: Any = sys.stdin.buffer
    while (beginning := source.peek(16)[:16].removeprefix(b"\xef\xbb\xbf")) and not beginning.strip(b" \r\n"):
        source.readline()  # empty lines
    return _jsonl(source, "stdin") if beginning.lstrip().startswith(b"{") else _tabs(source)


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


def _lines(file: BinaryIO, place: str) -> Iterator[list[tuple[int, str]]]:
    """Lists of (row, line), without empty lines; a row is a line that is not empty."""
    part: list[tuple[int, str]] = []
    row = 0
    for number, raw in enumerate(file):
        try:
            line = raw.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{place}, row {row}: not UTF-8 text") from None
        if line.strip(" \r\n"):  # a tab stands between two texts, empty ones as well
            part.append((row, line.rstrip("\r\n")))
            row += 1
        if len(part) == ROWS:
            yield part
            part = []
    if part:
        yield part


def _jsonl(file: BinaryIO, place: str) -> Iterator[pa.Table]:
    for part in _lines(file, place):
        rows = [_object(line, f"{place}, row {row}") for row, line in part]
        columns: dict[str, Any] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            text = all(value is None or isinstance(value, str) for value in values)
            columns[name] = pa.array(values, pa.string()) if text else _other(values)
        yield pa.table(columns)


def _other(values: list[Any]) -> pa.Array:
    """A column that is no text: only its kind matters, for the message."""
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([[None]] * len(values))


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}, not an object; write one object a line")
    return value


def _tabs(file: BinaryIO) -> Iterator[pa.Table]:
    for part in _lines(file, "stdin"):
        rows = [(row, line.split("\t")) for row, line in part]
        for row, cells in rows:
            if len(cells) != 2:
                raise UserError(
                    f"stdin, row {row}: expected premise<TAB>hypothesis or jsonl, found {len(cells)} columns"
                )
        yield pa.table({name: [cells[i] for _, cells in rows] for i, name in enumerate(("premise", "hypothesis"))})


@contextmanager
def open_output(output: str | None, label_names: list[str]) -> Iterator[Write]:
    """A function that appends a row a pair: its class, and the probability of each. None: nothing is written.

    A file gets its name when it is whole. Raises UserError where it can't be written.
    """
    if output is None:
        yield lambda probabilities: None
        return
    if output == "-":
        with _jsonl_writer(sys.stdout, label_names) as write:
            yield write
        sys.stdout.flush()
        return
    path = Path(output)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file, WRITERS[path.suffix](file, label_names) as write:
            yield write
        temporary.rename(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _jsonl_writer(file: Any, label_names: list[str]) -> Iterator[Write]:
    def write(probabilities: np.ndarray) -> None:
        for row in probabilities:
            scores = {name: round(float(p), 6) for name, p in zip(label_names, row, strict=True)}
            file.write(
                json.dumps({"label": label_names[int(row.argmax())], "scores": scores}, ensure_ascii=False) + "\n"
            )

    yield write


@contextmanager
def _jsonl_file(file: BinaryIO, label_names: list[str]) -> Iterator[Write]:
    with io.TextIOWrapper(file, "utf-8") as text, _jsonl_writer(text, label_names) as write:
        yield write


@contextmanager
def _csv_file(file: BinaryIO, label_names: list[str], separator: str = ",") -> Iterator[Write]:
    with io.TextIOWrapper(file, "utf-8", newline="") as text:
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerow(["label", *(f"score_{name}" for name in label_names)])

        def write(probabilities: np.ndarray) -> None:
            rows: Iterable[np.ndarray] = probabilities
            writer.writerows([label_names[int(row.argmax())], *(f"{p:.6f}" for p in row)] for row in rows)

        yield write


@contextmanager
def _tsv_file(file: BinaryIO, label_names: list[str]) -> Iterator[Write]:
    with _csv_file(file, label_names, "\t") as write:
        yield write


@contextmanager
def _parquet_file(file: BinaryIO, label_names: list[str]) -> Iterator[Write]:
    from pyarrow import parquet

    columns = [pa.field(f"score_{name}", pa.float64()) for name in label_names]
    schema = pa.schema([pa.field("label", pa.string()), *columns])
    with parquet.ParquetWriter(file, schema) as writer:

        def write(probabilities: np.ndarray) -> None:
            labels = [label_names[i] for i in probabilities.argmax(1)]
            writer.write_table(pa.table([labels, *probabilities.T], schema=schema))

        yield write


WRITERS: dict[str, Any] = {
    ".jsonl": _jsonl_file,
    ".csv": _csv_file,
    ".tsv": _tsv_file,
    ".parquet": _parquet_file,
}
