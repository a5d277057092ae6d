"""Pairs from stdin, and predictions into files of any size: a part at a time, in order, in constant memory."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError, reason
from trainer.base.files import replacing
from trainer.data.tables import jsonl, lines

Write = Callable[[np.ndarray], None]  # takes probabilities (n, classes)


def stream_stdin() -> Iterator[pa.Table]:
    """jsonl, or premise and hypothesis separated by a tab."""
    source: Any = sys.stdin.buffer
    while (beginning := source.peek(16)[:16].removeprefix(b"\xef\xbb\xbf")) and not beginning.strip(b" \r\n"):
        source.readline()  # empty lines
    return jsonl(source, "stdin") if beginning.lstrip().startswith(b"{") else _tabs(source)


def _tabs(file: BinaryIO) -> Iterator[pa.Table]:
    for part in lines(file, "stdin"):
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

    A file gets its name when it is complete. Raises UserError where it can't be written.
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
    try:
        kind = WRITERS[path.suffix]
        with (
            replacing(path, durable=False) as temporary,
            temporary.open("wb") as file,
            kind(file, label_names) as write,
        ):
            yield write
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent != path.parent:
            raise
        raise UserError(f"cannot write {output}: {reason(error)}") from None


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
def _parquet_file(file: BinaryIO, label_names: list[str]) -> Iterator[Write]:
    from pyarrow import parquet

    columns = [pa.field(f"score_{name}", pa.float64()) for name in label_names]
    schema = pa.schema([pa.field("label", pa.string()), *columns])
    with parquet.ParquetWriter(file, schema) as writer:

        def write(probabilities: np.ndarray) -> None:
            labels = [label_names[i] for i in probabilities.argmax(1)]
            writer.write_table(pa.table([labels, *probabilities.T], schema=schema))

        yield write


WRITERS: dict[str, Callable[[BinaryIO, list[str]], AbstractContextManager[Write]]] = {
    ".jsonl": _jsonl_file,
    ".csv": _csv_file,
    ".tsv": partial(_csv_file, separator="\t"),
    ".parquet": _parquet_file,
}
