"""The unpadded forward equals the library's own padded one, in logits and gradients, for every family."""

import copy

import numpy as np
import pytest
import torch
from families import V3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.encoders import make_tiny, tiny_config
from trainer.data.tokens import Tokens
from trainer.model import attention
from trainer.model.batch import assemble
from trainer.model.cross_encoder import CrossEncoder, checkpoint_activations
from trainer.model.families import FAMILIES
from trainer.model.settings import set_dropout

VOCABULARY = 97
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "embedding_size": 16,
    "vocab_size": VOCABULARY, "max_position_embeddings": 520, "num_labels": 3, "pad_token_id": 1, "type_vocab_size": 2,
}  # fmt: skip


VARIANTS = {
    "modernbert, mean": {"classifier_pooling": "mean"},
    "eurobert, mean": {"classifier_pooling": "mean"},
    "deberta-v2, v2": V3 | {"share_att_key": False, "conv_kernel_size": 3, "position_biased_input": True},
    "deberta-v2, c2p": V3 | {"pos_att_type": ["c2p"], "position_buckets": -1, "max_relative_positions": 16},
    "deberta-v2, p2c": V3 | {"pos_att_type": ["p2c"], "share_att_key": False},
    "deberta-v2, absolute": {"type_vocab_size": 2},
    "albert, groups": {"num_hidden_groups": 2, "inner_group_num": 2},
    "eurobert, late": {"classifier_pooling": "late"},
    "eurobert, grouped": {"num_key_value_heads": 2, "classifier_pooling": "bos"},
    "ultrabert, mean": {"classifier_pooling": "mean", "num_key_value_heads": 2},
    "deberta-v2, one layer": V3 | {"conv_kernel_size": 3, "num_hidden_layers": 1},
}
CASES = [*FAMILIES, *VARIANTS]


def make(case: str, dropout: float = 0.0, **changes: object):
    """A classifier of a family, or a variant of it, with `changes` of its config."""
    torch.manual_seed(0)
    family, sizes = case.split(",")[0], dict(SIZES)
    if family == "distilbert":
        sizes |= {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
        sizes = {k: v for k, v in sizes.items() if not k.startswith(("num_h", "num_a", "hidden_size", "inter"))}
    if family in ("modernbert", "ultrabert"):  # a window that most pairs are longer than
        sizes |= {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}
    if case == "deberta-v2":  # as v3 is, with buckets that pairs outgrow
        sizes |= V3
    sizes |= VARIANTS.get(case, {}) | changes
    config = AutoConfig.for_model(family, **sizes)
    set_dropout(config, dropout)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # weights of a trained model's size, so that a difference would show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_tokens(lengths, eos: int | None = None) -> Tokens:
    """Pairs of random tokens; each ends with `eos`, which is nowhere else."""
    rng = np.random.default_rng(sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(2 if eos is None else eos + 1, VOCABULARY, offsets[-1]).astype(np.uint16)
    if eos is not None:
        ids[offsets[1:] - 1] = eos
    types = np.concatenate([np.arange(n) >= rng.integers(1, n) for n in lengths])
    return Tokens.of(ids, offsets, types, 0, "f")


def library_logits(model, tokens: Tokens) -> torch.Tensor:
    """The model as transformers runs it, on a padded batch made here, independently."""
    longest = int(tokens.lengths.max())
    ids = torch.full((len(tokens.lengths), longest), model.config.pad_token_id)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(tokens.lengths):
        ids[row, :length] = torch.from_numpy(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].astype(int))
        mask[row, :length] = 1
        types[row, :length] = torch.from_numpy(tokens.types[tokens.offsets[row] : tokens.offsets[row + 1]].astype(int))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = types
    return model(**{name: value.to(model.device) for name, value in inputs.items()}).logits


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: CrossEncoder, theirs, lengths) -> None:
    tokens = make_tokens(lengths)
    labels = np.arange(len(lengths)) % 3
    batch = ours.batch(tokens, labels, np.arange(len(lengths)), theirs.device)
    got, expected = ours(batch), library_logits(theirs, tokens)[batch.rows]
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy
    got_gradients = gradients(ours.model, loss(got, batch.labels))
    expected_gradients = gradients(theirs, loss(expected, batch.labels))
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # Softmax does not see a key's bias: that gradient is 0 but for rounding, which has no relative size.
        scale = gradient.abs().max().clamp(min=1e-3 * largest)
        # 1e-7: what rounding leaves of probabilities that cancel in the classifier's bias.
        assert (got_gradients[name] - gradient).abs().max() < 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("family", CASES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    st.one_of(
        st.lists(st.integers(3, 40), min_size=1, max_size=9), st.lists(st.integers(3, 512), min_size=1, max_size=3)
    )
)
def test_equal_to_the_library(family, unpad, lengths):
    model = make(family)
    theirs = copy.deepcopy(model)
    assert_equal(CrossEncoder(model, unpad=unpad), theirs, lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_attention_head(family):
    for unpad in (True, False):
        model = make(family, **{"n_heads" if family == "distilbert" else "num_attention_heads": 1})
        assert_equal(CrossEncoder(copy.deepcopy(model), unpad=unpad), model, [7, 30, 12])


def test_attention_that_cannot_be_replaced(monkeypatch):
    """Older versions of the library only warn: left unpadded, tokens would see those of other pairs."""
    model = make("modernbert")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *args: False)
    ours = CrossEncoder(copy.deepcopy(model))
    assert (ours.layout, "keeps its attention to itself" in ours.note) == (None, True)
    assert_equal(ours, model, [7, 30, 12])


