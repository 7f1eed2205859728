"""E4M3: eight bits, of which three are mantissa, up to 448 (Micikevicius et al. 2022, FP8 formats for deep learning).

    x8_ij = round(x_ij / s_i),   s_i = max_j |x_ij| / 448,   x_ij ~ s_i x8_ij

with a scale for each row: rounding errs by 2^-4 of an element at most, as long as it is not below 2^-15 of the largest of its row.

Bytes: x read and x8 written once. FLOPs: two per element.
"""

import torch

from .dispatch import select

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
OUT_OF_FP8 = torch.bfloat16
"""What an op on E4M3 gives."""

Scales = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of the rows of q, k and v."""
NO_TRITON = "this op has no Triton kernel yet"


def quantize_rows(x: torch.Tensor, *, implementation: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., channels), float16, bfloat16, float32 or float64, as E4M3 and its float32 scales (...), one for each row.

    A row of zeros has a scale of one; one with an infinity or NaN comes back as NaN. Of q, k and v, (tokens, heads, head_dim), the scales
    (tokens, heads) lie in memory head by head, as `attention` reads them. Raises TypeError for another dtype.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x: expected a tensor of float16, bfloat16, float32 or float64, got {getattr(x, 'dtype', type(x).__name__)}")
    functions = {"torch": _quantize_torch, "reference": _quantize_reference}
    return select("quantize_rows", implementation, functions, {"triton": NO_TRITON})(x)


def dequantize_rows(x8: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The inverse of `quantize_rows`."""
    return x8.to(dtype) * scale.to(dtype)[..., None]


def _quantize_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, torch.promote_types(x.dtype, torch.float32))


def _quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, torch.float64)


def _quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(dtype)
    largest = x.abs().amax(dim=-1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST).float()
    x8 = (x / scale.to(dtype)[..., None]).clamp(-LARGEST, LARGEST).to(FP8)
    return x8, scale.movedim(-1, 0).contiguous().movedim(0, -1)
