"""DeBERTa-v2's and v3's disentangled attention (He et al. 2021) inside each pair.

A score has three parts: query and key; query and the key's relative position; key and the query's. A token's products
with the positions do not wait for its partner, so they are taken for all distances that a group's pairs have, and laid
out as scores by moving each row on by one. Of the table of relative positions only the rows that occur are computed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from trainer.model.attention import AttentionSite, Bias, attention, projected
from trainer.model.layout import Layout


@dataclass(frozen=True)
class Distances:
    """The distances in a batch, query's place less key's: from -(longest - 1) to longest - 1.

    Attributes:
        start, end: the rows of the table of relative positions that occur.
        row: (2 * longest - 1,) of each distance, upwards, its row among those.
    """

    start: int
    end: int
    row: torch.Tensor


@lru_cache(maxsize=1024)
def distances(span: int, buckets: int, farthest: int, longest: int, device: torch.device) -> Distances:
    """`span` is half the rows of the table, the others as in the library's build_relative_position."""
    one, all_of_them = torch.empty(1, 1), torch.empty(longest, 1)
    downwards = build_relative_position(one, all_of_them, buckets, farthest)[0, 0]  # 0, -1, ...
    rows = (torch.cat([downwards.flip(0), -downwards[1:]]) + span).clamp(0, 2 * span - 1)
    start, end = int(rows[0]), int(rows[-1]) + 1
    return Distances(start, end, (rows - start).to(device))


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
        of_query, of_key = (_by_head(module, rows, relative_pos) for rows in (of_query, of_key))
        bias = _bias(site.layout, of_query, of_key, scaling)
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


def _by_head(module: Any, rows: torch.Tensor | None, relative: Distances) -> torch.Tensor | None:
    """(heads, distances, size), upwards."""
    if rows is None:
        return None
    return rows.index_select(0, relative.row).unflatten(-1, (module.num_attention_heads, -1)).transpose(0, 1)


def _bias(layout: Layout, of_query: torch.Tensor | None, of_key: torch.Tensor | None, scaling: float) -> Bias:
    zero = layout.longest - 1  # where distance 0 is

    def bias(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        longest = k.shape[2]
        highest = zero + q.shape[2]  # queries are the pair's first tokens
        near = slice(zero - longest + 1, highest)
        parts = []
        if of_key is not None:
            parts.append(_skewed(_by_position(q, of_key[:, near].flip(1))))
        if of_query is not None and q.shape[2] == 1:
            parts.append((k * scaling * of_query[:, near].flip(1)).sum(-1).unsqueeze(2))
        elif of_query is not None:
            parts.append(_skewed(_by_position(k * scaling, of_query[:, near])).transpose(2, 3))
        return sum(parts[1:], parts[0])

    return bias


def _by_position(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x (pairs, heads, length, size) times table (heads, positions, size): (pairs, heads, length, positions)."""
    # One product a head, for all pairs at once.
    products = x.transpose(0, 1).flatten(1, 2) @ table.transpose(1, 2)
    return products.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _skewed(x: torch.Tensor) -> torch.Tensor:
    """x (..., length, positions) to (..., length, keys): row i from place length - 1 - i on."""
    length, positions = x.shape[-2:]
    if length == 1:
        return x
    keys = positions - length + 1
    flat = x.flatten(-2)[..., length - 1 : length - 1 + length * (positions - 1)]
    return flat.unflatten(-1, (length, positions - 1))[..., :keys]


def _convolved(conv: Any, layout: Layout, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """ConvLayer's forward, inside each pair: what it sees beyond a pair's end is zeros."""
    grids = layout.split(layout.pad(hidden[0]))
    rows = torch.cat([conv.conv(grid.transpose(1, 2)).transpose(1, 2).flatten(0, 1) for grid in grids])
    out = layout.unpadded(rows)[None]
    return conv.LayerNorm(residual + ACT2FN[conv.conv_act](conv.dropout(out)))
