"""Parquet files: a few rows of a row group at a time, whatever the size of the group."""

import gzip
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.rows import limits

BUFFER = 1 << 20  # bytes of a column that are read at once; without it, all of a row group's
# Rows that are unpacked at once. A page of text may be a word that is unpacked into a thousand rows.
STEP = 1 << 8


def parquet_names(path: Path) -> list[str]:
    """The columns, as the file's schema calls them."""
    with _opened(path) as file:
        return file.schema_arrow.names


def parquet_batches(path: Path, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    """The rows, of which only `columns` are read."""
    with _opened(path) as file:
        names = file.schema_arrow.names
        wanted = None if columns is None else [name for name in names if name in columns]
        for group in range(file.num_row_groups):
            size = min(STEP, limits.ROWS)
            for batch in file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False):
                if wanted is not None:  # also those of which a name is the beginning, before a dot
                    batch = batch.select([i for i, name in enumerate(batch.schema.names) if name in wanted])
                yield batch


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if path.suffix == ".gz":  # its index is at the end
            with gzip.open(path) as packed:
                shutil.copyfileobj(packed, plain, BUFFER)
        source = plain if path.suffix == ".gz" else path
        with parquet.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER) as file:
            yield file
