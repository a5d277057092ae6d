"""Which samples each optimizer step sees, and which rank computes which of them.

Invariants:
- The order of an epoch is a pure function of (seed, epoch, n). It is the order that sentence-transformers draws through
  accelerate's SeedableRandomSampler, so step k holds the samples of the reference trainer's step k. With source_weights
  it is the order of the pairs that mix.py gives an epoch.
- Ranks share a global batch. No rank owns data, so any number of ranks computes the same steps.
- A position is a step: resuming seeks, nothing is replayed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.base.arrays import taken
from trainer.base.errors import UserError
from trainer.config import BatchConfig, OptimisationConfig
from trainer.data.mix import Mix, permutation
from trainer.data.orders import mapped, remove

MAPPED = 1 << 20  # pairs of an epoch from which on its order is drawn once a node
CHUNK = 1 << 20  # pairs that are measured at a time
NO_MIX = "none"  # also in a checkpoint of an older version, which says nothing of it


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (num_samples,) of one epoch."""
    return permutation(num_samples, seed + epoch)


class Deal:
    """Positions 0..n-1 of a batch in parts of even token counts, and of sizes that differ by at most one.

    Longest first, back and forth over the parts (0 1 2, 2 1 0, ...), so that what a part lacks in one row it gains in
    the next. Parts can be empty where n < num_parts. They are sorted once; a rank asks for its own parts alone.
    """

    def __init__(self, lengths: np.ndarray, num_parts: int) -> None:
        self.lengths, self.num_parts = lengths, num_parts
        self.by_length = longest_first(lengths)

    def part(self, number: int) -> np.ndarray:
        """Positions of one part, ascending."""
        there, back = number, 2 * self.num_parts - 1 - number  # in the first row, and in the second one
        double = 2 * self.num_parts
        return np.sort(np.concatenate([self.by_length[there::double], self.by_length[back::double]]))

    @property
    def largest(self) -> int:
        """Positions of the largest part."""
        return -(-len(self.by_length) // self.num_parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest of all."""
        return int(self.lengths[self.by_length[0]])

    def measures(self) -> Iterator[tuple[int, int, int]]:
        """Of each part that is not empty: how many positions it has, its longest one's tokens, and those of all."""
        count, parts = len(self.by_length), self.num_parts
        grid = np.zeros((-(-count // (2 * parts)), 2, parts), np.int64)
        grid.reshape(-1)[:count] = self.lengths[self.by_length]
        grid[:, 1] = grid[:, 1, ::-1].copy()
        sizes = np.count_nonzero(grid, axis=(0, 1))  # no pair is without tokens
        for size, longest, tokens in zip(sizes, grid.max((0, 1), initial=0), grid.sum((0, 1)), strict=True):
            if size:
                yield int(size), int(longest), int(tokens)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Positions of `lengths` (n,), the longest first and equal ones in their order.

    What fits into 16 bits numpy sorts digit by digit, ten times as fast as by comparing.
    """
    below = lengths.max(initial=0) - lengths.astype(np.int64)
    return np.argsort(below.astype(np.uint16) if below.max(initial=0) < 2**16 else below, kind="stable")


@dataclass(frozen=True)
class Step:
    """The samples (rows of the data set) of one optimizer step; `step` counts from 0 over the run."""

    step: int
    epoch: int
    rows: np.ndarray


class GlobalBatchSampler:
    """The optimizer steps of a run.

    Args:
        num_samples: pairs of an epoch: rows of the training data, or len(mix).
        batch_size: pairs in an optimizer step over all ranks; the last one of an epoch may be shorter.
        seed: seed of the order.
        num_steps: steps of the run, all epochs together.
        fingerprint: of everything that must not change under a resumed run (data, tokenizer, options).
        mix: how often an epoch has which pair; None = each once.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, num_steps: int, fingerprint: str, mix: Mix | None = None
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.num_steps, self.fingerprint, self.mix = num_steps, fingerprint, mix
        self._drawn: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The rows (num_samples,) of one epoch, in some type of integers, read-only; the last one is remembered."""
        if self._drawn is None or self._drawn[0] != epoch:
            self.close()
            long = self.num_samples >= MAPPED
            self._drawn = epoch, mapped(self._name(epoch), lambda: self._draw(epoch)) if long else self._draw(epoch)
        return self._drawn[1]

    def close(self) -> None:
        """Lets go of the order that is remembered, and of its file; whoever asks for an order again draws it anew."""
        if self._drawn is not None and self.num_samples >= MAPPED:
            remove(self._name(self._drawn[0]))
        self._drawn = None

    def _draw(self, epoch: int) -> np.ndarray:
        order = epoch_order(self.num_samples, self.seed, epoch)
        if self.mix is None:
            return order
        return taken(self.mix.rows(self.seed, epoch), order)

    def _name(self, epoch: int) -> str:
        """Of the order, among all orders."""
        mix = NO_MIX if self.mix is None else self.mix.identity
        return f"{self.num_samples} {self.seed} {epoch} {mix}"

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Those that are left after the first `start`."""
        try:
            for step in range(start, self.num_steps):
                yield self.at(step)
        finally:
            self.close()

    def at(self, step: int) -> Step:
        """One step of the run."""
        epoch, number = divmod(step, self.steps_per_epoch)
        rows = self.order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        return Step(step, epoch, rows.astype(np.int64))

    def measure(self, lengths: np.ndarray, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of an epoch's steps, some at a time: pairs, their tokens, and the longest one's; `lengths` of all rows."""
        order, size = self.order(epoch), self.batch_size
        chunk = max(1, CHUNK // size) * size
        for start in range(0, self.num_samples, chunk):
            own = lengths[order[start : start + chunk]]
            starts = np.arange(0, len(own), size)
            sums = np.add.reduceat(own, starts, dtype=np.int64)
            yield np.diff(starts, append=len(own)), sums, np.maximum.reduceat(own, starts)

    def extremes(self, lengths: np.ndarray) -> tuple[Step, Step]:
        """The first step of the run whose pairs have the most tokens, and the first one that holds its longest pair.

        It goes over all epochs, so that one rank should do it for all.
        """
        best = [(-1, 0), (-1, 0)]
        for first in range(0, self.num_steps, self.steps_per_epoch):
            step = first
            for _, *both in self.measure(lengths, first // self.steps_per_epoch):
                for place, sizes in enumerate(both):
                    sizes = sizes[: max(0, self.num_steps - step)]
                    if sizes.max(initial=0) > best[place][0]:
                        best[place] = int(sizes.max()), step + int(sizes.argmax())
                step += len(both[0])
        (_, heaviest), (_, longest) = best
        return self.at(heaviest), self.at(longest)

    def position(self, step: int) -> dict[str, int | str]:
        """After `step` steps: where a resumed run begins, and what must be equal there."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "step": number, **self._identity()}

    def seek(self, position: dict[str, int | str]) -> int:
        """The steps done at `position`. Raises UserError listing every difference if it is of another order."""
        saved = position.get
        differing = [
            f"{k}: saved {before}, now {v}" for k, v in self._identity().items() if (before := saved(k, NO_MIX)) != v
        ]
        if differing:
            raise UserError("the saved run had another order of samples; " + "; ".join(differing))
        return int(position["epoch"]) * self.steps_per_epoch + int(position["step"])

    def _identity(self) -> dict[str, int | str]:
        return {
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "source_weights": NO_MIX if self.mix is None else self.mix.identity,
        }


def global_batch_size(config: BatchConfig, world_size: int) -> int:
    """Pairs in one optimizer step over all ranks."""
    per_forward = config.per_device_train_batch_size * world_size
    return config.train_batch_size or per_forward * config.gradient_accumulation_steps


def num_forwards(per_device: int, num_pairs: int, world_size: int) -> int:
    """Forwards of each rank in an optimizer step of `num_pairs`: the fewest that hold `per_device` pairs at most."""
    return math.ceil(num_pairs / (per_device * world_size))


def total_steps(config: OptimisationConfig, num_samples: int, batch_size: int) -> int:
    """Optimizer steps of the run, all epochs together; the short last batch of an epoch counts as one."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * math.ceil(num_samples / batch_size)))
