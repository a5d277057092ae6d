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
import torch

from trainer.base.errors import UserError
from trainer.config import BatchConfig, OptimisationConfig
from trainer.data.mix import Mix

NO_MIX = "none"  # also in a checkpoint of an older version, which says nothing of it


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (num_samples,) of one epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator).numpy()


def deal(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Splits positions 0..n-1 into parts of even token counts and of sizes that differ by at most one.

    Longest first, back and forth over the parts (0 1 2, 2 1 0, ...), so that what a part lacks in one row it gains in
    the next. Parts can be empty where n < num_parts. Positions inside a part ascend.
    """
    by_length = np.argsort(-lengths, kind="stable")
    row, column = np.divmod(np.arange(len(lengths)), num_parts)
    part = np.empty(len(lengths), dtype=np.int64)
    part[by_length] = np.where(row % 2 == 0, column, num_parts - 1 - column)
    return np.split(np.argsort(part, kind="stable"), np.bincount(part, minlength=num_parts)[:-1].cumsum())


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

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The rows (num_samples,) of one epoch."""
        order = epoch_order(self.num_samples, self.seed, epoch)
        return order if self.mix is None else self.mix.rows(self.seed, epoch)[order]

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Those that are left after the first `start`."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start, self.num_steps):
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            yield self._step(step, order)

    def at(self, step: int) -> Step:
        """One step of the run."""
        return self._step(step, self.order(step // self.steps_per_epoch))

    def _step(self, step: int, order: np.ndarray) -> Step:
        epoch, number = divmod(step, self.steps_per_epoch)
        return Step(step, epoch, order[number * self.batch_size : (number + 1) * self.batch_size])

    def heaviest(self, lengths: np.ndarray) -> Step:
        """The step of the run whose pairs have the most tokens; `lengths` of all rows of the data."""
        return self._largest(lengths, np.add)

    def longest(self, lengths: np.ndarray) -> Step:
        """The step of the run that holds its longest pair."""
        return self._largest(lengths, np.maximum)

    def _largest(self, lengths: np.ndarray, over: np.ufunc) -> Step:
        """The first step of which `over` its lengths is the largest."""
        starts = np.arange(0, self.num_samples, self.batch_size)
        largest, step = -1, 0
        for first in range(0, self.num_steps, self.steps_per_epoch):
            order = self.order(first // self.steps_per_epoch)
            sizes = over.reduceat(lengths[order], starts)[: self.num_steps - first]
            if sizes.max() > largest:
                largest, step = int(sizes.max()), first + int(sizes.argmax())
        return self.at(step)

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
