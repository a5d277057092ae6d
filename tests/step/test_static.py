"""The static step, the function that a GPU captures, on a CPU: the plain step's run, checked, resumed, on two ranks."""

import copy
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Ranks, crossrank, losses, weights_equal
from hypothesis import given
from hypothesis import strategies as st
from test_attention import CASES, gradients, make, make_tokens

from trainer.base.errors import TrainingFailed
from trainer.cli import parse_train
from trainer.data.sampler import Step
from trainer.model import kernels, plain_kernels
from trainer.model.attention import input_layers
from trainer.model.batch import IGNORED, shape_of
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.products import Products
from trainer.ranks import World
from trainer.step.form import make_step
from trainer.step.graphs import Graphs, NotAsExpected, Recorder
from trainer.step.static import StaticStep
from trainer.train import prepare

CPU = torch.device("cpu")
RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "51", "--max_test_samples", "51",
       "--logging_steps", "1", "--num_train_epochs", "2", "--save_steps", "4", "--save_total_limit", "null",
       "--dropout", "0.1", "--max_grad_norm", "0.5", "--track_emissions", "false", "--write_report", "false",
       "--eval_strategy", "no", "--train_batch_size", "64"]  # fmt: skip
STATIC = [*RUN, "--step_form", "static"]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64))
def test_what_fills_a_shape_are_pairs(lengths):
    """So many that each has a token, and none is longer than the longest."""
    shape = shape_of(np.array(lengths), 64)
    pairs, tokens = shape.pairs - len(lengths), shape.tokens - sum(lengths)
    assert pairs <= tokens <= pairs * shape.longest
    assert max(lengths) <= shape.longest


@pytest.mark.parametrize("family", [case for case in CASES if case not in ("deberta-v2, one layer",)])
def test_logits_and_gradients_are_the_plain_ones(family):
    """Filled up, with the kernels' plain equals and joint products in fp32, dropout on."""
    lengths = [7, 30, 12, 3, 25, 40, 18]
    model = make(family, dropout=0.2)
    found = {}
    for static in (False, True):
        encoder = CrossEncoder(copy.deepcopy(model)).train()
        assert encoder.layout.unpad
        options = {"num_pairs": 9} if static else {}
        batch = encoder.batch(make_tokens(lengths), np.arange(7) % 3, np.arange(7), CPU, seed=1, step=2, **options)
        if static:
            Products(encoder.model, encoder.layout, input_layers(encoder.model), torch.float32)
            encoder.layout.fast = True
            assert batch.num_pairs > len(lengths)
        logits = encoder(batch)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=IGNORED)
        found[static] = logits[:7].detach(), gradients(encoder.model, loss)
    assert torch.allclose(found[True][0], found[False][0], rtol=0, atol=1e-6)
    largest = max(gradient.norm() for gradient in found[False][1].values())
    for name, gradient in found[False][1].items():
        difference = (found[True][1][name] - gradient).norm()
        # Of nothing but rounding there is no relative size.
        assert difference < 2e-6 * gradient.norm().clamp(min=1e-2 * largest), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    crossrank("train", *RUN, "--output_dir", folder / "plain")
    crossrank("train", *STATIC, "--output_dir", folder / "static")
    return folder


def form(folder) -> str:
    return json.loads((folder / "about.json").read_text())["step_form"]


def bits(folder) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_the_run_is_the_plain_one(runs):
    assert (form(runs / "plain"), form(runs / "static")) == ("plain", "static")
    assert np.allclose(losses(runs / "static"), losses(runs / "plain"), rtol=0, atol=1e-6)
    weights_equal(runs / "static", runs / "plain", within=1e-3)


