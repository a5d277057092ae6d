"""What users choose of how a run is trained: the same run on any ranks, through any backend, interrupted or not."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import crossrank, events, losses
from safetensors.torch import load_file

from trainer import loop
from trainer.cli import parse_train
from trainer.ranks import World
from trainer.report.card import card
from trainer.report.read import read_run
from trainer.run.verified import load
from trainer.train import prepare, train

# All of them at once. By this threshold no evaluation is better than the first: it stops at step 8 of 12.
RUN = ["--recipe", "demo", "--max_train_samples", "290", "--max_eval_samples", "41", "--max_test_samples", "41",
       "--train_batch_size", "32", "--max_steps", "12", "--logging_steps", "1", "--dropout", "0.1", "--max_grad_norm",
       "0.5", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "null", "--track_emissions", "false",
       "--write_report", "false"]  # fmt: skip
CHOICES = [*RUN, "--class_weights", "1,2,0.5", "--label_smoothing_factor", "0.1", "--layerwise_lr_decay", "0.5",
           "--freeze_embeddings", "true", "--lr_scheduler_type", "inverse_sqrt", "--weight_decay", "0.01",
           "--early_stopping_patience", "3", "--early_stopping_threshold", "0.9"]  # fmt: skip


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def saved(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    """A checkpoint's weights and moments."""
    tensors = load(folder / "checkpoints" / f"step-{step:06}").tensors
    return {key: tensors.run(key, 0, math.prod(shape)).reshape(shape) for key, shape in tensors.shapes.items()}


def told(folder: Path) -> list[dict]:
    """metrics.jsonl, but for its times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("choices") / "run"
    said = crossrank("train", *CHOICES, "--output_dir", folder).said
    assert "frozen: the embeddings; 281,859 of 317,571 parameters are trained" in said
    assert "stopped early at step 8 of 12: 3 evaluation(s) with no better f1_macro by more than 0.9" in said
    return folder


def test_it_stopped_early(whole):
    counted = results(whole)["train"]
    assert [counted[name] for name in ("steps", "planned_steps", "stopped_early_at", "epochs")] == [8, 12, 8, 0.8]
    assert [event["step"] for event in events(whole, "train")] == [*range(1, 9)]
    scores = {event["step"]: event["f1_macro"] for event in events(whole, "eval") if event["split"] == "builtin-dev"}
    assert [*scores] == [2, 4, 6, 8]
    assert counted["best_step"] == max(scores, key=lambda step: scores[step])
    assert "- **Stopped early** at step 8 of 12\n" in card(read_run(whole), [])
    # The schedule is that of 12 planned steps, with 10 % of them, rounded up, for warmup.
    rates = [event["learning_rate"] for event in events(whole, "train")]
    assert rates == pytest.approx([0, 5e-4, *(1e-3 * (2 / step) ** 0.5 for step in range(2, 8))])


def test_what_is_frozen_is_in_the_model_and_in_no_checkpoint(whole):
    from trainer.data.builtin import make_config, make_model

    model = load_file(whole / "model" / "model.safetensors")
    start = make_model(make_config(), seed=42).state_dict()
    frozen = {name for name in model if "embeddings" in name}
    assert all(torch.equal(model[name], start[name]) for name in frozen)
    assert {name.removeprefix("weight/model.") for name in saved(whole) if name.startswith("weight/")} == (
        model.keys() - frozen
    )


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (["--step_form", "static"], 0),
        (["--step_form", "static"], 2),
        (["--exact_shards", "2"], 2),
        (["--backend", "ddp", "--per_device_train_batch_size", "7"], 2),
        (["--backend", "fsdp"], 2),
        (["--deepspeed", "zero2"], 2),
        *(pytest.param(["--deepspeed", stage], 2, marks=pytest.mark.full) for stage in ("zero0", "zero1", "zero3")),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else str(value),
)
def test_the_same_run(whole, tmp_path, options, ranks):
    if "--deepspeed" in options:
        pytest.importorskip("deepspeed")
    crossrank("train", *CHOICES, *options, "--output_dir", tmp_path / "run", ranks=ranks)
    if "static" in options:
        assert json.loads((tmp_path / "run" / "about.json").read_text())["step_form"] == "static"
    assert np.allclose(losses(tmp_path / "run"), losses(whole), rtol=0, atol=1e-5)
    assert results(tmp_path / "run")["train"]["stopped_early_at"] == 8
    ours, theirs = saved(tmp_path / "run"), saved(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith("weight/") and not name.endswith("key.bias"):  # whose gradient is rounding alone
            assert (ours[name] - value).abs().max() < 1e-4, name


def killed(whole: Path, folder: Path, step: int) -> Path:
    """A copy of the run as it was when its process died after the checkpoint of `step`; the best model is there."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return folder


