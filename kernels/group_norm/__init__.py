"""Group norm with SiLU, as the decoders and encoders of video VAEs interleave with their convolutions (Wu & He 2018; Rombach et al. 2022).

    xhat = (x - mean) / sqrt(variance + eps),   z = xhat weight_c + bias_c,   y = z sigmoid(z)

Mean and variance are those of a frame of a clip and a group of its channels, never over time: a clip that is decoded in chunks of frames
gives the same bits as at once. Fused, nothing is written between norm and SiLU, and in float32 nothing is rounded. A frame can be much
larger than what one program holds (16 channels of 480 x 832 pixels are 6.4 million numbers), so it is split into tiles of a fixed size:
one kernel writes their statistics, a second merges those of each group, a third normalises. The mean is kept as a sum of two numbers, and
squares are summed around the mean of their own tile: nothing cancels where a mean is large.

Per element of x, in bfloat16, and the floor at 3.35 TB/s of 17 frames of 512 channels of 60 x 104 pixels, beyond the L2 cache:

    pass        reads and writes              bytes   FLOPs    floor
    forward     x, x -> y                         6      15    97 us
    backward    x, dy, x, dy -> dx               10      40   162 us

The gradients of weight and bias cost no bytes more: the sums that dx needs are kept channel by channel, and summed over frames in float32
in a fixed order. Nothing is atomic: the same call gives the same bits.
"""

import torch

from ..dispatch import HAS_TRITON, choose, select, with_triton
from .reference import group_norm_silu_reference, group_norm_silu_torch

if HAS_TRITON:
    from . import fused

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    implementation: str = "auto",
) -> torch.Tensor:
    """SiLU of the group norm of each frame of x, or with `silu` False the norm alone, in x's dtype and memory format; float32 inside.

    x: (batch, channels, T, H, W) or (batch, channels, H, W), of any floating dtype, contiguous or channels-last, or a view whose pixels lie
    at one distance. weight, bias: (channels,). groups: how many groups of neighbouring channels, which divides their number.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device, number of groups or implementation.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() not in (4, 5):
        raise ValueError(f"x: expected (batch, channels, T, H, W) or (batch, channels, H, W), got shape {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if not isinstance(parameter, torch.Tensor) or not parameter.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {getattr(parameter, 'dtype', type(parameter).__name__)}")
        if parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name}: expected ({x.shape[1]},), got shape {tuple(parameter.shape)}")
        if parameter.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {parameter.device}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: expected an integer, got {groups!r}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}")
    available = {"torch": group_norm_silu_torch, "reference": group_norm_silu_reference}
    if HAS_TRITON:
        available = with_triton(x, available, fused.group_norm_silu, fused.unavailable(x, weight=weight, bias=bias))
    else:
        available = with_triton(x, available)
    if choose("group_norm_silu", implementation, *available) == "triton":
        return fused.group_norm_silu(x, weight, bias, groups, eps, silu, implementation)[0]
    return select("group_norm_silu", implementation, *available)(x, weight, bias, groups, eps, silu)
