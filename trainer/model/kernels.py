"""Attention inside pairs, keyed dropout, and dropout + residual + norm, each one kernel forward.

torch sees them as operators of its own (`torch.ops.crossrank`), with shapes for tracing and with gradients. On a CUDA
device they are the Triton kernels of triton_kernels.py, elsewhere the same formulas in torch's operations, from
plain_kernels.py. Both round where the library's eager code under autocast rounds, and draw the masks of dropout.py, bit
by bit. Nothing is added up atomically: the same inputs give the same bits.

A batch is `tokens` rows, its pairs laid end to end. `first` and `lengths` (pairs,) int64 say where each pair begins and
how many rows it has, at most `longest`. Every row belongs to exactly one pair: rows of no pair would not be written.
Heads lie side by side in a row. `keys` are the rows' dropout keys, int64; `columns` the numbers of `columns_of`; with
`p` = 0 neither is read. A row may be part of a wider one: only its own numbers must lie side by side.
"""

import importlib.util
import os
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

LONGEST, WIDEST_HEAD = 128, 128  # tokens of a pair, features of a head
HELD = 128 * 64  # numbers of a pair's keys in a head: they are held at once, and a GPU of 99 KiB has no room for more
WIDEST = 4096  # features of a normed row, which is held at once


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from trainer.model import triton_kernels
    except Exception:  # an installation that does not fit is as good as none
        return False
    return triton_kernels is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is to run the kernels, on a CPU, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device, longest: int = 1, head_size: int = 1, width: int = 1) -> bool:
    """Whether the operators here take pairs of `longest` tokens, heads of `head_size` and norms of `width` features.

    On CUDA they need Triton. On a CPU they bring nothing, and are what tests go through.
    """
    if longest > LONGEST or head_size > WIDEST_HEAD or width > WIDEST or _power(longest) * _power(head_size) > HELD:
        return False
    if device.type != "cuda":
        return True
    # Before Ampere there is no bfloat16.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0) and has_triton()


def _power(number: int) -> int:
    """The next power of two, at least 16: the shapes that kernels of attention work in."""
    return max(16, 1 << (number - 1).bit_length())


def _of(x: torch.Tensor) -> ModuleType:
    """What computes on x's device."""
    if x.is_cuda or interpreted():
        from trainer.model import triton_kernels

        return triton_kernels
    from trainer.model import plain_kernels

    return plain_kernels


@torch.library.custom_op("crossrank::attend", mutates_args=())
def attend(
    qkv: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> torch.Tensor:
    """Attention of every token inside its pair, with dropout of the weights.

    `qkv` (tokens, 3 * hidden) holds queries, keys and values side by side; `keys` (tokens,), `columns` (heads, longest
    / 4 or more). Gives (tokens, hidden).
    """
    return _of(qkv).attend(qkv, first, lengths, keys, columns, p, scaling, longest, heads)


@torch.library.custom_op("crossrank::attend_backward", mutates_args=())
def attend_backward(
    gradient: torch.Tensor,
    qkv: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> torch.Tensor:
    """The gradient of `qkv`, given that of the result (tokens, hidden)."""
    return _of(qkv).attend_backward(gradient, qkv, first, lengths, keys, columns, p, scaling, longest, heads)


@torch.library.custom_op("crossrank::attend_first", mutates_args=())
def attend_first(
    q: torch.Tensor,
    kv: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> torch.Tensor:
    """Attention of each pair's first token only: queries (pairs, hidden), keys and values (tokens, 2 * hidden).

    Gives (pairs, hidden).
    """
    return _of(q).attend_first(q, kv, first, lengths, keys, columns, p, scaling, longest, heads)


@torch.library.custom_op("crossrank::attend_first_backward", mutates_args=())
def attend_first_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    first: torch.Tensor,
    lengths: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
    scaling: float,
    longest: int,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `q` and `kv`, given that of the result (pairs, hidden)."""
    return _of(q).attend_first_backward(gradient, q, kv, first, lengths, keys, columns, p, scaling, longest, heads)


@torch.library.custom_op("crossrank::drop", mutates_args=())
def drop(x: torch.Tensor, keys: torch.Tensor, columns: torch.Tensor, p: float) -> torch.Tensor:
    """x (rows, width) after dropout. `keys` (rows,), `columns` (width / 4,). Its gradient is the gradient's `drop`."""
    return _of(x).drop(x, keys, columns, p)


@torch.library.custom_op("crossrank::add_norm", mutates_args=())
def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm of dropout(x) + residual, in fp32 and once more rounded to x's numbers.

    `x` (rows, width); `residual` likewise, in x's numbers or in fp32; `weight` and `bias` (width,) fp32; `keys` (rows,)
    and `columns` (width / 4,).
    """
    return _of(x).add_norm(x, residual, weight, bias, eps, keys, columns, p)


@torch.library.custom_op("crossrank::add_norm_backward", mutates_args=())
def add_norm_backward(
    of_exact: torch.Tensor | None,
    of_rounded: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    keys: torch.Tensor,
    columns: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `x`, `residual`, weight and bias, given those of the two results; None where one was not used.

    The sum is computed again: x and the residual are kept anyhow, or are smaller than what else would be.
    """
    return _of(x).add_norm_backward(of_exact, of_rounded, x, residual, weight, eps, keys, columns, p)


@attend.register_fake
def _(qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


@attend_backward.register_fake
def _(gradient: torch.Tensor, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


@attend_first.register_fake
def _(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


@attend_first_backward.register_fake
def _(gradient: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


@drop.register_fake
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@add_norm.register_fake
def _(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape)


@add_norm_backward.register_fake
def _(
    of_exact: torch.Tensor | None,
    of_rounded: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    return (
        x.new_empty(x.shape),
        residual.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps the inputs: tensors come first, numbers after them."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[len(tensors) :]


def _attend_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return attend_backward(gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


def _attend_first_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return *attend_first_backward(gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


def _keep_for_drop(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, keys, columns, ctx.p = inputs
    ctx.save_for_backward(keys, columns)


def _drop_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return drop(gradient, *ctx.saved_tensors, ctx.p), None, None, None


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, _, ctx.eps, keys, columns, ctx.p = inputs
    ctx.save_for_backward(x, residual, weight, keys, columns)
    ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, rather than one of zeros


def _norm_gradients(ctx: Any, of_exact: torch.Tensor | None, of_rounded: torch.Tensor | None) -> tuple[Any, ...]:
    if of_exact is None and of_rounded is None:
        return (None,) * 8
    x, residual, weight, keys, columns = ctx.saved_tensors
    gradients = add_norm_backward(of_exact, of_rounded, x, residual, weight, ctx.eps, keys, columns, ctx.p)
    return *gradients, None, None, None, None


attend.register_autograd(_attend_gradients, setup_context=_keep_all)
attend_first.register_autograd(_attend_first_gradients, setup_context=_keep_all)
drop.register_autograd(_drop_gradients, setup_context=_keep_for_drop)
add_norm.register_autograd(_norm_gradients, setup_context=_keep_for_norm)
