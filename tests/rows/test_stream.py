"""Prediction of files of any size: in order, a part at a time, in and out of every format; and from Python."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ranks, crossrank

from trainer.base.errors import UserError
from trainer.data.builtin import LABEL_NAMES
from trainer.rows import limits, tables
from trainer.rows.tables import read_parts, read_table

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
    monkeypatch.setattr(limits, "ROWS", 64)
    path = write_pairs(tmp_path / name, COUNT)
    parts = list(read_parts(path))
    assert all(0 < part.num_rows <= 64 for part in parts)
    assert pa.concat_tables(parts).to_pylist() == read_table(path).select(["premise", "hypothesis"]).to_pylist()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_way_out_says_the_same_in_order(kind, model, tmp_path, monkeypatch):
    from trainer.api import predict
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    monkeypatch.setattr(limits, "ROWS", 64)
    source, target = write_pairs(tmp_path / f"in.{kind}", COUNT), tmp_path / f"out.{kind}"
    predict_file(str(model), PredictConfig(input=str(source), output=str(target)), InferenceConfig())
    table, given = read_table(target), read_table(source)
    assert table.select(given.column_names).to_pylist() == given.to_pylist()
    scores = np.array([table[f"score_{name}"].to_pylist() for name in LABEL_NAMES], float).T
    expected = predict(model, [(row["premise"], row["hypothesis"]) for row in given.to_pylist()])
    assert np.allclose(scores, expected, atol=2e-6)
    assert table["prediction"].to_pylist() == [LABEL_NAMES[i] for i in expected.argmax(1)]
    assert not list(tmp_path.glob(".*"))


def test_several_ranks_write_the_same_bits(model, tmp_path):
    """Of what rank 0 reads: the others have no such file, and fewer pairs than there are ranks are enough."""
    for count, num_ranks in ((COUNT, 3), (1, 2)):
        source = write_pairs(tmp_path / f"{count}.jsonl", count)
        told = ["predict", model, "--input", source, "--output", tmp_path / "one.parquet"]
        crossrank(*told)
        told[-1] = tmp_path / "some.parquet"
        elsewhere = [*told[:3], tmp_path / "none.jsonl", *told[4:]]
        result = Ranks(told, num_ranks, None, None, {}, others=dict.fromkeys(range(1, num_ranks), elsewhere)).wait()
        assert result.returncode == 0, result.said
        first, other = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "some"))
        assert first.num_rows == count
        assert first.equals(other)
        for name in ("one", "some"):
            (tmp_path / f"{name}.parquet").unlink()


def test_a_bad_row_ends_all_ranks_with_one_error(model, tmp_path):
    """One of the second part, which rank 0 finds while the first is computed."""
    source = write_pairs(tmp_path / "in.jsonl", 80)
    source.write_text(source.read_text() + "{oops\n")
    script = tmp_path / "parts.py"
    script.write_text("import sys\nfrom trainer.rows import limits\nlimits.ROWS = 64\n"
                      "from trainer import __main__\nsys.exit(__main__.main(sys.argv[1:]))\n")  # fmt: skip
    told = ["predict", model, "--input", source, "--output", tmp_path / "out.csv"]
    result = crossrank(*told, ranks=2, script=script, check=False)
    assert result.returncode == 2
    assert result.said.count("row 80: not a JSON object") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "parts.py"]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ROWS", 256)
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
    "nothing": ("", "no rows"),
    "empty line": (
        '{"premise": "a", "hypothesis": "b"}\n' * 100 + "\n" + '{"premise": "a", "hypothesis": "b"}\n',
        "row 100: an empty line",
    ),
    "last line": ('{"premise": "a", "hypothesis": "b"}\n \n', "row 1: an empty line"),
    "a key twice": (
        '{"premise": "a", "hypothesis": "b", "premise": "c"}\n',
        "row 0: not a JSON object (the key 'premise'",
    ),
    "half a character": (
        '{"premise": "a", "hypothesis": "b"}\n{"premise": "\\ud800", "hypothesis": "b"}\n',
        "row 1: premise holds half of a surrogate pair",
    ),
    "deep": ('{"premise": ' + "[" * 100_000 + "\n", "row 0: not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_row_and_leaves_no_file(case, model, tmp_path, monkeypatch):
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    monkeypatch.setattr(limits, "ROWS", 32)
    text, expected = BAD[case]
    (tmp_path / "in.jsonl").write_text(text)
    config = PredictConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.csv"))
    with pytest.raises(UserError, match=r"in\.jsonl") as caught:
        predict_file(str(model), config, InferenceConfig())
    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("header", ["premise\thypothesis", "Sentence1\t sentence2"])
def test_a_header_on_stdin_is_no_pair(header, monkeypatch):
    import io
    import sys

    from trainer.rows.stream import stream_stdin

    for text, expected in (
        (f"{header}\na\tb\n", "row 0: .* are a header, and stdin takes none"),
        (f"a\tb\n{header}\n", ""),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode()))))
        if expected:
            with pytest.raises(UserError, match=expected):
                list(stream_stdin())
        else:
            assert sum(part.num_rows for part in stream_stdin()) == 2


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_file_of_nothing_but_its_first_line(name, model, tmp_path):
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    (tmp_path / name).write_text("A man sleeps.\tA person rests.\n")
    with pytest.raises(UserError, match="no rows; the first line of such a file is its header"):
        predict_file(str(model), PredictConfig(input=str(tmp_path / name)), InferenceConfig())
    with pytest.raises(UserError, match="no rows; the first line of such a file is its header"):
        read_table(tmp_path / name)


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
    for text, expected in (
        ("a\tb\nc\td\n\t\n", "row 2: premise is empty"),
        ("a\tb\n\nc\td\n", "row 1: an empty line"),
        ("\na\tb\n", "row 0: an empty line"),
        ("a\tb\n\n", "row 1: an empty line"),
    ):
        result = crossrank("predict", model, text=text, check=False)
        assert result.returncode == 2
        assert f"stdin, {expected}" in result.said


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_an_empty_line_of_a_table(tmp_path, name):
    text = "premise,hypothesis\na,b\n\nc,d\n".replace(",", "," if "csv" in name else "\t").encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    from trainer.data.given import unlabelled

    with pytest.raises(UserError, match="row 1"):
        [unlabelled(part, name, None, None) for part in read_parts(tmp_path / name, every_line=True)]
    assert read_table(tmp_path / name).num_rows == 2


def test_columns_that_nothing_reads_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ROWS", 2)
    odd = [1, 2**64 - 1, -1, 2.5, 2**70, "\ud800", [1, "x"], {"a": {"b": []}}, None, True]
    rows = [{"premise": "a", "hypothesis": "b", "odd": value} for value in odd]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_table(tmp_path / "a.jsonl")
    assert table["premise"].to_pylist() == ["a"] * len(odd)
    assert tables.values_of(table["odd"]) == odd


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz"])
def test_a_line_without_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(limits, "LONGEST_ROW", 1 << 16)
    path = write_pairs(tmp_path / name, 5)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    data += b"x" * (1 << 18) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    with pytest.raises(UserError, match="row 5: longer than 65,536 bytes"):
        read_table(path)


def test_a_long_text_of_a_table(tmp_path, monkeypatch):
    from trainer.data import given

    monkeypatch.setattr(limits, "LONGEST_ROW", 100)
    table = pa.table({"premise": ["a", "b" * 101], "hypothesis": ["a", "b"]})
    with pytest.raises(UserError, match="row 1: premise is longer than"):
        given.unlabelled(table, "pairs", None, None)


def test_more_text_than_one_array_holds():
    """Of 33 texts of 64 MB, which are one in memory, the last two."""
    from trainer.rows.texts import only

    chunk = pa.array(["x" * (1 << 26)])
    column = pa.chunked_array([chunk] * 33)
    assert len(only(column, np.array([31, 32]))) == 2
    assert len(only(column, np.arange(33))) == 33


def test_a_terminal_is_told_what_is_read(monkeypatch, said):
    import io

    from trainer.rows.stream import stream_stdin

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(io.BufferedReader(io.BytesIO(b"a\tb\n"))))
    assert next(stream_stdin()).to_pylist() == [{"premise": "a", "hypothesis": "b"}]
    assert "reading pairs from the terminal" in said[0]


@pytest.mark.parametrize("name", ["{}/../modle", "./model", "runs/modle", "a/b/c", "trainr"])
def test_a_misspelt_folder_is_named(name, model, tmp_path, monkeypatch):
    from trainer import api

    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "trainer"):
        (tmp_path / folder).mkdir()
    name = name.format(model)
    with pytest.raises(UserError, match="no such folder") as caught:
        api.predict(name, [("a", "b")])
    with pytest.raises(UserError, match="no such folder"):
        api.evaluate(name, dataset_name="builtin")
    assert name in str(caught.value)


def test_pairs_from_python_that_are_none(model):
    from trainer import api

    for pairs, expected in (
        ([("a", "b"), ("a",)], "row 1: expected"),
        (["ab"], "row 0: expected"),
        ([("a", "b"), ("a", 1)], "row 1: hypothesis must be text, found 1"),
        ([("a", None)], "row 0: hypothesis is null"),
        ([("a", "b"), (object(), "b")], "row 1: premise must be text or a number, found <object"),
        ([("a", b"b")], "row 0: hypothesis must be text"),
        (None, "must be a .* list of .*premise, hypothesis\\) or of dicts, found NoneType"),
        (5, "must be a .* list of .*, found int"),
        ([("a", "b"), ("\ud800", "b")], "row 1: premise holds half of a surrogate pair"),
    ):
        with pytest.raises(UserError, match=expected):
            api.predict(model, pairs)


def test_a_loaded_model_takes_pairs_of_any_kind(builtin_model, tmp_path):
    """Once loaded, it needs its folder no more; the same pairs have the same scores whatever they come in."""
    import shutil
    from concurrent.futures import ThreadPoolExecutor

    import datasets
    import pandas as pd

    import crossrank as front

    folder = shutil.copytree(builtin_model, tmp_path / "model")
    model = front.load(folder, per_device_eval_batch_size=2)
    shutil.rmtree(folder)
    assert model.folder == folder
    assert model.label_names == list(LABEL_NAMES)
    rows = [{"n": [i], "sentence1": f"A man {'very ' * i} sleeps.", "sentence2": "b"} for i in range(5)]
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
    expected = model.predict(pairs)
    assert expected.shape == (5, 3)
    renamed = [{"a": a, "b": b, "premise": 1} for a, b in pairs]
    for given in (
        rows,
        pd.DataFrame(rows),
        datasets.Dataset.from_list(rows),
        pa.Table.from_pylist(rows),
        map(list, pairs),
        np.array(pairs),
    ):
        assert np.array_equal(model.predict(given), expected)
    assert np.array_equal(model.predict(renamed, premise_column="a", hypothesis_column="b"), expected)
    assert np.abs(model.predict(pairs[3]) - expected[3]).max() < 1e-6  # a single pair
    assert model.predict([]).shape == (0, 3)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(model.predict, [pairs] * 8):
            assert np.array_equal(scores, expected)
    for given, said in (
        ([*rows, {"sentence1": "a"}], "pairs, row 5: hypothesis is null"),
        ([rows[0], pairs[0]], "row 1: expected a dict as in row 0"),
        (pd.DataFrame({"premise": ["a", None], "hypothesis": ["b", "c"]}), "row 1: premise is null"),
        (
            pd.DataFrame({"premise": ["a"], "text": ["b"]}),
            "no column 'hypothesis' .*; it has premise, text",
        ),
        (pa.table({"premise": ["a"], "hypothesis": [1]}), "row 0: hypothesis must be text, found int64"),
        ({"premise": "a", "hypothesis": "b"}, "must be a .* list of"),
        ("ab", "must be a .* list of"),
    ):
        with pytest.raises(UserError, match=said):
            model.predict(given)
    with pytest.raises(UserError, match="no such folder"):
        front.load(tmp_path / "nowhere")


@pytest.mark.parametrize("objective", ["binary_cross_entropy", "mse"])
def test_a_loaded_model_of_one_output_gives_a_score_a_pair(objective, builtin_model, monkeypatch):
    from trainer import api
    from trainer.metrics import activated

    model = api.load(builtin_model)
    logits = np.array([[-1.5], [0.25]], np.float32)
    monkeypatch.setattr(model.predictor, "objective", objective)
    monkeypatch.setattr(model.predictor.model, "num_classes", 1)
    monkeypatch.setattr(model.predictor, "logits", lambda pairs: logits[: len(pairs)])
    assert np.array_equal(model.predict([("a", "b"), ("c", "d")]), activated(logits, objective)[:, 0])
    assert model.predict(("a", "b")) == activated(logits, objective)[0, 0]


def test_numbers_of_other_classes_are_no_score(model, tmp_path):
    from trainer import api

    (tmp_path / "test.csv").write_text("premise,hypothesis,label\na,b,0\nc,d,1\n")
    with pytest.raises(UserError, match=r"the model has 3 classes .*--label_names"):
        api.evaluate(model, test_file=str(tmp_path / "test.csv"))
    names = ["entailment", "neutral", "contradiction"]
    assert api.evaluate(model, test_file=str(tmp_path / "test.csv"), label_names=names)


def test_streams_that_are_closed_or_full(monkeypatch):
    import io
    import sys

    from trainer.__main__ import main
    from trainer.rows.stream import stream_stdin
    from trainer.rows.writers import open_output

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(UserError, match="stdin is closed"):
        next(stream_stdin())
    with pytest.raises(UserError, match="stdout is closed"), open_output("-"):
        pass
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with open_output("-") as write, pytest.raises(OSError, match="No space") as caught:
        write(pa.table({"a": [0]}), pa.table({"b": [0.5]}))
    assert caught.value.filename == "stdout"
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert main(["--version"]) == 0
    assert sys.stderr.name == "/dev/null"  # what is said there does not come among the results
