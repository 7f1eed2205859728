"""Patch embedding and its inverse in Triton: the kernels, and how they are launched.

Three kernels serve both ways. `clips_to_tokens` gathers patches and multiplies them: patch_embed, and the gradient of what
`tokens_to_clips` reads. That multiplies tokens, after a norm if there is one, and scatters: unpatchify, and the gradient of what
`clips_to_tokens` reads; each pixel is in one patch, so no sum meets another. `weight_gradient` is tokens^T @ patches of both. Tokens that
stay tokens are a clip too, of one row of pixels and as many channels as they have.

A tile of tokens lies in one clip, and tells its threads to go along the row of pixels: a patch's neighbours in w are neighbours in memory,
of the same token and of the next, so that a tile is loaded as (channel, frame and row of the patch) x (pixels of a row), 16 bytes at once
where the clips are aligned for it, and turned into (patch elements, tokens) in registers. Every number depends on its own token alone.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.block import PRECISION
from ..dispatch import INTERPRETED, launch
from ..layout import VideoLayout
from ..norms import fused as norms
from .reference import grid_of, video_rows, without_gaps

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BLOCK_M = 64
"""Tokens of a tile, but where twice as many leave registers free, so that a weight is read half as often."""
HELD = tl.constexpr(4)
"""Of so many blocks of patch elements, `clips_to_tokens` gathers a tile once for all that it multiplies them with."""
AT_ONCE = 24
"""Clips that are written to a table in a launch."""
PROGRAMS = 512
"""About so many a launch has if it can, for any GPU to be busy; of wide tiles half as many."""
LARGEST_GROUP = 12
"""Blocks that a program makes of a tile at most."""
CHUNKS = (8, 64)
"""For the gradient of a weight, tokens are summed in so many parts, at least and at most: as many as make twice PROGRAMS, but of no
fewer than SUMMED tiles.
"""
SUMMED = 8
FOLDED = 2
"""A norm is folded into a weight ahead, for each row of the tables, if these together are no more than the tokens over so many."""
SPLITS = 16
"""The parts that the tokens of a row of a table are summed in for its gradient."""
OFFSET = 1 << 62

# A clip goes into a kernel as a tuple of ten numbers: how far the next one is, the strides of (channels, T, H, W), the size (T, H, W), its
# first row among the tokens, and how many rows further the next one's is. Clips that are not evenly spaced, or not of one size, go in as a
# table of these on the device, (ten, clips), with the address in place of the first and the first tile in place of the last. The table is
# written by a kernel that has the numbers as arguments: nothing on the host is to outlive the call, and a captured graph holds them.


@triton.jit
def _number(x):
    """As `_argument` hides it."""
    return (x >> 1) - (1 << 61)


def _argument(x: int) -> int:
    """An odd number above 2^32, so that it is passed as int64, and no kernel is compiled anew for a 1, a 0 or a multiple of 16."""
    return 2 * x + OFFSET + 1


@triton.jit(do_not_specialize=["first", "clips"])
def describe_clips(table_ptr, numbers, first, clips, COUNT: tl.constexpr):
    """COUNT columns of the table, from `first` on, as far as there are clips."""
    for i in tl.static_range(COUNT):
        for j in tl.static_range(10):
            tl.store(table_ptr + j * clips.to(tl.int64) + (first + i), _number(numbers[10 * i + j]), mask=first + i < clips)


@triton.jit
def _grid(size, PATCH):
    """Rows and columns of tokens in a frame, and tokens of a clip."""
    rows, columns = tl.cdiv(size[1], PATCH[2]), tl.cdiv(size[2], PATCH[3])
    return rows, columns, tl.cdiv(size[0], PATCH[1]) * rows * columns


@triton.jit
def _find(tile, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M: tl.constexpr, PATCH):
    """The clip of a tile: where it starts, its strides and size, its first row; and the tile's first token in it."""
    if table_ptr is None:
        size = _number(clip[5]).to(tl.int32), _number(clip[6]).to(tl.int32), _number(clip[7]).to(tl.int32)
        _rows, _columns, tokens = _grid(size, PATCH)
        tiles = tl.cdiv(tokens, BLOCK_M)
        nth = tile // tiles
        start = base_ptr + nth * _number(clip[0])
        strides = _number(clip[1]), _number(clip[2]), _number(clip[3]), _number(clip[4])
        row = _number(clip[8]) + nth * _number(clip[9])
        first = tile % tiles * BLOCK_M
    else:
        nth = -1
        for i in range(0, clips, 128):
            each = i + tl.arange(0, 128)
            starts = tl.load(table_ptr + 9 * clips.to(tl.int64) + each, mask=each < clips, other=1 << 40)
            nth += tl.sum((starts <= tile).to(tl.int32))
        table_ptr += nth
        step = clips.to(tl.int64)
        start = tl.load(table_ptr).to(base_ptr.dtype)
        strides = tl.load(table_ptr + step), tl.load(table_ptr + 2 * step), tl.load(table_ptr + 3 * step), tl.load(table_ptr + 4 * step)
        size = (
            tl.load(table_ptr + 5 * step).to(tl.int32), tl.load(table_ptr + 6 * step).to(tl.int32),
            tl.load(table_ptr + 7 * step).to(tl.int32),
        )  # fmt: skip
        row = tl.load(table_ptr + 8 * step)
        first = (tile - tl.load(table_ptr + 9 * step).to(tl.int32)) * BLOCK_M
    BYTES: tl.constexpr = VECTOR[0] * VECTOR[1] * base_ptr.dtype.element_ty.primitive_bitwidth // 8
    start = tl.multiple_of(start, BYTES)
    return start, strides, size, row, first