@pytest.mark.parametrize("options", [["--per_device_train_batch_size", "24"], ["--bf16", "true"]], ids=str)
def test_resumed_is_bit_equal(tmp_path, options):
    """After a kill, with gradients that add up over forwards of several shapes, and with rounded weights."""
    command = ["train", *STATIC, *options, "--output_dir"]
    crossrank(*command, tmp_path / "whole")
    killed = Ranks([*command, tmp_path / "again"], 0, None, None, {})
    while not (tmp_path / "again" / "checkpoints" / "step-000004").exists():
        assert killed.processes[0].is_alive(), killed.said
        time.sleep(0.01)
    os.kill(killed.processes[0].pid, signal.SIGKILL)
    killed.processes[0].join()
    assert "resuming at step" in crossrank(*command, tmp_path / "again").said
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert bits(tmp_path / "again") == bits(tmp_path / "whole")
    assert form(tmp_path / "again") == "static"


def test_two_ranks(runs, tmp_path):
    """They add up their gradients between two functions; the short last batch leaves one rank's forward empty."""
    said = crossrank("train", *STATIC, "--output_dir", tmp_path / "run", ranks=2).said
    assert "backend ddp" in said
    assert form(tmp_path / "run") == "static"
    assert np.allclose(losses(tmp_path / "run"), losses(runs / "static"), rtol=0, atol=1e-5)
    weights_equal(tmp_path / "run", runs / "static", within=1e-3)


@pytest.mark.parametrize(("ranks", "bf16"), [(0, "false"), (2, "true")])
def test_a_wrong_kernel_is_found_and_the_run_goes_on(tmp_path, bf16, ranks):
    """On one rank of two as well: both go on by plain steps, from where they were."""
    script = tmp_path / "wrong.py"
    script.write_text(
        "import os, sys\nfrom trainer import __main__\nfrom trainer.model import plain_kernels\n"
        "right = plain_kernels.attend_backward\n"
        "def wrong(*args):\n    return right(*args) * 1.1\n"
        "if os.environ.get('RANK', '0') == os.environ['WRONG']:\n    plain_kernels.attend_backward = wrong\n"
        "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    options = ["--bf16", bf16, "--max_steps", "5", "--output_dir"]
    wrong = "1" if ranks else "0"
    crossrank("train", *RUN, *options, tmp_path / "plain", ranks=ranks)
    said = crossrank("train", *STATIC, *options, tmp_path / "wrong", ranks=ranks, script=script, WRONG=wrong).said
    assert said.count("the static step is not used, all steps are plain: the gradient of bert.encoder.layer") == 1
    assert form(tmp_path / "wrong").startswith("plain, since another form failed: the gradient of")
    assert losses(tmp_path / "wrong") == losses(tmp_path / "plain")
    assert bits(tmp_path / "wrong") == bits(tmp_path / "plain")
    # And it stays plain when it is resumed, though nothing is wrong any more.
    (tmp_path / "wrong" / "results.json").unlink()
    said = crossrank("train", *STATIC, *options, tmp_path / "wrong", ranks=ranks).said
    assert "no static steps: plain, since another form failed" in said


@pytest.fixture
def trainer(tmp_path):
    made = prepare(parse_train([*RUN, "--output_dir", str(tmp_path / "run")]), World(0, 1, 0, CPU))
    yield made
    made.output.close()


class Forgetting(Recorder):
    """Its replays change nothing."""

    def record(self, function):
        return lambda: None


class Failing(Recorder):
    """Gets half way, as a capture that fails: it leaves gradients, and then an error."""

    def __init__(self, plain, error):
        self.plain, self.error = plain, error

    def record(self, function):
        for parameter in self.plain.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e3) if parameter.requires_grad else None
        raise self.error


def norms(trainer, recorder, steps=3) -> list[float]:
    trainer.settle(StaticStep(trainer.plain, recorder) if recorder else None)
    return [float(trainer.take(trainer.sampler.at(number), 1e-3)) for number in range(steps)]


