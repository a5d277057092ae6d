"""Every backend is the same run: losses, gradient norms, weights and F1 of `single`, whatever wires the ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, crossrank, events, free_port, losses, weights_equal
from safetensors.torch import load_file

from benchmarks.encoders import make_tiny, tiny_config
from trainer.backends.fsdp import layer_classes
from trainer.backends.single import Single
from trainer.backends.zero_settings import CONFIGS, fill, read_settings
from trainer.base.errors import UserError
from trainer.cli import parse_train
from trainer.model.cross_encoder import CrossEncoder
from trainer.ranks import World

# 31 steps, the last of 1 pair, of which one rank has none; a gradient norm that is always clipped.
RUN = ["--recipe", "demo", "--max_train_samples", "481", "--train_batch_size", "16", "--num_train_epochs", "1",
       "--max_eval_samples", "101", "--max_test_samples", "101", "--logging_steps", "1", "--max_grad_norm", "0.5",
       "--weight_decay", "0.01", "--eval_strategy", "no",
       "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
SLOW = ("ddp", "zero1", "zero3")
BACKENDS = {
    "ddp": ["--backend", "ddp"],
    "fsdp": ["--backend", "fsdp"],
    **{path.stem: ["--deepspeed", path.stem] for path in sorted(CONFIGS.glob("*.json"))},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    crossrank("train", *RUN, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def single_in_bf16(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single-bf16") / "run"
    crossrank("train", *RUN, "--bf16", "--output_dir", folder)
    return folder


@pytest.mark.parametrize("per_device", [pytest.param("8", marks=pytest.mark.full, id="one forward"),
                                        pytest.param("4", id="two forwards")])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_run(single, tmp_path, backend, per_device):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    options = [*BACKENDS[backend], "--per_device_train_batch_size", per_device]
    crossrank("train", *RUN, *options, "--output_dir", tmp_path / "run", ranks=2)
    assert len(losses(single)) == 31
    assert np.allclose(losses(tmp_path / "run"), losses(single), rtol=0, atol=1e-5)
    norms = [[event["grad_norm"] for event in events(folder, "train")] for folder in (tmp_path / "run", single)]
    assert min(norms[1]) > 0.5
    assert np.allclose(*norms, rtol=1e-4)
    weights_equal(tmp_path / "run", single, within=1e-5)
    results, reference = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", single))
    for split, scores in results["metrics"].items():
        for metric in ("f1_macro", "f1_micro", "f1_weighted"):
            assert scores[metric] == reference["metrics"][split][metric]


@pytest.mark.parametrize(
    "backend", ["fsdp", "zero3", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddp", "zero2"))]
)
def test_bf16_is_nearly_the_same_run(single, single_in_bf16, tmp_path, backend):
    """Autocast in every backend, over fp32 weights. How far bf16 is from fp32 depends on the processor's products."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    options = [*BACKENDS[backend], "--per_device_train_batch_size", "8", "--bf16"]
    crossrank("train", *RUN, *options, "--output_dir", tmp_path / "run", ranks=2)
    assert np.allclose(losses(tmp_path / "run"), losses(single_in_bf16), rtol=0, atol=0.03)
    assert not np.allclose(losses(tmp_path / "run"), losses(single), rtol=0, atol=1e-5)
    assert {value.dtype for value in load_file(tmp_path / "run/model/model.safetensors").values()} == {torch.float32}


