"""One device: the reference. Other backends derive from it and change only what differs."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from trainer.backends.optim import make_optimizer, parameter_groups, set_rate
from trainer.backends.share import Share
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


class SavedTensors(Protocol):
    """The tensors of a checkpoint, in its files; on ranks other than 0 only if they are `shared`.

    `run` gives numbers `start` to `stop` of a flattened tensor, 1-D on the CPU.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def shared(self) -> bool: ...

    def run(self, key: str, start: int, stop: int) -> torch.Tensor: ...


class Single:
    """How a model is wired to its ranks.

    The loop calls `prepare` once; then for every optimizer step, `backward` for every micro-batch inside
    `accumulate`, and `step`. Losses are sums divided by the global count, so gradients of all ranks add up.
    """

    name = "single"
    sharded = False  # each rank keeps a part of the weights, or of the moments
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

    def save_state(self) -> Share:
        """Weights and the optimizer's moments, copied to the CPU: what this rank keeps of them where they are sharded;
        else all of them on rank 0, and nothing elsewhere.

        Every backend saves the same tensors, so each loads what another saved, on any number of ranks.
        """
        shapes, runs = {}, {}
        for name, parameter in self._trained():
            start, stop = self._extent(parameter)
            for kind in KINDS:
                shapes[f"{kind}/{name}"] = tuple(self._shape(parameter))
                if stop > start and (self.divides or self.world.is_main):
                    copy = self._own(parameter, kind).detach().to("cpu", copy=True)
                    runs[f"{kind}/{name}"] = start, copy.flatten()
        return Share(shapes, runs, self.divides)

    def load_state(self, saved: SavedTensors, num_updates: int) -> None:
        """The reverse, after `num_updates` of the optimizer: where weights are sharded, each rank reads its own.

        Where they are not, or the ranks do not see the same files, rank 0 reads, and sends a tensor at a time.
        """
        shapes = {name: tuple(self._shape(parameter)) for name, parameter in self.module.named_parameters()}
        found = {key.removeprefix("weight/"): s for key, s in saved.shapes.items() if key.startswith("weight/")}
        # What is frozen is as it was at the start; only checkpoints of an older version hold it.
        trained = dict(self._trained())
        same = found == {name: shapes[name] for name in shapes if name in found or name in trained}
        if not self.world.broadcast(not self.world.is_main or same):
            raise UserError("the checkpoint is of another model: its weights have other names or shapes")
        self.make_moments(num_updates)
        for name, parameter in trained.items():
            start, stop = self._extent(parameter)
            for kind in KINDS:
                key = f"{kind}/{name}"
                if self.divides and saved.shared:
                    run = saved.run(key, start, stop)
                else:
                    size = math.prod(shapes[name])
                    full = saved.run(key, 0, size) if self.world.is_main else torch.empty(size)
                    full = full.to(self.world.device)
                    self.world.broadcast_(full)
                    run = full[start:stop]
                if stop > start:
                    self._set_own(parameter, kind, run)

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

    @property
    def divides(self) -> bool:
        """Whether each rank keeps, saves and reads a part of the weights and moments."""
        return self.sharded and self.world.size > 1

    @property
    def scatters(self) -> bool:
        """Whether `prepare` takes a hollow model: see scattered.py."""
        return False

    def _extent(self, parameter: nn.Parameter) -> tuple[int, int]:
        """From where to where in the flattened parameter what this rank keeps of it, and of its moments, reaches."""
        return 0, parameter.numel()

    def _own(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        """That part of a parameter, or of one of its moments, in whatever shape; no copy."""
        if kind == "weight":
            return parameter
        moment: torch.Tensor | None = self.optimizer.state[parameter].get(kind)
        return torch.zeros_like(parameter) if moment is None else moment

    @torch.no_grad()
    def _set_own(self, parameter: nn.Parameter, kind: str, run: torch.Tensor) -> None:
        own = self._own(parameter, kind)
        own.copy_(run.view(own.shape))

    def make_moments(self, num_updates: int) -> None:
        """The optimizer's state before its first step, as if it had made `num_updates`."""
        add_moments(self.optimizer, [parameter for _, parameter in self._trained()], num_updates)
