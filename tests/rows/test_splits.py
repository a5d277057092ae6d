"""Data sets of several splits: which is which, and which are left out."""

import pytest

from tests.data.test_sources import ROWS, write
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.load import load_pairs, load_splits

datasets = pytest.importorskip("datasets")
TEXTS = {"premise": ["a", "b", "c"], "hypothesis": ["x", "y", "z"]}


def saved(tmp_path, **labels):
    """A folder of splits, each with these labels; without a column for them where they are `no column`."""
    splits = {}
    for split, own in labels.items():
        columns = TEXTS | ({} if own == "no column" else {"label": own})
        splits[split] = datasets.Dataset.from_dict(columns if own else {**TEXTS, "label": [0, 1, 2]})
        if not own:
            splits[split] = splits[split].select([])
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return DataConfig(dataset_name=str(tmp_path / "saved"))


@pytest.mark.parametrize("dev", ["validation", "valid", "val", "dev", "eval", "Validation", "validation_matched"])
@pytest.mark.parametrize("test", ["test", "testing", "validation_mismatched", "dev-mismatched"])
def test_usual_names(tmp_path, said, dev, test):
    if "-" in test:
        test = test.replace("-", "_")  # a folder's name is no other
    splits = load_splits(saved(tmp_path, train=[0, 1, 2], **{dev: [1, 2, 0], test: [2, 1, 0]}))
    assert (splits["dev"].label.tolist(), splits["test"].label.tolist()) == ([1, 2, 0], [2, 1, 0])
    assert not said


def test_a_split_of_another_name_is_mentioned(tmp_path, said):
    assert set(load_splits(saved(tmp_path, train=[0, 1, 2], anli=[0, 1, 2]))) == {"train"}
    assert len(said) == 1
    assert "split 'anli' is not used" in said[0]


def test_a_second_split_of_one_role_is_mentioned(tmp_path, said):
    config = saved(tmp_path, train=[0, 1, 2], validation=[0, 0, 0], dev=[1, 1, 1])
    assert load_splits(config)["dev"].label.tolist() == [0, 0, 0]
    assert "split 'dev' is used only if 'validation' has no labels" in said[0]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([-1, -1, -1], "no labels"),
        ([-1.0, float("nan"), -1.0], "no labels"),
        ([None, None, None], "no labels"),
        (["-", "-1", ""], "no labels"),
        ("no column", "no column label or gold_label"),
        ([], "no rows"),
    ],
)
@pytest.mark.parametrize("role", ["dev", "test"])
def test_a_split_without_labels_is_left_out(tmp_path, said, labels, reason, role):
    splits = load_splits(saved(tmp_path, train=[0, 1, 2], **{role: labels}))
    assert set(splits) == {"train"}
    assert len(said) == 1
    assert f"saved {role} is left out: it has {reason}" in said[0]


def test_the_next_split_stands_in(tmp_path):
    config = saved(tmp_path, train=[0, 1, 2], test=[-1, -1, -1], validation_mismatched=[2, 1, 0])
    assert load_splits(config)["test"].label.tolist() == [2, 1, 0]


def test_bad_labels_of_a_split(tmp_path):
    with pytest.raises(UserError, match="saved test, row 0: label must be a class name or number, found list"):
        load_splits(saved(tmp_path, train=[0, 1, 2], test=[[0], [1], [2]]))
    with pytest.raises(UserError, match="saved train: no rows"):
        load_splits(saved(tmp_path / "empty", train=[]))
    with pytest.raises(UserError, match="saved has no train split; it has other"):
        load_splits(saved(tmp_path / "none", other=[0, 1, 2]))


def test_a_folder_of_splits_as_a_file(tmp_path):
    saved(tmp_path, val=[0, 1, 2])
    config = DataConfig(train_file=str(write(tmp_path / "a.csv", ROWS)), validation_file=str(tmp_path / "saved"))
    assert load_splits(config)["dev"].label.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="saved has no test split; it has val"):
        load_pairs(DataConfig(test_file=str(tmp_path / "saved")), "test")


def test_one_split_is_not_all_three(tmp_path):
    datasets.Dataset.from_dict({**TEXTS, "label": [0, 1, 2]}).save_to_disk(str(tmp_path / "one"))
    assert set(load_splits(DataConfig(dataset_name=str(tmp_path / "one")))) == {"train"}


@pytest.mark.parametrize("name", ["./none", "none/", "a/b/c", "saved/trian"])
def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no such folder"):
        load_splits(DataConfig(dataset_name=name))
