"""Dropout whose masks belong to the sample, not to the rank.

torch draws masks from a stream, in the order of the calls: another number of ranks, or another layout of the batch,
gives other masks and so another run. Here the mask of an element is a hash of (seed, step, row of the data set,
position of the token, dropout site, feature). The same seed then gives the same run on any number of ranks, padded or
not, on any device, and a resumed run has no random state to restore.

The hash is multiply-shift (Dietzfelbinger et al. 1997, "A reliable randomized algorithm for the closest-pair problem")
of a well-mixed 64-bit key a token and a random odd 64-bit number a column, its high half folded down and multiplied
once more. Each 64-bit result gives four 16-bit draws, so a probability is met to 1/65536, and the survivors are scaled
by the probability that was met.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

DRAWS = 4  # 16-bit draws in a 64-bit hash
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64
MULTIPLIER = -0x40A7B892E31B1A47  # odd; splitmix64's first one, as int64


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """A 64-bit key of integers; arrays broadcast. `start`: the key of what comes before them."""
    key = np.zeros((), dtype=np.uint64) if start is None else start
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key * np.uint64(GOLDEN) + np.asarray(part).astype(np.uint64) + np.uint64(GOLDEN))
    return key


def token_keys(
    seed: int, step: int, rows: np.ndarray, positions: np.ndarray, pair: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """Keys (tokens,) as int64 of the tokens at `positions` (tokens,) of the data set's `rows`.

    `pair`: of each token, which of the rows it is of, where there is not one a token.
    """
    return hash_key(positions, start=hash_key(seed, step, rows)[pair]).view(np.int64)


def columns_of(site: int, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Random odd numbers (num_rows, ceil(width / DRAWS)); each row (an attention head) has its own."""
    # Attention is as wide as the longest pair, so widths are rounded up: few are kept, none is computed twice.
    return _wide_columns(site, num_rows, -(-width // 128) * 128, device)[:, : -(-width // DRAWS)]


@cache  # for good: a recorded graph knows their places in memory
def _wide_columns(site: int, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    columns = hash_key(site, np.arange(num_rows)[:, None], np.arange(-(-width // DRAWS))[None])
    return torch.from_numpy((columns | np.uint64(1)).view(np.int64)).to(device)


def keep(keys: torch.Tensor, columns: torch.Tensor, width: int, threshold: int) -> torch.Tensor:
    """The mask (..., width): True where an element survives. `keys` and `columns` broadcast as (..., width / DRAWS)."""
    hashes = keys * columns
    hashes ^= hashes >> 32
    hashes *= MULTIPLIER
    return (hashes.view(torch.int16) >= threshold)[..., :width]


def masked(x: torch.Tensor, p: float, keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x (..., features) after dropout: 0, or x / P(survive). `keys` and `columns` as in `keep`."""
    dropped = round(p * 65536)
    kept, scale = keep(keys, columns, x.shape[-1], dropped - 32768), 65536 / (65536 - dropped)
    if x.is_cuda:
        return Kept.apply(x, kept, scale)
    # By a Python number torch multiplies in fp32; in a bfloat16 tensor, 1 / 0.9 would be 1.1094.
    return x * scale * kept


class Kept(torch.autograd.Function):
    """x where `kept`, times `scale`, by one of torch's kernels a direction, which multiplies in fp32; 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.ops.aten.native_dropout_backward(x, kept, scale)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return torch.ops.aten.native_dropout_backward(gradient, ctx.saved_tensors[0], ctx.scale), None, None


@cache  # for good: a recorded graph knows their places in memory
def _many_numbers(site: int, dim: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(hash_key(site, dim, np.arange(size), 1).view(np.int64)).to(device)


def numbers(site: int, dim: int, size: int, device: torch.device) -> torch.Tensor:
    """Random numbers (size,), one a coordinate of a site's dimension; a key and some of them add up to a new key."""
    return _many_numbers(site, dim, -(-size // 128) * 128, device)[:size]


def mixed(keys: torch.Tensor) -> torch.Tensor:
    """`mix` on int64: well-mixed keys from sums of keys and numbers."""
    keys = (keys ^ ((keys >> 30) & (2**34 - 1))) * MULTIPLIER
    keys = (keys ^ ((keys >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return keys ^ ((keys >> 31) & (2**33 - 1))
