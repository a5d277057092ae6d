"""Micro-batches: array operations from the flat tokens to tensors on the device."""

from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.tokens import Tokens
from trainer.model.dropout import token_keys

IGNORED = -100  # label that cross_entropy gives neither loss nor gradient: of a pair that fills an empty micro-batch
NO_ROW = 2**62  # no row of a data set: of what belongs to all pairs of a step


@dataclass(frozen=True)
class Group:
    """Consecutive pairs of a batch that attention pads to one length."""

    pairs: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Pairs laid end to end, without padding, longest first.

    Attributes:
        ids, positions, types: (tokens,) int64 token numbers, positions in the pair, token types.
        keys: (tokens,) int64 dropout keys.
        step_key: (1,) int64 dropout key of what all pairs of the step share.
        pair: (tokens,) int64 number of the pair in the batch.
        first, lengths: (pairs,) int64 where each pair begins, and its tokens.
        widths: (pairs,) int64 longest of the pair's group.
        labels: (pairs,) int64 class numbers.
        rows: (pairs,) rows in the data set, on the host.
        groups: how attention groups the pairs, on the host, so that no shape waits for the device.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    keys: torch.Tensor
    step_key: torch.Tensor
    pair: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    widths: torch.Tensor
    labels: torch.Tensor
    rows: np.ndarray
    groups: tuple[Group, ...]

    @property
    def num_pairs(self) -> int:
        return len(self.first)


def assemble(
    tokens: Tokens,
    labels: np.ndarray,
    rows: np.ndarray,
    device: torch.device,
    seed: int = 0,
    step: int = 0,
    likeness: float = 0.0,
    longest: int | None = None,
) -> Batch:
    """The batch of data set rows `rows`, which it orders by length.

    Args:
        likeness: shortest length of a group relative to its longest; 0 = all pairs are one group.
        longest: length that all pairs are padded to, if more than that of the longest of them.

    An empty micro-batch becomes row 0 with an ignored label: every rank takes part in every step.
    """
    targets = labels[rows]
    if len(rows) == 0:
        rows, targets = np.zeros(1, dtype=np.int64), np.array([IGNORED])
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    order = np.argsort(-lengths, kind="stable")
    rows, targets, lengths = rows[order], targets[order], lengths[order]
    groups = make_groups(lengths, likeness)
    if longest is not None:
        groups = (Group(len(rows), max(longest, int(lengths[0])), int(lengths.sum())),)
    first = np.cumsum(lengths) - lengths
    pair = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(len(pair)) - first[pair]
    places = tokens.offsets[rows][pair] + positions
    arrays = {
        "ids": tokens.ids[places],
        "positions": positions,
        "types": tokens.types[places],
        "keys": token_keys(seed, step, rows[pair], positions),
        "step_key": token_keys(seed, step, np.array([NO_ROW]), np.array([0])),
        "pair": pair,
        "first": first,
        "lengths": lengths,
        "widths": np.repeat([group.longest for group in groups], [group.pairs for group in groups]),
        "labels": targets,
    }
    return Batch(**_to(arrays, device), rows=rows, groups=groups)


def make_groups(lengths: np.ndarray, likeness: float) -> tuple[Group, ...]:
    """Cuts descending `lengths` (pairs,) where a pair is shorter than `likeness` times the longest of its group."""
    groups, start = [], 0
    while start < len(lengths):
        longest = int(lengths[start])
        end = int(np.searchsorted(-lengths, -likeness * longest, side="right"))
        groups.append(Group(end - start, longest, int(lengths[start:end].sum())))
        start = end
    return tuple(groups)


def _to(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as int64 tensors on the device, by one copy."""
    flat = torch.from_numpy(np.concatenate(list(arrays.values()), dtype=np.int64))
    if device.type == "cuda":
        # From pinned memory the copy runs while the device computes the step before.
        flat = flat.pin_memory().to(device, non_blocking=True)
    return dict(zip(arrays, flat.split([len(array) for array in arrays.values()]), strict=True))
