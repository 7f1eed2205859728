"""Cases of the first and the last layer: clips to tokens, by a product that gathers its patches, a convolution, or a permutation and a
product; and tokens to clips, normalised, modulated, multiplied and scattered.
"""

from functools import partial

import torch
import torch.nn.functional as F
from tubelet.kernels import Modulation, VideoLayout, patch_embed, unpatchify

from .harness import DEFAULT, FULL, QUICK, Case, Implementation
from .norms import plain_norm
from .peers import compile_
from .plain import case, implementation

OP, LAST = "patch embed", "final layer"
PATCH = (1, 2, 2)


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


def convolution(device: torch.device, leaves: tuple[str, ...] = ()) -> list[Implementation]:
    found = [implementation("Conv3d", convolved, leaves)]
    if device.type == "cuda":
        found.append(implementation("Conv3d, torch.compile", compile_(convolved), leaves, slow=True))
    return found


def scattered(tokens, weight, bias, shift, scale, rows, layout):
    """Norm and modulation, a product, and a permutation of each clip."""
    patches = F.linear(plain_norm(tokens, shift, scale, rows), weight, bias)
    found = []
    for span in layout.clips:
        x = patches[span.video_start : span.video_stop].unflatten(0, span.grid).unflatten(-1, (-1, *PATCH))
        found.append(x.permute(3, 0, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2).contiguous())
    return found


def ours_scattered(tokens, weight, bias, shift, scale, rows, layout, implementation):
    how = {"weight": weight, "bias": bias, "norm": Modulation(shift, scale), "rows": rows}
    return unpatchify(tokens, layout, len(weight) // 4, PATCH, **how, implementation=implementation)


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
            return {"clips": [draw(channels, *clip) for clip in clips], "weight": weight, "bias": bias, "patch": PATCH}

        def make_last(draw, device, clips=clips, channels=channels, width=width, tokens=tokens):
            layout = VideoLayout.pack([(t, h // 2, w // 2) for t, h, w in clips], device=device)
            tables = {"shift": draw(len(clips), width), "scale": draw(len(clips), width), "rows": layout.rows("clip")}
            weight = draw(4 * channels, width) * width**-0.5
            return {"tokens": draw(tokens, width), "weight": weight, "bias": draw(4 * channels), **tables, "layout": layout}

        shape = {"tokens": tokens, "clips": len(clips), "channels": channels, "width": width}
        flops = 8 * tokens * channels * width
        first = {"make": make, "ours": patch_embed, "plain": permuted, "devices": devices}
        found.append(case(OP, name, shape, others=convolution, flops=flops, level=level, **first))
        # As in training: the weights have gradients, and what is put into the model has none.
        leaves = ("weight", "bias")
        once = DEFAULT if level == QUICK else FULL
        back = {"leaves": leaves, "level": once, "representative": level == QUICK, "flops": flops}
        if name != "mixed pack":
            found.append(case(OP, name, shape, others=partial(convolution, leaves=leaves), **first, **back))
            last = {"make": make_last, "ours": ours_scattered, "plain": scattered, "devices": devices}
            flops += 8 * tokens * width
            found.append(case(LAST, name, shape, flops=flops, level=level if level == QUICK else FULL, **last))
            back |= {"leaves": ("tokens", "weight", "bias", "shift", "scale"), "flops": 2 * flops + 20 * tokens * width}
            found.append(case(LAST, name, shape, **last, **back))
    return found
