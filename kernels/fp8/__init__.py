"""E4M3: eight bits, of which three are mantissa, up to 448 (Micikevicius et al. 2022, FP8 formats for deep learning).

    quantize_rows:       x8_ij = round(x_ij / s_i),   s_i = max_j |x_ij| / 448,   x_ij ~ s_i x8_ij
    gelu_quantize_rows:  the same of GELU(x), between the two products of an MLP
    fp8_linear:          y_ij = s_i t_j sum_k x8_ik w8_jk + b_j

with a scale for each row: rounding errs by 2^-4 of an element at most, as long as it is not below 2^-15 of the largest of its row.

Rows are bound by memory: each is read, quantised and written in one pass, with the GELU in float32 and not rounded before. Op by op, a
GELU would be written in bfloat16, read for the scales, and read again. The product is bound by the tensor cores, at twice the rate of
bfloat16, and by memory for few tokens. Per element of x in bfloat16, and the floor at 3.35 TB/s of 32,760 tokens of 13,824 channels:

    op                    reads and writes    bytes   FLOPs    floor
    quantize_rows         x -> x8                 3       2   406 us
    gelu_quantize_rows    x -> x8                 3      20   406 us

fp8_linear: 2 tokens in out FLOPs, tokens in + in out + 2 tokens out bytes. With "torch" it is `torch._scaled_mm` on Hopper and Blackwell
where that has the shape (in and out multiples of 16; bfloat16), which "auto" takes there, else a product of the same numbers in float32;
with "triton" a kernel for the other GPUs with E4M3, sizes and dtypes. The library's sums have the 14 bits that Hopper's tensor cores keep,
the kernel's are float32 from 128 channels to the next.
"""

import torch

from ..dispatch import HAS_TRITON, choose, select, with_triton
from .reference import (
    FP8,
    LARGEST,
    OUT_OF_FP8,
    Scales,
    dequantize_rows,
    gelu_quantize_reference,
    gelu_quantize_torch,
    linear_reference,
    linear_scaled_mm,
    linear_torch,
    quantize_reference,
    quantize_torch,
    scaled_mm_serves,
)

if HAS_TRITON:
    from . import fused, linear

__all__ = ["FP8", "LARGEST", "OUT_OF_FP8", "Scales", "dequantize_rows", "fp8_linear", "gelu_quantize_rows", "quantize_rows"]


