"""E4M3: the definitions in float64, and plain torch."""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
OUT_OF_FP8 = torch.bfloat16
"""What an op on E4M3 gives."""

Scales = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of the rows of q, k and v."""


def dequantize_rows(x8: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The inverse of `quantize_rows`."""
    return x8.to(dtype) * scale.to(dtype)[..., None]


def quantize_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, torch.promote_types(x.dtype, torch.float32))


def quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, torch.float64)


def gelu_quantize_torch(x: torch.Tensor, approximate: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_torch(F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate=approximate))


def gelu_quantize_reference(x: torch.Tensor, approximate: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_reference(F.gelu(x.double(), approximate=approximate))


def _quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(dtype)
    # By a tensor: a GPU's division by a number is a product with its inverse, a rounding away.
    scale = (x.abs().amax(dim=-1) / x.new_full((), LARGEST)).float()
    scale = torch.where(scale == 0, 1.0, scale)
    x8 = (x / scale.to(dtype)[..., None]).clamp(-LARGEST, LARGEST).to(FP8)
    return x8, scale.movedim(-1, 0).contiguous().movedim(0, -1) if scale.dim() else scale


def linear_torch(x8, x_scale, weight8, weight_scale, bias, out_dtype):
    """The product of the E4M3 numbers in float32, and the scales on it."""
    return _linear(x8, x_scale, weight8, weight_scale, bias, torch.float32).to(out_dtype)


def linear_reference(x8, x_scale, weight8, weight_scale, bias, out_dtype):
    return _linear(x8, x_scale, weight8, weight_scale, bias, torch.float64).to(out_dtype)


def _linear(x8, x_scale, weight8, weight_scale, bias, dtype):
    y = F.linear(x8.to(dtype), weight8.to(dtype)) * x_scale.to(dtype)[:, None] * weight_scale.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def linear_scaled_mm(x8, x_scale, weight8, weight_scale, bias, out_dtype):
    """The library's product with a scale for each row and column, of what `scaled_mm_serves`; with fast accumulation: Hopper then keeps 14
    bits of a sum over all channels, where E4M3 keeps 4 of each factor.
    """
    if not len(x8):
        return x8.new_empty(0, len(weight8), dtype=out_dtype)
    scales = x_scale[:, None].contiguous(), weight_scale[None].contiguous()
    return torch._scaled_mm(x8, weight8.T, *scales, bias=bias, out_dtype=out_dtype, use_fast_accum=True)


def scaled_mm_serves(x8, weight8, bias, out_dtype) -> bool:
    """Whether the library has a product with such scales for these: on Hopper and Blackwell's datacenter GPUs, in bfloat16."""
    return (
        x8.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x8.device)[0] in (9, 10)
        and all(size % 16 == 0 for size in weight8.shape)
        and x8.is_contiguous()
        and weight8.is_contiguous()
        and (bias is None or bias.dtype == torch.bfloat16)
        and out_dtype == torch.bfloat16
    )
