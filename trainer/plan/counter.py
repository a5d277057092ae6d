"""Counts what torch dispatches over fake tensors: FLOPs, bytes, operations, and the bytes that are alive."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Products inside pairs: of small matrices, which reach less of a device's speed than linear layers do.
INSIDE_PAIRS = ("bmm", "baddbmm", "attention", "attend")

# Of model/kernels.py, which torch has no formula for: products of (longest, head) matrices a pair and head, two forward
# and five backward, where the scores are computed again; of `first`, one row of queries a pair.
KERNELS: dict[str, Callable[..., int]] = {
    "crossrank::attend": lambda qkv, first, *rest, out_val: 4 * len(first) * rest[-2] ** 2 * out_val.shape[-1],
    "crossrank::attend_backward": lambda g, qkv, first, *rest, out_val: 10 * len(first) * rest[-2] ** 2 * g.shape[-1],
    "crossrank::attend_first": lambda q, kv, first, *rest, out_val: 4 * len(first) * rest[-2] * q.shape[-1],
    "crossrank::attend_first_backward": lambda g, q, kv, *rest, out_val: 10 * len(q) * rest[-2] * q.shape[-1],
}


@dataclass(frozen=True)
class Counts:
    """Of one forward and backward, or one forward.

    Attributes:
        linear: FLOPs of linear layers.
        attention: FLOPs of products inside pairs.
        read: bytes that those products read and write.
        moved: bytes that other operations read and write.
        operations: that are dispatched, but for those that only look at a tensor in another way.
        peak: most bytes alive at a time, beyond parameters; with the gradients that there are by then.
        bare: the same without those gradients that are done, as where they have a place of their own.
    """

    linear: float
    attention: float
    read: float
    moved: float
    operations: float
    peak: float
    bare: float

    @property
    def flops(self) -> float:
        return self.linear + self.attention


class Counter(TorchDispatchMode):
    """Above a FakeTensorMode: counts operations, and leaves real what has no fake tensor in it: the layout's arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.attention = self.read = self.moved = self.operations = 0
        self.alive = self.peak = self.bare = self.gradients = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args) + tensors_in(tuple(kwargs.values()))
        if any(isinstance(x, FakeTensor) for x in inputs):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        outputs = tensors_in(result if isinstance(result, (tuple, list)) else (result,))
        for output in outputs:
            self._hold(output)
        if not func.is_view and func._schema.name not in ("aten::detach", "aten::_reshape_alias", "aten::_unsafe_view"):
            self._count(func, args, kwargs, inputs, outputs, result)
        return result

    def _count(
        self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], result: Any
    ) -> None:
        self.operations += 1
        size = sum(map(size_of, [*inputs, *outputs]))
        formula = KERNELS.get(func._schema.name) or flop_registry.get(func._overloadpacket)
        if formula is None:
            self.moved += size
            return
        self.read += size
        flops = int(formula(*args, **kwargs, out_val=result))
        if any(part in func._schema.name for part in INSIDE_PAIRS):
            self.attention += flops
        else:
            self.linear += flops

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.peak, self.bare = max(self.peak, self.alive), max(self.bare, self.alive - self.gradients)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def done(self, parameter: torch.Tensor) -> None:
        """A hook of parameters: its gradient is there."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def ignore(self, module: nn.Module) -> None:
        """What `module` has already is not counted as alive."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.known.add(tensor.untyped_storage()._cdata)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Of an operation's arguments or results, which are flat but for lists."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def size_of(tensor: torch.Tensor) -> int:
    """Bytes that are read: of an expanded tensor, those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
