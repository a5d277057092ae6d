"""crossrank's attention and dropout in a transformers model, through the library's own extension point.

A model of a known family keeps its own code. Its attention function is replaced through
`AttentionInterface.register`, and its nn.Dropout modules by KeyedDropout, so that masks follow the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainer.dropout import DropoutKeys, KeyedDropout

NAME = "crossrank"


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts: `layers` in the base model, `attention` in a layer."""

    layers: str = "encoder.layer"
    attention: str = "attention.self"


BERT = Family()
FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": Family("transformer.layer", "attention"),
}


class Layout:
    """What the attention sites need to know of the batch that is under way."""

    def __init__(self) -> None:
        self.dropout = DropoutKeys()
        self.keys: torch.Tensor  # (pairs, longest) dropout keys
        self.visible: torch.Tensor  # (pairs, 1, 1, longest) True at real tokens


def adopt(model: PreTrainedModel) -> Layout | None:
    """Gives `model` crossrank's attention and dropout; None, and the model untouched, if its family is unknown."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return None
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    layout = Layout()
    for module in _attention_modules(model, family):
        module.crossrank = (layout, layout.dropout.new_site())
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, KeyedDropout(child.p, layout.dropout))
    return layout


def _attention_modules(model: PreTrainedModel, family: Family) -> Iterator[Any]:
    for layer in model.base_model.get_submodule(family.layers).children():
        yield layer.get_submodule(family.attention)


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
    """Attention inside each pair: (pairs, heads, longest, size) in, (pairs, longest, heads, size) out."""
    layout, site = module.crossrank
    if dropout == 0:
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=layout.visible, scale=scaling)
    else:
        scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
        weights = scores.masked_fill(~layout.visible, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = (weights * layout.dropout.attention_mask(site, dropout, weights, layout.keys)) @ value
    return mixed.transpose(1, 2), None
