"""What any micro-batch takes, from a few that were counted.

What trace.py counts is a sum over tokens, over places and pairs of places of attention's grid, over pairs and over
groups: linear in those six numbers and 1. So a few counted micro-batches give the coefficients, and each of a run's
hundred thousand micro-batches is one product of a matrix. Products are exact so (tests/plan/test_plan.py); the number
of operations depends a little on more, such as whether a group has padding at all.
"""

from dataclasses import dataclass

import numpy as np

from trainer.model.batch import make_groups, shape_of
from trainer.plan.trace import Subject

NAMES = ("linear", "attention", "read", "moved", "operations", "peak")
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
    """Coefficients (features, NAMES) of a step's micro-batches and of those of an evaluation."""

    training: np.ndarray
    evaluation: np.ndarray

    @staticmethod
    def of(subject: Subject, lengths: np.ndarray, most_pairs: int) -> "Costs":
        """Counted on micro-batches of pairs as long as those of the data, `lengths` (n,)."""
        probes = micro_batches(lengths, min(most_pairs, LARGEST))
        return Costs(*(_fitted(subject, probes, most_pairs, training) for training in (True, False)))


def micro_batches(lengths: np.ndarray, largest: int) -> list[np.ndarray]:
    """Lengths of pairs of small and large micro-batches, of short and long pairs, even and mixed."""
    random = np.random.default_rng(0)
    low, middle, high = (int(np.quantile(lengths, q)) for q in (0.05, 0.5, 0.999))
    mixed = [np.sort(random.choice(lengths, size))[::-1] for size in {1, max(1, largest // 4), largest}]
    even = [np.full(max(1, size), length) for size, length in ((largest // 4, low), (largest // 2, middle), (2, high))]
    spread = np.linspace(high, low, max(2, largest // 3)).astype(np.int64)
    return [*mixed, *even, spread, np.array([high, middle, low])]


def _fitted(subject: Subject, probes: list[np.ndarray], most_pairs: int, training: bool) -> np.ndarray:
    """Least squares, each column of features scaled to one size."""
    rows = np.array([features(subject, own, most_pairs, training) for own in probes], dtype=np.float64)
    counted = [subject.count(own, training, most_pairs) for own in probes]
    values = np.array([[getattr(own, name) for name in NAMES] for own in counted], dtype=np.float64)
    scale = np.maximum(np.abs(rows).max(0), 1)
    found, *_ = np.linalg.lstsq(rows / scale, values, rcond=1e-9)
    return found / scale[:, None]
