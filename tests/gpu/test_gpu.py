"""On a real GPU, by `pytest -m gpu`: what no CPU can show.

CROSSRANK_GPU_TESTS_ON=cpu rehearses those that can run on a CPU.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, events, losses, weights_equal
from test_attention import assert_equal, gradients, library_logits, make, make_tokens

from benchmarks.encoders import make_tiny, tiny_config
from trainer.loop import Trainer
from trainer.model.attention import input_layers
from trainer.model.batch import IGNORED
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.families import FAMILIES
from trainer.model.products import Products
from trainer.ranks import World

ON = torch.device(os.environ.get("CROSSRANK_GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
cuda_alone = pytest.mark.skipif(ON.type != "cuda", reason="CPUs have no such thing")
LENGTHS = [[3], [7, 30, 12, 3, 25], [512, 40], list(range(5, 69))]
RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "4", "--save_total_limit", "null",
       "--dropout", "0.1", "--max_grad_norm", "0.5", "--track_emissions", "false",
       "--write_report", "false"]  # fmt: skip
# ZeRO's optimizer on the CPU is compiled where it is used.
BACKENDS = {"fsdp": ["--backend", "fsdp"], **{f"zero{stage}": ["--deepspeed", f"zero{stage}"] for stage in range(4)},
            "zero2_offload": ["--deepspeed", "zero2_offload"]}  # fmt: skip
LIMITED = """
import sys, torch
from trainer.__main__ import main
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 2**30 / whole)
sys.exit(main(sys.argv[2:]))
"""


def crossrank(*arguments: object, script: str | None = None, env: dict[str, str] | None = None) -> str:
    """Runs the command line on the device; returns what it said."""
    start = ["-c", script] if script else ["-m", "crossrank"]
    where = {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"} if ON.type == "cuda" else {}
    result = subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | where | (env or {}))  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    said = crossrank("train", *RUN, "--bf16", "false", "--output_dir", folder)
    assert f"on {ON.type}, 1 rank(s), backend single" in said
    return folder


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_library(family, unpad, lengths):
    model = make(family).to(ON)
    theirs = copy.deepcopy(model)
    assert_equal(CrossEncoder(model, unpad=unpad), theirs, lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_in_bf16(family):
    """As near to the padded forward in bf16 as that is to fp32, with room for one more rounding."""
    model, tokens = make(family).to(ON).eval(), make_tokens(LENGTHS[1])
    theirs = copy.deepcopy(model)
    ours = CrossEncoder(model)
    batch = ours.batch(tokens, np.zeros(5, int), np.arange(5), ON)
    with torch.no_grad():
        exact = library_logits(theirs, tokens)[batch.rows]
        with torch.autocast(ON.type, torch.bfloat16):
            got, expected = ours(batch).float(), library_logits(theirs, tokens)[batch.rows].float()
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-3


def test_the_cpu_computes_the_same(whole, tmp_path):
    """Masks, order and schedule do not depend on the device."""
    crossrank("train", *RUN, "--bf16", "false", "--output_dir", tmp_path / "run", env={"CUDA_VISIBLE_DEVICES": ""})
    assert np.allclose(losses(tmp_path / "run"), losses(whole), rtol=0, atol=1e-3)


@pytest.mark.parametrize("padded", [True, False], ids=["memory-efficient", "flash"])
@pytest.mark.parametrize("family", ["modernbert", "gpt2"])
def test_gradients_of_fused_attention_are_bit_equal(family, padded):
    """Many blocks of keys and of queries, whose products the kernels would add up in any order."""
    model = CrossEncoder(make(family) if family in FAMILIES else make_tiny(tiny_config(family, 97))).to(ON).train()
    tokens = make_tokens([150, 120, 90, 160] if padded else [160] * 4, eos=3)
    batch = model.batch(tokens, np.zeros(4, int), np.arange(4), ON)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast(ON.type, torch.bfloat16):
            scores = model(batch)
        scores.float().square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    first = gradients()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_resumed_is_bit_equal(tmp_path, bf16):
    command = ["train", *RUN, "--bf16", bf16, "--output_dir"]
    crossrank(*command, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if path.name > "step-000004":
            shutil.rmtree(path)
    (tmp_path / "again" / "results.json").unlink()
    shutil.rmtree(tmp_path / "again" / "model")
    assert "resuming at step 4" in crossrank(*command, tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("again", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_run(whole, tmp_path, backend):
    """One rank, wired by NCCL."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    crossrank("train", *RUN, "--bf16", "false", *BACKENDS[backend], "--output_dir", tmp_path / "run")
    assert np.allclose(losses(tmp_path / "run"), losses(whole), rtol=0, atol=1e-4)
    norms = [[event["grad_norm"] for event in events(folder, "train")] for folder in (tmp_path / "run", whole)]
    assert np.allclose(*norms, rtol=1e-3)
    weights_equal(tmp_path / "run", whole, within=1e-3)