# Constants that go through the functions below: PATCH, the channels of a clip and the sides of a patch; JOINED, the sides in w that a tile
# has side by side, pw or, if that is no power of two, one; VECTOR, how many neighbours in (channels, w) are aligned and known to be there
# together; TAIL, whether a patch may reach past its clip.


@triton.jit
def _pixels(strides, size, first, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH):
    """Where patch elements k .. k + BLOCK_K of the tokens first .. first + BLOCK_M are, (BLOCK_K / JOINED, BLOCK_M * JOINED), and whether
    they are there.
    """
    rows, columns, tokens = _grid(size, PATCH)
    element = k + JOINED * tl.arange(0, BLOCK_K // JOINED)
    dw = element % PATCH[3]
    dh = element // PATCH[3] % PATCH[2]
    dt = element // (PATCH[3] * PATCH[2]) % PATCH[1]
    channel = element // (PATCH[3] * PATCH[2] * PATCH[1])
    column = tl.arange(0, BLOCK_M * JOINED)
    token = first + column // JOINED
    t, h, w = token // (rows * columns) * PATCH[1], token // columns % rows * PATCH[2], token % columns * PATCH[3] + column % JOINED
    down = channel * strides[0] + dt * strides[1] + dh * strides[2] + dw * strides[3]
    along = t * strides[1] + h * strides[2] + w * strides[3]
    offsets = down[:, None] + along[None, :]
    there = (element < PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3])[:, None] & (token < tokens)[None, :]
    if TAIL:
        there &= (dt[:, None] + t[None, :] < size[0]) & (dh[:, None] + h[None, :] < size[1]) & (dw[:, None] + w[None, :] < size[2])
    offsets = tl.max_contiguous(tl.multiple_of(offsets, [VECTOR[0], VECTOR[1]]), [VECTOR[0], VECTOR[1]])
    return offsets, tl.max_constancy(there, [VECTOR[0], VECTOR[1]])


