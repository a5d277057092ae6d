"""Every backend is the same run: losses, gradient norms, weights and F1 of `single`, whatever wires the ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import crossrank, events, losses
from safetensors.torch import load_file

from trainer.backends.deepspeed import CONFIGS

# 31 steps, the last of 1 pair, of which one rank has none; a gradient norm that is always clipped.
RUN = ["--recipe", "demo", "--max_train_samples", "481", "--train_batch_size", "16", "--num_train_epochs", "1",
       "--max_eval_samples", "101", "--max_test_samples", "101", "--logging_steps", "1", "--max_grad_norm", "0.5",
       "--weight_decay", "0.01", "--eval_strategy", "no"]  # fmt: skip
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


@pytest.mark.parametrize("per_device", ["8", "4"], ids=["one forward", "two forwards"])
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
    ours, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", single))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        # Softmax does not see a key's bias: its gradient is rounding alone, which Adam scales up to a step.
        if not name.endswith("key.bias"):
            assert (value - expected[name]).abs().max().item() < 1e-4, name
    results, reference = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", single))
    for split, scores in results["metrics"].items():
        for metric in ("f1_macro", "f1_micro", "f1_weighted"):
            assert scores[metric] == reference["metrics"][split][metric]
