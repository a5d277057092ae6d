"""Ranks that would train different runs are refused before the first step, with what differs and where."""

import json

import pytest
import torch
from conftest import Ranks
from families import save_encoder

from trainer.config import Config
from trainer.data.builtin import pairs
from trainer.model.cross_encoder import model_facts
from trainer.model.loading import load_for_training
from trainer.ranks import World, _differences
from trainer.run import versions
from trainer.train import prepare

RUN = ["train", "--model_name_or_path", "builtin", "--max_steps", "3", "--train_batch_size", "16",
       "--logging_steps", "1", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def others() -> dict:
    rows = pairs("train")[:80]
    swapped = [*rows[:5], {**rows[5], "label": (rows[5]["label"] + 1) % 3}, *rows[6:]]
    return {
        "another rate": (["--learning_rate", "1e-3"], rows, "learning_rate is 5e-05 on rank 0"),
        "another seed": (["--seed", "7"], rows, "seed is 42 on rank 0"),
        "another step of saving": (["--save_steps", "2"], rows, "save_steps is 500 on rank 0"),
        "another backend": (["--unpad", "false"], rows, "unpad is True on rank 0"),
        "another label": ([], swapped, "train is "),
        "fewer rows": ([], rows[:40], "train is "),
        "another model": (["--model_name_or_path", "MODEL"], rows, "model_name_or_path is builtin on rank 0"),
    }


@pytest.mark.parametrize("what", others())
def test_ranks_of_different_runs(what, tmp_path, builtin_model):
    options, rows, expected = others()[what]
    for rank, own in enumerate((pairs("train")[:80], rows)):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "train.jsonl", own)
    options = [str(builtin_model) if option == "MODEL" else option for option in options]
    common = [*RUN, "--output_dir", tmp_path / "run", "--train_file"]
    command = [[*common, tmp_path / str(rank) / "train.jsonl", *(options if rank else [])] for rank in range(2)]
    result = Ranks(command[0], 2, None, None, {}, others={1: command[1]}).wait()
    assert result.returncode == 2, result.said
    assert result.said.count("the ranks do not agree") == 1
    assert expected in result.said
    assert "on rank 1" in result.said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def told(monkeypatch, tmp_path, name, config=None, **changes) -> dict:
    """What a rank tells the others before its first step, its model being a folder of its own host."""
    folder = save_encoder(tmp_path / name, "bert", **changes)
    write(tmp_path / "train.jsonl", pairs("train")[:8])
    facts = {}
    monkeypatch.setattr(World, "agree", lambda self, own: facts.update(own()))
    config = Config(model_name_or_path=str(folder), train_file=str(tmp_path / "train.jsonl"), max_length=60,
                    output_dir=str(tmp_path / f"run-{name}"), track_emissions=False, **config or {})  # fmt: skip
    prepare(config, World(0, 1, 0, torch.device("cpu"))).output.close()
    return facts


def test_what_ranks_compare(monkeypatch, tmp_path):
    """Also what no weight shows: config.json, the classes' names, and crossrank's own code."""
    ours = told(monkeypatch, tmp_path, "a")
    theirs = told(monkeypatch, tmp_path, "b", {"label_names": ["yes", "no", "maybe"]}, hidden_dropout_prob=0.3)
    assert ours["model"] == theirs["model"]
    monkeypatch.setattr(versions, "CODE", ("launcher",))
    assert versions.code_hash() != ours["code"]
    del theirs["code"]  # an older version tells nothing of it
    said = _differences([{"host": "x", "facts": ours}, {"host": "y", "facts": theirs}])
    for expected in (
        "config.json's hidden_dropout_prob is 0.0 on rank 0 (x) and 0.3 on rank 1 (y)",
        "config.json's id2label is {'0': 'entailment'",
        f"code is {ours['code']} on rank 0 (x) and nothing on rank 1 (y)",
    ):
        assert expected in said


def test_a_buffer_without_dimensions_has_a_fingerprint(tmp_path):
    config = Config(model_name_or_path=str(save_encoder(tmp_path, "bert")), train_file="x.csv", max_length=60)
    model = load_for_training(config, ["a", "b"])
    model.register_buffer("scale", torch.tensor(2.0))
    before = model_facts(model)["model"]
    model.scale += 1
    assert model_facts(model)["model"] != before
    World(0, 1, 0, torch.device("cpu")).agree(lambda: pytest.fail("one rank has nothing to compare"))


def scoring() -> dict:
    rows = pairs("train")[:80]
    swapped = [*rows[:5], {**rows[5], "premise": "A cat."}, *rows[6:]]
    return {
        "predict, another precision": ("predict", ["--bf16", "true"], rows, "bf16 is False on rank 0"),
        "predict, another model": ("predict", ["OTHER"], rows, "config.json's id2label is "),
        "evaluate, another file": ("evaluate", [], swapped, "test is "),
        "evaluate, another batch": ("evaluate", ["--per_device_eval_batch_size", "8"], rows,
                                    "per_device_eval_batch_size is 64 on rank 0"),
        "evaluate, one file less": ("evaluate", ["NO FILE"], rows, "test is "),
    }  # fmt: skip


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, builtin_model):
    """The same weights under other names of their classes."""
    import shutil

    folder = tmp_path_factory.mktemp("classifiers")
    for name, classes in (("one", "entailment neutral contradiction"), ("other", "contradiction neutral entailment")):
        shutil.copytree(builtin_model, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["id2label"] = dict(enumerate(classes.split()))
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("what", scoring())
def test_ranks_that_score_different_things(what, tmp_path, classifiers):
    verb, options, rows, expected = scoring()[what]
    script = tmp_path / "parts.py"  # the input in parts of 64 rows
    script.write_text("import sys\nfrom trainer.rows import limits\nlimits.ROWS = 64\n"
                      "from trainer import __main__\nsys.exit(__main__.main(sys.argv[1:]))\n")  # fmt: skip
    command = []
    for rank, own in enumerate((pairs("train")[:80], rows)):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "test.jsonl", own)
        file = (
            "--input" if verb == "predict" else "--validation_file" if rank and "NO FILE" in options else "--test_file"
        )
        model = classifiers / ("other" if rank and "OTHER" in options else "one")
        words = [word for word in options if rank and word not in ("OTHER", "NO FILE")]
        command.append([verb, model, file, tmp_path / str(rank) / "test.jsonl", *words])
    result = Ranks(command[0], 2, None, script, {}, others={1: command[1]}).wait()
    assert result.returncode == 2, result.said
    assert result.said.count("the ranks do not agree") == 1
    assert expected in result.said
