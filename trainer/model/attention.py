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

from trainer.model import kernels
from trainer.model.layout import Layout, joined
from trainer.model.products import side_by_side

# Adds to a group's scores (pairs, heads, length, keys), given its queries and keys (pairs, heads, length, size).
Bias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys, values


@dataclass(frozen=True)
class AttentionSite:
    """What an attention module knows beyond its own code, as its attribute `site`.

    Attributes:
        dropout: number of its dropout site.
        first_only: its queries are each pair's first token only.
        inputs: names of the linear layers of queries, keys and values.
    """

    layout: Layout
    dropout: int
    first_only: bool
    inputs: tuple[str, ...] = ()


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
    layout, heads = site.layout, query.shape[1]
    scaling = scaling or query.shape[-1] ** -0.5
    if key.shape[1] < heads:  # each serves several of the queries' heads
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    whole = sliding_window is None or sliding_window >= layout.longest
    if whole and bias is None and not site.first_only and _fits_kernel(layout, query):
        rows = torch.cat([x.to(value.dtype).transpose(1, 2).flatten(2) for x in (query, key, value)], -1)
        return _by_kernel(site, [rows], heads, scaling, dropout).unflatten(-1, (heads, -1)), None

    def grouped(x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.transpose(1, 2).reshape(-1, x.shape[-1])
        return layout.split(layout.grid(rows, heads), heads)

    if site.first_only:
        queries = list(query.split([group.pairs for group in layout.groups]))
        keys, values = grouped(key), grouped(value)
    elif layout.unpad:
        queries, keys, values = grouped(query), grouped(key), grouped(value)
    else:
        queries, keys, values = [query], [key], [value]
    parts = list(zip(queries, keys, values, strict=True))
    return _of_groups(site, parts, scaling, dropout, sliding_window, bias), None


def _of_groups(
    site: AttentionSite,
    parts: list[Parts],
    scaling: float,
    dropout: float,
    window: int | None = None,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Of each group's queries, keys and values (pairs, heads, length, size): (batch, length, heads, size)."""
    layout, mixed = site.layout, []
    for group, (q, k, v) in enumerate(parts):
        if dropout == 0 and bias is None and not _short_on_cpu(k):
            visible = layout.visible(group, window)
            mixed.append(fused(q, k, v, attn_mask=visible, scale=scaling))
        else:
            mixed.append(_mixed(site, group, (q * scaling, k, v), window, dropout, bias))
    if layout.unpad and not site.first_only:
        _, heads, _, size = mixed[0].shape
        return layout.tokens(joined([x.reshape(-1, size) for x in mixed]), heads).view(1, -1, heads, size)
    return joined(mixed).transpose(1, 2)


def _mixed(
    site: AttentionSite,
    group: int,
    parts: Parts,
    window: int | None,
    dropout: float,
    bias: Bias | None,
) -> torch.Tensor:
    """Of a group's scaled queries, keys and values: (pairs, heads, queries, size)."""
    q, k, v = parts
    scores = q @ k.transpose(2, 3)
    if bias is not None:
        scores = bias(scores, q, k)
    if (absent := site.layout.absent(group, window)) is not None:
        scores = scores.masked_fill_(absent, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if dropout > 0:
        of_queries = site.layout.keys(group)[:, : q.shape[2]]
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


def projected(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, length, heads * size) to (batch, heads, length, size)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def own_attention(module: Any, hidden: torch.Tensor, heads: int, bias: Bias | None = None) -> torch.Tensor:
    """Attention of `hidden` (batch, length, hidden) by a module's own linear layers; the same shape."""
    site: AttentionSite = module.site
    layers = [getattr(module, name) for name in site.inputs]
    dropout = module.dropout.p if module.training else 0.0
    source = site.layout.hidden if site.first_only else hidden
    size = layers[0].out_features // heads
    if site.layout.fast and site.layout.unpad:
        rows = [side_by_side(layers, hidden)]
        if site.first_only:
            rows = [layers[0](hidden), side_by_side(layers[1:], source)]
        if bias is None and _fits_kernel(site.layout, hidden, size):
            return _by_kernel(site, rows, heads, size**-0.5, dropout)
        return _of_groups(site, _on_grid(site, rows, heads, size), size**-0.5, dropout, bias=bias).flatten(2)
    query, key, value = (projected(x, heads) for x in (layers[0](hidden), layers[1](source), layers[2](source)))
    mixed, _ = attention(module, query, key, value, None, dropout=dropout, bias=bias)
    return mixed.flatten(2)


def _on_grid(site: AttentionSite, rows: list[torch.Tensor], heads: int, size: int) -> list[Parts]:
    """Of each group queries, keys and values (pairs, heads, length, size), given `rows` as `_by_kernel` takes them."""
    layout, parts = site.layout, 2 if site.first_only else 3
    moved = layout.grid(rows[-1].reshape(-1, size), heads, parts).view(parts, -1, size)
    split = [layout.split(part, heads) for part in moved.unbind(0)]
    if site.first_only:
        split.insert(0, list(projected(rows[0], heads).split([group.pairs for group in layout.groups])))
    return list(zip(*split, strict=True))


def input_layers(model: nn.Module) -> list[list[nn.Linear]]:
    """Of each attention module the linear layers of queries, keys and values, where `own_attention` takes them."""
    found = []
    for module in model.modules():
        site = getattr(module, "site", None)
        layers = [getattr(module, name, None) for name in site.inputs] if isinstance(site, AttentionSite) else []
        if layers and all(type(layer) is nn.Linear for layer in layers):
            found.append(layers)
    return found  # type: ignore[return-value]


def _fits_kernel(layout: Layout, x: torch.Tensor, size: int | None = None) -> bool:
    """Whether a kernel computes attention with heads of `size`, by default the last dimension of x."""
    size = x.shape[-1] if size is None else size
    return layout.fast and layout.unpad and kernels.available(x.device, layout.longest, size)


def _by_kernel(
    site: AttentionSite, rows: list[torch.Tensor], heads: int, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention without the grid: (1, tokens, hidden), or (pairs, 1, hidden) where queries are the first tokens.

    `rows`: queries, keys and values side by side, (1, tokens, 3 * hidden); or queries, and keys and values.
    """
    layout, batch = site.layout, site.layout.batch
    columns = layout.dropout.columns(site.dropout, heads, layout.longest, rows[0].device)
    attend = kernels.attend_first if site.first_only else kernels.attend
    # Flattened, not indexed, whose backward would fill zeros.
    flat = [part.flatten(0, 1) for part in rows]
    mixed = attend(*flat, batch.first, batch.lengths, batch.keys, columns, dropout, scaling, layout.longest, heads)
    return mixed[:, None] if site.first_only else mixed[None]


def bert_forward(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """In place of the forward of BERT's kind of attention."""
    return own_attention(module, hidden_states, module.num_attention_heads), None


def distilbert_forward(
    module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """In place of DistilBERT's."""
    return module.out_lin(own_attention(module, hidden_states, module.n_heads)), None


def mpnet_forward(
    module: Any, hidden_states: torch.Tensor, attention_mask: Any, position_bias: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor]:
    """In place of MPNet's. `position_bias` (1, heads, longest, longest) is that of the longest pair."""

    def bias(scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return scores + position_bias[..., : q.shape[2], : k.shape[2]]

    return (module.o(own_attention(module, hidden_states, module.num_attention_heads, bias)),)


def residual_forward(
    module: Any, layout: Layout, hidden_states: torch.Tensor, input_tensor: torch.Tensor
) -> torch.Tensor:
    """In place of the forward of a module that has a linear layer, dropout, and the norm of the sum with its input.

    The fast one has, as attribute `low`, the numbers that the next product would round it to.
    """
    x, dropout, norm = module.dense(hidden_states), module.dropout, module.LayerNorm
    if not (layout.fast and kernels.available(x.device, width=x.shape[-1])):
        return norm(dropout(x) + input_tensor)  # type: ignore[no-any-return]
    p = dropout.p if module.training else 0.0
    keys, columns = layout.dropout.keys(x), layout.dropout.columns(dropout.site, 1, x.shape[-1], x.device)[0]
    rows = (part.flatten(0, -2) for part in (x, input_tensor))
    exact, low = kernels.add_norm(*rows, norm.weight, norm.bias, norm.eps, keys.flatten(), columns, p)
    exact = exact.view(x.shape)
    if low.dtype != exact.dtype:
        exact.low = low.view(x.shape)
    return exact
