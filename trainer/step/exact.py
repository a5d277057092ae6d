"""The exact step: the same bits on any number of ranks.

A floating-point sum depends on its order, and a product of matrices on its shapes. So a step's pairs are dealt into as
many shards as the run says, however many ranks there are. A rank computes neighbouring ones, each by itself and in the
shapes that it has on any other rank; gradients and losses are added up along one binary tree over the shards, first
inside a rank and then across ranks. EasyScale (Li et al. 2023) does the like with the workers of a job.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainer.data.sampler import Step, num_forwards
from trainer.ranks import World
from trainer.step.plain import PlainStep, seed_torch


class Tree:
    """The sum of 2**n tensors that come one after the other, along a binary tree: ((0 + 1) + (2 + 3)) + ...

    It holds n + 1 of them at most, and writes into those that it was given.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, torch.Tensor]] = []  # leaves and sum of subtrees, each larger than the next

    def add(self, tensor: torch.Tensor) -> None:
        leaves = 1
        while self.waiting and self.waiting[-1][0] == leaves:
            tensor = self.waiting.pop()[1].add_(tensor)
            leaves *= 2
        self.waiting.append((leaves, tensor))

    def total(self) -> torch.Tensor:
        """Raises ValueError unless 2**n tensors were added."""
        ((_, total),) = self.waiting
        return total


class ExactStep(PlainStep):
    """An optimizer step in `exact_shards`, which the number of ranks divides.

    Between backward and the backend's step gradients are flat, in fp32: those of all trained parameters one after the
    other, the loss, and zeros up to a multiple of the shards, which any number of ranks can cut evenly.
    """

    def __call__(self, current: Step, rate: float) -> torch.Tensor:
        """Takes the step. Returns the gradient's norm, on the device."""
        tree, own = Tree(), torch.zeros((), device=self.world.device)
        for number, micro_batches in self.shards(current):
            if self.model.draws:
                seed_torch(self.config.seed, current.step, number)
            loss = torch.zeros((), device=self.world.device)
            for rows in micro_batches:
                loss += self.backward(current, rows, last=False)
            own += loss
            tree.add(self.take_gradients(loss))
        loss = self.give_gradients(over_ranks(tree.total(), self.world))
        norm = self.backend.step(rate, self.config.max_grad_norm)
        if not self.skipped(norm):
            # A window is added up over ranks: one counts the loss of all, and each says whether its own was finite.
            counted = loss if self.world.is_main else torch.zeros_like(loss)
            self.state.window.count(current.step + 1, counted, norm, own)
            self.add_to_window(current)
        return norm

    def shards(self, current: Step) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Number and micro-batches of each of this rank's shards."""
        micro_batches, count = self.micro_batches(current), self.num_shards // self.world.size
        each = len(micro_batches) // count
        for place in range(count):
            yield self.world.rank * count + place, micro_batches[place * each :][:each]

    def num_parts(self, current: Step) -> int:
        """Micro-batches of the step, shard after shard: the same ones on any number of ranks."""
        return self.num_shards * num_forwards(self.micro_batch_size, len(current.rows), self.num_shards)

    @property
    def num_shards(self) -> int:
        assert self.config.exact_shards is not None
        return self.config.exact_shards

    @property
    def num_sums(self) -> int:
        """Of all gradients, that a step holds beside them: the tree's, and what comes from other ranks."""
        return (self.num_shards // self.world.size).bit_length() + (self.world.size > 1)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def take_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradients, which the parameters no longer have, and a shard's loss (), as one flat tensor."""
        # A model of any family may leave out a part of itself in some shards.
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.trained()]
        self.model.zero_grad()
        flat = torch.cat([*parts, loss[None], loss.new_zeros(-(sum(map(len, parts)) + 1) % self.num_shards)])
        assert flat.dtype == torch.float32
        return flat

    def give_gradients(self, flat: torch.Tensor) -> torch.Tensor:
        """The reverse: gradients are views of `flat`. Returns its loss ()."""
        start = 0
        for parameter in self.trained():
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return flat[start]


def over_ranks(own: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of every rank's `own` (n,) along a binary tree over ranks, on every rank; overwrites `own`.

    `world.size`, a power of two, divides n. Each rank gets one slice of all, adds it up, and sends it to all: it sends
    2 n (size - 1) / size numbers, as in a ring.
    """
    if world.size == 1:
        return own
    slices, tree = torch.empty_like(own), Tree()
    dist.all_to_all_single(slices, own)
    for part in slices.chunk(world.size):
        tree.add(part)
    dist.all_gather_into_tensor(own, tree.total())
    return own
