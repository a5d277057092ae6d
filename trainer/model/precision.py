"""Number formats: bfloat16 autocast around the forward, TF32, and what the device has of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.base.errors import UserError

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


def autocast(device: torch.device, bf16: bool, keep: bool = True) -> AbstractContextManager[object]:
    """Matrix products in bfloat16; weights, norms, softmax and the loss in fp32.

    `keep`: whether weights that were rounded once are kept while it lasts.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=keep)


def products(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Wraps everything that computes, backward included: the fastest right way to bfloat16 products on this device."""
    return Bf16ProductsInFp32() if bf16 and not has_bf16(device) else nullcontext()


class Bf16ProductsInFp32(TorchDispatchMode):
    """bfloat16 matrix products on a CPU without instructions for them, where torch's own are some 25 times slower.

    The product of two bfloat16 numbers is exact in fp32, and bfloat16 hardware sums in fp32 too: the factors are
    widened, multiplied in fp32, and the result is rounded. Only the order of the sums differs.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            return func(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def has_bf16(device: torch.device) -> bool:
    """Whether the device itself multiplies in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_bf16(device: torch.device) -> str | None:
    """A warning where bfloat16 brings no speed. Raises UserError on a GPU without it."""
    if has_bf16(device):
        return None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no bfloat16 (it came with Ampere); use --bf16 false")
    return "this CPU has no bfloat16 instructions: its products are computed in fp32, so --bf16 false is no slower"


def settle_products(tf32: bool = False) -> None:
    """Whether fp32 products may be of TF32 numbers; products of 16-bit numbers are summed in fp32 throughout."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # By default cuBLAS may add up the parts of a long sum in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
