"""What a column of labels says of one score: numbers, or 0 and 1 in any kind of file."""

import json

import numpy as np
import pyarrow as pa
import pytest

from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.load import load_scored, load_splits
from trainer.data.tokens import targets_of
from trainer.labels.targets import read_targets
from trainer.labels.values import Targets, read_labels

TEXTS = {"premise": "a b", "hypothesis": "c d"}


def read(values: list, objective: str, own_names=None, classes=None, of_model=False, **fields):
    labels = read_labels(pa.chunked_array([pa.array(values)]), "file")
    return read_targets([(labels, own_names)], DataConfig(**fields), objective, classes, of_model)[0]


@pytest.mark.parametrize(
    "values",
    [[-1, 5, 0, 5], [-1.0, 5.0, 0.0, 5.0], ["-1", "5.0", " 0 ", "5e0"]],
)
def test_numbers(values):
    found = read(values, "mse")
    assert found.values.tolist() == [-1, 0, 5]
    assert found.values.dtype == np.float32
    assert found.values[found.label].tolist() == [-1, 5, 0, 5]
    some = Targets.joined([found], [np.array([1, 2])])
    assert (some.values.tolist(), some.label.tolist(), some.names) == ([0, 5], [1, 0], ())
    more = Targets.joined([found, read([3, 5, 9], "mse")], [np.array([1]), np.array([0, 1])])
    assert (more.values[more.label].tolist(), more.values.tolist()) == ([5, 3, 5], [3, 5])


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.5, None], "row 1: label is null"), (["1", ""], "row 1: label is ''"), (["1", "-"], "row 1: label is '-'"),
     ([0.5, float("nan")], "row 1: label is 'nan'"), ([0.5, float("inf")], "row 1: label is 'inf'"),
     (["1", "4,5"], "row 1: label is '4,5'"), (["1", "1_0"], "row 1: label is '1_0'"), ([True], "label is 'True'"),
     ([1.0, 1e39], "row 1: label is '9999999"), (["good"], "row 0: label is 'good'")],
)  # fmt: skip
def test_no_numbers(values, said):
    with pytest.raises(UserError, match=f"file, {said}" if "row" in said else said):
        read(values, "mse")


@pytest.mark.parametrize(
    ("values", "fields", "own_names", "names"),
    [
        ([0, 1, -1, 1], {}, None, ("0", "1")),
        ([0.0, 1.0, -1.0, 1.0], {}, None, ("0", "1")),
        (["0", "1", "-", "1.0"], {}, None, ("0", "1")),
        (["False", "true", "-", "TRUE"], {}, None, ("0", "1")),
        (["no", "yes", "-", "yes"], {"label_names": ["no", "yes"]}, None, ("no", "yes")),
        ([0, 1, -1, 1], {}, ["different", "same"], ("different", "same")),
        # The order that the user gives counts, and the data's own numbers are turned with it.
        ([1, 0, -1, 0], {"label_names": ["different", "same"]}, ["same", "different"], ("different", "same")),
    ],
)
def test_two_labels(values, fields, own_names, names):
    found = read(values, "binary_cross_entropy", own_names, **fields)
    assert (found.label.tolist(), found.names, found.values.tolist()) == ([0, 1, -1, 1], names, [0, 1])


def test_booleans_are_two_labels():
    assert read([False, True], "binary_cross_entropy").label.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "fields", "own_names", "said"),
    [
        ([0, 1, 2], {}, None, "row 2: label is '2', and objective binary_cross_entropy needs 0 and 1"),
        ([0, 0.5], {}, None, "row 1: label is '0.5'"),
        (["no", "yes"], {}, None, "row 0: label is 'no'.* --label_names NEGATIVE,POSITIVE"),
        ([0, None], {}, None, "row 1: label is null"),
        (["0", ""], {}, None, "row 1: label is empty"),
        ([0, 1, 2], {}, ["a", "b", "c"], r"needs two labels, and has 3 \(a, b, c\)"),
        ([0, 1], {"label_names": ["a", "b", "c"]}, None, "needs two labels, and has 3"),
        (["no", "maybe"], {"label_names": ["no", "yes"]}, None, "row 1: .*maybe"),
        ([0, 1], {"label_map": ["a=b"]}, None, "label_map is for classes"),
    ],
)
def test_no_two_labels(values, fields, own_names, said):
    with pytest.raises(UserError, match=said):
        read(values, "binary_cross_entropy", own_names, **fields)


