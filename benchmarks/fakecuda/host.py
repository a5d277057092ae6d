"""What the host has and gets while the device is fake: its own tensors, and answers where it asks for values."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def name_of(func: Any) -> str:
    """`index` of aten::index.Tensor; of other namespaces with the namespace."""
    return func._schema.name.removeprefix("aten::")


def devices_of(values: Any) -> set[str]:
    """Kinds of the devices of all tensors in nested `values`."""
    return {x.device.type for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the device: for a value, for a shape that depends on values, for a copy."""
    name = name_of(func)
    if "cuda" not in devices_of((args, kwargs)):
        return False
    if name == "_to_copy":
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu"
    if name == "copy_":
        return args[0].device.type == "cpu"
    if name in INDEXED:  # a mask is turned into places, whose number the host has to know
        return any(map(_is_mask, args[1]))
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return bool(TAGS & set(func.tags))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class Host(TorchDispatchMode):
    """Above a FakeTensorMode: leaves what is the host's real, and answers for the device.

    Values of the device do not exist: numbers are 1, truths False, arrays zeros, and every element is nonzero.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in ("pin_memory", "_pin_memory"):  # which needs a driver
            return args[0]
        device = kwargs.get("device")
        if devices_of((args, kwargs)) <= {"cpu"} and (device is None or torch.device(device).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if waits(func, args, kwargs):
            return _answer(func, args, kwargs)
        if func is torch.ops.aten._fused_adamw_.tensor_lr:
            return None  # all that it does is in place, and it has no form without values
        # A real tensor that goes to the device would be sent there in earnest.
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        return func(*args, **kwargs)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, x = name_of(func), args[0]
    if name == "_local_scalar_dense":
        return False if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1
    if name == "equal":
        return True
    if name == "nonzero":
        return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)
    if name in INDEXED:
        places: list[torch.Tensor | None] = []
        for index in args[1]:
            all_of_it = [x.new_empty(index.numel(), dtype=torch.int64)] * index.dim() if _is_mask(index) else [index]
            places.extend(all_of_it)
        return func(x, places, *args[2:], **kwargs)
    if name == "copy_":
        return x
    if name == "_to_copy":
        with unset_fake_temporarily():
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
    return func(*args, **kwargs)
