"""Rows of the embedding table that are in no training pair are left out of a step, and nothing else changes."""

import copy

import numpy as np
import pytest
import torch
from conftest import crossrank
from test_attention import VOCABULARY, make, make_tokens

from trainer.backends.optim import make_optimizer, parameter_groups
from trainer.config import OptimisationConfig
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.families import FAMILIES

LENGTHS = [7, 12, 5, 30]


def trained(model: CrossEncoder, tokens) -> CrossEncoder:
    """After three steps of AdamW, with dropout."""
    config = OptimisationConfig(learning_rate=1e-2)
    optimizer = make_optimizer(parameter_groups(model, config), config)
    for step in range(3):
        batch = model.batch(tokens, np.arange(4) % 3, np.arange(4), torch.device("cpu"), seed=1, step=step)
        torch.nn.functional.cross_entropy(model.train()(batch), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal(family, unpad):
    """Weights after training, and scores of pairs with tokens that training never saw."""
    tokens, other = make_tokens(LENGTHS), make_tokens([60, 50, 40])
    assert len(np.setdiff1d(other.ids, tokens.ids)) > 5
    model = make(family, dropout=0.2)
    plain, saving = CrossEncoder(copy.deepcopy(model), unpad=unpad), CrossEncoder(model, unpad=unpad)
    saving.freeze_unused_rows(tokens)
    assert 0 < saving.used_rows[1].num_used < VOCABULARY - 20
    trained(plain, tokens), trained(saving, tokens)
    expected, got = plain.model.state_dict(), saving.with_frozen_rows(saving.model.state_dict())
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    batch = plain.batch(other, np.zeros(3, int), np.arange(3), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(saving.eval()(batch), plain.eval()(batch))


def test_back_and_forth():
    model = CrossEncoder(make("roberta"))
    model.freeze_unused_rows(make_tokens(LENGTHS))
    weights = model.model.state_dict()
    back = model.without_frozen_rows(model.with_frozen_rows(weights))
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert model.without_frozen_rows({}) == {}


def test_nothing_to_leave_out():
    model = CrossEncoder(make("roberta"))
    tokens = make_tokens([3])
    object.__setattr__(tokens, "used", np.arange(VOCABULARY))
    model.freeze_unused_rows(tokens)
    assert model.used_rows is None


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    """The rows that it lacks would be another model's."""
    run = ["train", "--recipe", "demo", "--max_train_samples", "60", "--max_eval_samples", "20", "--max_test_samples",
           "20", "--max_steps", "4", "--save_steps", "2", "--track_emissions", "false",
           "--write_report", "false"]  # fmt: skip
    crossrank(*run, "--output_dir", tmp_path / "a", "--data_seed", "1", "--seed", "1")
    there = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoints" / "step-000002"]
    for other in (["--seed", "2"], ["--seed", "1", "--weight_decay", "0.1"]):
        command = [*run, *there, "--data_seed", "1", *other, "--output_dir", tmp_path / other[-1]]
        result = crossrank(*command, check=False)
        assert result.returncode == 2
        assert "its run froze other rows of the embedding table" in result.stderr
