"""The plain step: forward and backward of each micro-batch, one after the other, and the backend's step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from trainer.backends import Single
from trainer.base.errors import TrainingFailed
from trainer.base.log import log
from trainer.config import Config
from trainer.data.sampler import Deal, Step, num_forwards
from trainer.data.tokens import Split
from trainer.model.batch import Batch
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.masks import hash_key
from trainer.model.precision import autocast, products
from trainer.ranks import World
from trainer.run.state import State
from trainer.step.loss import Loss


@dataclass(kw_only=True)
class PlainStep:
    """An optimizer step of one rank, and what any other form of it needs.

    Attributes:
        split: the training pairs.
        loss: of a batch, and what a step's sum of it is divided by.
        forward: the model as the backend calls it.
        micro_batch_size: pairs in one forward of one rank, at most.
        batch_size: pairs in one step, at most.
    """

    config: Config
    world: World
    split: Split
    model: CrossEncoder
    backend: Single
    forward: Callable[[Batch], torch.Tensor]
    state: State
    micro_batch_size: int
    batch_size: int
    loss: Loss = field(init=False)
    _dealt: tuple[Step, Deal] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.loss = Loss(self.config, self.split, self.world.device)

    def __call__(self, current: Step, rate: float) -> torch.Tensor:
        """Takes the step. Returns the gradient's norm, on the device."""
        if self.model.draws:
            seed_torch(self.config.seed, current.step, self.world.rank)
        loss = torch.zeros((), device=self.world.device)
        micro_batches = self.micro_batches(current)
        for rows in micro_batches:
            loss += self.backward(current, rows, last=rows is micro_batches[-1])
        norm = self.backend.step(rate, self.config.max_grad_norm)
        if not self.skipped(norm):
            self.state.window.count(current.step + 1, loss, norm)
            self.add_to_window(current)
        return norm

    def micro_batches(self, current: Step, rank: int | None = None) -> list[np.ndarray]:
        """The rows of each of a rank's micro-batches, this one's by default; an empty one still takes part."""
        dealt, own = self.dealt(current), self.world.rank if rank is None else rank
        count = dealt.num_parts // self.world.size
        return [current.rows[dealt.part(own * count + number)] for number in range(count)]

    def dealt(self, current: Step) -> Deal:
        """The step's rows in micro-batches, all ranks' one after the other; of the last step it is remembered."""
        parts = self.num_parts(current)
        if self._dealt is None or self._dealt[0] is not current or self._dealt[1].num_parts != parts:
            self._dealt = current, Deal(self.split.tokens.lengths[current.rows], parts)
        return self._dealt[1]

    def num_parts(self, current: Step) -> int:
        """Micro-batches of the step, all ranks' together."""
        return self.world.size * num_forwards(self.micro_batch_size, len(current.rows), self.world.size)

    def backward(self, current: Step, rows: np.ndarray, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns its part of the step's loss, on the device."""
        config, device = self.config, self.world.device
        batch = self.batch(current, rows)
        with products(device, config.bf16), self.backend.accumulate(last):
            with autocast(device, config.bf16):
                logits = self.forward(batch)
            # A sum over these pairs divided by what all pairs of the step give: any split gives the same gradient.
            loss = self.loss(logits, batch) / self.loss.divisor(current.rows)
            self.backend.backward(loss)
        self.forget()
        return loss.detach()

    @property
    def most_pairs(self) -> int:
        """Of a micro-batch, over the run: a step that is one forward of each rank is dealt evenly."""
        return min(self.micro_batch_size, -(-self.batch_size // self.world.size))

    @property
    def num_sums(self) -> int:
        """Of all gradients, that a step holds beside them."""
        return 0

    def forget(self) -> None:
        """Lets go of what a forward has left in the model."""
        if self.model.layout:
            self.model.layout.forget()

    def batch(
        self, current: Step, rows: np.ndarray, device: torch.device | None = None, num_pairs: int | None = None
    ) -> Batch:
        """The micro-batch `rows` of a step; see CrossEncoder.batch."""
        keys, longest = {"seed": self.config.seed, "step": current.step}, self.dealt(current).longest
        tokens, labels, device = self.split.tokens, self.split.pairs.label, device or self.world.device
        return self.model.batch(tokens, labels, rows, device, longest, num_pairs, **keys)

    def skipped(self, norm: torch.Tensor) -> bool:
        """Whether the step was left out for its gradient, as skip_nonfinite allows. Raises TrainingFailed."""
        allowed, totals, step = self.config.skip_nonfinite, self.state.totals, self.state.step
        if allowed == 0 or math.isfinite(float(norm)):
            return False
        totals.skipped_steps += 1
        if totals.skipped_steps > allowed:
            raise TrainingFailed(f"step {step}: gradient norm {float(norm)}, and {allowed} such steps were skipped "
                                 "before; lower --learning_rate")  # fmt: skip
        log.warning(f"step {step} is skipped: its gradient norm is {float(norm)}")
        return True

    def add_to_window(self, current: Step) -> None:
        """What the host counts of a step."""
        self.state.window.add(len(current.rows), int(self.dealt(current).lengths.sum()))


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own random stream, for what does not draw by sample: a function of (seed, step, rank)."""
    torch.manual_seed(int(hash_key(seed, step, rank)) >> 1)
