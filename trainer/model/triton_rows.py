# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Keyed dropout, and dropout + residual + norm, in Triton. In a kernel, types are Triton's to infer.

BLOCK: features held, WIDTH: features of a row, ROWS: rows of a program, DROP: whether there is masks.
"""

import triton
import triton.language as tl

from trainer.model import masks

# What differs from step to step takes any value, so that a kernel is compiled once: sizes, and where in a batch's one
# array an array begins.
ANY = {
    "do_not_specialize": ["threshold", "rows", "share", "programs"],
    "do_not_specialize_on_alignment": ["first", "lengths", "keys"],
}
MULTIPLIER = tl.constexpr(masks.MULTIPLIER)


@triton.jit
def factors(keys, columns, feature, threshold, inverse):
    """Dropout's factors, of the rows' keys, the columns' numbers and the features' numbers, which broadcast."""
    hashes = keys * columns
    hashes = hashes ^ (hashes >> 32)
    hashes = hashes * MULTIPLIER
    draws = (hashes >> ((feature % 4) * 16).to(tl.int64)).to(tl.int16).to(tl.int32)
    return tl.where(draws >= threshold, inverse, 0.0)


@triton.jit
def scaled(x, factors):
    """x times fp32 factors, rounded once."""
    return (x.to(tl.float32) * factors).to(x.dtype)


@triton.jit(**ANY)
def drop_kernel(
    x, out, keys, columns, rows, stride, threshold, inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (feature < WIDTH)[None, :]
    dropped = tl.load(x + row[:, None] * stride + feature[None, :], mask=there, other=0.0)
    if DROP:
        of_row = tl.load(keys + row, mask=row < rows, other=0)
        of_feature = tl.load(columns + feature // 4, mask=feature < WIDTH, other=0)
        kept = factors(of_row[:, None], of_feature[None, :], feature[None, :], threshold, inverse)
        dropped = scaled(dropped, kept)
    tl.store(out + row[:, None] * WIDTH + feature[None, :], dropped, mask=there)


@triton.jit
def _normed(x, residual, kept, inside, eps, WIDTH: tl.constexpr, DROP: tl.constexpr):
    """Of one row's x and residual (BLOCK,): (dropout(x) + residual - mean) / deviation in fp32, and 1 / deviation."""
    if DROP:
        x = scaled(x, kept)
    # A sum of two 16-bit numbers is one itself; the norm is computed in fp32.
    summed = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype).to(tl.float32)
    centred = tl.where(inside, summed - tl.sum(summed, 0) / WIDTH, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    return centred * scale, scale


@triton.jit(**ANY)
def add_norm_kernel(
    x, residual, weight, bias, exact, rounded, keys, columns, rows, stride, residual_stride, eps, threshold, inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * ROWS
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    w = tl.load(weight + feature, mask=inside, other=0.0)
    b = tl.load(bias + feature, mask=inside, other=0.0)
    if DROP:
        of_feature = tl.load(columns + feature // 4, mask=inside, other=0)
    for row in range(begin, tl.minimum(begin + ROWS, rows)):
        kept = 1.0
        if DROP:
            kept = factors(tl.load(keys + row), of_feature, feature, threshold, inverse)
        of_x = tl.load(x + row * stride + feature, mask=inside, other=0.0)
        of_residual = tl.load(residual + row * residual_stride + feature, mask=inside, other=0.0)
        normed, _ = _normed(of_x, of_residual, kept, inside, eps, WIDTH, DROP)
        y = normed * w + b
        tl.store(exact + row * WIDTH + feature, y, mask=inside)
        tl.store(rounded + row * WIDTH + feature, y.to(of_x.dtype), mask=inside)


@triton.jit(**ANY)
def add_norm_backward_kernel(
    of_exact, of_rounded, x, residual, weight, gx, gresidual, parts, keys, columns, rows, share, exact_stride,
    rounded_stride, stride, residual_stride, eps, threshold, inverse,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr, EXACT: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """`share`: rows of a program; `parts` (programs, 2, WIDTH): its sums for the weight's and the bias's gradients.

    EXACT, ROUNDED: which of the two results have a gradient.
    """
    begin = tl.program_id(0).to(tl.int64) * share
    feature = tl.arange(0, BLOCK)
    inside = feature < WIDTH
    w = tl.load(weight + feature, mask=inside, other=0.0)
    gweight = tl.zeros([BLOCK], tl.float32)
    gbias = tl.zeros([BLOCK], tl.float32)
    if DROP:
        of_feature = tl.load(columns + feature // 4, mask=inside, other=0)
    for row in range(begin, tl.minimum(begin + share, rows)):
        kept = 1.0
        if DROP:
            kept = factors(tl.load(keys + row), of_feature, feature, threshold, inverse)
        of_x = tl.load(x + row * stride + feature, mask=inside, other=0.0)
        of_residual = tl.load(residual + row * residual_stride + feature, mask=inside, other=0.0)
        normed, scale = _normed(of_x, of_residual, kept, inside, eps, WIDTH, DROP)
        g = tl.zeros([BLOCK], tl.float32)
        if EXACT:
            g += tl.load(of_exact + row * exact_stride + feature, mask=inside, other=0.0)
        if ROUNDED:
            g += tl.load(of_rounded + row * rounded_stride + feature, mask=inside, other=0.0).to(tl.float32)
        gweight += g * normed
        gbias += g
        g *= w
        inner = tl.sum(g * normed, 0) / WIDTH
        gsum = (scale * (g - tl.sum(g, 0) / WIDTH - normed * inner)).to(of_residual.dtype)
        tl.store(gresidual + row * WIDTH + feature, gsum, mask=inside)
        gdropped = gsum.to(of_x.dtype)
        if DROP:
            gdropped = scaled(gdropped, kept)
        tl.store(gx + row * WIDTH + feature, gdropped, mask=inside)
    parts += tl.program_id(0).to(tl.int64) * (2 * WIDTH) + feature
    tl.store(parts, gweight, mask=inside)
    tl.store(parts + WIDTH, gbias, mask=inside)


@triton.jit(**ANY)
def sum_kernel(parts, gweight, gbias, programs, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sums `parts` over its programs, always in the same order: the weight's or the bias's, BLOCK features of it."""
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    part = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, programs, ROWS):
        there = (begin + part < programs)[:, None] & (feature < WIDTH)[None, :]
        at = (begin + part)[:, None] * (2 * WIDTH) + which * WIDTH + feature[None, :]
        sums += tl.load(parts + at, mask=there, other=0.0)
    summed = tl.sum(sums, 0)
    if which == 0:
        tl.store(gweight + feature, summed, mask=feature < WIDTH)
    else:
        tl.store(gbias + feature, summed, mask=feature < WIDTH)
