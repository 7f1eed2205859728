"""Tokens to clips in Triton: a norm, a product, and patches put where they belong. It is unpatchify and final_layer, and the gradient of
what `clips_to_tokens` reads; each pixel is in one patch, so no sum meets another. Every number depends on its own token alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.block import PRECISION
from ..launch import cdiv, lanes, launch
from ..norms import fused as norms
from .clips import (
    BLOCK_M,
    Source,
    as_bytes,
    before_hopper,
    compute_capability,
    find,
    grid_of_tokens,
    place,
    power,
    put,
    strides_of,
    unit_of,
    weights,
)

FOLDED = 2
"""A norm is folded into a weight ahead, for each row of the tables, if these together are no more than the tokens over so many."""


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
            w = weights(weight_ptr, stride_weight, k, d, k < ELEMENTS, there_d, ACROSS)
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
    factor = factor_of(scale_ptr + row * (stride_scale * UNIT) if scale_ptr is not None else None, None, d, there)
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
def factor_of(scale_ptr, norm_weight_ptr, d, there):
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
    """The tokens' means and inverse deviations, and the same with a bias, of tokens that share a row of the tables, the norm being done to
    the weight instead:

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
            w = weights(weight_ptr + row * stride_row, stride_weight, k, d, k < ELEMENTS, there_d, False)
            if scale_ptr is not None or norm_weight_ptr is not None:
                scale = scale_ptr + row * stride_scale if scale_ptr is not None else None
                w = (w.to(tl.float32) * factor_of(scale, norm_weight_ptr, d, there_d)[None, :]).to(w.dtype)
            sums += (tl.dot(w, tl.trans(x), acc[i]),)
        acc = sums
    mean, square = tl.sum(total, 1) / WIDTH, tl.sum(square, 1) / WIDTH
    rstd = tl.rsqrt(tl.where(there, tl.maximum(square - mean * mean, 0.0) + eps, 1.0))  # finite in rows that are not there
    mean += near
    projected = (mean, rstd)
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
    sums_ptr, statistics_ptr, stride_x, stride_weight, stride_row, stride_shift, stride_scale, eps, clips, groups,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, STAGES: tl.constexpr, PATCH,
):  # fmt: skip
    """A tile of tokens, WIDTH wide, and of what it is projected to PARTS blocks of BLOCK_K. NORM: None, "layer" or "rms"; if there are the
    sums of `fold_norm`, it is done to the weight, and the statistics of the tokens are written down.
    """
    start, strides, size, row, first = find(tl.program_id(0) // groups, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M, PATCH)
    _rows, _columns, tokens = grid_of_tokens(size, PATCH)
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
            if begin == 0:
                tl.store(statistics_ptr + 2 * rows, projected[0], mask=there & (at == now))
                tl.store(statistics_ptr + 2 * rows + 1, projected[1], mask=there & (at == now))
            taken = ()
            for i in tl.static_range(PARTS):
                taken += (tl.where((at == now)[None, :], projected[2 + i].to(base_ptr.dtype.element_ty), out[i]),)
            out = taken
            waiting = tl.where(at == now, 0, waiting)
    for i in tl.static_range(PARTS):
        put(out[i], start, strides, size, first, begin + i * BLOCK_K, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)


def unavailable_norm(tokens: Tensor, norm) -> str | None:
    """Why it cannot compute this norm, or its gradients."""
    if norm is None:
        return None
    tensors = {name: getattr(norm, name) for name in ("shift", "scale", "weight", "bias")}
    return norms.unavailable(tokens, False, **tensors)


class Folded(NamedTuple):
    """A norm done to a weight (elements, width): that of each row of the tables, stride_row apart, or with the scale or the norm's weight,
    which it is to be multiplied with; and of each row and element its sum and what is added, float32 (table rows, elements, 2).
    """

    weight: Tensor
    stride_row: int
    scale: Tensor | None
    norm_weight: Tensor | None
    sums: Tensor

    @classmethod
    def of(cls, op: str, tokens: int, weight: Tensor, bias, shift, scale, norm_weight, norm_bias) -> "Folded":
        """tokens: that it is for."""
        (elements, width), rows = weight.shape, table_rows(shift, scale)
        sums = weight.new_empty(rows, elements, 2, dtype=torch.float32)
        changed = scale is not None or norm_weight is not None
        folded = weight.new_empty(rows, elements, width) if changed and rows * elements * FOLDED <= tokens else None
        unit, block = unit_of(weight, shift, scale), triton.next_power_of_2(width)
        launch(
            op, fold_norm, rows * elements, sums, folded, weight, bias, shift, scale, norm_weight, norm_bias,
            *strides_of(unit, weight, shift, scale), elements, WIDTH=width, UNIT=unit, BLOCK=block,
            num_warps=min(8, max(1, block // (8 * lanes()))),
        )  # fmt: skip
        return cls(weight, 0, scale, norm_weight, sums) if folded is None else cls(folded[0], folded.stride(0), None, None, sums)


def table_rows(shift: Tensor | None, scale: Tensor | None) -> int:
    """Of a modulation; one without tables."""
    return next((len(each) for each in (scale, shift) if each is not None), 1)


def folds(x: Tensor, weight: Tensor, kind: str | None) -> bool:
    """Whether a norm of this kind is done to the weight: of tokens that the product takes as they are."""
    return kind is not None and weight.dtype.itemsize == 2 and x.dtype == weight.dtype


def project_tokens(
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
) -> Tensor | None:
    """Writes the projection of tokens, after their norm if there is a kind of it, to the target's clips. weight: (elements, dim), or with
    `across` (dim, elements). Returns the tokens' means and inverse deviations, float32 (tokens, 2), where the norm `folds`.
    """
    block_k, width = power(target.elements, 16, 64), x.shape[1]
    half, fold = weight.dtype.itemsize == 2, folds(x, weight, kind)
    parts = min(cdiv(target.elements, block_k), 4 if half and not (fold and before_hopper()) else 1)
    groups, small = cdiv(target.elements, parts * block_k), half and parts < 3
    sums = statistics = None
    stride_row = 0
    if fold:
        weight, stride_row, scale, norm_weight, sums = Folded.of(op, len(x), weight, bias, shift, scale, norm_weight, norm_bias)
        bias = shift = norm_bias = None
        statistics = x.new_empty(len(x), 2, dtype=torch.float32)
    large = fold and parts == 1
    two_at_once = {"maxnreg": 128} if large and compute_capability() == 90 else {}  # programs of a multiprocessor
    clips = place(op, target.clips, target.starts, target.patch, 2 * BLOCK_M if large else BLOCK_M)
    unit = unit_of(x, weight, shift, scale)
    launch(
        op, tokens_to_clips, clips.tiles * groups, clips.base, x, clips.table, clips.clip, weight, bias, shift, scale,
        None if rows is None else rows.contiguous(), norm_weight, norm_bias, as_bytes(target.used), sums, statistics,
        *strides_of(unit, x, weight), stride_row // unit, *strides_of(unit, shift, scale), eps, clips.count, groups,
        WIDTH=width, NORM=kind, ACROSS=across, UNIT=unit, BLOCK_D=power(width, 16, 64 if half else 32), BLOCK_K=block_k,
        PARTS=parts, STAGES=4 if large else 3 if small and x.element_size() == 2 else 2, num_warps=4 if small and not large else 8,
        **two_at_once, **clips.constants,
    )  # fmt: skip
    return statistics