@pytest.mark.parametrize("family", CASES)
def test_dropout_is_the_same_padded_or_not(family):
    """Masks belong to the samples: with dropout on, the two layouts still compute the same."""
    tokens = make_tokens([7, 30, 12, 3, 25])
    logits = []
    for unpad in (True, False):
        model = CrossEncoder(make(family, dropout=0.2), unpad=unpad)
        batch = model.batch(tokens, np.zeros(5, int), np.arange(5), torch.device("cpu"), seed=1, step=2)
        logits.append(model.train()(batch))
    assert torch.allclose(*logits, atol=1e-5)
    assert not torch.allclose(logits[0], model.eval()(batch), atol=1e-3)


@pytest.mark.parametrize("family", ["roberta", "deberta-v2", "modernbert", "megatron-bert"])
def test_gradient_checkpointing(family):
    model = make(family, dropout=0.2)
    plain, saving = CrossEncoder(copy.deepcopy(model)), CrossEncoder(copy.deepcopy(model))
    checkpoint_activations(saving)
    batch = assemble(make_tokens([7, 30, 12]), np.zeros(3, int), np.arange(3), torch.device("cpu"), seed=1, step=2)
    expected, got = (gradients(m.model, m.train()(batch).square().sum()) for m in (plain, saving))
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)


def test_padding_is_not_computed():
    """Linear layers see real tokens alone, and the last layer's feed-forward the first tokens alone."""
    model = CrossEncoder(make("roberta"))
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: a[0].shape[:-1].numel()}))
    model(assemble(make_tokens([5, 40, 9]), np.zeros(3, int), np.arange(3), torch.device("cpu")))
    layer = "model.roberta.encoder.layer."
    assert seen[layer + "0.intermediate.dense"] == seen[layer + "2.attention.self.key"] == 54
    assert seen[layer + "2.intermediate.dense"] == seen[layer + "2.attention.self.query"] == 3


class Backwards(TorchDispatchMode):
    """Of each operation on the way, whether torch was in its deterministic mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] = torch.are_deterministic_algorithms_enabled()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["modernbert", "gpt2", "checkpointed gpt2"])
def test_fused_attention_repeats_its_gradients(model):
    """In our attention and in the library's: the kernels for CUDA do so in torch's deterministic mode."""
    if model == "modernbert":
        ours, lengths = CrossEncoder(make(model)), [140, 150]  # shorter ones are not fused on a CPU
    else:
        ours, lengths = CrossEncoder(make_tiny(tiny_config("gpt2", VOCABULARY))), [40, 50]
        assert ours.model.config._attn_implementation == "sdpa"
    if model.startswith("checkpointed"):
        checkpoint_activations(ours)
    batch = ours.batch(make_tokens(lengths, eos=3), np.zeros(2, int), np.arange(2), torch.device("cpu"), 150)
    scores = ours.train()(batch)
    with Backwards() as backwards:
        scores.sum().backward()
    name = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
    assert [operation for operation, mode in backwards.seen.items() if mode] == [name]
    assert not torch.are_deterministic_algorithms_enabled()


def test_fused_attention_of_odd_head_sizes():
    """As the kernels for CUDA leave it, behind a slice."""
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    kept, sliced = attention.scaled_dot_product_attention, lambda *args: kept(*args)[..., :12]
    attention.scaled_dot_product_attention = sliced
    try:
        mixed = attention.fused(q, q, q)
    finally:
        attention.scaled_dot_product_attention = kept
    with Backwards() as backwards:
        mixed.sum().backward()
    assert any(backwards.seen.values())
