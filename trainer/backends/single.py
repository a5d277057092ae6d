"""One device: the reference. Other backends derive from it and change only what differs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer.backends.optim import make_optimizer, parameter_groups, set_rate
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.model.batch import Batch
from trainer.ranks import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def add_moments(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], num_updates: int) -> None:
    """AdamW's state of `parameters`: zero moments after `num_updates`."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


class Single:
    """How a model is wired to its ranks.

    The loop calls `prepare` once; then for every optimizer step, `backward` for every micro-batch inside
    `accumulate`, and `step`. Losses are sums divided by the global count, so gradients of all ranks add up.
    """

    name = "single"
    replicated = True  # every rank holds the full model, so a forward without `last` involves no other rank

    def __init__(self, world: World, config: Config) -> None:
        self.world, self.config = world, config
        self.module: nn.Module
        self.optimizer: Any

    def prepare(self, module: nn.Module) -> Callable[[Batch], torch.Tensor]:
        """Takes the model, on its device, and makes its optimizer; returns what the loop calls for a forward."""
        self.module, self.optimizer = module, self._make_optimizer(parameter_groups(module, self.config))
        return module

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Wraps forward and backward of one micro-batch; `last` of its step or not."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """Clips, steps, clears. Returns the global gradient norm before clipping, still on the device.

        Where steps may be skipped, one whose norm is not finite changes nothing, not even the optimizer's count.
        """
        norm = self.clip(max_grad_norm)
        if self.config.skip_nonfinite:  # the fused optimizer looks at it on the device
            self.optimizer.found_inf = (~norm.isfinite()).float()
        set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Sees to it that the step takes gradients of at most this norm, if it is not 0. Returns the one they have."""
        return self._clip(max_grad_norm if max_grad_norm > 0 else torch.inf)

    def save_state(self) -> dict[str, torch.Tensor]:
        """Weights and the optimizer's moments, in full, copied to the CPU of rank 0; empty elsewhere.

        Every backend saves the same, so each loads what another saved, on any number of ranks.
        """
        state = {}
        for name, parameter in self._trained():
            for kind in KINDS:
                full = self._full(parameter, kind)
                if self.world.is_main:
                    state[f"{kind}/{name}"] = full.detach().to("cpu", copy=True).contiguous()
        return state

    def load_state(self, state: dict[str, torch.Tensor], num_updates: int) -> None:
        """The reverse: `state` on rank 0, after `num_updates` of the optimizer, into every rank's tensors."""
        shapes = {name: list(self._shape(parameter)) for name, parameter in self.module.named_parameters()}
        saved = {key.removeprefix("weight/"): list(v.shape) for key, v in state.items() if key.startswith("weight/")}
        # What is frozen is as it was at the start; only checkpoints of an older version hold it.
        trained = dict(self._trained())
        same = saved == {name: shapes[name] for name in shapes if name in saved or name in trained}
        if not self.world.broadcast(not self.world.is_main or same):
            raise UserError("the checkpoint is of another model: its weights have other names or shapes")
        self.make_moments(num_updates)
        for name, parameter in trained.items():
            for kind in KINDS:
                full = state[f"{kind}/{name}"] if self.world.is_main else torch.empty(self._shape(parameter))
                full = full.to(self.world.device)
                self.world.broadcast_(full)
                self._set_full(parameter, kind, full)

    def full_weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The full fp32 weights of `module`, a part of the prepared one, on the CPU of rank 0; empty elsewhere."""
        if not self.world.is_main:
            return {}
        return {name: value.detach().cpu() for name, value in module.state_dict().items()}

    def load_weights(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """The reverse: `weights` on rank 0, empty elsewhere, into every rank's `module`."""
        if self.world.is_main:
            module.load_state_dict(weights)
        for value in module.state_dict().values():
            self.world.broadcast_(value)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters, but for the frozen ones."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    # What subclasses override.

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return make_optimizer(groups, self.config)

    def _clip(self, limit: float) -> torch.Tensor:
        """Sees to it that the step takes gradients of at most this norm. Returns the one that they have.

        The fused optimizer divides by the scale where it reads a gradient anyway; clip_grad_norm_ would read and write
        each of them once more.
        """
        norm = nn.utils.get_total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
        self.optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        return norm

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the full parameter."""
        return parameter.shape

    def _full(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        """A parameter, or one of its moments, as one tensor on every rank."""
        return parameter if kind == "weight" else self.optimizer.state[parameter].get(kind, torch.zeros_like(parameter))

    def _set_full(self, parameter: nn.Parameter, kind: str, full: torch.Tensor) -> None:
        with torch.no_grad():
            self._full(parameter, kind).copy_(full)

    def make_moments(self, num_updates: int) -> None:
        """The optimizer's state before its first step, as if it had made `num_updates`."""
        add_moments(self.optimizer, [parameter for _, parameter in self._trained()], num_updates)
