"""Pairs that a Python program holds: every kind becomes the same file, and what is none is refused."""

import numpy as np
import pytest

from tests.made_pairs import premises_of, sources_of
from trainer import api
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.builtin import pairs
from trainer.data.given import as_files
from trainer.data.load import load_scored, load_splits
from trainer.labels.values import NLI

TUPLES = [("a", "b", "entailment"), ("c", "d", "neutral"), ("e", "f", "contradiction")]
DICTS = [{"sentence1": p, "sentence2": h, "gold_label": name, "extra": object()} for p, h, name in TUPLES]


def frame(**more):
    pd = pytest.importorskip("pandas")
    columns = {name: [row[i] for row in TUPLES] for i, name in enumerate(("premise", "hypothesis", "label"))}
    return pd.DataFrame(columns | more)


def dataset(labels=(0, 1, 2), names=NLI):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(premise=datasets.Value("string"), hypothesis=datasets.Value("string"),
                                 label=datasets.ClassLabel(names=list(names)))  # fmt: skip
    rows = [{"premise": p, "hypothesis": h, "label": label} for (p, h, _), label in zip(TUPLES, labels, strict=True)]
    return datasets.Dataset.from_list(rows, features=features)


def loaded(**fields):
    return load_splits(DataConfig(**as_files(fields)))


@pytest.mark.parametrize("kind", ["tuples", "dicts", "frame", "dataset", "other order of classes"])
def test_every_kind(kind):
    data = {"tuples": TUPLES, "dicts": DICTS}.get(kind)
    if data is None:
        data = {"frame": frame, "dataset": dataset}.get(kind, lambda: dataset((2, 1, 0), NLI[::-1]))()
    splits = loaded(train_dataset=data, eval_dataset=data, test_dataset={"one": data, "two": TUPLES[:2]})
    assert {key: own.split for key, own in splits.items()} == {
        "train": "train", "dev": "dev", "test": "one-test", "test 2": "two-test"
    }  # fmt: skip
    assert premises_of(splits["train"]) == ["a", "c", "e"]
    assert [NLI[number] for number in splits["train"].label] == list(NLI)
    assert len(splits["test 2"]) == 2


def test_the_same_pairs_are_the_same_file():
    """Wherever they are, so ranks agree and a run can be resumed."""
    first, again, other = (
        as_files({"train_dataset": rows})["train_file"] for rows in (TUPLES, list(TUPLES), TUPLES[:2])
    )
    assert first == again != other
    assert as_files({"train_dataset": frame(more=1.0)})["train_file"] == first


def test_numbers_and_gaps_of_pandas(said):
    pd = pytest.importorskip("pandas")
    data = frame(label=[0.0, 1.0, 2.0], source=pd.Series(["s", "t", "s"], dtype="category"))
    assert sources_of(loaded(train_dataset=data)["train"]) == ["s", "t", "s"]
    assert loaded(train_dataset=frame(label=np.array([2, 0, 1])))["train"].label.tolist() == [2, 0, 1]
    gap = frame(hypothesis=pd.array(["x", pd.NA, "y"], dtype="string"))
    with pytest.raises(UserError, match=r"^train_dataset, row 1: hypothesis is null"):
        loaded(train_dataset=gap)


def test_a_data_set_of_several_splits(said):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=dataset(), validation=dataset((1, 2, 0)), test=dataset((-1, -1, -1)))
    found = loaded(dataset=splits)
    assert (list(found), found["dev"].label.tolist()) == (["train", "dev"], [1, 2, 0])
    assert said == ["dataset['test'] is left out: it has no labels"]
    assert list(load_scored(DataConfig(**as_files({"dataset": {"test": TUPLES}})), NLI)) == ["test"]


def test_sources_of_a_dict():
    train = loaded(train_dataset={"one": TUPLES, "two": dataset((2, 2, 2))})["train"]
    assert sources_of(train) == ["one"] * 3 + ["two"] * 3
    assert train.label.tolist() == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"train_dataset": 5}, "train_dataset must be a datasets.Dataset, .*found int"),
        ({"train_dataset": (row for row in TUPLES)}, "train_dataset must be .*found generator"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"test_dataset": {}}, "test_dataset is empty"),
        ({"test_dataset": {"a/b": TUPLES}}, "test_dataset: 'a/b' is no name"),
        ({"train_dataset": [*TUPLES, ("a", "b")]}, "train_dataset, row 3: expected .*, found .'a', 'b'."),
        ({"train_dataset": [*DICTS, ("a", "b")]}, "train_dataset, row 3: expected a dict"),
        ({"train_dataset": [("a", "b", {1})]}, "train_dataset, row 0: label must be text or a number"),
        ({"eval_dataset": [{"text": "a", "label": 1}]}, "eval_dataset: no column 'premise' or .*it has text, label"),
        ({"train_dataset": DICTS, "label_column": "y"}, "train_dataset: no column 'y'"),
        ({"train_dataset": TUPLES, "train_file": "a.csv"}, "train_file is the split that train_dataset"),
        ({"train_dataset": TUPLES, "dataset": {}}, "dataset holds all splits"),
        (
            {"train_dataset": {"train": TUPLES, "test": TUPLES}},
            "several splits .train, test.; .* as dataset=",
        ),
        ({"dataset": TUPLES}, "dataset must be a DatasetDict.*found list"),
        ({"dataset": {"other": TUPLES}}, "no split by a usual name.*it has other"),
    ],
)
def test_what_is_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        as_files(fields)


def test_a_stream_is_refused():
    with pytest.raises(UserError, match="train_dataset is a stream"):
        as_files({"train_dataset": dataset().to_iterable_dataset()})


def test_a_run_from_python(tmp_path):
    """Its config.yaml names the files; evaluate takes the same kinds."""
    rows = [(row["premise"], row["hypothesis"], NLI[row["label"]]) for row in pairs("train")[:64]]
    results = api.train(model_name_or_path="builtin", train_dataset=rows, test_dataset={"half": rows[:32]}, max_steps=1,
                        train_batch_size=32, track_emissions=False, write_report=False,
                        output_dir=tmp_path / "run")  # fmt: skip
    assert list(results["metrics"]) == ["half-test"]
    assert "train.parquet" in (tmp_path / "run" / "config.yaml").read_text()
    again = api.evaluate(tmp_path / "run" / "model", test_dataset={"half": rows[:32]})
    assert again["half-test"]["accuracy"] == results["metrics"]["half-test"]["accuracy"]
