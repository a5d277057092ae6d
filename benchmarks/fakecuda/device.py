"""The context in which fake CUDA tensors work, and what puts a model there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from benchmarks.fakecuda import library
from benchmarks.fakecuda.host import Host

DEVICE = torch.device("cuda", 0)

# What torch's Python says of a card: one of Hopper's kind.
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "fake",
    "mem_get_info": (80 * 2**30, 80 * 2**30),
    "is_current_stream_capturing": False,
    "get_rng_state_all": [],
}
SILENT = ("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """While it lasts, tensors on "cuda" are fake ones. The device itself stays for the rest of the process."""
    library.load()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(fake)  # before torch says that it has a card, whose memory torch.tensor would then use
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        for name in SILENT:
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=None))
        # Lists of plain tensors take torch's fused operations; these shall too.
        supported = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", supported))
        stack.enter_context(Host(fake))
        stack.enter_context(FusedAttention())
        yield


def to_fake_cuda(module: Any) -> Any:
    """Puts fake tensors on the device in place of all parameters and buffers; call it inside `fake_cuda`.

    A tensor that has two names stays one, and what is frozen stays so.
    """
    moved: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return moved[id(tensor)]

    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]  # type: ignore[list-item]
        for own in tables:
            own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})
    return module


class FusedAttention(TorchFunctionMode):
    """torch's scaled_dot_product_attention as a CUDA build of torch dispatches it.

    A CPU build knows no fused kernel for the device and would take the operation apart. Which kernel a card takes is
    decided by its driver's age and kind; here it is flash attention for 16-bit numbers without a mask, else the
    memory-efficient one, whose mask has to be added and wide: what is done to a mask before is dispatched here too.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and args[0].device.type == "cuda":
            return fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """One operation, those on a mask, and the casts that autocast would make."""
    aten = torch.ops.aten
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    trained = any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled()
    mask = None if attn_mask is None else _added_mask(attn_mask, query, key)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, trained, dropout_p, is_causal, scale=scale
    )[0]


def _added_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What the kernel adds to the scores (batch, heads, queries, keys), in rows that begin at multiples of 16."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=query.dtype, device=mask.device))
    mask = mask.to(query.dtype)
    width = mask.shape[-1]
    if width % 16:
        mask = nn.functional.pad(mask, (0, -width % 16))[..., :width]
    return mask.expand(*query.shape[:3], key.shape[2])
