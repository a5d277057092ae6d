"""Attention, dropout and layout of a batch in a transformers model, without a copy of its code.

A model of a known family runs its own forward. What changes comes in through the library's extension point
(`AttentionInterface.register`), through modules put in place of others, and through forward hooks:

- Dropout masks follow the samples (KeyedDropout), so they do not depend on ranks or padding.
- Unpadded, a batch is one row of its real tokens: linear layers, norms, activations and dropout see no padding.
  Attention alone lays the tokens out per pair.
- Only the first token's vector reaches the classifier. So the last layer is fed the first tokens, and its keys and
  values alone are computed from all of them. This is exact: what is left out never reached the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainer.batch import Batch
from trainer.dropout import DropoutKeys, KeyedDropout

NAME = "crossrank"


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts: `layers` in the base model, the others in a layer."""

    layers: str = "encoder.layer"
    attention: str = "attention.self"
    key: str = "attention.self.key"
    value: str = "attention.self.value"


BERT = Family()
FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": Family("transformer.layer", "attention", "attention.k_lin", "attention.v_lin"),
}


class Layout:
    """How the batch under way is laid out, for the attention and dropout sites of one model."""

    def __init__(self, unpad: bool) -> None:
        self.unpad = unpad
        self.dropout = DropoutKeys()
        self.shape: tuple[int, int]  # pairs, tokens of the longest
        self.slots: torch.Tensor  # (tokens,) place of each token in the padded grid, pairs * longest
        self.first: torch.Tensor  # (pairs,) place of each pair's first token among the tokens
        self.keys: torch.Tensor  # (pairs, longest) dropout keys
        self.visible: torch.Tensor  # (pairs, 1, 1, longest) True at real tokens
        self.hidden: torch.Tensor  # (1, tokens, hidden) what the last layer's keys and values are computed from

    def set(self, batch: Batch) -> None:
        self.shape = batch.num_pairs, batch.longest
        self.slots = batch.pair * batch.longest + batch.positions
        self.first = batch.first
        self.keys = self.pad(batch.keys)
        self.visible = self.pad(torch.ones_like(batch.ids, dtype=torch.bool))[:, None, None, :]
        self.dropout.set(batch.keys[None] if self.unpad else self.keys, batch.keys[batch.first])

    def pad(self, values: torch.Tensor, filler: int = 0) -> torch.Tensor:
        """(tokens, ...) to (pairs, longest, ...)."""
        pairs, longest = self.shape
        grid = values.new_full((pairs * longest, *values.shape[1:]), filler)
        return grid.index_copy(0, self.slots, values).unflatten(0, self.shape)

    def unpadded(self, grid: torch.Tensor) -> torch.Tensor:
        """(pairs, longest, ...) to (tokens, ...)."""
        return grid.flatten(0, 1).index_select(0, self.slots)


def adopt(model: PreTrainedModel, unpad: bool) -> Layout | None:
    """Gives `model` crossrank's attention, dropout and layout; None, and it untouched, if its family is unknown."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return None
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    layout = Layout(unpad)
    layers: list[Any] = list(model.base_model.get_submodule(family.layers).children())
    for layer in layers:
        layer.get_submodule(family.attention).crossrank = (
            layout,
            layout.dropout.new_site(),
            unpad and layer is layers[-1],
        )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, KeyedDropout(child.p, layout.dropout))
    if unpad:
        _narrow(layers[-1], family, layout)
    return layout


def _narrow(layer: nn.Module, family: Family, layout: Layout) -> None:
    """Feeds `layer` the first tokens, as (pairs, 1, hidden), and its keys and values all tokens."""

    def take_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        layout.hidden = args[0]
        return layout.hidden[0].index_select(0, layout.first)[:, None], *args[1:]

    layer.register_forward_pre_hook(take_first)
    for name in (family.key, family.value):
        linear = layer.get_submodule(name)
        linear.register_forward_pre_hook(lambda module, args: (layout.hidden,))
        # The model views this as (pairs, 1, heads, size), one long row of heads; `attention` views it back.
        linear.register_forward_hook(lambda module, args, output: layout.pad(output[0]))


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each pair. (batch, heads, length, size) in, (batch, length, heads, size) out.

    The batch is the padded grid (pairs, longest), or one row of tokens, or the first tokens alone (pairs, 1).
    """
    layout, site, first_only = module.crossrank
    keys = layout.keys
    if first_only:
        keys = keys[:, :1]
        pairs, heads, _, size = query.shape
        key, value = (x.reshape(pairs, -1, heads, size).transpose(1, 2) for x in (key, value))
    elif layout.unpad:
        query, key, value = (layout.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    if dropout == 0:
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=layout.visible, scale=scaling)
    else:
        scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
        weights = scores.masked_fill(~layout.visible, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = (weights * layout.dropout.attention_mask(site, dropout, weights, keys)) @ value
    mixed = mixed.transpose(1, 2)
    return (layout.unpadded(mixed)[None] if layout.unpad and not first_only else mixed), None
