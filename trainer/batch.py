"""Micro-batches: array operations from the flat tokens to tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.dropout import token_keys
from trainer.tokens import Tokens

IGNORED = -100  # label of a pair that fills a rank's empty share: cross_entropy gives it neither loss nor gradient


@dataclass(frozen=True)
class Batch:
    """Pairs laid end to end, without padding.

    Attributes:
        ids, positions, types: (tokens,) int64 token numbers, positions in the pair, token types 0 or 1.
        keys: (tokens,) int64 dropout keys.
        pair: (tokens,) int64 number of the pair in the batch.
        first: (pairs,) int64 where each pair begins.
        labels: (pairs,) int64 class numbers.
        longest: tokens of the longest pair.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    keys: torch.Tensor
    pair: torch.Tensor
    first: torch.Tensor
    labels: torch.Tensor
    longest: int

    @property
    def num_pairs(self) -> int:
        return len(self.first)


def assemble(
    tokens: Tokens, labels: np.ndarray, rows: np.ndarray, device: torch.device, seed: int = 0, step: int = 0
) -> Batch:
    """The batch of data set rows `rows`. An empty share becomes row 0 with an ignored label: every rank takes part."""
    targets = labels[rows]
    if len(rows) == 0:
        rows, targets = np.zeros(1, dtype=np.int64), np.array([IGNORED])
    starts = tokens.offsets[rows]
    lengths = tokens.offsets[rows + 1] - starts
    first = np.cumsum(lengths) - lengths
    pair = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(len(pair)) - first[pair]
    arrays = {
        "ids": tokens.ids[starts[pair] + positions],
        "positions": positions,
        "types": positions >= tokens.second[rows][pair],
        "keys": token_keys(seed, step, rows[pair], positions),
        "pair": pair,
        "first": first,
        "labels": targets,
    }
    return Batch(**{k: _to(v, device) for k, v in arrays.items()}, longest=int(lengths.max()))


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array.astype(np.int64, copy=False))
    # Pinned memory lets the copy run while the device computes the step before.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
