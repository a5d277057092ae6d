"""A label means the same in every kind of file, and what can be no class is an error with its row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_sources import ROWS, load, write
from trainer.base.errors import UserError
from trainer.labels.classes import class_numbers
from trainer.labels.values import NLI, read_labels

KINDS = ("a.csv", "a.tsv", "a.jsonl", "a.parquet")


def labelled(path, labels):
    rows = [ROWS[0] | {"label": label} for label in labels]
    if path.suffix in (".jsonl", ".parquet"):
        return write(path, rows)
    return write(path, [row | {"label": "" if row["label"] is None else row["label"]} for row in rows])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "labels", [[-1.0, 0.0, 1.0, 2.0], [-1, 0, 1, 2], ["-", "0", "1.0", "2"], ["-1.0", "00", "1", "+2"]]
)
def test_numbers_however_they_are_written(tmp_path, name, labels):
    pairs = load(labelled(tmp_path / name, labels))
    assert (pairs.label.tolist(), pairs.label_names, pairs.num_dropped) == ([0, 1, 2], NLI, 1)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("none", ["-1", "-", "-1.0"])
def test_no_consensus_among_names(tmp_path, name, none):
    pairs = load(labelled(tmp_path / name, ["neutral", none, "entailment"]))
    assert (pairs.label.tolist(), pairs.label_names, pairs.num_dropped) == ([1, 0], NLI[:2], 1)


LARGE = 2**64 - 1
BAD = [
    ([0.0, 0.5, 1.0], "row 1: labels such as 0.5 are scores, not classes"),
    (["entailment", "0"], "row 1: label 0 is a number, and 'entailment' in row 0 is a name"),
    ([0, 1, None], "row 2: label is (null|empty|missing)"),
    ([0.0, 1.0, float("nan")], "row 2: label is (null|missing)"),
    (["yes", "no", None], "row 2: label is (null|empty)"),
    ([True, False], "row 0: label is True.*--label_names False,True"),
    ([0, 1, -2], "row 2: label -2 is outside"),
    ([0, 1, LARGE], "row 2: class numbers must run from 0 without gaps"),
    ([0, 1, -(2**63)], "row 2: label -9223372036854775808 is outside"),
    ([*NLI * 333, "entailmnt"], r"row 999: label 'entailmnt' is in 1 of 1,000 rows \(did you mean 'entailment'"),
    ([*NLI, "contradition"], "row 3: label 'contradition' .*did you mean 'contradiction'"),
    (["entailmnt", "neutral", "contradiction"], "row 0: label 'entailmnt' .*did you mean 'entailment'"),
    ([*NLI, "neutral_", "Neutral"], "did you mean 'neutral'|did you mean 'Neutral'"),
    (["yes", "no", "maybe"] * 333 + ["x"], "row 999: label 'x' is in 1 of 1,000 rows; mend it"),
    ([0, 1, 2] * 333 + [3], "row 999: label '3' is in 1 of 1,000 rows; mend it"),
    (["supports"] * 30 + ["refutes"] * 30 + ["suports"], "did you mean 'supports'"),
    *((["yes", "no", "maybe", none] * 9, "row 3: label is (missing|null|empty).*--label_names")
      for none in ("None", "NA", "n/a", "#N/A", "?", "NaN")),
    ([*NLI, "unrelated"] * 9, "row 3: label 'unrelated' stands beside entailment, neutral, contradiction"),
    ([1, 2, 3, 4, 5], "row 4: .* from 0 without gaps, found 1, 2, 3, 4, 5; .*--label_names 1,2,3,4,5"),
    ([], "no rows"),
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("labels", "expected"), BAD)
def test_what_can_be_no_class(tmp_path, name, labels, expected):
    if not labels:
        (tmp_path / name).write_text(
            "" if name == "a.jsonl" else "premise\thypothesis\tlabel\n".replace("\t", "," if name == "a.csv" else "\t")
        )
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / name)
    elif LARGE in labels and name == "a.parquet":
        table = pa.Table.from_pylist(ROWS).set_column(2, "label", pa.array(labels, pa.uint64()))
        pq.write_table(table, tmp_path / name)
    else:
        labelled(tmp_path / name, labels)
    with pytest.raises(UserError, match=expected) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, "entailment"], "row 0: label 0 is a number, and 'entailment' in row 1 is a name"),
        ([0, 1, [1]], r"row 2: label must be a class name or number, found \[1\]"),
        ([[0], [1]], r"row 0: label must be a class name or number, found \[0\]"),
        ([{"a": 1}, {"a": 2}], "row 0: label must be"),
        ([True, 1], "row 1: label 1 is a number, and 'True' in row 0 is a name"),
        (["a", "b\ud800", "a", "a"], "nothing"),
    ],
)
def test_values_that_only_json_holds(tmp_path, labels, expected):
    path = labelled(tmp_path / "a.jsonl", labels)
    if expected == "nothing":
        assert load(path).label_names == ("a", "b\\ud800")
        return
    with pytest.raises(UserError, match=expected):
        load(path)


@pytest.mark.parametrize(
    "labels",
    [
        ["entailment", "not_entailment"],
        ["entailment", "neutral", "unrelated"],
        ["class_11"] * 20 + ["class_12"],
        ["A"] * 20 + ["A-"],
        ["yes"] * 1000 + ["no"],
        [f"topic {i}" for i in range(150)] + ["topic 0"] * 5000,
        list(range(12)),
    ],
)
def test_unlike_classes_are_classes(tmp_path, labels):
    assert set(load(labelled(tmp_path / "a.parquet", labels)).label) == set(range(len(set(labels))))


def test_named_classes_may_be_rare(tmp_path):
    labels = [*NLI * 333, "entailmnt"]
    names = [*NLI, "entailmnt"]
    assert load(labelled(tmp_path / "a.csv", labels), label_names=names).label_names == tuple(names)
    bools = load(labelled(tmp_path / "b.parquet", [True, False]), label_names=["False", "True"])
    assert bools.label.tolist() == [1, 0]


def test_categories(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.set_column(2, "label", table["label"].dictionary_encode()), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").label.tolist() == [0, 2, 1]


def numbers(values, classes=None, label_names=None, own_names=None, of_model=False):
    labels = read_labels(pa.chunked_array([pa.array(values)]), "data")
    return class_numbers(labels, classes, label_names, own_names, of_model)[0].tolist()


FIVE = ["1", "2", "3", "4", "5"]
MEANT = [
    # --label_names that are numbers are names; others count from 0.
    ([1, 5, 4], {"label_names": FIVE}, [0, 4, 3]),
    (["2.0", "01", "-1"], {"label_names": FIVE}, [1, 0, -1]),
    ([-1, 0, 1], {"label_names": ["-1", "0", "1"]}, [0, 1, 2]),
    ([0, 1], {"label_names": ["1", "0"]}, [1, 0]),
    ([0, 2], {"label_names": ["a", "b", "c"]}, [0, 2]),
    (["none", "a"], {"label_names": ["a", "none"]}, [1, 0]),
    # A column's own names are of its numbers, even where they look like these.
    ([0, 2], {"own_names": ["1", "2", "3"]}, [0, 2]),
    ([-1, 0], {"own_names": ["-1", "0"]}, [-1, 0]),
    ([0, 2], {"own_names": list(NLI), "label_names": ["contradiction", "neutral", "entailment"]}, [2, 0]),
    # The dev split of a run.
    ([3, 1], {"classes": FIVE, "label_names": FIVE}, [2, 0]),
    ([0, 1, 1], {"classes": NLI}, [0, 1, 1]),
    ([0, 1], {"classes": ("LABEL_0", "LABEL_1")}, [0, 1]),
    ([0, 1], {"classes": ("yes", "no"), "label_names": ["yes", "no"]}, [0, 1]),
    # A model's classes.
    ([0, 1, 1], {"classes": NLI, "label_names": ["entailment", "contradiction"], "of_model": True}, [0, 2, 2]),
    ([0, 2, -1], {"classes": NLI, "of_model": True}, [0, 2, -1]),
    ([3, 1], {"classes": ("1", "2", "3"), "of_model": True}, [2, 0]),
    ([0, 1], {"classes": ("no", "yes"), "of_model": True}, [0, 1]),
    (["neutral", "entailment"], {"classes": NLI, "of_model": True}, [1, 0]),
]
REFUSED = [
    (
        [1, 2, 3],
        {"label_names": ["a", "b", "c"]},
        r"label 3 is outside the classes 0\.\.2 \(a, b, c\); names count from 0",
    ),
    ([0, 1, 4], {"label_names": FIVE}, "row 0: unknown label '0'; .*1, 2, 3, 4, 5"),
    (["None", "a"], {"label_names": ["a", "b"]}, "row 0: label is missing"),
    ([0, 1], {"classes": ("no", "yes")}, r"the training pairs are names \(no, yes\)"),
    ([0, 1], {"classes": ("entailment", "contradiction")}, "say what the numbers mean, from 0, with --label_names"),
    (
        [0, 1, 1],
        {"classes": NLI, "of_model": True},
        "data: its labels are the numbers 0, 1, the model has 3 .*--label_names",
    ),
    (["0", "-", "1.0"], {"classes": NLI, "of_model": True}, "--label_names"),
    ([1, 2], {"classes": NLI, "of_model": True}, "data: its labels are the numbers 1, 2, the model has 3"),
    (
        [0, 1],
        {"classes": NLI, "label_names": ["entailment", "not"], "of_model": True},
        "include 'not', which is not among",
    ),
    (["a"], {"classes": NLI, "label_names": ["a", "b"], "of_model": True}, "include 'a', which is not among"),
    ([0, 1], {"own_names": ["x", "y"], "label_names": ["a", "b"]}, "include 'x', which is not among a, b"),
]


@pytest.mark.parametrize(("values", "context", "expected"), MEANT)
def test_what_labels_mean(values, context, expected):
    assert numbers(values, **context) == expected


@pytest.mark.parametrize(("values", "context", "expected"), REFUSED)
def test_labels_that_may_mean_something_else(values, context, expected):
    with pytest.raises(UserError, match=expected):
        numbers(values, **context)


def test_a_models_own_numbering_is_said(said):
    assert numbers([0, 1], ("no", "yes"), of_model=True) == [0, 1]
    assert said == ["data: its labels are taken as the model numbers its classes: 0 = no, 1 = yes"]
