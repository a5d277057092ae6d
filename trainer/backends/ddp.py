"""Several ranks, each with the full model: torch's DistributedDataParallel.

Annotations are evaluated here: DDP looks at those of a communication hook.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from trainer.backends.single import Single


def in_bf16(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """torch's own hook under another name: by that name DDP refuses it on gloo, which can do it."""
    return default_hooks.bf16_compress_hook(dist.distributed_c10d._get_default_group(), bucket)


class DDP(Single):
    name = "ddp"

    def prepare(self, module: nn.Module) -> nn.Module:
        super().prepare(module)
        if self.world.size == 1:
            return module
        with warnings.catch_warnings():
            # No static_graph: with it, torch 2.13 breaks down (an internal assert) on a first step that accumulates.
            # torch 2.13 renames the argument; the old name is the one that all supported versions know.
            warnings.simplefilter("ignore", FutureWarning)
            self.replica = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.ddp_comm_hook == "bf16":
            self.replica.register_comm_hook(None, in_bf16)
        return self.replica

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or self.world.size == 1 else self.replica.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP averages over ranks; ours are parts of one sum.
        super().backward(loss * self.world.size)