def test_names_of_classes_are_no_numbers():
    with pytest.raises(UserError, match="label_names is for classes"):
        read([0, 1], "mse", label_names=["a", "b"])


def test_a_models_name_is_no_label():
    """Of a model that knows the names of 0 and 1 these count, whatever order a set has them in."""
    assert read([0, 1], "binary_cross_entropy", of_model=True).names == ("0", "1")
    known = {"objective": "binary_cross_entropy", "classes": ["no", "yes"], "of_model": True}
    turned = read([0, 1], own_names=["yes", "no"], **known)
    assert (turned.label.tolist(), turned.names) == ([1, 0], ("no", "yes"))
    assert read([0, 1], **known).label.tolist() == [0, 1]
    assert read(["yes", "no"], **known).label.tolist() == [1, 0]
    with pytest.raises(UserError, match="'maybe'"):
        read(["yes", "maybe"], **known)


def test_names_of_several_sources():
    """Two that number the same names in another way are one."""
    sources = [(read_labels(pa.chunked_array([[0, 1, 1]]), name), own)
               for name, own in (("a", ["no", "yes"]), ("b", ["yes", "no"]), ("c", None))]  # fmt: skip
    found = read_targets(sources, DataConfig(), "binary_cross_entropy")
    assert [own.label.tolist() for own in found] == [[0, 1, 1], [1, 0, 0], [0, 1, 1]]
    other = [sources[0], (sources[1][0], ["so", "no"])]
    with pytest.raises(UserError, match="include 'so'"):
        read_targets(other, DataConfig(), "binary_cross_entropy")


def written(path, labels: list) -> list[str]:
    path.write_text("".join(json.dumps(TEXTS | {"label": label}) + "\n" for label in labels))
    return [str(path)]


def test_splits(tmp_path):
    config = DataConfig(
        train_file=written(tmp_path / "train.jsonl", [0.5, 4.5, 3, 0.5]),
        test_file=written(tmp_path / "test.jsonl", [2, -1]),
        max_train_samples=3,
    )
    splits = load_splits(config, "mse")
    train, test = splits["train"], splits["test"]
    assert train.values[train.label].tolist() == [0.5, 4.5, 3]
    assert (test.values.tolist(), test.label.tolist(), test.num_dropped) == ([-1, 2], [1, 0], 0)
    assert targets_of(train) == "scores from 0.5 to 4.5"
    with pytest.raises(UserError, match=r"row 1: labels such as 4\.5 are scores.*--objective mse"):
        load_splits(DataConfig(train_file=written(tmp_path / "some.jsonl", [0, 4.5])))


def test_nothing_to_learn(tmp_path):
    config = DataConfig(train_file=written(tmp_path / "train.jsonl", [2.5, 2.5]))
    with pytest.raises(UserError, match=r"all with label 2\.5: there is nothing to learn"):
        load_splits(config, "mse")


def test_what_has_no_consensus_is_counted(tmp_path):
    config = DataConfig(test_file=written(tmp_path / "test.jsonl", [1, -1, 0, 1]))
    pairs = load_scored(config, (), True, "binary_cross_entropy")["test"]
    assert (pairs.label.tolist(), pairs.row.tolist(), pairs.num_dropped) == ([1, 0, 1], [0, 2, 3], 1)
    assert targets_of(pairs) == "66.7% labelled 1"


def test_targets_are_part_of_the_data():
    """Labels that have the same places, and are other numbers."""
    from dataclasses import replace

    from tests.made_pairs import made_pairs, tokenize
    from trainer.data import builtin

    pairs = made_pairs([("a", "c"), ("b", "d")], [0, 1], ())
    prints = [
        tokenize(replace(pairs, values=values), builtin.make_tokenizer(), 128).fingerprint
        for values in (None, np.array([0, 1], np.float32), np.array([0, 2], np.float32))
    ]
    assert len(set(prints)) == 3
