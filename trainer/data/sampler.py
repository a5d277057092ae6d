"""Which samples each optimizer step sees, and which rank computes which of them.

Invariants:
- The order of an epoch is a pure function of (seed, epoch, n). It is the order that sentence-transformers draws through
  accelerate's SeedableRandomSampler, so step k holds the samples of the reference trainer's step k.
- Ranks share a global batch. No rank owns data, so any number of ranks computes the same steps.
- The state is a position: resuming seeks, nothing is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from trainer.config import UserError


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
    part = np.where(row % 2 == 0, column, num_parts - 1 - column)
    return [np.sort(by_length[part == p]) for p in range(num_parts)]


@dataclass(frozen=True)
class Step:
    """The samples (rows of the data set) of one optimizer step; `step` counts from 0 over the whole run."""

    step: int
    epoch: int
    rows: np.ndarray


class GlobalBatchSampler:
    """Iterates over the optimizer steps that are left in a run.

    Args:
        num_samples: rows of the training data.
        batch_size: pairs in an optimizer step over all ranks; the last one of an epoch may be shorter.
        seed: seed of the order.
        num_steps: steps of the whole run.
        fingerprint: of everything that must not change under a resumed run (data, tokenizer, options).
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, num_steps: int, fingerprint: str) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.num_steps, self.fingerprint = num_steps, fingerprint
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while self.step < self.num_steps:
            if epoch != self.step // self.steps_per_epoch:
                epoch = self.step // self.steps_per_epoch
                order = epoch_order(self.num_samples, self.seed, epoch)
            start = self.step % self.steps_per_epoch * self.batch_size
            current = Step(self.step, epoch, order[start : start + self.batch_size])
            # Advance before handing out, so that a state taken after the step points behind it.
            self.step += 1
            yield current

    def at(self, step: int) -> Step:
        """One step of the run, wherever the sampler is."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_samples, self.seed, epoch)
        return Step(step, epoch, order[number * self.batch_size : (number + 1) * self.batch_size])

    def heaviest(self, lengths: np.ndarray) -> Step:
        """The step of the run whose pairs have the most tokens; `lengths` (num_samples,) of all pairs."""
        starts = np.arange(0, self.num_samples, self.batch_size)
        steps = []
        for epoch in range(-(-self.num_steps // self.steps_per_epoch)):
            order = epoch_order(self.num_samples, self.seed, epoch)
            tokens = np.add.reduceat(lengths[order], starts)[: self.num_steps - epoch * self.steps_per_epoch]
            steps.append((int(tokens.max()), epoch * self.steps_per_epoch + int(tokens.argmax())))
        return self.at(max(steps)[1])

    def longest(self, lengths: np.ndarray) -> Step:
        """The step of the first epoch that holds the longest pair of all."""
        place = int(lengths[epoch_order(self.num_samples, self.seed, 0)].argmax())
        return self.at(min(place // self.batch_size, self.num_steps - 1))

    def state_dict(self) -> dict[str, int | str]:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Seeks. Raises UserError listing every difference if the state is of another order of samples."""
        differing = [f"{k}: saved {state.get(k)}, now {v}" for k, v in self._identity().items() if state.get(k) != v]
        if differing:
            raise UserError("the saved run had another order of samples; " + "; ".join(differing))
        self.step = int(state["epoch"]) * self.steps_per_epoch + int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        return {
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }
