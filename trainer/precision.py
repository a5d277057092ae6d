"""Number formats: bfloat16 autocast around the forward, TF32, and whether the device has them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from trainer.config import UserError


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16; weights, norms, softmax and the loss in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def check_bf16(device: torch.device) -> str | None:
    """A warning where bfloat16 is emulated on the CPU. Raises UserError on a GPU without it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no bfloat16 (it came with Ampere); use --bf16 false")
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        return "this CPU has no bfloat16 instructions: torch emulates them, several times slower than --bf16 false"
    return None


def allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
