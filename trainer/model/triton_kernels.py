"""The operators of kernels.py as launches of Triton kernels; arguments as there. Imported where there is Triton.

`pairs` are the arguments that all of attention share: first, lengths, keys, columns, p, scaling, longest, heads.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from trainer.model import triton_attention, triton_rows

TILE = 16  # queries at a time: with more, threads run out of registers
PARTS = 256  # programs of the norm's backward, on any device: another number would give other bits


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    warps: int,
    device: torch.device,
) -> None:
    """Runs a kernel; `constants` are known when it is compiled. benchmarks/kernels.py compiles in place of it."""
    on: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # The loops are short: loading their next round ahead would only take shared memory.
    with on:
        kernel[grid](**arguments, **constants, num_warps=warps, num_stages=1)


def _numbers(p: float) -> dict[str, Any]:
    """Dropout's threshold and scale, as in dropout.py's `masked`."""
    dropped = round(p * 65536)
    return {"threshold": dropped - 32768, "inverse": 65536 / (65536 - dropped)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a row side by side, as a gradient need not have them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


class Attention(NamedTuple):
    """What every kernel of attention gets."""

    grid: tuple[int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int

    def tiled(self) -> dict[str, Any]:
        """The constants where there are many queries. Most pairs are short: for them half a block is enough."""
        return self.constants | {"TILE": TILE, "SMALL": max(self.constants["BLOCK"] // 2, TILE)}


def _attention(
    x: torch.Tensor,
    hidden: int,
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> Attention:
    size, columns = hidden // heads, _rows(columns)
    arguments = {"first": first, "lengths": lengths, "keys": keys, "columns": columns,
                 "column_stride": columns.stride(0), "scaling": scaling, **_numbers(p)}  # fmt: skip
    constants = {"BLOCK": max(16, next_power_of_2(longest)), "SIZE": size, "SIZE_BLOCK": max(16, next_power_of_2(size)),
                 "HIDDEN": hidden, "DROP": p > 0}  # fmt: skip
    # Without tensor cores, products of fp32 need more registers than four warps have.
    return Attention((len(first), heads), arguments, constants, 4 if x.itemsize == 2 else 8)


def attend(qkv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    hidden = qkv.shape[1] // 3
    out = _empty(len(qkv), hidden, like=qkv)
    grid, arguments, _, warps = shared = _attention(qkv, hidden, *pairs)
    arguments |= {"qkv": qkv, "out": out, "stride": qkv.stride(0)}
    launch(triton_attention.attend_kernel, grid, arguments, shared.tiled(), warps, qkv.device)
    return out


def attend_backward(gradient: torch.Tensor, qkv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    out, gradient = _empty(*qkv.shape, like=qkv), _rows(gradient)
    grid, arguments, _, warps = shared = _attention(qkv, qkv.shape[1] // 3, *pairs)
    arguments |= {"gradient": gradient, "qkv": qkv, "out": out, "gradient_stride": gradient.stride(0),
                  "stride": qkv.stride(0)}  # fmt: skip
    launch(triton_attention.attend_backward_kernel, grid, arguments, shared.tiled(), warps, qkv.device)
    return out


def attend_first(q: torch.Tensor, kv: torch.Tensor, *pairs: Any) -> torch.Tensor:
    out = _empty(*q.shape, like=q)
    grid, arguments, constants, warps = _attention(q, q.shape[1], *pairs)
    arguments |= {"q": q, "kv": kv, "out": out, "q_stride": q.stride(0), "stride": kv.stride(0)}
    launch(triton_attention.attend_first_kernel, grid, arguments, constants, warps, q.device)
    return out


def attend_first_backward(
    gradient: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, *pairs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    of_q, of_kv, gradient = _empty(*q.shape, like=q), _empty(*kv.shape, like=kv), _rows(gradient)
    grid, arguments, constants, warps = _attention(q, q.shape[1], *pairs)
    arguments |= {"gradient": gradient, "q": q, "kv": kv, "of_q": of_q, "of_kv": of_kv,
                  "gradient_stride": gradient.stride(0), "q_stride": q.stride(0), "stride": kv.stride(0)}  # fmt: skip
    launch(triton_attention.attend_first_backward_kernel, grid, arguments, constants, warps, q.device)
    return of_q, of_kv


def drop(x: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    rows, width = x.shape
    out, x = _empty(rows, width, like=x), _rows(x)
    arguments = {"x": x, "out": out, "keys": keys, "columns": columns, "rows": rows, "stride": x.stride(0),
                 **_numbers(p)}  # fmt: skip
    block, at_once = min(256, next_power_of_2(width)), 8
    constants = {"WIDTH": width, "BLOCK": block, "ROWS": at_once, "DROP": p > 0}
    grid = (-(-rows // at_once), -(-width // block))
    launch(triton_rows.drop_kernel, grid, arguments, constants, 4, x.device)
    return out


def _norm(
    x: torch.Tensor, residual: torch.Tensor, eps: float, keys: torch.Tensor, columns: torch.Tensor, p: float
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arguments, constants and warps that the norm's kernels share."""
    arguments = {"x": x, "residual": residual, "eps": eps, "keys": keys, "columns": columns, "rows": len(x),
                 "stride": x.stride(0), "residual_stride": residual.stride(0), **_numbers(p)}  # fmt: skip
    block = next_power_of_2(x.shape[1])
    return arguments, {"WIDTH": x.shape[1], "BLOCK": block, "DROP": p > 0}, 4 if block <= 1024 else 8


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *dropout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dropout`: keys, columns and p."""
    x, residual = _rows(x), _rows(residual)
    exact, rounded = _empty(*x.shape, like=x, dtype=torch.float32), _empty(*x.shape, like=x)
    arguments, constants, warps = _norm(x, residual, eps, *dropout)
    arguments |= {"weight": weight, "bias": bias, "exact": exact, "rounded": rounded}
    grid, constants = (-(-len(x) // 4),), constants | {"ROWS": 4}
    launch(triton_rows.add_norm_kernel, grid, arguments, constants, warps, x.device)
    return exact, rounded


def add_norm_backward(
    of_exact: torch.Tensor | None,
    of_rounded: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *dropout: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = _rows(x), _rows(residual)
    share = max(1, -(-len(x) // PARTS))
    programs, width = -(-len(x) // share), x.shape[1]
    gx, gresidual = _empty(*x.shape, like=x), _empty(*x.shape, like=residual)
    parts = _empty(programs, 2, width, like=weight)
    arguments, constants, warps = _norm(x, residual, eps, *dropout)
    given: dict[str, Any] = {}
    for name, gradient in (("exact", of_exact), ("rounded", of_rounded)):
        rows = None if gradient is None else _rows(gradient)
        given |= {f"of_{name}": rows, f"{name}_stride": 0 if rows is None else rows.stride(0)}
        constants[name.upper()] = rows is not None
    arguments |= {"weight": weight, "gx": gx, "gresidual": gresidual, "parts": parts, "share": share, **given}
    launch(triton_rows.add_norm_backward_kernel, (programs,), arguments, constants, warps, x.device)
    gweight, gbias = _empty(width, like=weight), _empty(width, like=weight)
    arguments = {"parts": parts, "gweight": gweight, "gbias": gbias, "programs": programs}
    constants = {"WIDTH": width, "BLOCK": 32, "ROWS": 32}
    launch(triton_rows.sum_kernel, (-(-width // 32), 2), arguments, constants, 4, x.device)
    return gx, gresidual, gweight, gbias
