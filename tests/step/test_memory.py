"""Running out of memory, in whichever words a library says it."""

import pytest
import torch
from test_attention import make, make_tokens

from tests.made_pairs import made_pairs
from trainer.base.errors import TrainingFailed, UserError
from trainer.cli import parse_train
from trainer.evaluate import predict_logits
from trainer.loop import Trainer
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.probe import examine
from trainer.ranks import World
from trainer.step.memory import fits
from trainer.train import failures, prepare

WORLD = World(0, 1, 0, torch.device("cpu"))
RUN = ["--recipe", "demo", "--max_train_samples", "64", "--train_batch_size", "16", "--track_emissions", "false",
       "--write_report", "false"]  # fmt: skip
ERRORS = [
    torch.OutOfMemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {str(error)[:32]}")


def raising(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.fixture
def trainer(tmp_path):
    made: Trainer = prepare(parse_train([*RUN, "--output_dir", str(tmp_path / "run")]), WORLD)
    yield made
    made.output.close()


@each_error
def test_a_forward_does_not_fit(trainer, monkeypatch, error):
    monkeypatch.setattr(trainer.plain, "backward", raising(error))
    assert not fits(trainer.plain, trainer.sampler.at(0))


def test_another_error_is_no_lack_of_memory(trainer, monkeypatch):
    monkeypatch.setattr(trainer.plain, "backward", raising(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")))
    with pytest.raises(RuntimeError, match="EXECUTION"):
        fits(trainer.plain, trainer.sampler.at(0))


@pytest.mark.parametrize(("per_device", "held"), [(16, [False]), (4, [False, True])])
def test_gradients_are_held_as_in_a_step(trainer, monkeypatch, per_device, held):
    """A step's second forward runs beside the gradients of its first one."""
    found, backward = [], trainer.plain.backward

    def watched(*args, **kwargs):
        found.append(all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad))
        return backward(*args, **kwargs)

    monkeypatch.setattr(trainer.plain, "backward", watched)
    trainer.plain.micro_batch_size = per_device
    assert fits(trainer.plain, trainer.sampler.at(0))
    assert found == held
    assert all(p.grad is None for p in trainer.model.parameters())


@each_error
def test_it_is_one_clear_error(tmp_path, monkeypatch, error):
    with (
        pytest.raises(TrainingFailed, match="memory is used up; lower --per_device_train_batch_size"),
        failures(parse_train(RUN), WORLD, tmp_path),
    ):
        raise error
    model, tokens = CrossEncoder(make("bert")), make_tokens([5, 9])
    monkeypatch.setattr(model.model, "forward", raising(error))
    pairs = made_pairs([("", "")] * 2)
    with pytest.raises(TrainingFailed, match="memory is used up; lower --per_device_eval_batch_size"):
        predict_logits(model, pairs, tokens, WORLD, 2, False)
    with pytest.raises(type(error)) as caught:  # nor is it a mistake in the input
        examine(model, tokens, attention_is_given=False)
    assert not isinstance(caught.value, UserError)