@pytest.mark.parametrize("step", [4, 8])
def test_killed_and_resumed_is_bit_equal(whole, tmp_path, step):
    """At the stop there is nothing left but to finish."""
    folder = killed(whole, tmp_path / "run", step)
    said = crossrank("train", *CHOICES, "--output_dir", folder).said
    assert f"resuming at step {step}" in said
    assert told(folder) == told(whole)
    ours, theirs = saved(folder), saved(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    same = ("steps", "stopped_early_at", "best_step", "epochs")
    assert [results(folder)["train"][name] for name in same] == [results(whole)["train"][name] for name in same]


def test_another_frozen_base_is_refused(whole, tmp_path, builtin_model):
    """What is frozen is in no checkpoint, so weights of the same shape would pass for it."""
    other = Path(shutil.copytree(builtin_model, tmp_path / "other"))
    start = [*CHOICES, "--model_name_or_path", other, "--max_steps", "2", "--output_dir"]
    crossrank("train", *start, tmp_path / "a")
    from safetensors.torch import save_file

    weights = load_file(other / "model.safetensors")
    weights["bert.embeddings.position_embeddings.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    result = crossrank("train", *start, tmp_path / "b", "--resume_from_checkpoint", tmp_path / "a", check=False)
    assert result.returncode == 2
    assert "the checkpoint cannot be resumed here" in result.stderr


def short(folder: Path, *options: str):
    return parse_train([*RUN, "--max_steps", "4", *options, "--output_dir", str(folder)])


@pytest.mark.parametrize(("options", "most"), [([], 3), (["--load_best_model_at_end", "false"], 3),
                                               (["--eval_strategy", "no"], 2)])  # fmt: skip
def test_no_evaluation_is_computed_twice(tmp_path, monkeypatch, options, most):
    """Dev at steps 2 and 4, or the last; test at the end."""
    counted, evaluate = [], loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda model, split, *rest: counted.append(split) or evaluate(model, split, *rest)
    )
    train(short(tmp_path / "run", *options))
    assert len(counted) == most
    finals = [e for e in events(tmp_path / "run", "eval") if e["split"] == "builtin-dev"]
    assert finals[-1]["step"] in ({2, 4} if not options else {4})


@pytest.mark.parametrize("last", [False, True])
def test_patience_without_keeping_the_best(tmp_path, last):
    """The weights of the last step are kept; the best value is known all the same."""
    options = ["--early_stopping_patience", "1", "--early_stopping_threshold", "0.9"]
    if last:
        options += ["--load_best_model_at_end", "false"]
    train(short(tmp_path / "run", "--max_steps", "6", "--metric_for_best_model", "loss", *options))
    told = results(tmp_path / "run")["train"]
    dev = [e for e in events(tmp_path / "run", "eval") if e["split"] == "builtin-dev"]
    assert told["stopped_early_at"] == 4
    assert dev[-1]["step"] == (4 if last else told["best_step"])
    assert (told["best_step"] is None) == last


def test_waiting_is_counted_as_in_transformers(tmp_path, monkeypatch):
    """Small steps up are the best so far, but do not end the waiting."""
    from transformers import EarlyStoppingCallback

    options = ["--early_stopping_patience", "3", "--early_stopping_threshold", "0.05"]
    trainer = prepare(short(tmp_path / "run", *options), World(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(trainer, "save_model", lambda: None)
    theirs = EarlyStoppingCallback(3, 0.05)
    args = SimpleNamespace(metric_for_best_model="f1", greater_is_better=True)
    state = SimpleNamespace(best_metric=None)
    control = SimpleNamespace(should_training_stop=False)
    for step, value in enumerate([0.3, 0.4, 0.42, 0.44, 0.50, 0.5, 0.51, 0.2, 0.9], 1):
        trainer.state.step = step
        theirs.check_metric_value(args, state, control, value)
        if state.best_metric is None or value > state.best_metric:
            state.best_metric = value
        trainer.keep_if_best({"f1_macro": value})
        assert trainer.state.waited == theirs.early_stopping_patience_counter
        assert trainer.state.best[0] == state.best_metric
        assert trainer.stopped_early == (theirs.early_stopping_patience_counter >= 3)
    trainer.output.close()