def quantize_rows(x: torch.Tensor, *, implementation: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., channels), float16, bfloat16, float32 or float64, as E4M3 and its float32 scales (...), one for each row.

    A row of zeros has a scale of one; one with an infinity or NaN comes back as NaN. Of q, k and v, (tokens, heads, head_dim), the scales
    (tokens, heads) lie in memory head by head, as `attention` reads them. Raises TypeError for another dtype.
    """
    _check_float("x", x)
    available = _implementations(x, "quantize_rows", {"torch": quantize_torch, "reference": quantize_reference})
    if choose("quantize_rows", implementation, *available) == "triton":
        return fused.quantize_rows(x, implementation)
    return select("quantize_rows", implementation, *available)(x)


def gelu_quantize_rows(x: torch.Tensor, approximate: str = "tanh", *, implementation: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of GELU(x), which is computed in float32 and not rounded in between; x (..., channels) likewise.

    approximate: "tanh" or "none", as of `torch.nn.functional.gelu`. Raises TypeError for another dtype, ValueError for another
    approximation and if a gradient of x is required, since there is none.
    """
    _check_float("x", x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: expected 'tanh' or 'none', got {approximate!r}")
    _check_no_gradient("gelu_quantize_rows", x=x)
    available = _implementations(x, "gelu_quantize_rows", {"torch": gelu_quantize_torch, "reference": gelu_quantize_reference})
    if choose("gelu_quantize_rows", implementation, *available) == "triton":
        return fused.gelu_quantize_rows(x, approximate, implementation)
    return select("gelu_quantize_rows", implementation, *available)(x, approximate)


def fp8_linear(
    x: torch.Tensor,
    weight8: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = OUT_OF_FP8,
    implementation: str = "auto",
) -> torch.Tensor:
    """x weight^T + bias, (..., out) in out_dtype, of E4M3 numbers with a scale for each row.

    x: (..., in), quantised here by rows; or E4M3, with x_scale (...), float32. weight8: E4M3 (out, in), and weight_scale: float32 (out,),
    as `quantize_rows` makes them of a weight. bias: (out,), of any floating dtype. Sums are in float32, but by the library's
    product ("auto" on Hopper and Blackwell) with fast accumulation, which on Hopper keeps 14 bits of them.

    Raises TypeError or ValueError on a mismatch, and ValueError if a gradient is required, since there is none.
    """
    if isinstance(x, torch.Tensor) and x.dtype == FP8:
        if x_scale is None:
            raise ValueError(f"x_scale: expected the scales of x, which is {FP8}, got None")
    else:
        _check_float("x", x, f" or {FP8}")
        if x_scale is not None:
            raise ValueError(f"x_scale: expected None for x of {x.dtype}, which is quantised here, got a {type(x_scale).__name__}")
    if not isinstance(weight8, torch.Tensor) or weight8.dtype != FP8:
        raise TypeError(f"weight8: expected a tensor of {FP8}, got {getattr(weight8, 'dtype', type(weight8).__name__)}")
    if weight8.dim() != 2:
        raise ValueError(f"weight8: expected (out, in), got shape {tuple(weight8.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight8.shape[1]:
        raise ValueError(f"x: expected (..., {weight8.shape[1]}) as weight8 has so many inputs, got shape {tuple(x.shape)}")
    for name, scale, shape in (("weight_scale", weight_scale, weight8.shape[:1]), ("x_scale", x_scale, x.shape[:-1])):
        if scale is None and name == "x_scale":
            continue
        if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
            raise TypeError(f"{name}: expected a tensor of torch.float32, got {getattr(scale, 'dtype', type(scale).__name__)}")
        if scale.shape != shape:
            raise ValueError(f"{name}: expected {tuple(shape)}, one for each row, got shape {tuple(scale.shape)}")
    if bias is not None:
        if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias: expected a floating point tensor or None, got {getattr(bias, 'dtype', type(bias).__name__)}")
        if bias.shape != weight8.shape[:1]:
            raise ValueError(f"bias: expected ({weight8.shape[0]},), got shape {tuple(bias.shape)}")
    for name, other in (("weight8", weight8), ("weight_scale", weight_scale), ("x_scale", x_scale), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {other.device}")
    if not isinstance(out_dtype, torch.dtype) or not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype: expected a floating point torch.dtype, got {out_dtype!r}")
    _check_no_gradient("fp8_linear", x=x, x_scale=x_scale, weight_scale=weight_scale, bias=bias)

    x8, x_scale = quantize_rows(x, implementation=implementation) if x_scale is None else (x, x_scale)
    rows = x8.flatten(0, -2) if x8.dim() > 1 else x8[None]
    arguments = rows, x_scale.reshape(-1), weight8, weight_scale, bias, out_dtype
    served = scaled_mm_serves(rows, weight8, bias, out_dtype)
    available = {"torch": linear_scaled_mm if served else linear_torch, "reference": linear_reference}
    if HAS_TRITON:
        available, unavailable = with_triton(rows, available, linear.fp8_linear, linear.unavailable(rows, weight8, out_dtype))
    else:
        available, unavailable = with_triton(rows, available)
    if served and prefers_library(*weight8.shape):
        available = {"torch": linear_scaled_mm} | available
    if choose("fp8_linear", implementation, available, unavailable) == "triton":
        out = linear.fp8_linear(*arguments, implementation)
    else:
        out = select("fp8_linear", implementation, available, unavailable)(*arguments)
    return out.unflatten(0, x8.shape[:-1]) if x8.dim() > 1 else out[0]


def prefers_library(out: int, inner: int) -> bool:
    """Whether "auto" takes the library's product where it serves, for a weight of this size. The number of tokens has no say: a token's
    numbers would depend on what else is in its pack.
    """
    return True


def _implementations(x, op, others):
    return with_triton(x, others, getattr(fused, op), fused.unavailable(x)) if HAS_TRITON else with_triton(x, others)


def _check_float(name: str, x, more: str = "") -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name}: expected a tensor of float16, bfloat16, float32 or float64{more}, got {got}")


def _check_no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected no gradient to be required, since {op} has none, got requires_grad")
