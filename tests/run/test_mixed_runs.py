"""A run on three sources with weights: the same on any number of ranks, and over a resume."""

import json
import shutil

import numpy as np
import pytest
from conftest import crossrank, losses, weights_equal
from safetensors.torch import load_file

from trainer.data.builtin import pairs

OPTIONS = ["--model_name_or_path", "builtin", "--dropout", "0.1", "--train_batch_size", "16", "--num_train_epochs", "3",
           "--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "3", "--save_total_limit", "null",
           "--track_emissions", "false", "--write_report", "false", "--max_samples_per_source", "40"]  # fmt: skip
TEXTS = ("premise", "hypothesis", "label")
WEIGHTS = ["--source_weights", "one=0.5,two=1.5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name them; the test sets are called by their folders."""
    folder = tmp_path_factory.mktemp("files")
    for number, name in enumerate(("one", "two", "three", "a/test", "b/test")):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{key: row[key] for key in TEXTS} for row in pairs("train")[number * 60 : number * 60 + 50]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ",".join(str(folder / f"{name}.jsonl") for name in ("one", "two", "three"))
    return ["--train_file", train, "--test_file", f"{folder}/*/test.jsonl"]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    crossrank("train", *files, *OPTIONS, *WEIGHTS, "--output_dir", folder)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_run(files, whole, tmp_path, ranks):
    crossrank("train", *files, *OPTIONS, *WEIGHTS, "--output_dir", tmp_path / "run", ranks=ranks)
    assert len(losses(whole)) == 24  # 20 + 60 + 40 pairs are 8 steps
    assert np.allclose(losses(tmp_path / "run"), losses(whole), rtol=0, atol=1e-5)
    weights_equal(tmp_path / "run", whole, within=1e-4)


def test_killed_and_resumed_is_bit_equal(files, whole, tmp_path):
    """In the middle of its second epoch. Other weights are another run."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name > "step-000012":
            shutil.rmtree(path)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "model")
    command = ["train", *files, *OPTIONS, "--output_dir", folder]
    result = crossrank(*command, "--source_weights", "one=0.5,two=2", check=False)
    assert result.returncode == 2
    assert "source_weights: saved ['one=0.5', 'two=1.5'], now ['one=0.5', 'two=2']" in result.said
    assert "resuming at step 12" in crossrank(*command, *WEIGHTS).said
    assert losses(folder) == losses(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_what_a_run_says_of_its_sources(whole):
    about, results = (json.loads((whole / name).read_text()) for name in ("about.json", "results.json"))
    train = about["data"]["train"]
    assert train["sources"] == [
        {"name": "one", "size": 40, "weight": 0.5, "epoch_size": 20},
        {"name": "two", "size": 40, "weight": 1.5, "epoch_size": 60},
        {"name": "three", "size": 40, "weight": 1.0, "epoch_size": 40},
    ]
    assert train["files"] == ["one.jsonl", "two.jsonl", "three.jsonl"]
    assert about["dataset"]["name"] == "one.jsonl, two.jsonl and three.jsonl"
    assert list(results["metrics"]) == ["a-test", "b-test"]
    assert {path.name for path in (whole / "predictions").iterdir()} == {"a-test.parquet", "b-test.parquet"}
    assert results["train"]["epochs"] == 3