def test_what_is_replayed_is_tried(trainer, said):
    before = copy.deepcopy(trainer.model.state_dict())
    static = StaticStep(trainer.plain, Forgetting())
    with pytest.raises(NotAsExpected, match="computed as a CUDA graph, it gives other bits"):
        static(trainer.sampler.at(0), 1e-3)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert float(trainer.state.window.loss) == 0
    assert all(p.grad is None for p in trainer.model.parameters())
    static.close()
    StaticStep(trainer.plain, Recorder())(trainer.sampler.at(0), 1e-3)
    assert float(trainer.state.window.loss) > 0


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: operation not permitted"), torch.OutOfMemoryError()])
def test_a_recording_that_fails_leaves_nothing(tmp_path, said, error):
    """Neither do the steps that follow it see its gradients, nor those in its place."""
    found = []
    for name in ("plain", "failing"):
        trainer = prepare(parse_train([*RUN, "--output_dir", str(tmp_path / name)]), World(0, 1, 0, CPU))
        trainer.model.train()
        found.append(norms(trainer, Failing(trainer.plain, error) if name == "failing" else None))
        trainer.output.close()
    assert np.allclose(*found, rtol=1e-5)
    distrusted = any("all steps are plain: RuntimeError: CUDA error" in line for line in said)
    # For want of memory the function runs as it is.
    assert distrusted == (not isinstance(error, torch.OutOfMemoryError))
    assert (trainer.static is None) == distrusted


def test_a_recording_meets_no_older_forward(trainer):
    """Autograd's nodes of parameters know the stream on which they were made, which is not the one that is recorded."""
    seen = []

    def nodes(loss):
        waiting, found = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found.add(node)
                waiting += [child for child, _ in node.next_functions]
        return [node for node in found if "AccumulateGrad" in node.name()]

    class Watching(Recorder):
        def record(self, function):
            seen.append(None)
            function()
            return function

    loss = trainer.plain.loss

    def watched(logits, batch):
        value = loss(logits, batch)
        found = nodes(value)
        assert found
        if seen:
            assert not any(node.metadata.get("seen") for node in found)
        for node in found:
            node.metadata["seen"] = True
        return value

    watched.divisor = loss.divisor
    trainer.plain.loss = watched
    trainer.model.train()
    StaticStep(trainer.plain, Watching())(trainer.sampler.at(0), 1e-3)
    assert seen


def test_a_failure_in_what_was_met_before_is_not_hidden(trainer):
    """An epoch's short last batch can be one forward of a shape that others have met as a part."""
    trainer.plain.micro_batch_size = 40
    trainer.model.train()
    static = StaticStep(trainer.plain, None)
    rows = trainer.sampler.at(0).rows
    parts = trainer.plain.micro_batches(trainer.sampler.at(0))
    static(trainer.sampler.at(0), 1e-3)
    static.graphs.run = lambda *args: (_ for _ in ()).throw(NotAsExpected("wrong"))
    with pytest.raises(NotAsExpected, match="wrong"):
        static(Step(1, 0, parts[0]), 1e-3)
    with pytest.raises(TrainingFailed, match="wrong"):
        static(Step(2, 0, rows), 1e-3)


def test_memory_for_fewer_graphs_than_shapes():
    """What cannot be recorded any more runs as it is; what cannot even do that is not to be trusted."""
    value, room = torch.zeros(3), [2]

    class Small(Recorder):
        def record(self, function):
            if room[0] == 0:
                raise torch.OutOfMemoryError
            room[0] -= 1
            return lambda: function()

    def too_large():
        raise torch.OutOfMemoryError

    graphs = Graphs(Small())
    for key in (1, 2, 3, 3, 4):
        graphs.run(key, lambda: value.add_(1), lambda: [value])
        graphs.keep()
    assert value.tolist() == [5, 5, 5]
    with pytest.raises(NotAsExpected, match="more memory than there is"):
        graphs.run(5, too_large, lambda: [value])
    graphs.undo()
    assert value.tolist() == [5, 5, 5]


