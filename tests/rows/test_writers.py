"""What crossrank predict writes: every row and column that came in, what the model says of it, or why it says nothing.

The model is the embedded one, untrained: what is written does not depend on what it has learned.
"""

import csv
import datetime
import decimal
import gzip
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, crossrank

from trainer import metrics
from trainer.base.errors import UserError
from trainer.data.builtin import LABEL_NAMES
from trainer.predict import InferenceConfig, PredictConfig, Predictor, predict_file
from trainer.rows import limits

KINDS = ["jsonl", "csv", "tsv", "parquet"]
NEW = ["prediction", *(f"score_{name}" for name in LABEL_NAMES)]
TEXTS = {"premise": "a", "hypothesis": "b"}


@pytest.fixture(scope="module")
def predictor(builtin_model):
    from trainer import ranks

    return Predictor(str(builtin_model), InferenceConfig(), ranks.start(60))


@pytest.fixture
def predicted(builtin_model, predictor, tmp_path, monkeypatch):
    """A function from an input's rows, or its text, to the rows of the output, read by libraries that are not ours."""
    monkeypatch.setattr("trainer.predict.Predictor", lambda *_: predictor)
    monkeypatch.setattr(limits, "ROWS", 2)

    def call(given, kind: str, name: str = "in.jsonl", **options) -> list[dict]:
        if isinstance(given, list):
            given = "".join(json.dumps(row) + "\n" for row in given)
        if given is not None:
            (tmp_path / name).write_bytes(given if isinstance(given, bytes) else given.encode())
        target = tmp_path / f"out.{kind}"
        target.unlink(missing_ok=True)
        config = PredictConfig(input=str(tmp_path / name), output=str(target), **options)
        predict_file(str(builtin_model), config, InferenceConfig())
        assert not list(tmp_path.glob(".*"))
        if kind == "parquet":
            return pq.read_table(target).to_pylist()
        if kind == "jsonl":
            return [json.loads(line) for line in target.read_text().splitlines()]
        with target.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="," if kind == "csv" else "\t"))

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_comes_out_as_it_came_in(kind, predicted):
    """Over several parts; also a label, an id and an index, which have no meaning here."""
    own = {"id": "007", "label": "neutral", "index": "x", "note": 'a "b", c\td\ne\rf'}
    if kind == "tsv":  # in which the embedded reader, too, takes no tab
        own["note"] = 'a "b", c'
    given = "id,premise,hypothesis,label,index,note\n" + "".join(
        f'{row:03},a,b {row},neutral,x,"{own["note"].replace(chr(34), chr(34) * 2)}"\n' for row in range(5)
    )
    rows = predicted(given, kind, "in.csv")
    assert [*rows[0]] == ["id", "premise", "hypothesis", "label", "index", "note", *NEW]
    for number, row in enumerate(rows):
        assert {name: row[name] for name in own} == own | {"id": f"{number:03}"}
        assert (row["premise"], row["hypothesis"]) == ("a", f"b {number}")
        assert row["prediction"] in LABEL_NAMES
        assert sum(float(row[name]) for name in NEW[1:]) == pytest.approx(1, abs=2e-6)


