"""Several ranks, each with the full model: torch's DistributedDataParallel.

Annotations are evaluated here: DDP looks at those of a communication hook.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from trainer.backends.single import Single
from trainer.model.batch import Batch


def in_bf16(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """torch's own hook under another name: by that name DDP refuses it on gloo, which can do it."""
    return default_hooks.bf16_compress_hook(dist.distributed_c10d._get_default_group(), bucket)


class Replicas(Single):
    """Each rank has the full model, and nothing adds their gradients up: the step does."""

    name = "ddp"


class DDP(Replicas):
    last = True

    def prepare(self, module: nn.Module) -> Callable[[Batch], torch.Tensor]:
        super().prepare(module)
        return self._forward if self.world.size > 1 else module

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Of a micro-batch that is not the last, gradients stay where they are."""
        return (self.replica if self.last else self.module)(batch)  # type: ignore[no-any-return]

    @cached_property
    def replica(self) -> DistributedDataParallel:
        """Made when it is first needed: the static step reduces gradients itself."""
        with warnings.catch_warnings():
            # No static_graph: with it, torch 2.13 breaks down (an internal assert) on a first step that accumulates.
            # torch 2.13 renames the argument; the old name is the one that all supported versions know.
            warnings.simplefilter("ignore", FutureWarning)
            replica = DistributedDataParallel(self.module, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.ddp_comm_hook == "bf16":
            replica.register_comm_hook(None, in_bf16)
        return replica

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        self.last = last
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP averages over ranks; ours are parts of one sum.
        super().backward(loss * self.world.size)
