"""Clips to tokens in Triton: patches are gathered while they are multiplied. It is patch_embed, and the gradient of what `tokens_to_clips`
reads. Every number depends on its own token alone.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.block import PRECISION
from ..launch import cdiv, launch
from .clips import BLOCK_M, Source, as_bytes, before_hopper, find, gather, grid_of_tokens, place, power, strides_of, unit_of, weights
from .reference import grid_of

HELD = tl.constexpr(4)
"""Of so many blocks of patch elements, `clips_to_tokens` gathers a tile once for all that it multiplies them with."""
PROGRAMS = 512
"""About so many a launch has if it can, for any GPU to be busy; of wide tiles half as many."""
LARGEST_GROUP = 12
"""Blocks that a program makes of a tile at most."""


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
    start, strides, size, row, first = find(tile, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M, PATCH)
    _rows, _columns, tokens = grid_of_tokens(size, PATCH)
    there = first + tl.arange(0, BLOCK_M) < tokens
    rows = row + first + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    precision: tl.constexpr = PRECISION if dtype == tl.float32 else None
    ELEMENTS: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3]
    PARTS: tl.constexpr = (ELEMENTS + BLOCK_K - 1) // BLOCK_K
    parts = ()
    if PARTS <= HELD:
        for i in tl.static_range(PARTS):
            parts += (gather(start, strides, size, first, i * BLOCK_K, dtype, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH),)
    begin = tl.program_id(0) % groups * group
    for block in tl.range(begin, tl.minimum(begin + group, tl.cdiv(WIDTH, BLOCK_N)), num_stages=STAGES):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there_n = n < WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PARTS <= HELD:
            for i in tl.static_range(PARTS):
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                w = weights(weight_ptr, stride_weight * UNIT, n, k, there_n, k < ELEMENTS, ACROSS)
                acc = tl.dot(tl.trans(parts[i]), tl.trans(w), acc, input_precision=precision)
        else:
            for step in range(0, ELEMENTS, BLOCK_K):
                k = step + tl.arange(0, BLOCK_K)
                w = weights(weight_ptr, stride_weight * UNIT, n, k, there_n, k < ELEMENTS, ACROSS)
                x = gather(start, strides, size, first, step, dtype, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
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
    unit, most = unit_of(weight, *tables), (128, 64) if wide else (64, 64) if weight.dtype.itemsize == 2 else (32, 32)
    block_n = power(width, 16, most[0])
    blocks = cdiv(width, block_n)
    group = max(1, min(blocks, LARGEST_GROUP, (2 if wide else 1) * clips.tiles * blocks // PROGRAMS))
    groups = cdiv(blocks, group)
    launch(
        op, clips_to_tokens, clips.tiles * groups, out, clips.base, clips.table, clips.clip, weight, bias, *tables, places,
        as_bytes(known), known_weight, as_bytes(source.used),
        *strides_of(unit, weight, *tables), *(0 if table is None else table.shape[0] for table in tables), clips.count, groups, group,
        WIDTH=width, ACROSS=across, UNIT=unit, BLOCK_N=block_n, BLOCK_K=power(source.elements, 16, most[1]),
        STAGES=1 if wide else 2, num_warps=8 if wide and before_hopper() else 4, **clips.constants,
    )  # fmt: skip
    return out


def _zero_gaps(out: Tensor, source: Source) -> None:
    """Between clips, and past the last."""
    end = 0
    for clip, start in zip(source.clips, source.starts, strict=True):
        if start > end:
            out[end:start].zero_()
        end = start + math.prod(grid_of(clip, source.patch))
    if end < len(out):
        out[end:].zero_()
