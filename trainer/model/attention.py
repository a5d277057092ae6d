"""Attention inside each pair of a batch, for models of a known family.

It comes in through the library's extension point (`AttentionInterface.register`) or, where a family does not use
that, in place of its attention modules' own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from trainer.model.layout import Layout

# Adds to a group's scores (pairs, heads, length, keys), given its queries and keys (pairs, heads, length, size).
Bias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionSite:
    """What an attention module knows beyond its own code, as its attribute `site`.

    `dropout` is the number of its dropout site; `first_only`: its queries are each pair's first token only.
    """

    layout: Layout
    dropout: int
    first_only: bool


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    bias: Bias | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each pair. (batch, heads, length, size) in, (batch, length, heads, size) out.

    The batch is the padded grid (pairs, longest), or one row of tokens, or only the first tokens (pairs, 1).
    `sliding_window`: a token sees those less than so many places away; None = all.
    """
    site: AttentionSite = module.site
    layout = site.layout
    _, heads, _, size = query.shape
    scaling = scaling or size**-0.5
    if key.shape[1] < heads:  # each serves several of the queries' heads
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))

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
    for group, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        visible = _windowed(layout.visible[group], sliding_window, k)
        if dropout == 0 and bias is None and not _short_on_cpu(k):
            mixed.append(fused(q, k, v, attn_mask=visible, scale=scaling))
        else:
            mixed.append(_mixed(site, group, (q * scaling, k, v), visible, dropout, bias))
    if layout.unpad and not site.first_only:
        rows = torch.cat([x.reshape(-1, size) for x in mixed])
        return layout.unpadded(rows, heads).view(1, -1, heads, size), None
    return torch.cat(mixed).transpose(1, 2), None


def _mixed(
    site: AttentionSite,
    group: int,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    visible: torch.Tensor | None,
    dropout: float,
    bias: Bias | None,
) -> torch.Tensor:
    """Of a group's scaled queries, keys and values: (pairs, heads, queries, size)."""
    q, k, v = parts
    scores = q @ k.transpose(2, 3)
    if bias is not None:
        scores = bias(scores, q, k)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if dropout > 0:
        of_queries = site.layout.keys[group][:, : q.shape[2]]
        weights = site.layout.dropout.attention_mask(site.dropout, dropout, weights, of_queries)
    return weights @ v


def fused(*args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's scaled_dot_product_attention, with a backward that gives the same bits each time.

    The flash and the memory-efficient kernels for CUDA add up gradients in any order, unless torch is in its
    deterministic mode when their backward starts (ATen's attention_backward.cu); it is, for as long as that takes.
    """
    mixed = scaled_dot_product_attention(*args, **kwargs)
    before = torch.get_deterministic_debug_mode()
    node = mixed.grad_fn
    if node is not None and node.name().startswith("Slice"):  # of heads that were padded to a multiple of 8
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith("ScaledDotProduct"):
        node.register_prehook(lambda gradients: torch.set_deterministic_debug_mode("error"))
        node.register_hook(lambda inputs, outputs: torch.set_deterministic_debug_mode(before))
    return mixed


@contextmanager
def library_fused() -> Iterator[None]:
    """While it lasts, the library's own attention is `fused`, where it calls torch's."""
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = scaled_dot_product_attention


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


def projected(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, length, heads * size) to (batch, heads, length, size)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def own_attention(
    module: Any, projections: tuple[nn.Module, ...], hidden: torch.Tensor, bias: Bias | None = None
) -> torch.Tensor:
    """Attention of `hidden` (batch, length, hidden) by queries', keys' and values' linear layers; the same shape."""
    heads = module.num_attention_heads
    query, key, value = (projected(projection(hidden), heads) for projection in projections)
    dropout = module.dropout.p if module.training else 0.0
    mixed, _ = attention(module, query, key, value, None, dropout=dropout, bias=bias)
    return mixed.flatten(2)


def bert_forward(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """In place of the forward of BERT's kind of attention, where that does not use the library's interface."""
    return own_attention(module, (module.query, module.key, module.value), hidden_states), None


def mpnet_forward(
    module: Any, hidden_states: torch.Tensor, attention_mask: Any, position_bias: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor]:
    """In place of MPNet's. `position_bias` (1, heads, longest, longest) is that of the longest pair."""

    def bias(scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return scores + position_bias[..., : q.shape[2], : k.shape[2]]

    return (module.o(own_attention(module, (module.q, module.k, module.v), hidden_states, bias)),)
