"""The operators of kernels.py in torch's own operations, for a device without the kernels; arguments as there.

`pairs` are the arguments that all of attention share: first, lengths, keys, columns, p, scaling, longest, heads.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import layer_norm

from trainer.model.masks import masked


class Grid(NamedTuple):
    """The padded grid of pairs: `places` (pairs, longest) of the tokens, which of them are `real`, and `heads`."""

    places: torch.Tensor
    real: torch.Tensor
    heads: int

    def of(self, rows: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """Rows (tokens, parts * hidden) as `parts` grids (pairs, heads, longest, size), zeros at the padding."""
        padded = rows[self.places].masked_fill(~self.real[..., None], 0.0)
        return list(padded.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def rows(self, grids: list[torch.Tensor], tokens: int) -> torch.Tensor:
        """The way back, to (tokens, parts * hidden)."""
        padded = torch.cat([grid.transpose(1, 2).flatten(2) for grid in grids], 2)
        rows = padded.new_empty(tokens, padded.shape[2])
        rows[self.places[self.real]] = padded[self.real]
        return rows


class Attention(NamedTuple):
    """What attention needs beside queries, keys and values.

    `visible` (pairs, 1, 1, longest): keys that are tokens; `keys` (pairs, 1, queries, 1) and `columns` (heads, 1,
    longest / 4) of its dropout.
    """

    visible: torch.Tensor
    keys: torch.Tensor
    columns: torch.Tensor
    p: float
    scaling: float

    def dropped(self, weights: torch.Tensor) -> torch.Tensor:
        return weights if self.p == 0 else masked(weights, self.p, self.keys, self.columns)

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Of scaled queries (pairs, heads, queries, size): (pairs, heads, queries, longest) in fp32."""
        scores = (q @ k.transpose(2, 3)).masked_fill(~self.visible, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.dropped(self.weights(q * self.scaling, k).to(v.dtype)) @ v

    def backward(
        self, gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scaled = q * self.scaling
        weights = self.weights(scaled, k)
        of_values = self.dropped(weights.to(v.dtype)).transpose(2, 3) @ gradient
        of_weights = self.dropped(gradient @ v.transpose(2, 3)).float()
        inner = (of_weights * weights).sum(-1, keepdim=True)
        of_scores = ((of_weights - inner) * weights).to(q.dtype)
        return of_scores @ k * self.scaling, of_scores.transpose(2, 3) @ scaled, of_values


def _laid_out(
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> tuple[Grid, Attention]:
    place = torch.arange(longest, device=first.device)
    real = place < lengths[:, None]
    grid = Grid((first[:, None] + place).where(real, 0), real, heads)
    of_heads = columns[:, None, : -(-longest // 4)]
    return grid, Attention(real[:, None, None], keys[grid.places][:, None, :, None], of_heads, p, scaling)


def attend(qkv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    grid, attention = _laid_out(*pairs)
    return grid.rows([attention.forward(*grid.of(qkv, 3))], len(qkv))


def attend_backward(gradient: torch.Tensor, qkv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    grid, attention = _laid_out(*pairs)
    return grid.rows(list(attention.backward(*grid.of(gradient, 1), *grid.of(qkv, 3))), len(qkv))


def attend_first(q: torch.Tensor, kv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    grid, attention = _laid_out(*pairs)
    attention = attention._replace(keys=attention.keys[:, :, :1])
    return attention.forward(q.unflatten(1, (grid.heads, 1, -1)), *grid.of(kv, 2)).flatten(1)


def attend_first_backward(
    gradient: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, *pairs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    grid, attention = _laid_out(*pairs)
    attention = attention._replace(keys=attention.keys[:, :, :1])
    one = (grid.heads, 1, -1)
    of_q, *of_kv = attention.backward(gradient.unflatten(1, one), q.unflatten(1, one), *grid.of(kv, 2))
    return of_q.flatten(1), grid.rows(of_kv, len(kv))


def drop(x: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    # What an operator gives must be memory of its own, as the kernel's result is.
    return x.clone(memory_format=torch.contiguous_format) if p == 0 else _dropped(x, keys, columns, p)


def _dropped(x: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    return x if p == 0 else masked(x, p, keys[:, None], columns)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    summed = (_dropped(x, keys, columns, p) + residual).float()
    y = layer_norm(summed, weight.shape, weight, bias, eps)
    return y, y.to(x.dtype, copy=True)


def add_norm_backward(
    of_exact: torch.Tensor | None,
    of_rounded: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = [gradient.float() for gradient in (of_exact, of_rounded) if gradient is not None]
    gradient = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    summed = (_dropped(x, keys, columns, p) + residual).float()
    centred = summed - summed.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normed, of_normed = centred * scale, gradient * weight
    inner = (of_normed * normed).mean(1, keepdim=True)
    of_sum = (scale * (of_normed - of_normed.mean(1, keepdim=True) - normed * inner)).to(residual.dtype)
    of_x = _dropped(of_sum.to(x.dtype, copy=True), keys, columns, p)
    return of_x.contiguous(), of_sum.contiguous(), (gradient * normed).sum(0), gradient.sum(0)
