"""Micro-batches: array operations from the flat tokens to tensors on the device."""

from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.tokens import Tokens
from trainer.model.masks import token_keys

IGNORED = -100  # label that cross_entropy gives neither loss nor gradient: of a pair that fills up
NO_ROW = 2**62  # no row of a data set: of what belongs to all pairs of a step
SHORTEST, STEP = 64, 128  # of shapes: lengths of pairs, and steps of tokens


@dataclass(frozen=True)
class Group:
    """Consecutive pairs of a batch that attention pads to one length."""

    pairs: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Shape:
    """What a batch is filled up to, so that the batches of a run have few shapes."""

    tokens: int
    pairs: int
    longest: int


@dataclass(frozen=True)
class Batch:
    """Pairs laid end to end, without padding, longest first; then those that fill up a shape, if it has one.

    Attention lays them out as a grid: groups of pairs, each padded to its longest, one group after the other.

    Attributes:
        ids, positions, types: (tokens,) int64 token numbers, positions as the model counts them, token types.
        keys: (tokens,) int64 dropout keys.
        step_key: (1,) int64 dropout key of what all pairs of the step share.
        pair: (tokens,) int64 number of the pair in the batch.
        first, lengths: (pairs,) int64 where each pair begins, and its tokens.
        labels: (pairs,) int64 class numbers.
        place, start, width: (tokens,) int64 place in the grid, where the pair begins there, the length it is padded to.
        token: (slots,) int64 which token lies in each place of the grid; 0 where none does.
        real: (slots,) int64 1 where a token lies.
        rows: (data set's pairs,) rows in the data set, on the host.
        groups: how attention groups the pairs, on the host, so that no shape waits for the device.
        flat, sizes: all tensors, one after the other in the order of the fields, and how long they are.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor
    keys: torch.Tensor
    step_key: torch.Tensor
    pair: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    place: torch.Tensor
    start: torch.Tensor
    width: torch.Tensor
    token: torch.Tensor
    real: torch.Tensor
    rows: np.ndarray
    groups: tuple[Group, ...]
    flat: torch.Tensor
    sizes: list[int]

    @property
    def num_pairs(self) -> int:
        return len(self.first)

    def on(self, flat: torch.Tensor) -> "Batch":
        """The same batch, of which `flat` is to have the numbers."""
        return _named(self.sizes, flat, self.rows, self.groups)


def shape_of(lengths: np.ndarray, num_pairs: int) -> Shape:
    """The shape that pairs of `lengths` (pairs,) are filled up to, where a batch has at most `num_pairs`."""
    return shape_for(len(lengths), int(lengths.max()), int(lengths.sum()), num_pairs)


def shape_for(size: int, longest: int, tokens: int, num_pairs: int) -> Shape:
    """The same of `size` pairs, of which the longest has `longest` tokens and all together have `tokens`.

    Tokens are filled up in steps of 128, or of an eighth of their number's power of two if that is more. What fills up
    are pairs as well, so that every token belongs to one: so many that none is longer than the longest, nor empty.
    """
    longest = SHORTEST if longest <= SHORTEST else -(-longest // STEP) * STEP
    step = max(STEP, 2 ** (tokens.bit_length() - 4))
    pairs = num_pairs + -(-(step - 1) // (longest - 1))
    return Shape(-(-(tokens + pairs - size) // step) * step, pairs, longest)


def assemble(
    tokens: Tokens,
    labels: np.ndarray,
    rows: np.ndarray,
    device: torch.device,
    seed: int = 0,
    step: int = 0,
    likeness: float = 0.0,
    longest: int | None = None,
    num_pairs: int | None = None,
    padding: int = 0,
    first_position: int = 0,
) -> Batch:
    """The batch of data set rows `rows`, which it orders by length.

    Args:
        likeness: shortest length of a group relative to its longest; 0 = all pairs are one group.
        longest: length that all pairs are padded to, if more than that of the longest of them.
        num_pairs: most pairs of a batch; given, the batch is filled up to one of few shapes, in one group.
        padding, first_position: number of the padding token, and position of a pair's first token. If that is not 0,
            padding tokens are not counted, which a text can hold written out: RoBERTa's kind.

    An empty micro-batch becomes row 0 with an ignored label: every rank takes part in every step.
    """
    rows, targets = (rows, labels[rows]) if len(rows) else (np.zeros(1, dtype=np.int64), np.array([IGNORED]))
    lengths = tokens.lengths[rows].astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    rows, targets, lengths = rows[order], targets[order], lengths[order]
    count = int(lengths.sum())
    lengths, groups = _grouped(lengths, likeness, longest, num_pairs)
    pair, positions, first = _numbered(lengths)
    places = tokens.offsets[rows][pair[:count]] + positions[:count]
    # One more key than tokens: that of the step.
    numbers = (np.append(rows, NO_ROW), np.append(positions[:count], 0), np.append(pair[:count], len(rows)))
    keys = token_keys(seed, step, *numbers)
    ids = _up_to(len(pair), tokens.ids[places], padding)
    arrays = {
        "ids": ids,
        "positions": positions if first_position == 0 else _counted(ids, first, pair, first_position - 1),
        "types": _up_to(len(pair), tokens.types[places], 0),
        "keys": _up_to(len(pair), keys[:-1], 0),
        "step_key": keys[-1:],
        "pair": pair,
        "first": first,
        "lengths": lengths,
        "labels": _up_to(len(lengths), targets, IGNORED),
        **_grid(groups, pair, positions),
    }
    return _named([len(values) for values in arrays.values()], _copied(arrays, device), rows, groups)


def _grouped(
    lengths: np.ndarray, likeness: float, longest: int | None, num_pairs: int | None
) -> tuple[np.ndarray, tuple[Group, ...]]:
    """Descending `lengths` (pairs,), with those of the pairs that fill up, and how attention groups them all."""
    if num_pairs is not None:
        shape = shape_of(lengths, num_pairs)
        filling = _shares(shape.tokens - int(lengths.sum()), shape.pairs - len(lengths))
        return np.concatenate([lengths, filling]), (Group(shape.pairs, shape.longest, shape.tokens),)
    if longest is not None:
        return lengths, (Group(len(lengths), max(longest, int(lengths[0])), int(lengths.sum())),)
    return lengths, make_groups(lengths, likeness)


def make_groups(lengths: np.ndarray, likeness: float) -> tuple[Group, ...]:
    """Cuts descending `lengths` (pairs,) where a pair is shorter than `likeness` times the longest of its group."""
    groups, start = [], 0
    while start < len(lengths):
        longest = int(lengths[start])
        end = int(np.searchsorted(-lengths, -likeness * longest, side="right"))
        groups.append(Group(end - start, longest, int(lengths[start:end].sum())))
        start = end
    return tuple(groups)


def _numbered(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token of pairs that long, (tokens,): its pair, and its place there; (pairs,) where each pair begins."""
    pair, first = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths) - lengths
    return pair, np.arange(len(pair)) - first[pair], first


