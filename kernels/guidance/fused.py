"""One solver step with guidance in Triton: the kernel, how it is launched, and the operator of torch.library that calls it.

A program is a tile of tokens and channels. The coefficients and scales are read from memory, each token's own, so that a CUDA graph that
was captured once serves every step: the caller writes the next row into the table. A scale that is a number is an argument like the sizes,
none of which a kernel is compiled for; the operator takes it as a tensor on the CPU, since a graph of torch.compile is compiled for each
number that an operator is given.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import NO_GLUON, as_operator, select
from ..launch import cdiv, launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _load(ptr, token, stride, c, mask, UNIT: tl.constexpr):
    return tl.load(ptr + token[:, None] * (stride * UNIT) + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "guidance", "tokens", "stride_x", "stride_cond", "stride_uncond", "stride_prev", "stride_row", "stride_number", "stride_scale",
    ]
)  # fmt: skip
def guided_step_forward(
    x_ptr, cond_ptr, uncond_ptr, prev_ptr, table_ptr, scales_ptr, rows_ptr, known_ptr, next_ptr, x0_ptr, guidance, tokens,
    stride_x, stride_cond, stride_uncond, stride_prev, stride_row, stride_number, stride_scale,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, BLOCK channels; scales_ptr is None where the scale is `guidance`, stride_row 0 where the table has one row."""
    parts: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // parts).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    mask = there[:, None] & (c < CHANNELS)[None, :]
    row = token * 0 if rows_ptr is None else tl.load(rows_ptr + token, mask=there, other=0).to(tl.int64)
    table_ptr += row * stride_row
    # All is read before anything is written: the compiler moves no read up past a write.
    p = tl.load(table_ptr, mask=there, other=0.0)[:, None]
    q = tl.load(table_ptr + stride_number, mask=there, other=0.0)[:, None]
    a = tl.load(table_ptr + 2 * stride_number, mask=there, other=0.0)[:, None]
    b = tl.load(table_ptr + 3 * stride_number, mask=there, other=0.0)[:, None]
    x = _load(x_ptr, token, stride_x, c, mask, UNIT)
    o = _load(cond_ptr, token, stride_cond, c, mask, UNIT)
    if uncond_ptr is not None:
        uncond = _load(uncond_ptr, token, stride_uncond, c, mask, UNIT)
        g = guidance if scales_ptr is None else tl.load(scales_ptr + row * stride_scale, mask=there, other=0.0)[:, None]
        # From the nearer end, as `torch.lerp`: a scale of one gives cond, bit for bit.
        difference = o - uncond
        near = tl.abs(g) < 0.5
        o = tl.fma(tl.where(near, g, g - 1.0), difference, tl.where(near, uncond, o))
    x0 = tl.fma(q, o, p * x)
    x_next = tl.fma(b, x0, a * x)
    if prev_ptr is not None:
        weight = tl.load(table_ptr + 4 * stride_number, mask=there, other=0.0)[:, None]
        x_next = tl.fma(weight, _load(prev_ptr, token, stride_prev, c, mask, UNIT), x_next)
    if known_ptr is not None:
        known = (tl.load(known_ptr + token, mask=there, other=0) != 0)[:, None]
        x0, x_next = tl.where(known, x, x0), tl.where(known, x, x_next)
    at = token[:, None] * CHANNELS + c[None, :]
    tl.store(next_ptr + at, x_next.to(next_ptr.dtype.element_ty), mask=mask)
    tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), mask=mask)


def unavailable(tables: list[torch.Tensor], out_dtype: torch.dtype, **tokens: torch.Tensor | None) -> str | None:
    """Why the kernel cannot run on these where torch can, if it cannot; those with a row for each token by their names."""
    given = {name: tensor for name, tensor in tokens.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}"
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            return f"the channels of {name} are {tensor.stride(1)} numbers apart, not one"
    if out_dtype not in DTYPES:
        return f"out_dtype is {out_dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given.values(), *tables)):
        return "a gradient is required, which the kernel does not give"
    return None


def tile(channels: int) -> dict:
    """2048 numbers, of at most 256 channels at once, in narrower parts where these leave less to fill up."""
    block = min(256, max(8, triton.next_power_of_2(channels)))
    while block > 32 and cdiv(channels, block) * block > 1.125 * channels:
        block //= 2
    return {"BLOCK": block, "TOKENS": 2048 // block, "num_warps": 4}


def guided_step_fused(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype):
    """(x_next, x0); guidance is a table, or a number as a tensor without axes, on the CPU."""
    scales, guidance = (None, guidance.item()) if guidance is not None and not guidance.dim() else (guidance, 0.0)
    tokens, channels = x.shape
    x_next, x0 = (x.new_empty(x.shape, dtype=out_dtype) for _ in range(2))
    rows, known = (None if each is None else each.contiguous() for each in (rows, known))
    strides = [0 if each is None else each.stride(0) for each in (x, cond, uncond, x0_prev)]
    unit, how = 8 if all(stride % 8 == 0 for stride in strides) else 1, tile(channels)
    launch(
        "guided_step", guided_step_forward, cdiv(tokens, how["TOKENS"]) * cdiv(channels, how["BLOCK"]),
        x, cond, uncond, x0_prev, coefficients, scales, rows, known, x_next, x0, guidance, tokens, *(stride // unit for stride in strides),
        coefficients.stride(0) if coefficients.dim() == 2 else 0, coefficients.stride(-1), 0 if scales is None else scales.stride(0),
        CHANNELS=channels, UNIT=unit, **how,
    )  # fmt: skip
    return x_next, x0


@as_operator("tubelet::guided_step")
def guided_step(
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    x0_prev: torch.Tensor | None,
    coefficients: torch.Tensor,
    guidance: torch.Tensor | None,
    rows: torch.Tensor | None,
    known: torch.Tensor | None,
    out_dtype: torch.dtype,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = select("guided_step", implementation, {"triton": guided_step_fused}, {"gluon": NO_GLUON})
    return run(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype)


@guided_step.register_fake
def _(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype, implementation):
    return tuple(x.new_empty(x.shape, dtype=out_dtype) for _ in range(2))
