"""Several ranks, each with the whole model: torch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.backends.single import Single


class DDP(Single):
    name = "ddp"

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        super().prepare(module, optimizer)
        if self.world.size == 1:
            return module
        with warnings.catch_warnings():
            # torch 2.13 renames the argument; the old name is the one that all supported versions know.
            warnings.simplefilter("ignore", FutureWarning)
            self.replica = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        return self.replica

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or self.world.size == 1 else self.replica.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP averages over ranks; ours are shares of one sum.
        super().backward(loss * self.world.size)