def _up_to(size: int, values: np.ndarray, filler: int) -> np.ndarray:
    """(size,) of which the first are `values`."""
    filled = np.full(size, filler, dtype=np.int64)
    filled[: len(values)] = values
    return filled


def _shares(total: int, parts: int) -> np.ndarray:
    """(parts,) numbers as equal as can be whose sum is `total`."""
    return np.diff(np.arange(parts + 1) * total // parts)


def _counted(ids: np.ndarray, first: np.ndarray, pair: np.ndarray, padding: int) -> np.ndarray:
    """(tokens,) positions from padding + 1 on, of which a padding token has none: `padding`."""
    real = (ids != padding).astype(np.int64)
    count = real.cumsum()
    return (count - (count - real)[first][pair]) * real + padding


def _grid(groups: tuple[Group, ...], pair: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """What a Batch says of the grid."""
    widths = np.repeat([group.longest for group in groups], [group.pairs for group in groups])
    start, width = (np.cumsum(widths) - widths)[pair], widths[pair]
    place = start + positions
    token, real = np.zeros((2, widths.sum()), dtype=np.int64)
    token[place], real[place] = np.arange(len(pair)), 1
    return {"place": place, "start": start, "width": width, "token": token, "real": real}


def _copied(arrays: dict[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """The arrays one after the other, on the device, by one copy."""
    flat = torch.from_numpy(np.concatenate(list(arrays.values()), dtype=np.int64))
    if device.type == "cuda":
        # From pinned memory the copy runs while the device computes the step before.
        flat = flat.pin_memory().to(device, non_blocking=True)
    return flat


def _named(sizes: list[int], flat: torch.Tensor, rows: np.ndarray, groups: tuple[Group, ...]) -> Batch:
    """The batch whose tensors, in the order of its fields, are the parts of `flat` that long."""
    return Batch(*flat.split(sizes), rows=rows, groups=groups, flat=flat, sizes=sizes)  # type: ignore[misc]
