"""A model's shape before its weights are read: on torch's meta device, where a tensor has no numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_,
         init.kaiming_uniform_, init.kaiming_normal_, init.xavier_uniform_, init.xavier_normal_)  # fmt: skip


class NothingDrawn(TorchFunctionMode):
    """Inside, no numbers are drawn or counted for a tensor that has none.

    Modules draw their first weights when they are made, and number their positions. On the meta device that comes to
    nothing, but there torch does it in Python, and loads sympy to check the bounds: a quarter of a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        if func is torch.arange and [*map(type, args)] == [int] and str(kwargs.get("device")) == "meta":
            return torch.empty(args[0], **kwargs | {"dtype": kwargs.get("dtype") or torch.int64})
        if func is torch.empty_like and args and {*kwargs} <= {"dtype", "device"}:
            like = args[0]
            if like.is_meta and like.is_contiguous():
                return torch.empty(like.shape, **{"dtype": like.dtype, "device": "meta"} | kwargs)
        return func(*args, **kwargs)
