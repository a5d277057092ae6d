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

from functools import lru_cache

import numpy as np
import torch
from torch import nn

DRAWS = 4  # 16-bit draws in a 64-bit hash
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64
MULTIPLIER = -0x40A7B892E31B1A47  # odd; splitmix64's first one, as int64


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit key of integers; arrays broadcast."""
    key = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key * np.uint64(GOLDEN) + np.asarray(part).astype(np.uint64) + np.uint64(GOLDEN))
    return key


def token_keys(seed: int, step: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys (tokens,) as int64 of the tokens at `positions` of data set rows `rows`, both (tokens,)."""
    return hash_key(seed, step, rows, positions).view(np.int64)


def columns_of(site: int, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Random odd numbers (num_rows, ceil(width / DRAWS)); each row (an attention head) has its own."""
    # Attention is as wide as the longest pair, so widths are rounded up: few are kept, none is computed twice.
    return _wide_columns(site, num_rows, -(-width // 128) * 128, device)[:, : -(-width // DRAWS)]


@lru_cache(maxsize=4096)
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
    # By a Python number torch multiplies in fp32; in a bfloat16 tensor, 1 / 0.9 would be 1.1094.
    return x * (65536 / (65536 - dropped)) * keep(keys, columns, x.shape[-1], dropped - 32768)


@lru_cache(maxsize=4096)
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


class DropoutKeys:
    """The keys of the tokens that the model is about to see, shared by all its dropout sites.

    A site finds its keys by the leading shape of its input: every token, (batch, length), or only each pair's first
    one, (batch,) or (batch, 1).

    Attributes:
        passes: how often layers that are computed several times in a forward have begun; each pass has its own masks.
    """

    def __init__(self) -> None:
        self.kinds: tuple[torch.Tensor, ...] = ()
        self.step: torch.Tensor
        self.num_sites = 0
        self.passes = 0

    def set(self, tokens: torch.Tensor, first: torch.Tensor, step: torch.Tensor) -> None:
        """`tokens` (batch, length) keys of every token, `first` (pairs,) those of each pair's first token, `step` (1,)
        one that all pairs of the step share."""
        self.kinds = (tokens, first[:, None], first)
        self.step, self.passes = step, 0

    def new_site(self) -> int:
        self.num_sites += 1
        return self.num_sites

    def mask(self, site: int, p: float, x: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., features) after dropout; `columns` are the site's, for as many features or more, if at hand."""
        if columns is None:
            columns = columns_of(self._now(site), 1, x.shape[-1], x.device)[0]
        keys = next(kind for kind in self.kinds if kind.shape == x.shape[:-1])  # no table: shapes can be symbols
        return masked(x, p, keys.unsqueeze(-1), columns[: -(-x.shape[-1] // DRAWS)])

    def attention_mask(self, site: int, p: float, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The same for attention weights (batch, heads, queries, keys), given the `queries`' keys (batch, queries)."""
        columns = columns_of(self._now(site), weights.shape[1], weights.shape[-1], weights.device)
        return masked(weights, p, queries[:, None, :, None], columns[:, None])

    def shared_mask(self, site: int, p: float, x: torch.Tensor, start: int) -> torch.Tensor:
        """The same for rows (rows, features) of a table, from row `start` on, that all pairs of a step share."""
        of_row = numbers(site, 0, start + len(x), x.device)[start:]
        return masked(x, p, mixed(self.step + of_row)[:, None], columns_of(site, 1, x.shape[-1], x.device)[0])

    def _now(self, site: int) -> int:
        return site + self.passes * self.num_sites


class KeyedDropout(nn.Module):
    """Takes the place of an nn.Dropout.

    Attributes:
        columns: as in `keep`, of more features than there are. Only compiled code has them beforehand: it can make
            none, and would be another one for each site, if it had to know its number.
    """

    def __init__(self, p: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.keys, self.site = p, keys, keys.new_site()
        self.columns: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        return self.keys.mask(self.site, self.p, x, self.columns)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"
