"""Which pairs each rank computes in each step: by the sampler and the dealing of the run itself, at any world size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.config import Config
from trainer.data.mix import Mix
from trainer.data.sampler import Deal, GlobalBatchSampler, global_batch_size, longest_first, num_forwards, total_steps
from trainer.data.tokens import Split
from trainer.plan.costs import Costs, features
from trainer.plan.trace import Subject

MOST_PARTS = 4_096  # micro-batches that are looked at of a run; more steps are sampled evenly


def sampler_of(config: Config, split: Split, ranks: int) -> GlobalBatchSampler:
    """That of the run on so many ranks; see train.make_sampler, which says what this one does not."""
    mix = Mix.of(config.source_weights, split.pairs)
    batch, samples = global_batch_size(config, ranks), len(split) if mix is None else len(mix)
    steps = total_steps(config, samples, batch)
    return GlobalBatchSampler(samples, batch, config.order_seed, steps, split.tokens.fingerprint, mix)


def sampled_steps(sampler: GlobalBatchSampler, parts: int) -> Iterator[np.ndarray]:
    """Rows of every so manieth step of the first epoch, its short last one among them where all are looked at."""
    order, size = sampler.order(0), sampler.batch_size
    count = min(sampler.num_steps, sampler.steps_per_epoch)
    for step in np.unique(np.linspace(0, count - 1, max(2, min(count, MOST_PARTS // parts))).astype(int)):
        yield order[step * size : (step + 1) * size]


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
        num_steps: of the run.
        micro_batch: most pairs of a forward.
    """

    counts: np.ndarray
    tokens: np.ndarray
    num_steps: int
    micro_batch: int


def loads_of(config: Config, subject: Subject, costs: Costs, split: Split, ranks: int, micro_batch: int) -> Loads:
    sampler, lengths = sampler_of(config, split, ranks), split.tokens.lengths
    most = min(micro_batch, -(-sampler.batch_size // ranks))
    forwards = num_forwards(micro_batch, sampler.batch_size, ranks)
    counts, tokens = [], []
    for rows in sampled_steps(sampler, ranks * forwards):
        of_rows, longest = lengths[rows], int(lengths[rows].max())
        count = num_forwards(micro_batch, len(rows), ranks)
        parts = all_parts(of_rows, ranks * count)
        # An empty micro-batch is row 0.
        found = [features(subject, of_rows[p] if len(p) else lengths[:1], most, True, longest) for p in parts]
        values = np.zeros((ranks, forwards, costs.training.shape[1]))
        values[:, :count] = (np.array(found, dtype=np.float64) @ costs.training).reshape(ranks, count, -1)
        counts.append(values)
        tokens.append(np.array([of_rows[p].sum() for p in parts]).reshape(ranks, count).sum(1))
    return Loads(np.stack(counts), np.stack(tokens), sampler.num_steps, most)


def heaviest_parts(config: Config, split: Split, ranks: int, micro_batch: int) -> list[np.ndarray]:
    """Lengths (pairs,) of the largest micro-batches of the steps with the most tokens and with the longest pair."""
    sampler, lengths = sampler_of(config, split, ranks), split.tokens.lengths
    found = []
    for step in sampler.extremes(lengths):
        of_rows = lengths[step.rows]
        parts = all_parts(of_rows, ranks * num_forwards(micro_batch, len(of_rows), ranks))
        found.append(of_rows[max(parts, key=lambda part: int(of_rows[part].sum()))])
        found.append(of_rows[max(parts, key=lambda part: int(of_rows[part].max(initial=0)))])
    return found


def evaluation_counts(subject: Subject, costs: Costs, split: Split, batch_size: int, ranks: int) -> list[np.ndarray]:
    """(batches, costs.NAMES) of each rank, as evaluate.predict_logits cuts and deals them."""
    lengths = split.tokens.lengths
    order = longest_first(lengths)
    batches = [lengths[order[i : i + batch_size]] for i in range(0, len(lengths), batch_size)]
    found = np.array([features(subject, own, batch_size, False) for own in batches], dtype=np.float64)
    parts = all_parts(np.array([own.sum() for own in batches]), ranks)
    return [found[part] @ costs.evaluation for part in parts]
