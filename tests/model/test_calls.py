"""In a model of any family, dropout belongs to the sample: random enough, and the same in any batch, on any rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_attention import VOCABULARY, make_tokens
from test_dropout import look_independent
from torch import nn
from torch.nn import functional

from benchmarks.encoders import ASKED, make_tiny, table, tiny_config
from trainer.model.calls import SHARED, UNCLEAR, DropoutCalls, _counted
from trainer.model.cross_encoder import CrossEncoder, checkpoint_activations
from trainer.model.families import FAMILIES
from trainer.model.masks import token_keys
from trainer.model.probe import _some, examine

LENGTHS = [9, 30, 12, 6, 25, 17]
CPU = torch.device("cpu")


def calls_of(pairs: int, dims: list[int]) -> DropoutCalls:
    calls = DropoutCalls()
    calls.sites = [(dim, number) for number, dim in enumerate(dims)]
    rows = np.arange(pairs)
    calls.set(
        torch.from_numpy(token_keys(42, 3, rows, 0 * rows)), torch.from_numpy(token_keys(42, 3, rows[:1], rows[:1]))
    )
    return calls


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((80, 25, 512), 0), ((160, 4, 25, 64), 0), ((25, 80, 256), 1), ((2000, 512), SHARED), ((8, 64, 64, 40), 3)],
)
def test_masks_look_independent(shape, dim, p):
    calls = calls_of(40, [dim])
    with calls.active():
        mask = functional.dropout(torch.ones(shape), p)
    look_independent(mask.reshape(-1, shape[-1]), p)


def test_sites_and_steps_differ_and_a_forward_is_repeated():
    calls, x = calls_of(8, [0, 0]), torch.ones(8, 30, 64)
    with calls.active():
        first, second = functional.dropout(x, 0.5), nn.Dropout(0.5)(x)
    with calls.active():
        again = functional.dropout(x, 0.5)
    with calls.active(start=1):
        assert torch.equal(functional.dropout(x, 0.5), second)
        assert functional.dropout(x, 0.5, training=False) is x
    assert torch.equal(first, again)
    assert abs(((first > 0) == (second > 0)).double().mean() - 0.5) < 0.02
    assert functional.dropout is not calls.dropout


def test_what_counts_the_pairs():
    assert _counted((2, 37, 8), (3, 37, 8)) == 0
    assert _counted((37, 8, 5), (37, 12, 5)) == 1
    assert _counted((512, 16), (512, 16)) == SHARED  # though 512 rows are a multiple of 2 pairs
    assert _counted((2, 37), (3, 38)) == _counted((2, 4), (3, 4, 1)) == _counted((2, 2), (3, 3)) == UNCLEAR


VARIANTS = {"xlnet, first": {"summary_type": "first"}, "funnel, max": {"pool_q_only": False, "pooling_type": "max"}}


def tiny(case, dropout=0.2) -> CrossEncoder:
    config = tiny_config(case.split(",")[0], VOCABULARY, dropout)
    config.pad_token_id = 0
    for name, value in VARIANTS.get(case, {}).items():
        setattr(config, name, value)
    return CrossEncoder(make_tiny(config))


OTHERS = [*(family for family in ASKED if family not in FAMILIES), *VARIANTS]


@pytest.mark.parametrize("family", OTHERS)
def test_any_model_computes_the_same_in_any_batch(family, said):
    model = tiny(family)
    tokens, labels = make_tokens(LENGTHS, eos=3), np.zeros(len(LENGTHS), np.int64)
    examine(model, tokens, attention_is_given=False)
    assert not any("another number of ranks" in line for line in said)
    assert not model.draws
    model.train()

    def logits(rows, step=2):
        batch = model.batch(tokens, labels, np.array(rows), CPU, max(LENGTHS), seed=1, step=step)
        return {int(row): value for row, value in zip(batch.rows, model(batch), strict=True)}

    together, apart = logits(range(6)), logits([4, 0]) | logits([1]) | logits([5, 3, 2])
    scale = max(value.abs().max() for value in together.values())
    for row, value in together.items():
        assert (value - apart[row]).abs().max() < 1e-5 * scale
    assert (together[0] - logits([0], step=3)[0]).abs().max() > 1e-4 * scale  # there is dropout


@pytest.mark.parametrize("family", ["deberta", "bart", "gpt2"])
def test_gradient_checkpointing(family):
    model = tiny(family)
    tokens, labels = make_tokens(LENGTHS, eos=3), np.zeros(len(LENGTHS), np.int64)
    examine(model, tokens, attention_is_given=False)
    saving = tiny(family)
    examine(saving, tokens, attention_is_given=False)
    checkpoint_activations(saving)
    for own in (model, saving):
        batch = own.batch(tokens, labels, np.arange(6), CPU, seed=1, step=2)
        own.train()(batch).square().sum().backward()
    both = [(p.grad, q.grad) for p, q in zip(model.parameters(), saving.parameters(), strict=True) if p.requires_grad]
    largest = max(ours.abs().max() for ours, _ in both)
    assert all((ours - theirs).abs().max() < 1e-6 * largest for ours, theirs in both)


def test_what_cannot_be_keyed_is_said(said):
    tokens, draws = make_tokens(LENGTHS), "gpt2 draws random numbers in another way than by dropout, so another number"
    model = tiny("gpt2")
    model.model.transformer.h[0].register_forward_pre_hook(
        lambda module, args: (args[0] + 0 * torch.rand(()), *args[1:])
    )
    examine(model, tokens, attention_is_given=False)
    assert said[-1].startswith(draws)
    fused = tiny("gpt2")
    fused.model.set_attn_implementation("sdpa")
    examine(fused, tokens, attention_is_given=True)
    assert said[-1].startswith(draws)
    assert said[-1].endswith("leave --attn_implementation out")
    mixed = tiny("gpt2")
    mixed.model.transformer.h[0].register_forward_pre_hook(
        lambda module, args: (args[0] * functional.dropout(torch.ones(len(args[0]) + 1, 1))[:-1, None], *args[1:])
    )
    examine(mixed, tokens, attention_is_given=False)
    assert said[-1].startswith("gpt2: which of its dropouts belong to which pair cannot be told; so another number")
    assert all(own.draws for own in (model, fused, mixed))


def test_the_docs_name_the_families():
    assert "\n".join(table()) in (ROOT / "docs" / "models.md").read_text(), "python -m benchmarks.encoders --table"


@pytest.mark.parametrize("count", [1, 2, 8, 1000])
@pytest.mark.parametrize("longest", [2, 5, 3000])
def test_pairs_of_many_lengths_are_found_without_sorting_all(count, longest):
    """Sorting takes 16 bytes a pair, on every rank."""
    lengths = np.random.default_rng(0).integers(1, longest, count).astype(np.int16)
    order = np.argsort(-lengths.astype(int), kind="stable")
    expected = order[np.unique(np.linspace(0, count - 1, 8).astype(int))]
    assert _some(SimpleNamespace(lengths=lengths)).tolist() == expected.tolist()
