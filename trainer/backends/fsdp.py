"""torch's FSDP2 (`fully_shard`): weights, gradients and optimizer sharded over the ranks, layer by layer.

In bf16 it is autocast that rounds, as in the other backends: a bfloat16 policy would also round what autocast leaves in
fp32, norms and embeddings. Gradients are summed in fp32.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer import ranks
from trainer.backends.optim import parameter_groups
from trainer.backends.share import Share
from trainer.backends.single import Single
from trainer.config import Config
from trainer.model.batch import Batch
from trainer.model.scattered import fill_buffers, lay_aside, sent
from trainer.ranks import World


def outermost(module: nn.Module, names: set[str]) -> list[nn.Module]:
    """The parts whose class is one of `names`, but none inside another: sharded twice, it would be gathered twice."""
    found = [part for part in module.modules() if type(part).__name__ in names]
    inner = {id(part) for outer in found for part in outer.modules() if part is not outer}
    return [part for part in found if id(part) not in inner]


def layer_classes(module: Any) -> set[str]:
    """Names of the classes that are gathered by themselves: those that the model names, or a known family's layers."""
    named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    if named or module.layout is None:
        return named
    # Layers that are computed more than once are fewer than that: they stay with the rest.
    count = module.model.config.num_hidden_layers
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return {type(layer).__name__ for layer in lists[0]} if lists and count > 1 else set()


class FSDP(Single):
    name = "fsdp"
    sharded = True
    replicated = False

    def __init__(self, world: World, config: Config) -> None:
        super().__init__(world, config)
        ranks.form_group(world)

    def prepare(self, module: nn.Module) -> Callable[[Batch], torch.Tensor]:
        values = lay_aside(module) if getattr(module, "hollow", False) else None
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in outermost(module, layer_classes(module)):
            fully_shard(part, mp_policy=policy)
        self.root: Any = fully_shard(module, mp_policy=policy)
        self.module = module
        if values is not None:
            self._fill(values)
        self.optimizer = self._make_optimizer(parameter_groups(module, self.config))  # of the shards
        return module

    @property
    def scatters(self) -> bool:
        return self.world.size > 1

    @torch.no_grad()
    def _fill(self, values: dict[str, torch.Tensor]) -> None:
        """Gives a hollow module, which is sharded already, the values that rank 0 has laid aside."""
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # what has two names stays one
        try:
            self.module.to_empty(device=self.world.device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        for name, parameter in self.module.named_parameters():
            full = sent(values.pop(name, None), parameter, self.world)
            start, stop = self._extent(parameter)
            own: Any = parameter
            own.to_local().copy_(full.flatten()[start:stop].view_as(own.to_local()))
        fill_buffers(self.module, values, self.world)
        self.module.hollow = False  # type: ignore[assignment]

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        self.root.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # Ranks are averaged; ours are parts of one sum.
        super().backward(loss * self.world.size)

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        norm: Any = super().step(learning_rate, max_grad_norm)
        return norm.full_tensor()

    def _clip(self, limit: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.module.parameters(), limit)  # the scale would have to be a DTensor

    def save_state(self) -> Share:
        self._reshard()
        return super().save_state()

    def _reshard(self) -> None:
        """An evaluation leaves weights gathered, since no backward follows that would let go of them."""
        for part in self.root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _extent(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Of the first dimension each rank has as many rows, the last ones fewer, or none; see torch.chunk."""
        rows = len(parameter)
        each = -(-rows // self.world.size)
        first, last = (min(rows, each * rank) for rank in (self.world.rank, self.world.rank + 1))
        width = parameter.numel() // rows
        return first * width, last * width

    def _own(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        shard: Any = super()._own(parameter, kind)
        local: torch.Tensor = shard.to_local()
        return local

    def full_weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        self._reshard()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(module, options=options)
        return weights

    def load_weights(self, module: nn.Module, weights: dict[str, Any]) -> None:
        self._reshard()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=options)
