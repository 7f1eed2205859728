"""Cases of patch embedding: clips to tokens, by a product that gathers its patches, a convolution, or a permutation and a product."""

import torch
import torch.nn.functional as F
from tubelet.kernels import patch_embed

from .harness import DEFAULT, QUICK, Case, Implementation
from .peers import compile_
from .plain import case

OP = "patch embed"


def permuted(clips, weight, bias, patch):
    """Patches by a permutation, then a product."""
    tokens = []
    for clip in clips:
        c, t, h, w = clip.shape
        x = clip.reshape(c, t // patch[0], patch[0], h // patch[1], patch[1], w // patch[2], patch[2])
        tokens.append(x.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, weight.shape[1]))
    return F.linear(torch.cat(tokens), weight, bias)


def convolved(clips, weight, bias, patch):
    """A convolution whose stride is its kernel, clip by clip."""
    kernel = weight.view(weight.shape[0], clips[0].shape[0], *patch)
    return torch.cat([F.conv3d(clip[None], kernel, bias, stride=patch)[0].flatten(1).T for clip in clips])


def convolution(device: torch.device) -> list[Implementation]:
    found = [Implementation("Conv3d", lambda inputs: lambda: convolved(**inputs))]
    if device.type == "cuda":
        compiled = compile_(convolved)
        found.append(Implementation("Conv3d, torch.compile", lambda inputs: lambda: compiled(**inputs), slow=True))
    return found


def cases() -> list[Case]:
    sizes = [
        ("Wan 2.1 1.3B 480p", [(21, 60, 104)], 16, 1536, QUICK, ("cuda",)),
        ("Wan 2.1 14B 720p", [(21, 90, 160)], 16, 5120, DEFAULT, ("cuda",)),
        ("Latte 512p", [(16, 64, 64)], 4, 1152, DEFAULT, ("cuda",)),
        ("mixed pack", [(21, 60, 104), (1, 128, 128), (16, 64, 64), (5, 60, 104), (9, 40, 72)], 16, 1536, DEFAULT, ("cuda",)),
        ("Latte 128p", [(8, 16, 16)], 4, 1152, QUICK, ("cpu",)),
    ]
    found = []
    for name, clips, channels, width, level, devices in sizes:
        tokens = sum(t * h * w // 4 for t, h, w in clips)

        def make(draw, device, clips=clips, channels=channels, width=width):
            weight, bias = draw(width, 4 * channels), draw(width)
            return {"clips": [draw(channels, *clip) for clip in clips], "weight": weight, "bias": bias, "patch": (1, 2, 2)}

        shape = {"tokens": tokens, "clips": len(clips), "channels": channels, "width": width}
        flops = 8 * tokens * channels * width
        how = {"make": make, "ours": patch_embed, "plain": permuted, "flops": flops, "level": level, "devices": devices}
        found.append(case(OP, name, shape, others=convolution, **how))
    return found