@cuda_alone
@pytest.mark.parametrize("form", ["plain", "captured"])
def test_a_step_does_not_wait_for_the_device(tmp_path, form):
    """torch raises at every call that would."""
    from trainer.cli import parse_train
    from trainer.train import prepare, settle_step

    options = [*RUN, "--bf16", "true", "--step_form", form, "--output_dir", str(tmp_path / "run")]
    trainer: Trainer = prepare(parse_train(options), World(0, 1, 0, ON))
    settle_step(trainer)
    trainer.model.train()
    for _ in range(2):  # the second time, tables are made and graphs are recorded
        for current in trainer.sampler.steps():
            trainer.take(current, 1e-4)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.step_form == form
    trainer.output.close()


def form_of(folder: Path) -> str:
    return json.loads((folder / "about.json").read_text())["step_form"]


@pytest.mark.parametrize("bf16", ["true", "false"])
@pytest.mark.parametrize("options", [[], ["--per_device_train_batch_size", "24"]], ids=["whole", "parts"])
def test_a_captured_step_is_the_plain_one(tmp_path, bf16, options):
    """As a graph, and as the function that it is recorded from, which gives the same bits."""
    forms = ["plain", "static", *(["captured"] if ON.type == "cuda" else [])]
    for form in forms:
        folder = tmp_path / form
        crossrank("train", *RUN, *options, "--bf16", bf16, "--step_form", form, "--output_dir", folder)
        assert form_of(folder) == form
        assert np.allclose(losses(folder), losses(tmp_path / "plain"), rtol=0, atol=2e-2 if bf16 == "true" else 1e-3)
    bits = {form: (tmp_path / form / "model" / "model.safetensors").read_bytes() for form in forms[1:]}
    assert len(set(bits.values())) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_static_step_of_every_family(family):
    """What it is checked by before it is trusted, in bf16, with the kernels."""
    lengths = list(range(3, 67))
    encoder = CrossEncoder(make(family, dropout=0.1).to(ON)).train()
    found = {}
    for name, (bf16, static) in {"exact": (False, False), "plain": (True, False), "static": (True, True)}.items():
        if static:
            Products(encoder.model, encoder.layout, input_layers(encoder.model), torch.bfloat16)
        encoder.layout.fast = static
        shape = {"num_pairs": 64} if static else {}
        batch = encoder.batch(make_tokens(lengths), np.arange(64) % 3, np.arange(64), ON, seed=1, step=2, **shape)
        with torch.autocast(ON.type, torch.bfloat16, enabled=bf16):
            logits = encoder(batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels, ignore_index=IGNORED)
        found[name] = gradients(encoder.model, loss)
    exact = torch.cat([g.flatten() for g in found["exact"].values()])
    plain, static = (torch.cat([g.flatten() for g in found[name].values()]) - exact for name in ("plain", "static"))
    assert static.norm() <= 1.5 * plain.norm()


@cuda_alone
def test_a_wrong_kernel_is_found_on_the_card(tmp_path):
    script = (
        "import sys\nfrom trainer import __main__\nfrom trainer.model import triton_kernels\n"
        "right = triton_kernels.attend_backward\n"
        "triton_kernels.attend_backward = lambda *args: right(*args) * 1.1\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    options = [*RUN, "--bf16", "true", "--output_dir"]
    crossrank("train", *options, tmp_path / "plain", "--step_form", "plain")
    said = crossrank("train", *options, tmp_path / "wrong", script=script)
    assert "the captured step is not used, all steps are plain: the gradient of" in said
    assert losses(tmp_path / "wrong") == losses(tmp_path / "plain")


@cuda_alone
def test_a_forward_that_does_not_fit_is_split(tmp_path, allnli, roberta_tokenizer):
    """1,024 pairs of distilroberta's shape keep some 8 GB; with 5 GiB it is two or more forwards, and the same run."""
    from transformers import RobertaConfig

    shutil.copytree(roberta_tokenizer, tmp_path / "model")
    RobertaConfig(
        num_hidden_layers=6, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
    ).save_pretrained(tmp_path / "model")
    command = ["train", "--recipe", "allnli-100k", "--model_name_or_path", tmp_path / "model", "--init", "random",
               "--train_file", allnli / "train.parquet", "--train_batch_size", 1024, "--per_device_train_batch_size",
               1024, "--max_steps", 3, "--logging_steps", 1, "--eval_on_start", "false", "--eval_strategy", "no",
               "--save_strategy", "no", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
    crossrank(*command, "--output_dir", tmp_path / "whole")
    said = crossrank(5, *command, "--output_dir", tmp_path / "split", script=LIMITED)
    assert "not enough GPU memory: continuing with" in said
    assert np.allclose(losses(tmp_path / "split"), losses(tmp_path / "whole"), rtol=0, atol=1e-2)


@cuda_alone
def test_energy_of_the_card_is_measured(tmp_path):
    crossrank("train", *RUN, "--track_emissions", "true", "--country_iso_code", "FRA", "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["energy"]["kwh"] > 0
    assert "gpu_energy" in (tmp_path / "run" / "emissions.csv").read_text().splitlines()[0]
