"""Inputs that are larger than memory, or that would be: each format's peak, and one clear error at each limit."""

import gzip
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from trainer.base.errors import UserError
from trainer.rows import limits
from trainer.rows.pipes import as_file
from trainer.rows.tables import names_of, read_parts

ROWS = [{"premise": "a", "n": 1, "hypothesis": "b"}, {"premise": "c", "n": 2, "hypothesis": "d"}]
TEXT = "premise,n,hypothesis\na,1,b\nc,2,d\n"


@pytest.fixture
def files(tmp_path):
    """The same rows in every format."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=1)
    (tmp_path / "a.csv").write_text(TEXT)
    (tmp_path / "a.tsv").write_text(TEXT.replace(",", "\t"))
    (tmp_path / "a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in ROWS))
    for path in list(tmp_path.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    return sorted(tmp_path.iterdir())


def test_names_and_the_columns_that_are_asked_for(files):
    assert len(files) == 8
    for path in files:
        assert names_of(path) == ["premise", "n", "hypothesis"]
        (part,) = read_parts(path, columns={"hypothesis", "premise", "nowhere"})
        assert part.to_pylist() == [{name: row[name] for name in ("premise", "hypothesis")} for row in ROWS]


def test_a_column_that_is_another_ones_beginning(tmp_path):
    pq.write_table(pa.table({"a": ["x"], "a.b": ["y"], "c": [{"d": 1}]}), tmp_path / "a.parquet")
    (part,) = read_parts(tmp_path / "a.parquet", columns=["a"])
    assert part.to_pylist() == [{"a": "x"}]


# The peak of reading a file, less that before, in MiB.
PEAK = """
import resource, sys
from pathlib import Path
from trainer.rows.tables import read_parts
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
print(sum(part.num_rows for part in read_parts(Path(sys.argv[1]))), peak() - before)
"""


def rows_and_mib(path) -> tuple[int, float]:
    command = [sys.executable, "-c", PEAK, path]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    return int(said[0]), float(said[1])


@pytest.mark.parametrize("shape", ["text", "list", "word"])
def test_one_row_group_of_any_size(shape, tmp_path):
    """400 MB of texts, or of lists of them; and one word, unpacked into 400 MB. Files of one row group each."""
    texts = [f"{i} {'many words ' * 80}" for i in range(1000)] if shape != "word" else ["many words " * 80] * 1000
    chunk = pa.array([[text] for text in texts] if shape == "list" else texts)
    table = pa.table({"premise": pa.chunked_array([chunk] * 450)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10**9, use_dictionary=shape == "word")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    rows, mib = rows_and_mib(tmp_path / "a.parquet")
    assert rows == 450_000
    assert mib < 150


def packed(path, *parts: tuple[bytes, int]):
    """A gzip file of bytes that are repeated."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for unit, count in parts:
            for _ in range(count // 1_000_000):
                file.write(unit * 1_000_000)
            file.write(unit * (count % 1_000_000))
    return path


HEADER = (b"premise,hypothesis\na,b\n", 1)
LONG = {
    "a.csv.gz": ([(b"x", 3_000_000)], "its first line, the header, is longer than 1,048,576 bytes"),
    "commas.csv.gz": ([(b"a,", 300_000), (b"\na,b\n", 1)], "the header, has 300,001 columns, and a table has 4,096"),
    "quote.csv.gz": ([(b'"', 1), (b"a\n,", 1_000_000)], "the header, is longer than"),
    "tabs.tsv.gz": ([(b"a\t", 300_000), (b"\n", 1)], "the header, has 300,001 columns"),
    "row.csv.gz": ([HEADER, (b"x", 5_000_000)], "row 1: longer than 1,048,576 bytes"),
    "open.csv.gz": ([HEADER, (b'"', 1), (b"a\n", 2_500_000)], "row 1: .* or a quote in it is never closed"),
    "row.jsonl.gz": ([(b'{"premise": "', 1), (b"x", 5_000_000)], "row 0: longer than 1,048,576 bytes"),
    "keys.jsonl": ([(b"", 0)], "row 1: 5,000 columns, and a table has 4,096 at most"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_line_without_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "LONGEST_ROW", 1 << 20)
    parts, expected = LONG[name]
    path = tmp_path / name
    if name.startswith("keys"):
        path.write_text('{"a": 1}\n' + json.dumps({f"k{i}": 0 for i in range(5000)}) + "\n")
    else:
        packed(path, *parts)
    with pytest.raises(UserError, match=expected) as caught:
        list(read_parts(path))
    assert name in str(caught.value)


def test_other_keys_in_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_COLUMNS", 10)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({f"k{i}": 0}) + "\n" for i in range(11)))
    with pytest.raises(UserError, match=r"a\.jsonl, rows 0 to 10: 11 columns"):
        list(read_parts(tmp_path / "a.jsonl"))
    assert sum(part.num_rows for part in read_parts(tmp_path / "a.jsonl", columns=["k0"])) == 11


def test_what_comes_through_a_pipe_is_told_by_its_beginning(tmp_path):
    """A first line that never ends is no reason to read it."""
    os.mkfifo(tmp_path / "pipe")
    data = gzip.compress(b"x" * 20_000_000)
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    thread.start()
    with pytest.raises(UserError, match="neither parquet nor jsonl, nor a header"), as_file(tmp_path / "pipe"):
        pass
    thread.join()
