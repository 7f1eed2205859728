"""Cases of group norm with SiLU, which the decoders of video VAEs have before each convolution: frames one by one."""

import torch.nn.functional as F
from tubelet.kernels import group_norm_silu

from .harness import DEFAULT, FULL, QUICK, Case
from .plain import case, wide

OP, GROUPS = "group norm", 32


def plain(x, weight, bias):
    y = wide(x)
    return F.silu(F.group_norm(y, GROUPS, weight.to(y.dtype), bias.to(y.dtype), eps=1e-6)).to(x.dtype)


def in_its_dtype(x, weight, bias):
    """As VAEs have it, which do not upcast for a norm: the peer."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, eps=1e-6))


def ours(x, weight, bias, implementation):
    return group_norm_silu(x, weight, bias, GROUPS, implementation=implementation)


def cases() -> list[Case]:
    found = []
    for name, frames, channels, height, width, level, devices in (
        ("HunyuanVideo's VAE 480p, 512 channels", 17, 512, 60, 104, QUICK, ("cuda",)),
        ("CogVideoX's VAE 480p, 128 channels", 8, 128, 480, 720, DEFAULT, ("cuda",)),
        ("a VAE, small", 4, 64, 32, 32, QUICK, ("cpu",)),
    ):

        def make(draw, device, size=(frames, channels, height, width)):
            return {"x": draw(*size), "weight": draw(size[1]), "bias": draw(size[1])}

        n, shape = frames * channels * height * width, {"frames": frames, "channels": channels, "height": height, "width": width}
        how = {"make": make, "ours": ours, "plain": in_its_dtype, "reference": plain, "devices": devices}
        found.append(case(OP, name, shape, flops=15 * n, level=level, **how))
        back = {"leaves": ("x", "weight", "bias"), "level": DEFAULT if level == QUICK else FULL, "representative": level == QUICK}
        found.append(case(OP, name, shape, flops=40 * n, **how, **back))
    return found
