"""docs/coming-from.md: its tables against what is installed, and its two examples, run as they stand there."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, crossrank

from trainer.base.fields import default
from trainer.config import Config

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
OURS = {own.name: default(own) for own in dataclasses.fields(Config)}
# Among what stands as code in the column of ours, without being a field.
NO_FIELDS = {"train", "crossrank launch", "train_dataset", "eval_dataset"}


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose first column is called so."""
    lines = PAGE.split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("heading", ["sentence-transformers", "run_glue.py", "TrainingArguments"])
def test_our_fields_exist(heading):
    for theirs, ours, *_ in table(heading):
        assert set(words(ours)) <= OURS.keys() | NO_FIELDS, theirs
        # Nothing without a reason.
        assert words(ours) or ours.startswith(("none: ", "always", "from the data", "the same")), theirs
        assert ours != "none", theirs


def theirs() -> dict[str, object]:
    from transformers import TrainingArguments

    return {own.name: default(own) for own in dataclasses.fields(TrainingArguments)}


def test_every_option_of_transformers_is_there_once():
    named = [name for row in table("TrainingArguments") for name in words(row[0])]
    assert len(named) == len(set(named))
    assert set(named) == theirs().keys()


def test_options_of_the_same_name_mean_the_same_or_it_is_said():
    """A default that differs is in the last column, theirs and ours; and nothing else is."""
    options = theirs()
    for names, ours, defaults in table("TrainingArguments"):
        for name in words(names):
            if name not in OURS:
                continue
            assert name in words(ours), name
            differs = options[name] != OURS[name]
            assert words(defaults) == ([repr(options[name]), repr(OURS[name])] if differs else []), name
        if not set(words(names)) & OURS.keys():
            assert defaults == "", names


def test_names_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    import inspect

    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        evaluation,
        losses,
    )

    named: set[str] = set()
    own_options = {own.name for own in dataclasses.fields(CrossEncoderTrainingArguments)} - theirs().keys()
    classes = {"CrossEncoder": CrossEncoder, "CrossEncoderTrainer": CrossEncoderTrainer}
    for cell, *_ in table("sentence-transformers"):
        for word in words(cell):
            named.add(word)
            name, _, rest = word.partition("(")
            owner = classes.get(name) or getattr(losses, name, None) or getattr(evaluation, name, None)
            if owner is None:
                assert name in {*own_options, "train_dataset"}, word
                continue
            assert {part.strip() for part in rest.strip(")").split(",") if part} <= {
                *inspect.signature(owner).parameters
            }
    assert own_options <= named
    every = [name for name in losses.__all__ if name.endswith("Loss")]
    assert {name.partition("(")[0] for name in named} >= {*every, *evaluation.__all__[:4]}


@pytest.mark.parametrize("example", ["A mix, and sets of two classes", "Scores, as in STS-B"])
def test_the_examples_run(example, tmp_path, monkeypatch):
    part = re.split(r"\n##+ ", PAGE.split(f"### {example}\n")[1])[0]
    monkeypatch.chdir(tmp_path)
    for kind, block in re.findall(r"```(python|sh)\n(.*?)```", part, re.DOTALL):
        if kind == "python":
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-c", block], check=True, env=env)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            program, *arguments = line.split()
            assert program == "crossrank"
            crossrank(*arguments)
    CHECKS[example](tmp_path)


def of_the_mix(folder: Path) -> None:
    results = json.loads((folder / "runs" / "mix" / "results.json").read_text())
    scores = results["metrics"]
    for split in ("rte-test", "hans-test"):
        assert len(scores[split]["label_names"]) == 2
        assert (folder / "runs" / "mix" / "predictions" / f"{split}.parquet").exists()
    assert len(next(own for split, own in scores.items() if split.startswith("dev"))["label_names"]) == 3
    # 360 + 180 + half of 90, in 32s, twice
    assert results["train"]["steps"] == 2 * 19


def of_the_scores(folder: Path) -> None:
    (scores,) = json.loads((folder / "runs" / "sts" / "results.json").read_text())["metrics"].values()
    assert {"loss", "spearman", "pearson"} <= scores.keys()
    lines = (folder / "scores.csv").read_text().splitlines()
    assert len(lines) == 91
    assert "score" in lines[0].split(",")


CHECKS = {"A mix, and sets of two classes": of_the_mix, "Scores, as in STS-B": of_the_scores}
