"""Which pairs each rank computes in each step: by the sampler and the dealing of the run itself, at any world size."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.config import Config
from trainer.data.mix import Mix
from trainer.data.sampler import Deal, GlobalBatchSampler, longest_first, num_forwards, total_steps
from trainer.data.tokens import Split
from trainer.plan.costs import Costs, features
from trainer.plan.trace import Subject

MOST_PARTS = 4_096  # micro-batches that are looked at of a run; more steps are sampled evenly


def sampler_of(config: Config, split: Split, batch: int) -> GlobalBatchSampler:
    """That of the run with so many pairs a step; see train.make_sampler, which says what this one does not."""
    mix = Mix.of(config.source_weights, split.pairs)
    samples = len(split) if mix is None else len(mix)
    steps = total_steps(config, samples, batch)
    return GlobalBatchSampler(samples, batch, config.order_seed, steps, split.tokens.fingerprint, mix)


class Orders:
    """A run's samplers and the lengths of its extreme steps, by the pairs of a step: found once. To be closed."""

    def __init__(self, config: Config, split: Split) -> None:
        self.config, self.split = config, split
        self._samplers: dict[int, GlobalBatchSampler] = {}
        self._extremes: dict[int, list[np.ndarray]] = {}

    def sampler(self, batch: int) -> GlobalBatchSampler:
        if batch not in self._samplers:
            self._samplers[batch] = sampler_of(self.config, self.split, batch)
        return self._samplers[batch]

    def extremes(self, batch: int) -> list[np.ndarray]:
        """Lengths (pairs,) of the step with the most tokens, and of that with the longest pair."""
        if batch not in self._extremes:
            lengths = self.split.tokens.lengths
            self._extremes[batch] = [lengths[step.rows] for step in self.sampler(batch).extremes(lengths)]
        return self._extremes[batch]

    def close(self) -> None:
        """Lets go of the orders, and of their files."""
        for sampler in self._samplers.values():
            sampler.close()


def sampled_steps(sampler: GlobalBatchSampler, parts: int) -> Iterator[tuple[np.ndarray, float]]:
    """Rows of every so manieth step of the first epoch, and for how many steps each stands; a short last step for
    itself alone."""
    order, size = sampler.order(0), sampler.batch_size
    count = min(sampler.num_steps, sampler.steps_per_epoch)
    whole = min(count, sampler.num_samples // size)
    sampled = max(1, min(whole, MOST_PARTS // parts))
    for start, stop in pairwise(whole * number // sampled for number in range(sampled + 1)):
        if stop > start:
            yield order[start * size : (start + 1) * size], float(stop - start)
    if whole < count:
        yield order[whole * size :], 1.0


def all_parts(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Positions of every part of a batch, as its ranks take them."""
    dealt = Deal(lengths, count)
    return [dealt.part(number) for number in range(count)]


@dataclass(frozen=True)
class Loads:
    """What was dealt in sampled steps.

    Attributes:
        counts: (steps, ranks, forwards, costs.NAMES) of each micro-batch; of steps with fewer forwards 0.
        tokens: (steps, ranks) real tokens.
        pairs: (steps,) of all ranks.
        weights: (steps,) for what part of all steps each of them stands; their sum is 1.
        num_steps: of the run.
    """

    counts: np.ndarray
    tokens: np.ndarray
    pairs: np.ndarray
    weights: np.ndarray
    num_steps: int

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Of `values` (steps, ...), over all steps."""
        return np.tensordot(self.weights, values, 1)  # type: ignore[no-any-return]


def loads_of(
    sampler: GlobalBatchSampler, lengths: np.ndarray, subject: Subject, costs: Costs, ranks: int, micro_batch: int
) -> Loads:
    """`lengths` of all rows."""
    most = min(micro_batch, -(-sampler.batch_size // ranks))
    forwards = num_forwards(micro_batch, sampler.batch_size, ranks)
    counts, tokens, pairs, weights = [], [], [], []
    for rows, weight in sampled_steps(sampler, ranks * forwards):
        of_rows, longest = lengths[rows], int(lengths[rows].max())
        count = num_forwards(micro_batch, len(rows), ranks)
        parts = all_parts(of_rows, ranks * count)
        # An empty micro-batch is row 0.
        found = [features(subject, of_rows[p] if len(p) else lengths[:1], most, True, longest) for p in parts]
        values = np.zeros((ranks, forwards, costs.training.shape[1]))
        values[:, :count] = (np.array(found, dtype=np.float64) @ costs.training).reshape(ranks, count, -1)
        counts.append(values)
        tokens.append(np.array([of_rows[p].sum() for p in parts]).reshape(ranks, count).sum(1))
        pairs.append(len(rows))
        weights.append(weight)
    return Loads(np.stack(counts), np.stack(tokens), np.array(pairs), np.array(weights) / sum(weights),
                 sampler.num_steps)  # fmt: skip


def heaviest_parts(steps: list[np.ndarray], ranks: int, micro_batch: int) -> list[np.ndarray]:
    """Lengths (pairs,) of the micro-batches with the most tokens and with the longest pair of each of `steps`, which
    are lengths (pairs,)."""
    found = []
    for of_rows in steps:
        parts = all_parts(of_rows, ranks * num_forwards(micro_batch, len(of_rows), ranks))
        found.append(of_rows[max(parts, key=lambda part: int(of_rows[part].sum()))])
        found.append(of_rows[max(parts, key=lambda part: int(of_rows[part].max(initial=0)))])
    return found


def evaluation_counts(
    subject: Subject, coefficients: np.ndarray, split: Split, batch_size: int, ranks: int
) -> list[np.ndarray]:
    """(batches, costs.NAMES) of each rank, as evaluate.predict_logits cuts and deals them."""
    lengths = split.tokens.lengths
    order = longest_first(lengths)
    batches = [lengths[order[i : i + batch_size]] for i in range(0, len(lengths), batch_size)]
    found = np.array([features(subject, own, batch_size, False) for own in batches], dtype=np.float64)
    parts = all_parts(np.array([own.sum() for own in batches]), ranks)
    return [found[part] @ coefficients for part in parts]
