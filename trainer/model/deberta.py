"""DeBERTa-v2's and v3's disentangled attention (He et al. 2021) inside each pair.

A score has three parts: query and key; query and the key's relative position; key and the query's. A token's products
with the positions do not wait for its partner, so they are taken for all distances that a group's pairs have, and
added to the scores by moving each row on by one. Only the rows of the table of positions that occur are computed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from trainer.model.attention import AttentionSite, Bias, attention, projected
from trainer.model.layout import Layout, Taken


@dataclass(frozen=True)
class Distances:
    """The distances in a batch, query's place less key's: from -(longest - 1) to longest - 1.

    Attributes:
        start, end: the rows of the table of relative positions that occur.
        upwards, downwards: (2 * longest - 1,) of each distance its row among those.
    """

    start: int
    end: int
    upwards: torch.Tensor
    downwards: torch.Tensor


@cache
def distances(span: int, buckets: int, farthest: int, longest: int, device: torch.device) -> Distances:
    """`span` is half the rows of the table, the others as in the library's build_relative_position."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    below = build_relative_position(torch.empty(1, 1), torch.empty(longest, 1), buckets, farthest)[0, 0]  # 0, -1, ...
    rows = (torch.cat([below.flip(0), -below[1:]]) + span).clamp(0, 2 * span - 1)
    start, end = int(rows[0]), int(rows[-1]) + 1
    rows = (rows - start).to(device)
    return Distances(start, end, rows, rows.flip(0))


def adopt_deberta(base: Any, layout: Layout) -> None:
    """Gives the base model's encoder distances in pairs, and a convolution in pairs, if it has one."""
    encoder = base.encoder
    encoder.get_attention_mask = lambda mask: mask
    encoder.get_rel_pos = lambda hidden, *args: (
        distances(
            encoder.rel_embeddings.num_embeddings // 2,
            encoder.position_buckets,
            encoder.max_relative_positions,
            layout.longest,
            hidden.device,
        )
        if encoder.relative_attention
        else None
    )
    if encoder.conv is not None and layout.unpad:
        encoder.conv.forward = lambda hidden, residual, mask: _convolved(encoder.conv, layout, hidden, residual)


def disentangled_forward(
    module: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    output_attentions: bool = False,
    query_states: Any = None,
    relative_pos: Distances | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """In place of DisentangledSelfAttention's."""
    site: AttentionSite = module.site
    source = site.layout.hidden if site.first_only else hidden_states
    kinds = [kind for kind in ("c2p", "p2c") if kind in module.pos_att_type]
    scaling = (module.attention_head_size * (1 + len(kinds))) ** -0.5
    table = None
    if relative_pos is not None and rel_embeddings is not None and kinds:
        table = rel_embeddings[relative_pos.start : relative_pos.end]
        if module.training and (p := module.pos_dropout.p) > 0:
            table = site.layout.dropout.shared_mask(module.pos_dropout.site, p, table, relative_pos.start)
    query, of_query = _project(module, "query", hidden_states, table if "p2c" in kinds else None)
    key, of_key = _project(module, "key", source, table if "c2p" in kinds else None)
    value = projected(module.value_proj(source), module.num_attention_heads)
    bias = None
    if relative_pos is not None and table is not None:
        by_query = _by_head(module, of_key, relative_pos.downwards)
        by_key = _by_head(module, of_query, relative_pos.upwards)
        bias = _bias(site.layout, by_query, None if by_key is None else by_key * scaling)
    dropout = module.dropout.p if module.training else 0.0
    mixed, _ = attention(module, query, key, value, None, scaling=scaling, dropout=dropout, bias=bias)
    return mixed.flatten(2), None


def _project(
    module: Any, name: str, source: torch.Tensor, table: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of `source` (batch, length, hidden) as heads, and of the table's rows (rows, hidden)."""
    linear, heads = getattr(module, f"{name}_proj"), module.num_attention_heads
    if table is None:
        return projected(linear(source), heads), None
    if not module.share_att_key:
        return projected(linear(source), heads), getattr(module, f"pos_{name}_proj")(table)
    tokens = source.flatten(0, 1)
    both = linear(torch.cat([tokens, table]))
    return projected(both[: len(tokens)].unflatten(0, source.shape[:2]), heads), both[len(tokens) :]


def _by_head(module: Any, rows: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    """(heads, distances, size)."""
    if rows is None:
        return None
    # Distances share rows: an embedding's gradient adds them up in a fixed order, that of an index on CUDA does not.
    return functional.embedding(order, rows).unflatten(-1, (module.num_attention_heads, -1)).transpose(0, 1)


def _bias(layout: Layout, by_query: torch.Tensor | None, by_key: torch.Tensor | None) -> Bias:
    """Of what queries are multiplied with, for distances downwards, and keys, for distances upwards."""
    zero = layout.longest - 1  # the distance 0, in either

    def bias(scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        _, _, length, keys = scores.shape  # the queries are the pair's first tokens
        if by_query is not None:
            scores = AddSkewed.apply(scores, _by_position(q, by_query[:, zero - length + 1 : zero + keys]))
        if by_key is not None:
            near = by_key[:, zero - keys + 1 : zero + length]
            if length == 1:
                return scores + (k * near.flip(1)).sum(-1).unsqueeze(2)
            scores = AddSkewed.apply(scores.transpose(2, 3), _by_position(k, near)).transpose(2, 3)
        return scores

    return bias


def _by_position(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x (pairs, heads, length, size) times table (heads, positions, size): (heads, pairs, length, positions)."""
    # One product a head, for all pairs at once.
    products = x.transpose(0, 1).flatten(1, 2) @ table.transpose(1, 2)
    return products.unflatten(1, (x.shape[0], x.shape[2]))


class AddSkewed(torch.autograd.Function):
    """scores (pairs, heads, length, keys), to which row i of products (heads, pairs, length, length + keys - 1) is
    added from place length - 1 - i on. In place, and without a copy of the products."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        ctx.shape = products.shape
        ctx.mark_dirty(scores)
        return scores.add_(_skewed(products))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        of_products = gradient.new_zeros(ctx.shape)
        _skewed(of_products).copy_(gradient)
        return gradient, of_products


def _skewed(x: torch.Tensor) -> torch.Tensor:
    """A view of x (heads, pairs, length, positions) as (pairs, heads, length, keys)."""
    x = x.contiguous()
    heads, pairs, length, positions = x.shape
    size = (pairs, heads, length, positions - length + 1)
    strides = (length * positions, pairs * length * positions, positions - 1, 1)
    return x.as_strided(size, strides, x.storage_offset() + length - 1)


def _convolved(conv: Any, layout: Layout, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """ConvLayer's forward, inside each pair: zeros between two pairs are all that it sees of another."""
    # In one call, however many groups there are: ZeRO-3's ranks meet at each call of a module.
    between = conv.conv.padding[0]
    batch, rows = layout.batch, hidden.flatten(0, 1)
    places = torch.arange(len(rows), device=rows.device) + between * batch.pair
    spaced = rows.new_zeros(len(rows) + between * batch.num_pairs, rows.shape[1]).index_copy(0, places, rows)
    out = Taken.apply(conv.conv(spaced.T[None])[0].T, places)[None]
    return conv.LayerNorm(residual + ACT2FN[conv.conv_act](conv.dropout(out)))
