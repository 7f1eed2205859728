"""Quantisation of rows to E4M3 in Triton: device functions for kernels that quantise what they computed, and the kernel for rows in memory.

A program holds whole rows in registers: the channels in PARTS parts of PART, a power of two, so that 3072 channels are 3 parts of 1024.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..dispatch import INTERPRETED, NO_GLUON, as_operator, select
from ..launch import cdiv, lanes, launch
from .reference import FP8, LARGEST

LARGEST_CHANNELS = 16384
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_WITH_FP8 = (8, 9)
"""Ada."""
E4M3_LARGEST = tl.constexpr(LARGEST)
FUSES = tl.constexpr(not INTERPRETED)
"""Whether `tl.fma` rounds once: Triton's interpreter rounds its product too."""


@triton.jit
def magnitudes(x):
    """The bits of |x|, float32. As integers they are in the order of the numbers, and NaN is above all: a maximum of them loses none."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """The float32 scale of rows whose largest `magnitudes` are these: one for zeros, not finite for an infinity or NaN."""
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, E4M3_LARGEST, tl.float32))
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quantize(x, scale):
    """x over its scale, which broadcasts, as E4M3; the conversion saturates."""
    if FUSES:
        # What `tl.div_rn` gives, in six operations and no branch, as a row shares its divisor: of a quotient by the divisor's correctly
        # rounded inverse, the second correction is rounded correctly (Markstein 1990). Small rows are enlarged, so that no remainder
        # underflows. The minus is where a zero keeps its sign.
        lift = tl.where(scale < 8.673617379884035e-19, 1.2089258196146292e24, 1.0)  # 2^-60, 2^80
        divisor = scale * lift
        minus_inverse = tl.div_rn(tl.full(divisor.shape, -1.0, tl.float32), divisor)
        divisor = tl.where(divisor == float("inf"), 0.0, divisor)  # over infinity numbers are zero, not NaN
        minus_x = x * -lift
        quotient = minus_x * minus_inverse
        quotient = tl.fma(tl.fma(quotient, divisor, minus_x), minus_inverse, quotient)
        quotient = tl.fma(tl.fma(quotient, divisor, minus_x), minus_inverse, quotient)
    else:
        quotient = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return quotient.to(tl.float8e4nv)


@triton.jit
def quantize_tile(x):
    """Rows (rows, channels), float32, as E4M3 and their scales (rows,): bit for bit what `quantize_rows` makes of them in float32.

    Zeros in lanes that are no channels, or no rows, change nothing.
    """
    scale = scale_of(tl.max(magnitudes(x), 1, keep_dims=True))
    return quantize(x, scale), tl.reshape(scale, [x.shape[0]])


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x times the normal distribution function of x; or times its approximation (1 + tanh u) / 2, as the sigmoid of 2 u."""
    tanh = x / (1.0 + tl.exp2(x * tl.fma(x * x, -0.10294324, -2.3022082))) if TANH else None  # -2 u log2(e)
    return tanh if TANH else 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit(do_not_specialize=["n1", "n2", "outer", "stride_0", "stride_1", "stride_2", "rows"])