def test_gradients_sent_in_bf16(single, tmp_path):
    """Half the bytes, and nearly the same run."""
    crossrank("train", *RUN, "--ddp_comm_hook", "bf16", "--output_dir", tmp_path / "run", ranks=2)
    assert np.allclose(losses(tmp_path / "run"), losses(single), rtol=0, atol=0.03)
    assert not np.allclose(losses(tmp_path / "run"), losses(single), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_one_rank_alone(single, tmp_path, backend):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    crossrank(
        "train", *RUN, *BACKENDS[backend], "--max_steps", "5", "--warmup_steps", "4", "--output_dir", tmp_path / "a"
    )
    crossrank("train", *RUN, "--max_steps", "5", "--warmup_steps", "4", "--output_dir", tmp_path / "b")
    assert np.allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_the_best_model_comes_back(tmp_path, backend):
    """A learning rate that wrecks the model at the end; the final evaluation is of the weights that were best."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    options = ["--learning_rate", "0.03", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--max_steps", "9",
               "--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end", "--metric_for_best_model",
               "loss", *BACKENDS[backend]]  # fmt: skip
    crossrank("train", *RUN, *options, "--output_dir", tmp_path / "run", ranks=2)
    *during, final = [e for e in events(tmp_path / "run", "eval") if e["split"] == "builtin-dev"]
    best = min(during, key=lambda event: event["loss"])
    assert final["loss"] == pytest.approx(best["loss"])
    assert final["loss"] < during[-1]["loss"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert best["step"] == final["step"] == results["train"]["best_step"]


def test_a_step_is_skipped_on_the_device(monkeypatch):
    """Whatever the norm is, the host does not ask for it; what is skipped leaves AdamW as it was."""
    config = parse_train(["--recipe", "demo", "--skip_nonfinite", "1", "--output_dir", "x"])
    module, backend = torch.nn.Linear(3, 2), Single(World(0, 1, 0, torch.device("cpu")), config)
    backend.prepare(module)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("the host waits"))
    for value in (1.0, torch.inf, torch.nan):
        module(torch.ones(1, 3)).sum().mul(value).backward()
        norm = backend.step(1e-3, 1.0)
        state = {name: [tensor.clone() for tensor in own.values()] for name, own in backend.optimizer.state.items()}
        if value == 1.0:
            before, weight = state, module.weight.detach().clone()
        else:
            assert not math.isfinite(norm)
    monkeypatch.undo()
    assert torch.equal(module.weight, weight)
    assert all(torch.equal(a, b) for name in state for a, b in zip(state[name], before[name], strict=True))


def test_what_is_saved_is_not_made_anew(monkeypatch):
    config = parse_train(["--recipe", "demo", "--output_dir", "x"])
    module, backend = torch.nn.Linear(3, 2), Single(World(0, 1, 0, torch.device("cpu")), config)
    backend.prepare(module)
    before = backend.save_state().runs
    backend.make_moments(3)
    monkeypatch.setattr(torch, "zeros_like", lambda like: pytest.fail("as large as the moment that there is"))
    after = backend.save_state().runs
    assert all(torch.equal(after[key][1], before[key][1]) for key in before | after)


CONFIG = ["--recipe", "demo", "--deepspeed", "zero2"]


def test_deepspeeds_own_calls_are_not_the_users_business(tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "warns.py"
    script.write_text(
        "import sys, warnings\nfrom trainer import __main__, train\nloop = train.Trainer.loop\n"
        "def warns(self):\n    warnings.warn('mine goes', FutureWarning)\n    return loop(self)\n"
        "train.Trainer.loop = warns\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    options = ["--recipe", "demo", "--max_train_samples", "330", "--max_steps", "3", "--track_emissions", "false",
               "--write_report", "false", "--deepspeed", "zero3"]  # fmt: skip
    result = crossrank("train", *options, "--output_dir", tmp_path / "run", ranks=2, script=script)
    assert "is deprecated" not in result.stderr
    assert "FutureWarning: mine goes" in result.stderr


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.json")])
def test_shipped_configs_are_valid_for_deepspeed_alone(name):
    deepspeed = pytest.importorskip("deepspeed")
    filled = fill(read_settings(name), name, parse_train(CONFIG), 1)
    assert deepspeed.DeepSpeedConfig(filled).zero_config.stage == int(name[4])
    assert '"auto"' not in json.dumps(filled)
    rows = (CONFIGS / "README.md").read_text()
    for key in {*read_settings(name), *read_settings(name)["zero_optimization"]} - {"zero_optimization"}:
        assert key.split(".")[0] in rows, f"{key} is there for no reason that README.md gives"


BAD = [
    ({"train_batch_size": 32}, "train_batch_size is 32, but train_batch_size is 64"),
    ({"gradient_clipping": 5.0}, "gradient_clipping is 5.0, but max_grad_norm is 1.0"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}, "optimizer.params.lr is 0.01, but learning_rate is"),
    ({"optimizer": {"type": "SGD"}}, "optimizer.type is SGD"),
    ({"scheduler": {"type": "WarmupLR"}}, "has a scheduler"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is set"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is set"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True, but bf16 is False"),
    ({"zero_optimization": {"stage": 4}}, "unknown zero_optimization.stage 4"),
]


@pytest.mark.parametrize(("settings", "expected"), BAD)
def test_contradictions_are_refused(settings, expected):
    with pytest.raises(UserError) as caught:
        fill(settings, "mine.json", parse_train(CONFIG), 1)
    assert expected in str(caught.value)
    assert "mine.json" in str(caught.value)


def test_auto_is_no_contradiction():
    """A config as transformers' users have it."""
    auto = {"enabled": "auto"}
    theirs = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": auto,
        "fp16": auto, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
    }  # fmt: skip
    assert fill(theirs, "theirs.json", parse_train(CONFIG), 2)["zero_optimization"] == {"stage": 3}


def test_unknown_and_broken_configs(tmp_path):
    with pytest.raises(UserError, match="did you mean 'zero3'"):
        read_settings("zero33")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_settings(str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match="deepspeed is set, but backend is ddp"):
        parse_train([*CONFIG, "--backend", "ddp"])


def test_deepspeeds_own_launcher(single, tmp_path):
    """`deepspeed` puts --local_rank before the verb."""
    import subprocess
    import sys

    pytest.importorskip("deepspeed")
    start = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "--module"]
    command = [*start, "crossrank", "train", *RUN, "--deepspeed", "zero2", "--output_dir",
               tmp_path / "run"]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert np.allclose(losses(tmp_path / "run"), losses(single), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("deberta-v2", {"DebertaV2Layer"}),
        ("electra", {"ElectraLayer"}),
        ("bert", {"BertEmbeddings", "BertLayer"}),  # which the library names
        ("albert", set()),  # one layer, computed twice
        ("funnel", set()),  # lists of lists
    ],
)
def test_what_fsdp_gathers_by_itself(family, expected):
    assert layer_classes(CrossEncoder(make_tiny(tiny_config(family, 97)))) == expected