@pytest.mark.parametrize("options", [["--lora_r", "4"], ["--bf16", "true"]], ids=str)
@pytest.mark.parametrize("name", ["add_norm_backward", "attend_backward", "attend_first_backward", "drop"])
def test_a_wrong_operator_is_found(tmp_path, monkeypatch, name, options):
    """Also where most gradients are exactly 0, as with LoRA's at first."""
    right = getattr(plain_kernels, name)

    def wrong(*args):
        result = right(*args)
        return tuple(x * 1.2 for x in result) if isinstance(result, tuple) else result * 1.2

    monkeypatch.setattr(plain_kernels, name, wrong)
    trainer = prepare(parse_train([*RUN, *options, "--output_dir", str(tmp_path / "run")]), World(0, 1, 0, CPU))
    trainer.model.train()
    with pytest.raises(NotAsExpected, match="the gradient of"):
        StaticStep(trainer.plain, None)(trainer.sampler.at(0), 1e-3)
    trainer.output.close()


def another_rate(trainer):
    trainer.backend.optimizer.param_groups[0]["lr"] = torch.tensor(2e-3)


def not_clipped(trainer):
    trainer.backend.clip = lambda limit: type(trainer.backend).clip(trainer.backend, 0)


@pytest.mark.parametrize("per_device", [64, 20])
@pytest.mark.parametrize("break_it", [another_rate, not_clipped])
def test_a_wrong_update_is_found(trainer, per_device, break_it):
    trainer.plain.micro_batch_size = per_device
    trainer.model.train()
    before = copy.deepcopy(trainer.model.state_dict())
    static = StaticStep(trainer.plain, None)
    break_it(trainer)
    with pytest.raises(NotAsExpected, match="the update is"):
        static(trainer.sampler.at(0), 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_without_kernels(tmp_path, monkeypatch, bf16):
    """Triton may be missing: the same by torch's own operations."""
    monkeypatch.setattr(kernels, "available", lambda *args, **kwargs: False)
    for name in ("attend", "attend_first", "drop", "add_norm"):
        monkeypatch.setattr(kernels, name, None)
    found = []
    for name in ("plain", "static"):
        options = [*RUN, "--bf16", bf16, "--output_dir", str(tmp_path / name)]
        trainer = prepare(parse_train(options), World(0, 1, 0, CPU))
        trainer.model.train()
        found.append(norms(trainer, Recorder() if name == "static" else None))
        trainer.output.close()
    assert trainer.static is not None
    assert np.allclose(*found, rtol=2e-2 if bf16 == "true" else 1e-5)


def test_a_step_that_is_not_repeatable_is_not_trusted(trainer, monkeypatch):
    trainer.model.train()
    right = plain_kernels.add_norm

    def random(*args):
        exact, low = right(*args)
        return exact + 1e-7 * torch.rand(1), low

    monkeypatch.setattr(plain_kernels, "add_norm", random)
    with pytest.raises(NotAsExpected, match="computed a second time, it gives other bits"):
        StaticStep(trainer.plain, None)(trainer.sampler.at(0), 1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--unpad", "false"], "the model runs padded"),
        (["--torch_compile", "true"], "torch_compile is set"),
        (["--skip_nonfinite", "3"], "skip_nonfinite is set"),
    ],
)
def test_what_a_static_step_cannot_do_is_said(tmp_path, said, options, reason, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **given: None)  # whose compiler takes long to load
    trainer = prepare(parse_train([*STATIC, *options, "--output_dir", str(tmp_path / "run")]), World(0, 1, 0, CPU))
    assert make_step(trainer.plain) is None
    assert f"no static steps: {reason}" in said
    trainer.output.close()


def test_a_cpu_captures_nothing(tmp_path):
    result = crossrank("train", *RUN, "--step_form", "captured", "--output_dir", tmp_path / "run", check=False)
    assert result.returncode == 2
    assert "step_form captured needs a CUDA device" in result.stderr
