"""The product of E4M3 rows with an E4M3 weight in Triton, for GPUs or shapes that the library's product does not serve.

A program computes a tile of the result. Programs go through groups of eight tiles of tokens, so that those that run at once share their
rows of x and of the weight in L2. Both operands lie along the channels that are summed over, as the tensor cores of FP8 want them, and are
read with asynchronous copies ahead of the products. Tile sizes do not depend on the number of tokens: a token's sums are the same bits in
any pack.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import NO_GLUON, as_operator, select
from ..launch import cdiv, launch
from .fused import without_e4m3

GROUP = 8
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["tokens"])
def linear_forward(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, out_ptr, tokens, stride_x, stride_weight,
    IN: tl.constexpr, OUT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out = (x8 weight8^T) x_scale weight_scale + bias."""
    across: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    down = tl.cdiv(tokens, BLOCK_M)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    group = tl.minimum(down - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    m = (first + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the last are the last again, and are not stored.
    x_ptr += tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * stride_x
    weight_ptr += tl.minimum(n, OUT - 1).to(tl.int64)[None, :] * stride_weight
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if IN % BLOCK_K == 0:
            x, weight = tl.load(x_ptr + k[None, :]), tl.load(weight_ptr + k[:, None])
        else:
            x = tl.load(x_ptr + k[None, :], mask=(k < IN)[None, :], other=0.0)
            weight = tl.load(weight_ptr + k[:, None], mask=(k < IN)[:, None], other=0.0)
        # Hopper sums products of FP8 with 14 bits: those of a step, which are then added in float32.
        acc = tl.dot(x, weight, acc, max_num_imprecise_acc=BLOCK_K)
    acc *= tl.load(x_scale_ptr + m, mask=m < tokens, other=0.0)[:, None]
    acc *= tl.load(weight_scale_ptr + n, mask=n < OUT, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * OUT + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (n < OUT)[None, :])


def unavailable(x8: torch.Tensor, weight8: torch.Tensor, out_dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run on these where torch can, if it cannot."""
    for name, tensor in (("x", x8), ("weight8", weight8)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            return f"the channels of {name} are {tensor.stride(1)} numbers apart, not one"
    if out_dtype not in OUT_DTYPES:
        return f"out_dtype is {out_dtype}"
    return without_e4m3(x8.device)


def config(channels: int) -> dict:
    """Of a product over so many channels: small tiles where rows do not begin at multiples of 16 bytes, which is for completeness."""
    if channels % 16:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}


def linear_fused(x8, x_scale, weight8, weight_scale, bias, out_dtype):
    tokens, out = x8.shape[0], x8.new_empty(x8.shape[0], weight8.shape[0], dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    how = config(x8.shape[1])
    programs = cdiv(tokens, how["BLOCK_M"]) * cdiv(weight8.shape[0], how["BLOCK_N"])
    launch(
        "fp8_linear", linear_forward, programs, x8, x_scale.contiguous(), weight8, weight_scale.contiguous(), bias, out, tokens,
        x8.stride(0), weight8.stride(0), IN=x8.shape[1], OUT=weight8.shape[0], GROUP=GROUP, **how,
    )  # fmt: skip
    return out


@as_operator("tubelet::fp8_linear")
def fp8_linear(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    implementation: str,
) -> torch.Tensor:
    run = select("fp8_linear", implementation, {"triton": linear_fused}, {"gluon": NO_GLUON})
    return run(x8, x_scale, weight8, weight_scale, bias, out_dtype)


@fp8_linear.register_fake
def _(x8, x_scale, weight8, weight_scale, bias, out_dtype, implementation):
    return x8.new_empty(x8.shape[0], weight8.shape[0], dtype=out_dtype)


@register_flop_formula(torch.ops.tubelet.fp8_linear)
def _flops(x_shape, x_scale_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]