@triton.jit
def _gather(
    start, strides, size, first, k, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH,
):  # fmt: skip
    """Patch elements k .. k + BLOCK_K, (BLOCK_K, BLOCK_M); zeros past the clip, the patch and the tokens."""
    offsets, there = _pixels(strides, size, first, k, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
    x = tl.load(start + offsets, mask=there, other=0.0).to(DTYPE)
    if JOINED > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, [BLOCK_K // JOINED, BLOCK_M, JOINED]), [0, 2, 1]), [BLOCK_K, BLOCK_M])
    return x


@triton.jit
def _scatter(
    x, start, strides, size, first, k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH,
):  # fmt: skip
    """The inverse."""
    offsets, there = _pixels(strides, size, first, k, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
    x = x.to(start.dtype.element_ty)
    if JOINED > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, [BLOCK_K // JOINED, JOINED, BLOCK_M]), [0, 2, 1]), [BLOCK_K // JOINED, BLOCK_M * JOINED])
    tl.store(start + offsets, x, mask=there)


@triton.jit
def _weights(weight_ptr, stride, out, along, there_out, there_along, ACROSS: tl.constexpr):
    """weight[out, along], (out, along), or with ACROSS weight[along, out]."""
    if ACROSS:
        pointers = weight_ptr + out[:, None] + along[None, :].to(tl.int64) * stride
    else:
        pointers = weight_ptr + out[:, None].to(tl.int64) * stride + along[None, :]
    return tl.load(pointers, mask=there_out[:, None] & there_along[None, :], other=0.0)


@triton.jit
def _at_place(ptr, places_ptr, stride, size, rows, there, n, there_n):
    """Of a table of positions, the entries at rows' places, (rows, n) in float32."""
    place = tl.load(places_ptr + 3 * rows, mask=there, other=0.0).to(tl.int32)
    place = tl.minimum(tl.maximum(place, 0), size - 1).to(tl.int64)
    mask = there[:, None] & there_n[None, :]
    return tl.load(ptr + place[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["clips", "groups", "group", "t_size", "h_size", "w_size"])
def clips_to_tokens(
    out_ptr, base_ptr, table_ptr, clip, weight_ptr, bias_ptr, t_ptr, h_ptr, w_ptr, places_ptr, known_ptr, known_weight_ptr, used_ptr,
    stride_weight, stride_t, stride_h, stride_w, t_size, h_size, w_size, clips, groups, group,
    WIDTH: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, STAGES: tl.constexpr, PATCH,
):  # fmt: skip
    """A tile of tokens, WIDTH wide in all, of which this program makes `group` blocks of BLOCK_N. t_ptr alone: positions of each token."""
    tile = tl.program_id(0) // groups
    start, strides, size, row, first = _find(tile, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M, PATCH)
    _rows, _columns, tokens = _grid(size, PATCH)
    there = first + tl.arange(0, BLOCK_M) < tokens
    rows = row + first + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    precision: tl.constexpr = PRECISION if dtype == tl.float32 else None
    ELEMENTS: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3]
    PARTS: tl.constexpr = (ELEMENTS + BLOCK_K - 1) // BLOCK_K
    parts = ()
    if PARTS <= HELD:
        for i in tl.static_range(PARTS):
            parts += (_gather(start, strides, size, first, i * BLOCK_K, dtype, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH),)
    begin = tl.program_id(0) % groups * group
    for block in tl.range(begin, tl.minimum(begin + group, tl.cdiv(WIDTH, BLOCK_N)), num_stages=STAGES):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there_n = n < WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PARTS <= HELD:
            for i in tl.static_range(PARTS):
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                w = _weights(weight_ptr, stride_weight * UNIT, n, k, there_n, k < ELEMENTS, ACROSS)
                acc = tl.dot(tl.trans(parts[i]), tl.trans(w), acc, input_precision=precision)
        else:
            for step in range(0, ELEMENTS, BLOCK_K):
                k = step + tl.arange(0, BLOCK_K)
                w = _weights(weight_ptr, stride_weight * UNIT, n, k, there_n, k < ELEMENTS, ACROSS)
                x = _gather(start, strides, size, first, step, dtype, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
                acc = tl.dot(tl.trans(x), tl.trans(w), acc, input_precision=precision)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=there_n, other=0.0).to(tl.float32)[None, :]
        mask = there[:, None] & there_n[None, :]
        if places_ptr is not None:
            acc += (
                _at_place(t_ptr, places_ptr, stride_t * UNIT, t_size, rows, there, n, there_n)
                + _at_place(h_ptr, places_ptr + 1, stride_h * UNIT, h_size, rows, there, n, there_n)
                + _at_place(w_ptr, places_ptr + 2, stride_w * UNIT, w_size, rows, there, n, there_n)
            )
        elif t_ptr is not None:
            acc += tl.load(t_ptr + rows[:, None] * (stride_t * UNIT) + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if known_ptr is not None:
            known = tl.load(known_ptr + rows, mask=there, other=0) != 0
            acc += tl.where(known[:, None], tl.load(known_weight_ptr + n, mask=there_n, other=0.0).to(tl.float32)[None, :], 0.0)
        if used_ptr is not None:
            used = tl.load(used_ptr + rows, mask=there, other=0) != 0
            acc = tl.where(used[:, None], acc, 0.0)
        tl.store(out_ptr + rows[:, None] * WIDTH + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tokens(ptr, rows, there, stride, d, WIDTH: tl.constexpr):
    """Channels d of tokens, (rows, d) in float32."""
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=there[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _project(
    x_ptr, weight_ptr, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, stride_x, stride_weight, stride_shift, stride_scale, eps,
    rows, at, there, begin, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight @ modulated_norm(x) as it reads: PARTS blocks of it from `begin` on, (BLOCK_K, BLOCK_M) each."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    X: tl.constexpr = x_ptr.dtype.element_ty
    precision: tl.constexpr = PRECISION if dtype == tl.float32 else None
    mean = tl.zeros([BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)  # the sum of those of the centred channels
    if NORM is not None:
        # Blocks of channels are joined by Chan, Golub & LeVeque's rule, which does not cancel where the mean is large.
        for step in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
            d = step + tl.arange(0, BLOCK_D)
            x = _tokens(x_ptr, rows, there, stride_x, d, WIDTH)
            if NORM == "layer":
                count = tl.minimum(WIDTH - step, BLOCK_D).to(tl.float32)
                share = count / tl.minimum(WIDTH, step + BLOCK_D).to(tl.float32)
                part = tl.sum(x, 1) / count
                x = tl.where((d < WIDTH)[None, :], x - part[:, None], 0.0)
                apart = part - mean
                mean += apart * share
                square += apart * apart * (step * share)
            square += tl.sum(x * x, 1)
        rstd = tl.rsqrt(tl.where(there, square / WIDTH + eps, 1.0))  # finite in rows that are not there
    acc = ()
    for _ in tl.static_range(PARTS):
        acc += (tl.zeros([BLOCK_K, BLOCK_M], tl.float32),)
    for step in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
        d = step + tl.arange(0, BLOCK_D)
        there_d = d < WIDTH
        x = _tokens(x_ptr, rows, there, stride_x, d, WIDTH)
        if NORM is not None:
            x = (x - mean[:, None]) * rstd[:, None] if NORM == "layer" else x * rstd[:, None]
            if norm_weight_ptr is not None:
                x *= tl.load(norm_weight_ptr + d, mask=there_d, other=0.0).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                x += tl.load(norm_bias_ptr + d, mask=there_d, other=0.0).to(tl.float32)[None, :]
            if scale_ptr is not None:
                x *= 1.0 + _tokens(scale_ptr, at, there, stride_scale, d, WIDTH)
            if shift_ptr is not None:
                x += _tokens(shift_ptr, at, there, stride_shift, d, WIDTH)
            x = x.to(X)  # as the norm is rounded where it is written
            if WIDTH % BLOCK_D:
                x = tl.where(there_d[None, :], x, 0.0)  # nor does a mean reach past the channels
        x = x.to(dtype)
        sums = ()
        for i in tl.static_range(PARTS):
            k = begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
            w = _weights(weight_ptr, stride_weight, k, d, k < ELEMENTS, there_d, ACROSS)
            sums += (tl.dot(w, tl.trans(x), acc[i], input_precision=precision),)
        acc = sums
    return acc


@triton.jit(do_not_specialize=["elements"])
def fold_norm(
    sums_ptr, folded_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr,
    stride_weight, stride_shift, stride_scale, elements, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each row of the tables and each patch element: what `_project_folded` multiplies tokens with, if there is a place for it, its
    sum, and what it adds.
    """
    row, element = tl.program_id(0).to(tl.int64) // elements, tl.program_id(0) % elements
    d = tl.arange(0, BLOCK)
    there = d < WIDTH
    w = tl.load(weight_ptr + element.to(tl.int64) * (stride_weight * UNIT) + d, mask=there, other=0.0)
    factor = _factor(scale_ptr + row * (stride_scale * UNIT) if scale_ptr is not None else None, None, d, there)
    shift = tl.zeros([BLOCK], tl.float32)
    if norm_bias_ptr is not None:
        shift += tl.load(norm_bias_ptr + d, mask=there, other=0.0).to(tl.float32) * factor
    if shift_ptr is not None:
        shift += tl.load(shift_ptr + row * (stride_shift * UNIT) + d, mask=there, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        factor *= tl.load(norm_weight_ptr + d, mask=there, other=0.0).to(tl.float32)
    folded = (w.to(tl.float32) * factor).to(w.dtype)
    at = row * elements + element
    if folded_ptr is not None:
        tl.store(folded_ptr + at * WIDTH + d, folded, mask=there)
    added = tl.sum(w.to(tl.float32) * shift, 0)
    if bias_ptr is not None:
        added += tl.load(bias_ptr + element).to(tl.float32)
    tl.store(sums_ptr + 2 * at, tl.sum(folded.to(tl.float32), 0))
    tl.store(sums_ptr + 2 * at + 1, added)


@triton.jit
def _factor(scale_ptr, norm_weight_ptr, d, there):
    """What a norm multiplies channels d of a token with, in float32."""
    factor = tl.full(d.shape, 1.0, tl.float32)
    if scale_ptr is not None:
        factor += tl.load(scale_ptr + d, mask=there, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        factor *= tl.load(norm_weight_ptr + d, mask=there, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _project_folded(
    x_ptr, weight_ptr, scale_ptr, norm_weight_ptr, sums_ptr, stride_x, stride_weight, stride_row, stride_scale, eps, rows, row, there,
    begin, WIDTH: tl.constexpr, ELEMENTS: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same with a bias, of tokens that share a row of the tables, and with the norm done to the weight instead:

        weight @ ((x - mean) * rstd * (1 + scale) + shift) = rstd * (folded @ x - mean * sum(folded)) + weight @ shift
        folded = weight * (1 + scale), rounded to the weight's dtype

    so that a token is read once, as it is, while its statistics are summed. weight is folded for each row, stride_row apart, or, with
    scale_ptr or norm_weight_ptr, is to be folded here, to the same numbers.
    """
    # Sums of squares less the mean of the first channels do not cancel, however large the mean: they are at most WIDTH / BLOCK_D + 1 times
    # those less the mean of all.
    near = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer":
        near = tl.sum(_tokens(x_ptr, rows, there, stride_x, tl.arange(0, BLOCK_D), WIDTH), 1) / min(BLOCK_D, WIDTH)
    acc = ()
    for _ in tl.static_range(PARTS):
        acc += (tl.zeros([BLOCK_K, BLOCK_M], tl.float32),)
    # Eight neighbours are summed in their thread, threads at the end.
    total, square = tl.zeros([BLOCK_M, BLOCK_D // 8], tl.float32), tl.zeros([BLOCK_M, BLOCK_D // 8], tl.float32)
    for step in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
        d = step + tl.arange(0, BLOCK_D)
        there_d = d < WIDTH
        mask = there[:, None] if WIDTH % BLOCK_D == 0 else there[:, None] & there_d[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + d[None, :], mask=mask, other=0.0)
        apart = x.to(tl.float32)
        if NORM == "layer":
            apart -= near[:, None]
            if WIDTH % BLOCK_D:
                apart = tl.where(there_d[None, :], apart, 0.0)
        apart = tl.reshape(apart, [BLOCK_M, BLOCK_D // 8, 8])
        if NORM == "layer":
            total += tl.sum(apart, 2)
        square += tl.sum(apart * apart, 2)
        sums = ()
        for i in tl.static_range(PARTS):
            k = begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
            w = _weights(weight_ptr + row * stride_row, stride_weight, k, d, k < ELEMENTS, there_d, False)
            if scale_ptr is not None or norm_weight_ptr is not None:
                scale = scale_ptr + row * stride_scale if scale_ptr is not None else None
                w = (w.to(tl.float32) * _factor(scale, norm_weight_ptr, d, there_d)[None, :]).to(w.dtype)
            sums += (tl.dot(w, tl.trans(x), acc[i]),)
        acc = sums
    mean, square = tl.sum(total, 1) / WIDTH, tl.sum(square, 1) / WIDTH
    rstd = tl.rsqrt(tl.where(there, tl.maximum(square - mean * mean, 0.0) + eps, 1.0))  # finite in rows that are not there
    mean += near
    projected = ()
    for i in tl.static_range(PARTS):
        k = begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
        sums = sums_ptr + 2 * (row * ELEMENTS + k)
        out, added = acc[i], tl.load(sums + 1, mask=k < ELEMENTS, other=0.0)
        if NORM == "layer":
            out -= mean[None, :] * tl.load(sums, mask=k < ELEMENTS, other=0.0)[:, None]
        projected += (out * rstd[None, :] + added[:, None],)
    return projected


@triton.jit(do_not_specialize=["clips", "groups"])
def tokens_to_clips(
    base_ptr, x_ptr, table_ptr, clip, weight_ptr, bias_ptr, shift_ptr, scale_ptr, rows_ptr, norm_weight_ptr, norm_bias_ptr, used_ptr,
    sums_ptr, stride_x, stride_weight, stride_row, stride_shift, stride_scale, eps, clips, groups,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, STAGES: tl.constexpr, PATCH,
):  # fmt: skip
    """A tile of tokens, WIDTH wide, and of what it is projected to PARTS blocks of BLOCK_K. NORM: None, "layer" or "rms"; if there are the
    sums of `fold_norm`, it is done to the weight.
    """
    start, strides, size, row, first = _find(tl.program_id(0) // groups, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M, PATCH)
    _rows, _columns, tokens = _grid(size, PATCH)
    inside = first + tl.arange(0, BLOCK_M) < tokens
    rows = row + first + tl.arange(0, BLOCK_M)
    ELEMENTS: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3]
    there = inside
    if used_ptr is not None:
        there &= tl.load(used_ptr + rows, mask=inside, other=0) != 0
    at = tl.zeros([BLOCK_M], tl.int32)
    if rows_ptr is not None:
        at = tl.load(rows_ptr + rows, mask=there, other=0).to(tl.int32)
    begin = tl.program_id(0) % groups * (PARTS * BLOCK_K)
    out = ()
    if sums_ptr is None:
        projected = _project(
            x_ptr, weight_ptr, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, stride_x * UNIT, stride_weight * UNIT,
            stride_shift * UNIT, stride_scale * UNIT, eps, rows, at.to(tl.int64), there, begin, WIDTH, ELEMENTS, NORM, ACROSS, BLOCK_M,
            BLOCK_D, BLOCK_K, PARTS, STAGES,
        )  # fmt: skip
        for i in tl.static_range(PARTS):
            each = begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
            if bias_ptr is not None:
                out += (projected[i] + tl.load(bias_ptr + each, mask=each < ELEMENTS, other=0.0).to(tl.float32)[:, None],)
            else:
                out += (projected[i],)
    else:
        # The tokens of a tile mostly share a row of the tables. If not, it is gone through once for each.
        for _ in tl.static_range(PARTS):
            out += (tl.zeros([BLOCK_K, BLOCK_M], base_ptr.dtype.element_ty),)
        waiting = inside.to(tl.int32)
        while tl.max(waiting, 0) > 0:
            now = tl.min(tl.where(waiting > 0, at, 0x7FFFFFFF), 0)
            projected = _project_folded(
                x_ptr, weight_ptr, scale_ptr, norm_weight_ptr, sums_ptr, stride_x * UNIT, stride_weight * UNIT, stride_row * UNIT,
                stride_scale * UNIT, eps, rows, now.to(tl.int64), there, begin, WIDTH, ELEMENTS, NORM, BLOCK_M, BLOCK_D, BLOCK_K, PARTS,
                STAGES,
            )  # fmt: skip
            taken = ()
            for i in tl.static_range(PARTS):
                taken += (tl.where((at == now)[None, :], projected[i].to(base_ptr.dtype.element_ty), out[i]),)
            out = taken
            waiting = tl.where(at == now, 0, waiting)
    for i in tl.static_range(PARTS):
        _scatter(out[i], start, strides, size, first, begin + i * BLOCK_K, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)


@triton.jit(do_not_specialize=["clips", "tiles", "chunk"])
def weight_gradient(
    partial_ptr, base_ptr, table_ptr, clip, d_ptr, sums_ptr, used_ptr, stride_d, clips, tiles, chunk,
    WIDTH: tl.constexpr, dtype: tl.constexpr, OF_PIXELS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, STAGES: tl.constexpr, PATCH,
):  # fmt: skip
    """Of a chunk of tiles: the sum over their tokens of d^T patches, (BLOCK_N, BLOCK_K), in float32, and if there is a place for them, the
    sums of d, or with OF_PIXELS of the patches.
    """
    ELEMENTS: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3]
    BLOCKS_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (ELEMENTS + BLOCK_K - 1) // BLOCK_K
    precision: tl.constexpr = PRECISION if dtype == tl.float32 else None
    nth_k, nth_n = tl.program_id(0) % BLOCKS_K, tl.program_id(0) // BLOCKS_K % BLOCKS_N
    part = (tl.program_id(0) // (BLOCKS_K * BLOCKS_N)).to(tl.int64)
    n, k = nth_n * BLOCK_N + tl.arange(0, BLOCK_N), nth_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_K if OF_PIXELS else BLOCK_N], tl.float32)
    begin = part.to(tl.int32) * chunk
    for tile in tl.range(begin, tl.minimum(begin + chunk, tiles), num_stages=STAGES):
        start, strides, size, row, first = _find(tile, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M, PATCH)
        _rows, _columns, tokens = _grid(size, PATCH)
        there = first + tl.arange(0, BLOCK_M) < tokens
        rows = row + first + tl.arange(0, BLOCK_M)
        x = _gather(start, strides, size, first, nth_k * BLOCK_K, dtype, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
        if used_ptr is not None:
            there &= tl.load(used_ptr + rows, mask=there, other=0) != 0
            x = tl.where(there[None, :], x, 0.0)
        mask = there[:, None] & (n < WIDTH)[None, :]
        d = tl.load(d_ptr + rows[:, None] * (stride_d * UNIT) + n[None, :], mask=mask, other=0.0)
        acc = tl.dot(tl.trans(d.to(dtype)), tl.trans(x), acc, input_precision=precision)
        if sums_ptr is not None:
            sums += tl.sum(x.to(tl.float32), 1) if OF_PIXELS else tl.sum(d.to(tl.float32), 0)
    mask = (n < WIDTH)[:, None] & (k < ELEMENTS)[None, :]
    tl.store(partial_ptr + part * (WIDTH * ELEMENTS) + n[:, None] * ELEMENTS + k[None, :], acc, mask=mask)
    if sums_ptr is not None:
        if OF_PIXELS:
            tl.store(sums_ptr + part * ELEMENTS + k, sums, mask=(k < ELEMENTS) & (nth_n == 0))
        else:
            tl.store(sums_ptr + part * WIDTH + n, sums, mask=(n < WIDTH) & (nth_k == 0))


@triton.jit(do_not_specialize=["table_rows"])
def sum_rows(
    partial_ptr, d_ptr, order_ptr, starts_ptr, stride_d, table_rows,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of d over every SPLITS-th STEP of the tokens of a row, in their order, float32 (SPLITS, table_rows, WIDTH)."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    nth = tl.program_id(0) // BLOCKS
    row, split = nth % table_rows, nth // table_rows
    stop = tl.load(starts_ptr + row + 1)
    total = tl.zeros([STEP, BLOCK_N], tl.float32)
    for i in range(tl.load(starts_ptr + row) + split * STEP, stop, SPLITS * STEP):
        each = i + tl.arange(0, STEP)
        token = tl.load(order_ptr + each, mask=each < stop, other=0)
        mask = (each < stop)[:, None] & (n < WIDTH)[None, :]
        total += tl.load(d_ptr + token[:, None] * (stride_d * UNIT) + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + nth.to(tl.int64) * WIDTH + n, tl.sum(total, 0), mask=n < WIDTH)


def unavailable(weight: Tensor, *others) -> str | None:
    """Why the kernels cannot run with this weight and others, tensors whose channels are to be neighbours, or dtypes, or None."""
    for other in (weight, *others):
        dtype = other.dtype if isinstance(other, Tensor) else other
        if dtype is not None and dtype not in DTYPES:
            return f"it has no {dtype}"
        if isinstance(other, Tensor) and other.shape[-1] > 1 and other.stride(-1) != 1:
            return f"the channels of a tensor {tuple(other.shape)} are {other.stride(-1)} numbers apart, not one"
    return None


def unavailable_norm(tokens: Tensor, norm) -> str | None:
    """Why it cannot compute this norm, or its gradients."""
    if norm is None:
        return None
    tensors = {name: getattr(norm, name) for name in ("shift", "scale", "weight", "bias")}
    return norms.unavailable(tokens, False, **tensors)


class Clips(NamedTuple):
    """Clips as the kernels take them. tiles: of their tokens; constants: as above."""

    base: Tensor
    table: Tensor | None
    clip: tuple[int, ...]
    count: int
    tiles: int
    constants: dict


def place(op: str, clips: Sequence[Tensor], starts: Sequence[int], patch: Sequence[int], block_m: int = BLOCK_M) -> Clips:
    """Clips (channels, T, H, W), whose tokens start at these rows. A table of them, if there is to be one, is written on the device."""
    first = clips[0]
    each = [triton.cdiv(math.prod(grid_of(clip, patch)), block_m) for clip in clips]
    spaced = [clip.data_ptr() - first.data_ptr() for clip in clips]
    step, spacing = (starts[1] - starts[0], spaced[1]) if len(clips) > 1 else (0, 0)
    numbers = [(*clip.stride(), *clip.shape[1:], start) for clip, start in zip(clips, starts, strict=True)]
    even = spacing % first.element_size() == 0 and all(
        clip.shape == first.shape and clip.stride() == first.stride() and start == starts[0] + i * step and at == i * spacing
        for i, (clip, start, at) in enumerate(zip(clips, starts, spaced, strict=True))
    )
    table = None
    if not even:
        table = torch.empty(10, len(clips), dtype=torch.int64, device=first.device)
        columns = zip((clip.data_ptr() for clip in clips), numbers, accumulate(each, initial=0), strict=False)
        flat = [_argument(number) for address, rest, tile in columns for number in (address, *rest, tile)]
        flat += [_argument(0)] * (-len(flat) % (10 * AT_ONCE))
        for i in range(0, len(clips), AT_ONCE):
            launch(op, describe_clips, 1, table, tuple(flat[10 * i : 10 * (i + AT_ONCE)]), i, len(clips), COUNT=AT_ONCE, num_warps=1)
    clip = tuple(map(_argument, (spacing // first.element_size(), *numbers[0], step)))
    constants = {
        "BLOCK_M": block_m,
        "PATCH": (first.shape[0], *patch),
        "JOINED": patch[2] if patch[2] in (2, 4, 8) else 1,
        "VECTOR": _vector(clips, patch),
        "TAIL": any(side % p for clip in clips for side, p in zip(clip.shape[1:], patch, strict=True)),
    }
    return Clips(first, table, clip, len(clips), sum(each), constants)


def _vector(clips: Sequence[Tensor], patch: Sequence[int]) -> tuple[int, int]:
    """How many neighbours in channels, and in w, are aligned, to 16 bytes at most, and there together in every patch."""
    size = clips[0].element_size()
    along = across = 16 // size
    for clip in clips:
        strides = [stride if side > 1 else 0 for stride, side in zip(clip.stride(), clip.shape, strict=True)]
        aligned = clip.data_ptr() // size
        along = math.gcd(along, aligned, *strides[:3], clip.shape[3]) if clip.stride(3) == 1 else 1
        across = math.gcd(across, aligned, *strides[1:], clip.shape[0]) if clip.stride(0) == 1 else 1
        if patch[2] not in (1, 2, 4, 8) or along < patch[2]:
            along = 1
        if math.prod(patch) > 1:
            across = 1
    return (1, along) if along >= across else (across, 1)


def one_after_the_other(clips: Sequence[Tensor], patch: Sequence[int]) -> list[int]:
    """Where their tokens start in a pack of them alone."""
    return list(accumulate((math.prod(grid_of(clip, patch)) for clip in clips[:-1]), initial=0))


def as_clip(tokens: Tensor) -> Tensor:
    """Tokens (tokens, channels) as a clip of one row of pixels, whose patches of one they are."""
    return tokens.T[:, None, None, :]


def _unit(*tensors: Tensor | None) -> int:
    """8 if all strides of rows are multiples of it, else 1: the compiler would look for multiples of 16."""
    return 8 if all(x is None or x.stride(0) % 8 == 0 for x in tensors) else 1


def _strides(unit: int, *tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) // unit for x in tensors]


def _bytes(marks: Tensor | None) -> Tensor | None:
    """Of bool, as kernels read it."""
    return None if marks is None else marks.contiguous().view(torch.uint8)


def _power(n: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(n)))


class Source(NamedTuple):
    """What tokens come from, or go to: clips, or tokens; where the clips start among the tokens; and which tokens are used, on the device,
    None for all that are in a clip.
    """

    clips: Sequence[Tensor]
    starts: Sequence[int]
    patch: Sequence[int]
    used: Tensor | None = None

    @classmethod
    def of(cls, sources: Sequence[Tensor], patch: Sequence[int] | None, layout: VideoLayout | None = None) -> "Source":
        """patch: None, or empty, for tokens."""
        if not patch:
            used = None if without_gaps(layout) else layout.table("video rows", video_rows)
            return cls([as_clip(sources[0])], [0], (1, 1, 1), used)
        if layout is not None:
            return cls(sources, [clip.video_start for clip in layout.clips], patch)
        return cls(sources, one_after_the_other(sources, patch), patch)

    @property
    def elements(self) -> int:
        """Of a patch."""
        return self.clips[0].shape[0] * math.prod(self.patch)


def embed(
    op: str,
    source: Source,
    weight: Tensor,
    tokens: int,
    dtype: torch.dtype,
    *,
    across: bool = False,
    bias: Tensor | None = None,
    positions: Sequence[Tensor] = (),
    places: Tensor | None = None,
    known: Tensor | None = None,
    known_weight: Tensor | None = None,
) -> Tensor:
    """patch_embed, weight (dim, elements), or with `across` (elements, dim); tokens of no clip are zeros."""
    width = weight.shape[1 if across else 0]
    out = weight.new_empty(tokens, width, dtype=dtype)
    wide = not positions and weight.dtype.itemsize == 2 and source.elements <= 128
    clips = place(op, source.clips, source.starts, source.patch, 2 * BLOCK_M if wide else BLOCK_M)
    _zero_gaps(out, source)
    tables = [*positions, None, None, None][:3]
    unit, most = _unit(weight, *tables), (128, 64) if wide else (64, 64) if weight.dtype.itemsize == 2 else (32, 32)
    block_n = _power(width, 16, most[0])
    blocks = triton.cdiv(width, block_n)
    group = max(1, min(blocks, LARGEST_GROUP, (2 if wide else 1) * clips.tiles * blocks // PROGRAMS))
    groups = triton.cdiv(blocks, group)
    launch(
        op, clips_to_tokens, clips.tiles * groups, out, clips.base, clips.table, clips.clip, weight, bias, *tables, places,
        _bytes(known), known_weight, _bytes(source.used),
        *_strides(unit, weight, *tables), *(0 if table is None else table.shape[0] for table in tables), clips.count, groups, group,
        WIDTH=width, ACROSS=across, UNIT=unit, BLOCK_N=block_n, BLOCK_K=_power(source.elements, 16, most[1]),
        STAGES=1 if wide else 2, num_warps=8 if wide and _before_hopper() else 4, **clips.constants,
    )  # fmt: skip
    return out


def _before_hopper() -> bool:
    """Whether the products are those of single warps, which would spill the sums of wide tiles."""
    return 0 < _compute_capability() < 90


def _compute_capability() -> int:
    """Ten times that of an NVIDIA GPU, else 0."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def _zero_gaps(out: Tensor, source: Source) -> None:
    """Between clips, and past the last."""
    end = 0
    for clip, start in zip(source.clips, source.starts, strict=True):
        if start > end:
            out[end:start].zero_()
        end = start + math.prod(grid_of(clip, source.patch))
    if end < len(out):
        out[end:].zero_()


def scatter(
    op: str,
    x: Tensor,
    weight: Tensor,
    target: Source,
    *,
    across: bool = False,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str | None = None,
    eps: float = 0.0,
) -> None:
    """Writes the projection of tokens, after their norm if there is a kind of it, to the target's clips. weight: (elements, dim), or with
    `across` (dim, elements).
    """
    block_k, width = _power(target.elements, 16, 64), x.shape[1]
    half = weight.dtype.itemsize == 2
    fold = kind is not None and half and x.dtype == weight.dtype
    parts = min(triton.cdiv(target.elements, block_k), 4 if half and not (fold and _before_hopper()) else 1)
    groups, small = triton.cdiv(target.elements, parts * block_k), half and parts < 3
    sums, stride_row = None, 0
    if fold:
        tables = 1 if shift is None and scale is None else len(shift if scale is None else scale)
        sums = x.new_empty(tables, target.elements, 2, dtype=torch.float32)
        changed = scale is not None or norm_weight is not None
        folded = x.new_empty(tables, target.elements, width) if changed and tables * target.elements * FOLDED <= len(x) else None
        _fold(op, folded, sums, weight, bias, shift, scale, norm_weight, norm_bias)
        bias = shift = norm_bias = None
        if folded is not None:
            weight, stride_row, scale, norm_weight = folded[0], folded.stride(0), None, None
    large = fold and parts == 1
    two_at_once = {"maxnreg": 128} if large and _compute_capability() == 90 else {}  # programs of a multiprocessor
    clips = place(op, target.clips, target.starts, target.patch, 2 * BLOCK_M if large else BLOCK_M)
    unit = _unit(x, weight, shift, scale)
    launch(
        op, tokens_to_clips, clips.tiles * groups, clips.base, x, clips.table, clips.clip, weight, bias, shift, scale,
        None if rows is None else rows.contiguous(), norm_weight, norm_bias, _bytes(target.used), sums,
        *_strides(unit, x, weight), stride_row // unit, *_strides(unit, shift, scale), eps, clips.count, groups,
        WIDTH=width, NORM=kind, ACROSS=across, UNIT=unit, BLOCK_D=_power(width, 16, 64 if half else 32), BLOCK_K=block_k,
        PARTS=parts, STAGES=4 if large else 3 if small and x.element_size() == 2 else 2, num_warps=4 if small and not large else 8,
        **two_at_once, **clips.constants,
    )  # fmt: skip


def _fold(op: str, folded: Tensor | None, sums: Tensor, weight: Tensor, bias, shift, scale, norm_weight, norm_bias) -> None:
    """What a norm does to a weight (elements, width): folded (table rows, elements, width), if it is wanted, and the sums."""
    unit, block = _unit(weight, shift, scale), triton.next_power_of_2(weight.shape[1])
    launch(
        op, fold_norm, sums.shape[0] * sums.shape[1], sums, folded, weight, bias, shift, scale, norm_weight, norm_bias,
        *_strides(unit, weight, shift, scale), sums.shape[1], WIDTH=weight.shape[1], UNIT=unit, BLOCK=block,
        num_warps=min(8, max(1, block // (8 * norms.lanes()))),
    )  # fmt: skip


def gradient_of_weight(
    op: str, d: Tensor, source: Source, dtype: torch.dtype, of_pixels: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """d^T patches, float32 (dim, elements), of products in dtype; and the sums over the tokens of d, or with `of_pixels` of the patches, or
    with None nothing.
    """
    clips, (width, elements) = place(op, source.clips, source.starts, source.patch), (d.shape[1], source.elements)
    block_n, block_k = _power(width, 16, 128 if dtype.itemsize == 2 else 32), _power(elements, 16, 64)
    blocks = triton.cdiv(width, block_n) * triton.cdiv(elements, block_k)
    chunk = max(SUMMED, triton.cdiv(clips.tiles, min(max(2 * PROGRAMS // blocks, CHUNKS[0]), CHUNKS[1])))
    chunks = triton.cdiv(clips.tiles, chunk)
    partial = d.new_empty(chunks, width, elements, dtype=torch.float32)
    sums = None if of_pixels is None else d.new_empty(chunks, elements if of_pixels else width, dtype=torch.float32)
    unit = _unit(d)
    launch(
        op, weight_gradient, chunks * blocks, partial, clips.base, clips.table, clips.clip, d, sums, _bytes(source.used),
        *_strides(unit, d), clips.count, clips.tiles, chunk, WIDTH=width, dtype=TYPES[dtype], OF_PIXELS=bool(of_pixels), UNIT=unit,
        BLOCK_N=block_n, BLOCK_K=block_k, STAGES=2, num_warps=4, **clips.constants,
    )  # fmt: skip
    return partial.sum(0), None if sums is None else sums.sum(0)


def gradient_of_table(op: str, d: Tensor, index: Tensor, table_rows: int) -> Tensor:
    """The sum of d over the tokens of each row, float32 (table_rows, dim); tokens of an index of table_rows have none."""
    index, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(index, torch.arange(table_rows + 1, dtype=index.dtype, device=index.device))
    partial, unit = d.new_empty(SPLITS, table_rows, d.shape[1], dtype=torch.float32), _unit(d)
    block = _power(d.shape[1], 16, 256)
    launch(
        op, sum_rows, SPLITS * table_rows * triton.cdiv(d.shape[1], block), partial, d, order, starts, *_strides(unit, d), table_rows,
        WIDTH=d.shape[1], UNIT=unit, SPLITS=SPLITS, STEP=8, BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)
