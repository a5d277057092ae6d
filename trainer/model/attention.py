"""Attention, dropout and layout of a batch in a transformers model, without a copy of its code.

A model of a known family runs its own forward. What changes comes in through the library's extension point
(`AttentionInterface.register`), through modules put in place of others, and through forward hooks:

- Dropout masks follow the samples (KeyedDropout), so they do not depend on ranks or padding.
- Unpadded, a batch is one row of its real tokens: linear layers, norms, activations and dropout see no padding.
  Only attention lays the tokens out per pair, in groups of like length.
- Only the first token's vector reaches the classifier. So the last layer is fed the first tokens, and only its keys and
  values are computed from all of them. This is exact: what is left out never reached the logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainer.model.batch import Batch, Group
from trainer.model.dropout import DropoutKeys, KeyedDropout

NAME = "crossrank"


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts: `layers` in the base model, the others in a layer.

    Without `key` and `value` the last layer computes every token in full, and hands on the first ones.
    """

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
    "modernbert": Family("layers", "attn", "", ""),  # queries, keys and values are one linear layer
}


class Layout:
    """How the batch under way is laid out, for the attention and dropout sites of one model.

    Attention works on groups of pairs of like length, each padded to its longest pair. A group's rows are ordered by
    pair, head and place, so that a head's attention inside a pair is one matrix of a batched product.
    """

    def __init__(self, unpad: bool) -> None:
        self.unpad = unpad
        self.dropout = DropoutKeys()
        self.groups: tuple[Group, ...]
        self.first: torch.Tensor  # (pairs,) place of each pair's first token among the tokens
        self.keys: list[torch.Tensor]  # of each group (pairs, longest), dropout keys
        self.visible: list[torch.Tensor | None]  # of each group (pairs, 1, 1, longest), True at real tokens; None = all
        self.hidden: torch.Tensor  # (1, tokens, hidden) what the last layer's keys and values are computed from

    def set(self, batch: Batch) -> None:
        self.groups, self.first, self.batch = batch.groups, batch.first, batch
        self.num_tokens = len(batch.ids)
        self.num_slots = sum(group.pairs * group.longest for group in batch.groups)
        self.places = {1: self._places(1)}
        keys, real = self.pad(batch.keys), self.pad(torch.ones_like(batch.ids, dtype=torch.bool))
        self.keys = self.split(keys)
        self.visible = [
            None if group.tokens == group.pairs * group.longest else mask[:, None, None, :]
            for group, mask in zip(self.groups, self.split(real), strict=True)
        ]
        self.dropout.set(batch.keys[None] if self.unpad else self.keys[0], batch.keys[batch.first])

    def _places(self, heads: int) -> torch.Tensor:
        """Where each (token, head) lies among the groups' rows."""
        batch, widths = self.batch, self.batch.widths
        starts = (widths.cumsum(0) - widths) * heads
        of_head = torch.arange(heads, device=widths.device)
        places = (starts[batch.pair] + batch.positions)[:, None] + widths[batch.pair][:, None] * of_head
        return places.flatten()

    def pad(self, values: torch.Tensor, heads: int = 1, filler: int = 0) -> torch.Tensor:
        """(tokens * heads, ...) to the groups' rows, one after the other."""
        if heads not in self.places:
            self.places[heads] = self._places(heads)
        rows = values.new_full((self.num_slots * heads, *values.shape[1:]), filler)
        return rows.index_copy(0, self.places[heads], values)

    def unpadded(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """The groups' rows to (tokens * heads, ...)."""
        return rows.index_select(0, self.places[heads])

    def split(self, rows: torch.Tensor, heads: int = 1) -> list[torch.Tensor]:
        """The groups' rows to (pairs, longest, ...) of each group, or (pairs, heads, longest, ...)."""
        sizes = [group.pairs * heads * group.longest for group in self.groups]
        shapes = [
            (group.pairs, heads, group.longest) if heads > 1 else (group.pairs, group.longest) for group in self.groups
        ]
        return [part.unflatten(0, shape) for part, shape in zip(rows.split(sizes), shapes, strict=True)]


@dataclass(frozen=True)
class AttentionSite:
    """What an attention module knows beyond its own code, as its attribute `site`.

    `dropout` is the number of its dropout site; `first_only`: its queries are each pair's first token only.
    """

    layout: Layout
    dropout: int
    first_only: bool


def adopt(model: PreTrainedModel, unpad: bool) -> tuple[Layout | None, str]:
    """Gives `model` crossrank's attention, dropout and layout, as far as its architecture allows.

    Returns:
        The layout, None where the model stays untouched; and why the model runs padded, if it does so unasked.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    own_code = not type(model).__module__.startswith("transformers.models.")
    odd_positions = getattr(config, "position_embedding_type", "absolute") != "absolute"
    if family is None or own_code or odd_positions or getattr(config, "is_decoder", False):
        what = "this kind of " if family else ""
        return None, f"{what}{config.model_type} runs padded, with its own attention and rank-dependent dropout"
    note = ""
    if unpad and getattr(config, "classifier_pooling", "cls") != "cls":
        unpad, note = False, f"runs padded: its classifier is fed by the {config.classifier_pooling} of all tokens"
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    layout = Layout(unpad)
    layers: list[Any] = list(model.base_model.get_submodule(family.layers).children())
    for layer in layers:
        first_only = unpad and layer is layers[-1] and family.key != ""
        layer.get_submodule(family.attention).site = AttentionSite(layout, layout.dropout.new_site(), first_only)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, KeyedDropout(child.p, layout.dropout))
    if unpad:
        _compute_first_only(layers[-1], family, layout)
    return layout, note


def _compute_first_only(layer: nn.Module, family: Family, layout: Layout) -> None:
    """Makes the last layer's output that of the first tokens, as (pairs, 1, hidden).

    It is fed the first tokens; only its keys and values are computed from all tokens.
    """

    def first(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[0].index_select(0, layout.first)[:, None]

    def take_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        # The model views keys and values as (pairs, 1, any number of heads, size), so their number must be a multiple
        # of the pairs. `attention` takes the rows back from there.
        layout.hidden = functional.pad(hidden, (0, 0, 0, -hidden.shape[1] % len(layout.first)))
        return first(hidden), *args[1:]

    if not family.key:
        layer.register_forward_hook(lambda module, args, output: first(output))
        return
    layer.register_forward_pre_hook(take_first)
    for name in (family.key, family.value):
        layer.get_submodule(name).register_forward_pre_hook(lambda module, args: (layout.hidden,))


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each pair. (batch, heads, length, size) in, (batch, length, heads, size) out.

    The batch is the padded grid (pairs, longest), or one row of tokens, or only the first tokens (pairs, 1).
    `sliding_window`: a token sees those less than so many places away; None = all.
    """
    site: AttentionSite = module.site
    layout = site.layout
    _, heads, _, size = query.shape

    def grouped(x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.transpose(1, 2).reshape(-1, size)[: layout.num_tokens * heads]
        return layout.split(layout.pad(rows, heads), heads)

    if site.first_only:
        queries = list(query.split([group.pairs for group in layout.groups]))
        keys, values = grouped(key), grouped(value)
    elif layout.unpad:
        queries, keys, values = grouped(query), grouped(key), grouped(value)
    else:
        queries, keys, values = [query], [key], [value]
    mixed = []
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        visible = _windowed(layout.visible[i], sliding_window, k)
        if dropout == 0 and not _short_on_cpu(k):
            mixed.append(scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling))
            continue
        scores = (q * (scaling or size**-0.5)) @ k.transpose(2, 3)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        if dropout > 0:
            queries_keys = layout.keys[i][:, : q.shape[2]]
            weights = layout.dropout.attention_mask(site.dropout, dropout, weights, queries_keys)
        mixed.append(weights @ v)
    if layout.unpad and not site.first_only:
        rows = torch.cat([x.reshape(-1, size) for x in mixed])
        return layout.unpadded(rows, heads).view(1, -1, heads, size), None
    return torch.cat(mixed).transpose(1, 2), None


def _short_on_cpu(keys: torch.Tensor) -> bool:
    """Whether torch's fused attention would lose: on a CPU it works in blocks of more tokens than most pairs have."""
    return keys.device.type == "cpu" and keys.shape[2] <= 128


def _windowed(visible: torch.Tensor | None, window: int | None, keys: torch.Tensor) -> torch.Tensor | None:
    """`visible` inside a sliding window, (pairs or 1, 1, longest, longest); itself where the window covers all."""
    longest = keys.shape[2]
    if window is None or window >= longest:
        return visible
    place = torch.arange(longest, device=keys.device)
    near = (place[:, None] - place).abs() < window
    # Padding sees itself, since a row that sees nothing would be NaN.
    return near[None, None] if visible is None else (near & visible) | (place[:, None] == place)
