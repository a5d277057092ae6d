"""What any micro-batch takes, from a few that were counted.

What trace.py counts is a sum over tokens, over places and pairs of places of attention's grid, over pairs and over
groups: linear in those six numbers and 1. So a few counted micro-batches give the coefficients, and each of a run's
hundred thousand micro-batches is one product of a matrix. Products are exact so (tests/plan/test_plan.py); the number
of operations depends a little on more, such as whether a group has padding at all.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.model.batch import make_groups, shape_of
from trainer.plan.counter import Counts
from trainer.plan.trace import Subject

NAMES = ("linear", "attention", "read", "moved", "operations", "peak", "bare")
LARGEST = 48  # pairs of a counted micro-batch


def features(subject: Subject, lengths: np.ndarray, most_pairs: int, training: bool, longest: int = 0) -> list[int]:
    """Of a micro-batch of pairs of `lengths` (pairs,): 1, tokens that are computed, pairs, places of attention's grid,
    pairs of places, groups, and the groups' longest pairs together.

    `most_pairs`: of any micro-batch of the run. `longest`: that all pairs are padded to, if more than its own.
    """
    if subject.fast and training:
        shape = shape_of(lengths, most_pairs)
        slots = shape.pairs * shape.longest
        return [1, shape.tokens, shape.pairs, slots, slots * shape.longest, 1, shape.longest]
    if not subject.unpadded:
        width = max(int(lengths.max()), longest if subject.model.one_length else 0)
        slots = len(lengths) * width
        return [1, slots, len(lengths), slots, slots * width, 1, width]
    groups = make_groups(-np.sort(-lengths), subject.likeness)
    slots = sum(group.pairs * group.longest for group in groups)
    squares = sum(group.pairs * group.longest**2 for group in groups)
    reach = sum(group.longest for group in groups)
    return [1, int(lengths.sum()), len(lengths), slots, squares, len(groups), reach]


@dataclass(frozen=True)
class Costs:
    """Coefficients (features, NAMES), counted when asked for, on micro-batches of pairs as long as those of the data.

    Attributes:
        lengths: (n,) of the data.
        most_pairs: of any micro-batch of the run.
    """

    subject: Subject
    lengths: np.ndarray
    most_pairs: int

    @cached_property
    def training(self) -> np.ndarray:
        return self._fitted(True)

    @cached_property
    def evaluation(self) -> np.ndarray:
        return self._fitted(False)

    @cached_property
    def exact(self) -> np.ndarray:
        """Of an evaluation without autocast, as ends a run in bf16."""
        return self._fitted(False, bf16=False) if self.subject.config.bf16 else self.evaluation

    def _fitted(self, training: bool, bf16: bool | None = None) -> np.ndarray:
        probes = micro_batches(self.lengths, min(self.most_pairs, LARGEST))
        return _fitted(self.subject, probes, training, bf16)


def micro_batches(lengths: np.ndarray, largest: int) -> list[np.ndarray]:
    """Lengths of pairs of small and large micro-batches, of short and long pairs, even and mixed."""
    random = np.random.default_rng(0)
    low, middle, high = (int(np.quantile(lengths, q)) for q in (0.05, 0.5, 0.999))
    sizes = sorted({1, max(1, largest // 4), largest}, reverse=True)
    mixed = [np.sort(random.choice(lengths, size))[::-1] for size in sizes]
    even = [np.full(max(1, size), length) for size, length in ((largest // 4, low), (largest // 2, middle), (2, high))]
    spread = np.linspace(high, low, max(2, largest // 3)).astype(np.int64)
    return [*mixed, *even, spread, np.array([high, middle, low])]


def _fitted(subject: Subject, probes: list[np.ndarray], training: bool, bf16: bool | None = None) -> np.ndarray:
    """Least squares, each column of features scaled to one size.

    Each probe is of the shape of a run whose largest micro-batch it is: pairs that fill up tell apart what grows with
    pairs, and coefficients hold for other micro-batches than the run's. A micro-batch that says nothing new is not
    counted: a count takes half a second.
    """
    rows = np.array([features(subject, own, len(own), training) for own in probes], dtype=np.float64)
    scale = np.maximum(np.abs(rows).max(0), 1)
    rows, kept = rows / scale, list(range(len(rows)))
    if subject.likeness == 0 or (subject.fast and training):  # one group: what adds nothing to the features can go
        kept = [0]
        for number in range(1, len(rows)):
            if np.linalg.matrix_rank(rows[[*kept, number]], tol=1e-9) > len(kept):
                kept.append(number)
    values = np.stack([_values(subject.count(probes[number], training, len(probes[number]), bf16)) for number in kept])
    found, *_ = np.linalg.lstsq(rows[kept], values, rcond=1e-9)
    column, known = NAMES.index("operations"), [0, 5]  # there are more of them with more groups, not with more tokens
    found[:, column] = 0
    found[known, column], *_ = np.linalg.lstsq(rows[np.ix_(kept, known)], values[:, column], rcond=1e-9)
    return found / scale[:, None]  # type: ignore[no-any-return]


def _values(counts: Counts) -> np.ndarray:
    return np.array([getattr(counts, name) for name in NAMES], dtype=np.float64)
