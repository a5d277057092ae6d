# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention inside pairs, in Triton: one program a pair and head.

It holds all the pair's keys and values and goes over its queries tile by tile, so it needs no running maximum, and a
short pair costs little. Its backward also holds their gradients, which no other program adds to. In a kernel, types are
Triton's to infer: only what is known at compile time is annotated.

BLOCK: keys held, SMALL: keys held for a short pair, TILE: queries at a time, SIZE: features of a head, SIZE_BLOCK: the
same as a power of two, HIDDEN: features of all heads, DROP: whether there is dropout.
"""

import triton
import triton.language as tl

from trainer.model.triton_rows import ANY, factors, scaled

EXACT = tl.constexpr("ieee")  # fp32 is multiplied as fp32: next to the linear layers this costs little


@triton.jit
def _softmax(scores, seen, AXIS: tl.constexpr):
    """Over one axis of two, where `seen`, in fp32."""
    scores = tl.where(seen, scores.to(tl.float32), float("-inf"))
    exponentials = tl.exp(scores - tl.expand_dims(tl.max(scores, AXIS), AXIS))
    return exponentials / tl.expand_dims(tl.sum(exponentials, AXIS), AXIS)


@triton.jit
def _rows(numbers, row, feature, stride, there):
    """Those of a matrix (rows, features), 0 where they are not `there`."""
    return tl.load(numbers + row[:, None] * stride + feature[None, :], mask=there, other=0.0)


@triton.jit
def _attend_pair(
    qkv, out, keys, columns, start, length, head, stride, column_stride, scaling, threshold, inverse,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, HIDDEN: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    key, feature = tl.arange(0, BLOCK), tl.arange(0, SIZE_BLOCK)
    inside, own = feature < SIZE, head * SIZE + feature
    of_keys = (key < length)[:, None] & inside[None, :]
    k = _rows(qkv + HIDDEN, start + key, own, stride, of_keys)
    v = _rows(qkv + 2 * HIDDEN, start + key, own, stride, of_keys)
    if DROP:
        of_key = tl.load(columns + head * column_stride + key // 4, mask=key < length, other=0)
    for begin in range(0, length, TILE):
        place = begin + tl.arange(0, TILE)
        row = start + place
        there = (place < length)[:, None] & inside[None, :]
        q = scaled(_rows(qkv, row, own, stride, there), scaling)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT).to(q.dtype)
        weights = _softmax(scores, (key < length)[None, :], 1).to(v.dtype)
        if DROP:
            of_row = tl.load(keys + row, mask=place < length, other=0)
            kept = factors(of_row[:, None], of_key[None, :], key[None, :], threshold, inverse)
            weights = scaled(weights, kept)
        mixed = tl.dot(weights, v, input_precision=EXACT).to(v.dtype)
        tl.store(out + row[:, None] * HIDDEN + own[None, :], mixed, mask=there)


@triton.jit(**ANY)
def attend_kernel(
    qkv, out, first, lengths, keys, columns, stride, column_stride, scaling, threshold, inverse,
    SMALL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(first + pair), tl.load(lengths + pair).to(tl.int32)
    # Most pairs are far shorter than the longest.
    if length <= SMALL:
        _attend_pair(qkv, out, keys, columns, start, length, head, stride, column_stride, scaling, threshold, inverse,
                     SMALL, TILE, SIZE, SIZE_BLOCK, HIDDEN, DROP)  # fmt: skip
    else:
        _attend_pair(qkv, out, keys, columns, start, length, head, stride, column_stride, scaling, threshold, inverse,
                     BLOCK, TILE, SIZE, SIZE_BLOCK, HIDDEN, DROP)  # fmt: skip


@triton.jit
def _attend_pair_backward(
    gradient, qkv, out, keys, columns, start, length, head, gradient_stride, stride, column_stride, scaling, threshold,
    inverse, BLOCK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    key, feature = tl.arange(0, BLOCK), tl.arange(0, SIZE_BLOCK)
    inside, own = feature < SIZE, head * SIZE + feature
    of_keys = (key < length)[:, None] & inside[None, :]
    k = _rows(qkv + HIDDEN, start + key, own, stride, of_keys)
    v = _rows(qkv + 2 * HIDDEN, start + key, own, stride, of_keys)
    if DROP:
        of_key = tl.load(columns + head * column_stride + key // 4, mask=key < length, other=0)
    gk = tl.zeros([BLOCK, SIZE_BLOCK], tl.float32)
    gv = tl.zeros([BLOCK, SIZE_BLOCK], tl.float32)
    for begin in range(0, length, TILE):
        place = begin + tl.arange(0, TILE)
        row = start + place
        there = (place < length)[:, None] & inside[None, :]
        q = scaled(_rows(qkv, row, own, stride, there), scaling)
        g = _rows(gradient, row, own, gradient_stride, there)
        # Keys down, queries across: the warps then share out the keys, instead of each holding all of them.
        scores = tl.dot(k, tl.trans(q), input_precision=EXACT).to(q.dtype)
        soft = _softmax(scores, (key < length)[:, None], 0)
        weights = soft.to(v.dtype)
        gw = tl.dot(v, tl.trans(g), input_precision=EXACT).to(v.dtype)
        if DROP:
            of_row = tl.load(keys + row, mask=place < length, other=0)
            kept = factors(of_row[None, :], of_key[:, None], key[:, None], threshold, inverse)
            weights, gw = scaled(weights, kept), scaled(gw, kept)
        gv = tl.dot(weights, g, gv, input_precision=EXACT)
        inner = tl.sum(soft * gw.to(tl.float32), 0)
        gs = (soft * (gw.to(tl.float32) - inner[None, :])).to(q.dtype)
        gk = tl.dot(gs, q, gk, input_precision=EXACT)
        gq = tl.dot(tl.trans(k), gs, input_precision=EXACT).to(q.dtype)
        tl.store(out + row[:, None] * (3 * HIDDEN) + own[None, :], tl.trans(scaled(gq, scaling)), mask=there)
    out += HIDDEN + (start + key)[:, None] * (3 * HIDDEN) + own[None, :]
    tl.store(out, gk.to(k.dtype), mask=of_keys)
    tl.store(out + HIDDEN, gv.to(v.dtype), mask=of_keys)


@triton.jit(**ANY)
def attend_backward_kernel(
    gradient, qkv, out, first, lengths, keys, columns, gradient_stride, stride, column_stride, scaling, threshold,
    inverse, SMALL: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(first + pair), tl.load(lengths + pair).to(tl.int32)
    if length <= SMALL:
        _attend_pair_backward(gradient, qkv, out, keys, columns, start, length, head, gradient_stride, stride,
                              column_stride, scaling, threshold, inverse, SMALL, TILE, SIZE, SIZE_BLOCK, HIDDEN,
                              DROP)  # fmt: skip
    else:
        _attend_pair_backward(gradient, qkv, out, keys, columns, start, length, head, gradient_stride, stride,
                              column_stride, scaling, threshold, inverse, BLOCK, TILE, SIZE, SIZE_BLOCK, HIDDEN,
                              DROP)  # fmt: skip


@triton.jit(**ANY)
def attend_first_kernel(
    q, kv, out, first, lengths, keys, columns, q_stride, stride, column_stride, scaling, threshold, inverse,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, HIDDEN: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(first + pair), tl.load(lengths + pair)
    key, feature = tl.arange(0, BLOCK), tl.arange(0, SIZE_BLOCK)
    inside, own = feature < SIZE, head * SIZE + feature
    there = (key < length)[:, None] & inside[None, :]
    query = scaled(tl.load(q + pair * q_stride + own, mask=inside, other=0.0), scaling)
    k = _rows(kv, start + key, own, stride, there)
    v = _rows(kv + HIDDEN, start + key, own, stride, there)
    scores = tl.sum(k.to(tl.float32) * query.to(tl.float32)[None, :], 1).to(query.dtype)
    weights = _softmax(scores[:, None], (key < length)[:, None], 0).to(v.dtype)
    if DROP:
        of_key = tl.load(columns + head * column_stride + key // 4, mask=key < length, other=0)
        kept = factors(tl.load(keys + start), of_key, key, threshold, inverse)
        weights = scaled(weights, kept[:, None])
    mixed = tl.sum(weights.to(tl.float32) * v.to(tl.float32), 0)
    tl.store(out + pair * HIDDEN + own, mixed.to(v.dtype), mask=inside)


@triton.jit(**ANY)
def attend_first_backward_kernel(
    gradient, q, kv, of_q, of_kv, first, lengths, keys, columns, gradient_stride, q_stride, stride, column_stride,
    scaling, threshold, inverse,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, HIDDEN: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(first + pair), tl.load(lengths + pair)
    key, feature = tl.arange(0, BLOCK), tl.arange(0, SIZE_BLOCK)
    inside, own = feature < SIZE, head * SIZE + feature
    there = (key < length)[:, None] & inside[None, :]
    query = scaled(tl.load(q + pair * q_stride + own, mask=inside, other=0.0), scaling)
    g = tl.load(gradient + pair * gradient_stride + own, mask=inside, other=0.0).to(tl.float32)
    k = _rows(kv, start + key, own, stride, there)
    v = _rows(kv + HIDDEN, start + key, own, stride, there)
    scores = tl.sum(k.to(tl.float32) * query.to(tl.float32)[None, :], 1).to(query.dtype)
    soft = _softmax(scores[:, None], (key < length)[:, None], 0)
    weights = soft.to(v.dtype)
    gw = tl.sum(v.to(tl.float32) * g[None, :], 1).to(v.dtype)[:, None]
    if DROP:
        of_key = tl.load(columns + head * column_stride + key // 4, mask=key < length, other=0)
        kept = factors(tl.load(keys + start), of_key, key, threshold, inverse)[:, None]
        weights, gw = scaled(weights, kept), scaled(gw, kept)
    inner = tl.sum(soft * gw.to(tl.float32), 0)
    gs = (soft * (gw.to(tl.float32) - inner[None, :])).to(query.dtype).to(tl.float32)
    gq = scaled(tl.sum(gs * k.to(tl.float32), 0).to(query.dtype), scaling)
    tl.store(of_q + pair * HIDDEN + own, gq, mask=inside)
    of_kv += (start + key)[:, None] * (2 * HIDDEN) + own[None, :]
    tl.store(of_kv, (gs * query.to(tl.float32)[None, :]).to(k.dtype), mask=there)
    tl.store(of_kv + HIDDEN, (weights.to(tl.float32) * g[None, :]).to(v.dtype), mask=there)