def test_types_stay(predicted, tmp_path):
    """Of parquet in parquet; in jsonl what JSON has; in csv JSON where a cell cannot hold it."""
    when, price = datetime.datetime(2026, 1, 2, 3, 4), decimal.Decimal("1.50")
    columns = {"n": pa.array([1, None, 3], pa.int16()), "list": [["x"], [], None], "when": [when] * 3,
               "price": [price] * 3, "raw": [b"\xffx"] * 3, "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
               "real": [0.1, float("nan"), None], "object": [{"a": [1]}] * 3}  # fmt: skip
    pq.write_table(pa.table({name: ["a"] * 3 for name in TEXTS} | columns), tmp_path / "in.parquet")
    table = pq.read_table(tmp_path / "in.parquet")
    predicted(None, "parquet", "in.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.field("n").type == pa.int16()
    assert written.schema.types[: len(table.schema)] == table.schema.types
    assert str(written.select(table.column_names).to_pylist()) == str(table.to_pylist())
    rows = predicted(None, "jsonl", "in.parquet")
    assert [row["n"] for row in rows] == [1, None, 3]
    assert [row["real"] for row in rows] == [0.1, None, None]
    assert rows[0]["object"] == {"a": [1]}
    rows = predicted(None, "csv", "in.parquet")
    shown = {name: rows[0][name] for name in columns}
    assert shown == {"n": "1", "list": '["x"]', "when": "2026-01-02 03:04:00", "price": "1.50", "raw": "\\xffx",
                     "kind": "u", "real": "0.1", "object": '{"a": [1]}'}  # fmt: skip
    assert rows[1]["n"] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_json_come_out_as_they_came_in(kind, predicted):
    def odd(values):
        return [row["odd"] for row in predicted([TEXTS | {"odd": value} for value in values], kind)]

    number = int if kind in ("csv", "tsv") else lambda value: value
    assert [number(i) for i in odd([7, 5, 6])] == [7, 5, 6]
    assert odd(["x", "y", "z"]) == ["x", "y", "z"]
    assert odd(["x", None, 3])[::2] == ["x", 3 if kind == "jsonl" else "3"]
    assert [int(i) for i in odd([2**64 - 1, 1, 2])] == [2**64 - 1, 1, 2]
    shown = (lambda value: value) if kind == "jsonl" else json.dumps
    for values in ([2.5, 1, True, False], [{"a": 1}, {"b": [1]}]):
        assert [repr(i) for i in odd(values)] == [repr(shown(value)) for value in values]
    assert odd(["\ud800"]) == ["\ud800" if kind == "jsonl" else "\\ud800"]
    if kind == "parquet":
        with pytest.raises(UserError, match="column 'odd' is int64 in the first rows and something else"):
            odd([1, 2, "x"])
    if kind == "jsonl":
        assert odd([float("nan"), float("-inf"), [float("inf")]]) == [None, "-inf", ["inf"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_only_some_rows_have(kind, predicted):
    rows = predicted([TEXTS | {"more": "x"}, TEXTS, TEXTS], kind)
    assert [row.get("more") or None for row in rows] == ["x", None, None]
    late = [TEXTS, TEXTS, TEXTS | {"more": "x"}]
    if kind == "jsonl":
        assert predicted(late, kind)[2]["more"] == "x"
    else:
        with pytest.raises(UserError, match="column 'more' comes first in rows 2 to 2"):
            predicted(late, kind)


def test_names_that_the_input_has_already(predicted):
    for name in NEW:
        with pytest.raises(UserError, match=f"a column '{name}' itself"):
            predicted([TEXTS, TEXTS, TEXTS | {name: 1}], "jsonl")
    rows = predicted([TEXTS | {"prediction": "mine", "error": "x"}], "csv", prefix="new_")
    assert [*rows[0]] == [*TEXTS, "prediction", "error", *(f"new_{name}" for name in NEW)]
    assert rows[0]["prediction"] == "mine"
    with pytest.raises(UserError, match="'new_error' itself"):
        predicted([TEXTS | {"new_error": "x"}], "csv", prefix="new_", on_error="mark")
    with pytest.raises(UserError, match="two columns are called 'x'"):
        predicted("premise,hypothesis,x,x\na,b,1,2\n", "csv", "in.csv")


FORMULAS = ["=1+1", "+x", "-2+3", "@user", "\t=1", "-", "-3.5", "+4e5", "a=b", "=cmd|' /C calc'!A0", "\uff1d1"]


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind, predicted, said):
    """Spreadsheets open csv and tsv only. A number, and a - by itself, are no formula."""
    given = [TEXTS | {"=note": text} for text in FORMULAS]
    rows = predicted(given, kind, csv_formulas="keep")
    assert [row["=note"] for row in rows] == FORMULAS
    assert not said
    rows = predicted(given, kind)
    if kind in ("jsonl", "parquet"):
        assert [row["=note"] for row in rows] == FORMULAS
    else:
        harmless = {"-", "-3.5", "+4e5", "a=b"}
        assert [row["'=note"] for row in rows] == [text if text in harmless else "'" + text for text in FORMULAS]
        assert said == ["8 cells begin as a formula does, and have a ' before that; --csv_formulas keep leaves them "
                        "as they came"]  # fmt: skip


GOOD = '{"premise": "a", "hypothesis": "b"}'
# Inputs, and what is said of their rows; None = it has a prediction.
BAD = {
    "in.jsonl": (
        f'{GOOD}\n\n{{oops\n[1]\n{{"premise": " ", "hypothesis": "b"}}\n{{"premise": "a"}}\n{{}}\n{GOOD}\n'
        '{"premise": 1, "hypothesis": "b"}\n{"premise": "\\ud800", "hypothesis": "b"}\n{"premise": 1, "premise": 2}\n'
        f'{{"premise": "a", "hypothesis": "{"x" * 300}"}}\n{GOOD}\n',
        [None, "an empty line", "not a JSON object", r"not a JSON object \(a list\).*: \[1\]$", "premise is empty",
         "hypothesis is null", "premise is null", None, "premise must be text, found (1|int64)", "half of a surrogate",
         "the key 'premise' twice", "longer than 200 bytes", None],
    ),
    "in.csv": (
        'premise,hypothesis,n\na,b,1\n\na,b\na,"b\nc",2\n,b,3\n"a,b,c",d,4\na,b,c,d\nx,y\n',
        [None, "premise is empty", "expected 3 fields, found 2: a,b$", None, "premise is empty", None,
         "expected 3 fields, found 4: a,b,c,d", "expected 3 fields, found 2: x,y"],
    ),
    "in.tsv": ("premise\thypothesis\n1\n2\n", ["expected 2 fields, found 1: 1", "expected 2 fields, found 1: 2"]),
    "in.csv.gz": ("premise,hypothesis\na\na,b\n", ["expected 2 fields, found 1: a", None]),
    "only.jsonl": ("{oops\n\n", ["not a JSON object", "an empty line"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_used_are_marked(kind, name, predicted, monkeypatch, said):
    """One row out for one in, and those that can be used say what they say without the others."""
    monkeypatch.setattr(limits, "LONGEST_ROW", 200)
    text, expected = BAD[name]
    data = gzip.compress(text.encode()) if name.endswith("gz") else text
    rows = predicted(data, kind, name, on_error="mark")
    assert len(rows) == len(expected)
    for row, what in zip(rows, expected, strict=True):
        if what is None:
            assert not row["error"]
            assert row["prediction"] in LABEL_NAMES
        else:
            assert re.search(what, row["error"])
            assert not any(row[column] for column in NEW)
    bad = len(expected) - expected.count(None)
    assert said[-1].endswith(f"{bad} of {len(expected)} rows have no prediction; the column error says why")
    with pytest.raises(UserError, match=name):
        predicted(data, kind, name)


def test_marked_rows_change_no_other(predicted):
    rows = [{"premise": f"A {'very ' * i}old man sleeps.", "hypothesis": "b", "n": i} for i in range(5)]
    alone = predicted(rows, "jsonl")
    mixed = predicted([rows[0], {"n": 9}, rows[1], rows[2], {"premise": 1}, rows[3], rows[4]], "jsonl", on_error="mark")
    assert [row for row in mixed if row.pop("error") is None] == [row | {} for row in alone]
    assert [row["n"] for row in mixed] == [0, 9, 1, 2, None, 3, 4]


def test_ranks_mark_the_same_rows(tmp_path, builtin_model):
    (tmp_path / "in.jsonl").write_text(BAD["in.jsonl"][0].replace("x" * 300, "b") * 3)
    for ranks in (0, 2):
        result = crossrank("predict", builtin_model, "--input", tmp_path / "in.jsonl", "--output",
                           tmp_path / f"{ranks}.parquet", "--on_error", "mark", ranks=ranks)  # fmt: skip
        assert result.stderr.count("27 of 39 rows have no prediction") == 1
    first, other = (pq.read_table(tmp_path / f"{ranks}.parquet") for ranks in (0, 2))
    for name in first.column_names:
        if name.startswith("score"):
            assert np.allclose(
                *(np.array(t[name].to_pylist(), float) for t in (first, other)), atol=2e-6, equal_nan=True
            )
        else:
            assert first[name].equals(other[name])


def test_lines_of_stdin_are_marked(builtin_model):
    text = "a\tb\n\nx\ty\tz\n\t\nc\td\n"
    result = crossrank("predict", builtin_model, "--on_error", "mark", text=text)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    errors = [row["error"] and row["error"].split(":")[0].split(";")[0] for row in rows]
    assert errors == [None, "an empty line", "expected premise<TAB>hypothesis or jsonl, found 3 columns",
                      "premise is empty", None]  # fmt: skip
    assert rows[0]["premise"] == "a"


@pytest.mark.parametrize("objective", ["binary_cross_entropy", "mse"])
def test_one_output_is_a_score(objective, predicted, predictor, monkeypatch):
    logits = np.array([[-1.5], [800.0], [0.25]], np.float32)
    expected = metrics.activated(logits, objective)[:, 0].tolist()
    assert expected == ([pytest.approx(0.18242552380635635), 1, pytest.approx(0.56217650088)]
                        if objective == "binary_cross_entropy" else [-1.5, 800, 0.25])  # fmt: skip
    for name, value in {"label_names": ["LABEL_0"], "objective": objective, "scored": lambda *_: logits}.items():
        monkeypatch.setattr(predictor, name, value)
    monkeypatch.setattr(limits, "ROWS", 8)
    rows = predicted([TEXTS] * 3, "csv")
    assert [*rows[0]] == [*TEXTS, "score"]
    assert [float(row["score"]) for row in rows] == pytest.approx(expected, abs=1e-6)


def test_what_is_terminated_leaves_nothing(tmp_path, builtin_model):
    (tmp_path / "in.jsonl").write_text(json.dumps(TEXTS) + "\n")
    script, out = tmp_path / "slow.py", tmp_path / "out"
    script.write_text(
        "import sys, time\nfrom trainer import __main__, predict\n"
        "predict.Predictor.scored = lambda *_: time.sleep(600)\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    out.mkdir()
    command = [sys.executable, script, "predict", builtin_model, "--input", "in.jsonl", "--output", "out/new.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path)
    while not [*out.iterdir()] and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert (process.wait(), process.stderr.read()) == (143, b"crossrank: terminated\n")
    assert not [*out.iterdir()]
