"""Group norm of frames with SiLU: the definition in float64, and plain torch."""

import torch
import torch.nn.functional as F


def group_norm_silu_torch(x, weight, bias, groups, eps, silu):
    """The library's, frame by frame, in float32 or better."""
    dtype, last = torch.promote_types(x.dtype, torch.float32), torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    frames = x.to(dtype) if x.dim() == 4 else x.to(dtype).transpose(1, 2).flatten(0, 1)
    # Of channels-last tensors the CPU's takes the variance as a mean of squares less a square, which cancels.
    y = F.group_norm(frames.contiguous(), groups, weight.to(dtype), bias.to(dtype), eps)
    y = (F.silu(y) if silu else y).to(x.dtype)
    y = y if x.dim() == 4 else y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    return y.contiguous(memory_format=last if not x.is_contiguous() and x.is_contiguous(memory_format=last) else torch.contiguous_format)


def group_norm_silu_reference(x, weight, bias, groups, eps, silu):
    """As the equations at the head of the package read."""
    frames = (x.double() if x.dim() == 5 else x.double()[:, :, None]).unflatten(1, (groups, -1))
    over = 2, 4, 5  # channels of a group, and pixels
    centred = frames - frames.mean(over, keepdim=True)
    y = (centred / (centred.square().mean(over, keepdim=True) + eps).sqrt()).flatten(1, 2)
    y = y * weight.double()[:, None, None, None] + bias.double()[:, None, None, None]
    y = y * y.sigmoid() if silu else y
    return (y if x.dim() == 5 else y[:, :, 0]).to(x.dtype)
