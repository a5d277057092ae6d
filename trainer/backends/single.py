"""One device: the reference. Other backends derive from it and change only what differs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.dist import World
from trainer.optim import make_optimizer, parameter_groups


class Single:
    """How a model is wired to its ranks.

    The loop calls `prepare` once; then for every optimizer step, `backward` for every micro-batch inside
    `accumulate`, and `step`. Losses are sums divided by the global count, so gradients of all ranks add up.
    """

    name = "single"
    replicated = True  # every rank holds the whole model, so a forward without `last` involves no other rank

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer

    def prepare(self, module: nn.Module) -> nn.Module:
        """Takes the model, on its device, and makes its optimizer; returns what the loop calls for a forward."""
        self.module, self.optimizer = module, self.make_optimizer(parameter_groups(module, self.config))
        return module

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return make_optimizer(groups, self.config)

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Wraps forward and backward of one micro-batch; `last` of its step or not."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """Clips, steps, clears. Returns the global gradient norm before clipping, still on the device."""
        limit = max_grad_norm if max_grad_norm > 0 else torch.inf
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def full_weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The whole fp32 weights of `module`, a part of the prepared one, on the CPU of rank 0; empty elsewhere."""
        if not self.world.is_main:
            return {}
        return {name: value.detach().cpu() for name, value in module.state_dict().items()}

    def load_weights(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """The reverse: `weights` on rank 0, empty elsewhere, into every rank's `module`."""
        if self.world.is_main:
            module.load_state_dict(weights)
        for value in module.state_dict().values():
            self.world.share(value)

    def close(self) -> None:
        """Lets go of what the ranks share."""
