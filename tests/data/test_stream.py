"""Prediction of files of any size: in order, a part at a time, in and out of every format; and from Python."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import crossrank

from trainer.base.errors import UserError
from trainer.data import tables
from trainer.data.tables import read_parts, read_table

COUNT = 500


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    crossrank("train", "--recipe", "demo", "--max_train_samples", "330", "--max_steps", "5", "--max_eval_samples", "20",
              "--max_test_samples", "20", "--track_emissions", "false", "--write_report", "false",
              "--output_dir", folder)  # fmt: skip
    return folder / "model"


def write_pairs(path: Path, count: int) -> Path:
    """Pairs whose texts say their number; with stray quotes and commas."""
    rows = [
        {"premise": f'A man, "number {i}", sleeps.', "hypothesis": f"A {'very ' * (i % 7)}person {i}."}
        for i in range(count)
    ]
    kind = path.suffixes[0]
    if kind == ".parquet":
        pq.write_table(
            pa.Table.from_pylist(rows), path.with_suffix("") if path.suffix == ".gz" else path, row_group_size=70
        )
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        return path
    if kind == ".jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n"
    elif kind == ".tsv":
        text = "premise\thypothesis\n" + "".join(f"{r['premise']}\t{r['hypothesis']}\n" for r in rows)
    else:
        quoted = [[r["premise"].replace('"', '""'), r["hypothesis"]] for r in rows]
        text = "premise,hypothesis\n" + "".join(f'"{a}","{b}"\n' for a, b in quoted)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.parquet.gz"])
def test_parts_are_the_table(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 64)
    path = write_pairs(tmp_path / name, COUNT)
    parts = list(read_parts(path))
    assert all(0 < part.num_rows <= 64 for part in parts)
    assert pa.concat_tables(parts).to_pylist() == read_table(path).select(["premise", "hypothesis"]).to_pylist()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_way_out_says_the_same_in_order(kind, model, tmp_path, monkeypatch):
    from trainer.api import predict
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    monkeypatch.setattr(tables, "ROWS", 64)
    source, target = write_pairs(tmp_path / f"in.{kind}", COUNT), tmp_path / f"out.{kind}"
    predict_file(str(model), PredictConfig(input=str(source), output=str(target)), InferenceConfig())
    if kind == "jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        labels, scores = [row["label"] for row in rows], np.array([list(row["scores"].values()) for row in rows])
    else:
        table = read_table(target)
        labels, scores = (
            table["label"].to_pylist(),
            np.array([table[c].to_pylist() for c in table.column_names[1:]], float).T,
        )
    pairs = [(row["premise"], row["hypothesis"]) for row in read_table(source).to_pylist()]
    expected = predict(model, pairs)
    assert np.allclose(scores, expected, atol=2e-6)
    names = list(json.loads((model / "config.json").read_text())["id2label"].values())
    assert labels == [names[i] for i in expected.argmax(1)]
    assert not list(tmp_path.glob(".*"))


def test_several_ranks_write_the_same_file(model, tmp_path):
    source = write_pairs(tmp_path / "in.jsonl", COUNT)
    for ranks in (0, 3):
        crossrank("predict", model, "--input", source, "--output", tmp_path / f"{ranks}.csv", ranks=ranks)
    first, other = (read_table(tmp_path / f"{ranks}.csv").to_pandas() for ranks in (0, 3))
    assert first["label"].tolist() == other["label"].tolist()
    assert np.allclose(first.iloc[:, 1:].astype(float), other.iloc[:, 1:].astype(float), atol=2e-6)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 256)
    peaks = []
    for count in (2_000, 40_000):
        path = write_pairs(tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        assert sum(part.num_rows for part in read_parts(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


BAD = {
    "json": ('{"premise": "a", "hypothesis": "b"}\n' * 100 + "{oops\n", "row 100: not a JSON object"),
    "array": ("[1]\n", "row 0: not a JSON object (a list)"),
    "empty text": (
        '{"premise": "a", "hypothesis": "b"}\n' * 100 + '{"premise": " ", "hypothesis": "b"}\n',
        "row 100: premise is empty",
    ),
    "missing": ('{"premise": "a", "hypothesis": "b"}\n' * 100 + '{"premise": "a"}\n', "row 100: hypothesis is null"),
    "number": ('{"premise": 1, "hypothesis": "b"}\n', "premise must be text"),
    "mixed": ('{"premise": "a", "hypothesis": "b"}\n{"premise": 1, "hypothesis": "b"}\n', "premise must be text"),
    "columns": ('{"a": "a", "b": "b"}\n', "it has a, b"),
    "nothing": ("\n\n", "no pairs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_row_and_leaves_no_file(case, model, tmp_path, monkeypatch):
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    monkeypatch.setattr(tables, "ROWS", 32)
    text, expected = BAD[case]
    (tmp_path / "in.jsonl").write_text(text)
    config = PredictConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.csv"))
    with pytest.raises(UserError, match=r"in\.jsonl") as caught:
        predict_file(str(model), config, InferenceConfig())
    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_damaged_archives(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl.gz", 2000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read as jsonl"):
        list(read_parts(path))


def test_the_python_interface(model, tmp_path):
    from trainer import api

    assert api.predict(model, []).shape == (0, 3)
    scores = api.predict(
        model, [("A man sleeps.", "A person rests."), ("A cat.", "A dog.")], per_device_eval_batch_size=1
    )
    assert scores.shape == (2, 3)
    assert np.allclose(scores.sum(1), 1)
    with pytest.raises(UserError, match="pairs, row 1: premise is empty"):
        api.predict(model, [("a", "b"), ("", "b")])
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        api.predict(model, [("a", "b")], bf61=True)
    with pytest.raises(UserError, match="did you mean 'test_file'"):
        api.evaluate(model, test_fil="x")
    with pytest.raises(UserError, match="did you mean 'max_steps'"):
        api.train(recipe="demo", max_step=3)
    (tmp_path / "test.csv").write_text("premise,hypothesis,label\nA man sleeps.,A person rests.,0\nA cat.,A dog.,2\n")
    metrics = api.evaluate(model, test_file=str(tmp_path / "test.csv"))
    assert sum(map(sum, metrics["test"]["confusion_matrix"])) == 2


def test_training_from_python(tmp_path):
    """In a process of its own, since it takes over the signals."""
    script = tmp_path / "mine.py"
    script.write_text(
        "from trainer.api import train\n"
        f"r = train(recipe='demo', max_steps=2, max_train_samples=128, max_eval_samples=20, max_test_samples=20,\n"
        f"          track_emissions=False, write_report=False, output_dir={str(tmp_path / 'run')!r})\n"
        "print(sorted(r['metrics']))\n"
    )
    assert "['builtin-dev', 'builtin-test']" in crossrank(script=script).stdout


def test_an_empty_pair_on_standard_input_is_no_empty_line(model):
    result = crossrank("predict", model, text="a\tb\n\nc\td\n\t\n", check=False)
    assert result.returncode == 2
    assert "row 2: premise is empty" in result.said
