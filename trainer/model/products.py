"""The products of a model's linear layers with copies of their weights that are rounded once a step.

Under autocast each layer rounds its weight anew in every forward, and turns the gradient back: two passes over all
weights, and four launches a layer on a GPU. Here the copies lie side by side, so that queries, keys and values, which
have one input, are one product, whatever the checkpoint calls them; and gradients come out in fp32, as the sum that
they are. The parameters stay what they were, and get the gradients.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainer.model.layout import Layout

Sizes = tuple[int, ...]


class Multiplied(torch.autograd.Function):
    """x (..., in) times the transposed `weight` (out, in), plus `bias` (out,); both are copies of the parameters.

    The parameters come after `sizes`, their rows: all weights, then all biases.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sizes, *own: nn.Parameter
    ) -> torch.Tensor:
        rows = x.to(weight.dtype).flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        ctx.sizes, ctx.dtype = sizes, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(rows, weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        outer, gradient = gradient.shape[:-1], gradient.flatten(0, -2)
        of_x = multiplied(gradient, weight, ctx.dtype).unflatten(0, outer) if ctx.needs_input_grad[0] else None
        wanted, count = ctx.needs_input_grad[4:], len(ctx.sizes)
        of_own: list[torch.Tensor | None] = [None] * len(wanted)
        if any(wanted[:count]):
            of_own[:count] = multiplied(gradient.T, rows, torch.float32).split(ctx.sizes)
        if any(wanted[count:]):
            of_own[count:] = gradient.sum(0, dtype=torch.float32).split(ctx.sizes)
        kept = (part if needed else None for part, needed in zip(of_own, wanted, strict=True))
        return of_x, None, None, None, *kept


def multiplied(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b as `dtype`. A GPU sums in fp32, and need not round in between."""
    if dtype != a.dtype and a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.ops.aten.mm.dtype(a, b, dtype)  # type: ignore[no-any-return]
    return (a @ b).to(dtype)


class Joint:
    """Linear layers of one input, whose copies are rows of one matrix."""

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype) -> None:
        self.layers = layers
        first = layers[0].weight
        rows = sum(layer.out_features for layer in layers)
        self.weight = torch.empty(rows, first.shape[1], dtype=dtype, device=first.device)
        self.bias = None if layers[0].bias is None else self.weight.new_empty(rows)
        self.sizes = [layer.out_features for layer in layers]

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every copy with its parameter."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = list(
            zip(self.weight.split(self.sizes), (layer.weight for layer in self.layers), strict=True)
        )
        if self.bias is not None:
            pairs += zip(self.bias.split(self.sizes), (layer.bias for layer in self.layers), strict=True)
        return pairs

    def __call__(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """x (..., in) through layers `start` to `end`: (..., the sum of their outs)."""
        layers, sizes = self.layers[start:end], tuple(self.sizes[start:end])
        rows = slice(sum(self.sizes[:start]), sum(self.sizes[:end]))
        own = [layer.weight for layer in layers]
        own += [layer.bias for layer in layers if layer.bias is not None]
        bias = None if self.bias is None else self.bias[rows]
        product: torch.Tensor = Multiplied.apply(getattr(x, "low", x), self.weight[rows], bias, sizes, *own)
        return product


class Products:
    """The copies of all linear layers of a model, which compute with them while its layout is fast."""

    def __init__(
        self, model: nn.Module, layout: Layout, together: Iterable[list[nn.Linear]], dtype: torch.dtype
    ) -> None:
        """`together`: layers that have one input."""
        self.layout = layout
        groups = [group for group in together if len({layer.bias is None for layer in group}) == 1]
        grouped = {layer for group in groups for layer in group}
        alone = [[layer] for layer in model.modules() if type(layer) is nn.Linear and layer not in grouped]
        joints = [Joint(layers, dtype) for layers in groups + alone]
        self.copies = [pair for joint in joints for pair in joint.copies()]
        self.layers = [layer for joint in joints for layer in joint.layers]
        for joint in joints:
            for number, layer in enumerate(joint.layers):
                layer.joint = (joint, number)  # type: ignore[assignment]
                layer.forward = partial(self._forward, layer, joint, number)  # type: ignore[method-assign]
        self.refresh()
        self.copies = [(copy, parameter) for copy, parameter in self.copies if parameter.requires_grad]

    def remove(self) -> None:
        """The layers are as they were."""
        for layer in self.layers:
            del layer.joint, layer.forward

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the weights that training changes, as they are now."""
        torch._foreach_copy_([copy for copy, _ in self.copies], [parameter for _, parameter in self.copies])

    def _forward(self, layer: nn.Linear, joint: Joint, number: int, x: torch.Tensor) -> torch.Tensor:
        return joint(x, number, number + 1) if self.layout.fast else functional.linear(x, layer.weight, layer.bias)


def side_by_side(layers: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """x (..., in) through linear layers, (..., the sum of their outs): in one product where they have joint copies."""
    found = [getattr(layer, "joint", (None, 0)) for layer in layers]
    joint, start = found[0]
    if joint is not None and found == [(joint, start + i) for i in range(len(layers))]:
        return joint(x, start, start + len(layers))  # type: ignore[no-any-return]
    return torch.cat([layer(x) for layer in layers], -1)