def quantize_forward(
    x_ptr, x8_ptr, scale_ptr, n1, n2, outer, stride_0, stride_1, stride_2, rows,
    GELU: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, DIMS,
):  # fmt: skip
    """ROWS rows of x (n0, n1, n2, channels), of its GELU if that is "tanh" or "none", as E4M3; the scales as (n2, n0 n1 = outer)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    o, i2 = row // n2, (row % n2).to(tl.int64)
    i0, i1 = (o // n1).to(tl.int64), (o % n1).to(tl.int64)
    x_ptr += (i0 * stride_0 + i1 * stride_1 + i2 * stride_2) * UNIT
    parts = ()
    for i in tl.static_range(DIMS[2]):
        c = (tl.arange(0, DIMS[1]) + i * DIMS[1])[None, :]
        mask = there if DIMS[0] >= (i + 1) * DIMS[1] else there & (c < DIMS[0])
        parts += (tl.load(x_ptr + c, mask=mask, other=0.0).to(tl.float32),)
    if GELU is not None:
        raw, parts = parts, ()
        for i in tl.static_range(DIMS[2]):
            parts += (gelu(raw[i], GELU == "tanh"),)
    largest = magnitudes(parts[0])
    for i in tl.static_range(1, DIMS[2]):
        largest = tl.maximum(largest, magnitudes(parts[i]))
    scale = scale_of(tl.max(largest, 1, keep_dims=True))
    tl.store(scale_ptr + i2 * outer + o, scale, mask=there)
    x8_ptr += row.to(tl.int64) * DIMS[0]
    for i in tl.static_range(DIMS[2]):
        c = (tl.arange(0, DIMS[1]) + i * DIMS[1])[None, :]
        mask = there if DIMS[0] >= (i + 1) * DIMS[1] else there & (c < DIMS[0])
        tl.store(x8_ptr + c, quantize(parts[i], scale), mask=mask)


def unavailable(x: torch.Tensor) -> str | None:
    """Why the kernel cannot run on x where torch can, if it cannot."""
    if x.dim() == 0 or not 1 <= x.shape[-1] <= LARGEST_CHANNELS:
        return f"{x.shape[-1] if x.dim() else 'no'} channels are not from 1 to {LARGEST_CHANNELS}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return f"the channels of x are {x.stride(-1)} numbers apart, not one"
    if torch.is_grad_enabled() and x.requires_grad:
        return "x requires a gradient, which the kernel does not give"
    return without_e4m3(x.device)


def without_e4m3(device: torch.device) -> str | None:
    """Why a kernel cannot convert to E4M3 or multiply it there, if it cannot."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < FIRST_WITH_FP8):
        return "this GPU has no E4M3"
    return None


@cache
def tile(channels: int, lanes: int) -> dict:
    """How rows are split: into at most eight parts, narrow enough to leave little to fill up; for four warps, or as many as give a thread
    8 neighbours of each part; and as many rows as make four parts' worth of numbers.
    """
    num_warps = 4
    while 8 * num_warps * 8 * lanes < channels:
        num_warps *= 2
    whole = 8 * num_warps * lanes
    part = min(whole, max(16, triton.next_power_of_2(channels)))
    while part > 64 and cdiv(channels, part) * part > 1.125 * channels and 4 * part >= channels:
        part //= 2
    parts = cdiv(channels, part)
    return {"DIMS": (channels, part, parts), "ROWS": max(1, 4 * whole // (part * triton.next_power_of_2(parts))), "num_warps": num_warps}


def quantize_fused(op: str, x: torch.Tensor, gelu: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of x, or of its GELU, and their scales."""
    leading = _leading(x)
    if leading is None:  # more than two strides before the last axis but one
        x = x.contiguous()
        leading = _leading(x)
    (n0, stride_0), (n1, stride_1), (n2, stride_2) = leading
    x8, scale = _results(x)
    unit = 8 if all(stride % 8 == 0 for _, stride in leading) else 1
    how, rows = tile(x.shape[-1], lanes()), n0 * n1 * n2
    launch(
        op, quantize_forward, cdiv(rows, how["ROWS"]), x, x8, scale, n1, n2, n0 * n1,
        stride_0 // unit, stride_1 // unit, stride_2 // unit, rows, GELU=gelu, UNIT=unit, **how,
    )  # fmt: skip
    return x8, scale


def _leading(x: torch.Tensor) -> list[tuple[int, int]] | None:
    """Sizes and strides of the axes before the channels as three: the last as it is, those before it merged; None if that leaves more."""
    *before, last = [(1, 0), *zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    merged = []
    for size, stride in before:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        elif size != 1:
            merged.append((size, stride))
    return [*[(1, 0)] * (2 - len(merged)), *merged, last] if len(merged) <= 2 else None


def _results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    *before, last = x.shape[:-1] or (1,)
    scale = x.new_empty((last, *before), dtype=torch.float32).movedim(0, -1)
    return x.new_empty(x.shape, dtype=FP8), scale if x.dim() > 1 else scale[0]


@as_operator("tubelet::quantize_rows")
def quantize_rows(x: torch.Tensor, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    run = select("quantize_rows", implementation, {"triton": quantize_fused}, {"gluon": NO_GLUON})
    return run("quantize_rows", x, None)


@quantize_rows.register_fake
def _(x, implementation):
    return _results(x)


@as_operator("tubelet::gelu_quantize_rows")
def gelu_quantize_rows(x: torch.Tensor, approximate: str, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    run = select("gelu_quantize_rows", implementation, {"triton": quantize_fused}, {"gluon": NO_GLUON})
    return run("gelu_quantize_rows", x, approximate)


@gelu_quantize_rows.register_fake
def _(x, approximate, implementation):
    return _results(x)
