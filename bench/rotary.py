"""Cases of QK norm with rotary position embedding, forwards and backwards: q and k are views of a fused tensor."""

from functools import partial

import torch
from tubelet.kernels import VideoLayout, qk_norm_rope, rotary_table

from .harness import DEFAULT, FULL, QUICK, Case
from .plain import case, wide

OP = "QK norm and rotary"


def plain(q, k, q_weight, k_weight, cos, sin, across_heads=False):
    """RMS norm of each head, or across heads, and pairs of neighbours turned."""
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = wide(x.flatten(1) if across_heads else x)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight).view(x.shape)
        first, second = y[..., 0::2], y[..., 1::2]
        c, s = cos[:, None], sin[:, None]
        found.append(torch.stack((first * c - second * s, first * s + second * c), dim=-1).flatten(-2).to(x.dtype))
    return found


def ours(q, k, q_weight, k_weight, cos, sin, implementation, across_heads=False):
    return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, across_heads=across_heads, eps=1e-6, implementation=implementation)


def cases() -> list[Case]:
    sizes = [
        ("Wan 2.1 1.3B 480p, across heads", (21, 30, 52), 12, 128, True, QUICK, ("cuda",)),
        ("Wan 2.1 14B 480p, across heads", (21, 30, 52), 40, 128, True, FULL, ("cuda",)),
        ("HunyuanVideo 544p, per head", (33, 34, 60), 24, 128, False, DEFAULT, ("cuda",)),
        ("CogVideoX 5B 480p, per head", (13, 30, 45), 48, 64, False, DEFAULT, ("cuda",)),
        ("Cosmos, 9 frames 704p, per head", (9, 44, 80), 16, 128, False, FULL, ("cuda",)),
        ("Latte 128p, per head", (8, 8, 8), 16, 72, False, QUICK, ("cpu",)),
    ]
    found = []
    for name, grid, heads, head_dim, across, level, devices in sizes:
        tokens = grid[0] * grid[1] * grid[2]

        def make(draw, device, grid=grid, tokens=tokens, heads=heads, head_dim=head_dim, across=across):
            sides = 2 * (head_dim // 6)
            table = rotary_table(VideoLayout.pack([grid], device=device).positions, (head_dim - 2 * sides, sides, sides))
            width = heads * head_dim if across else head_dim
            weights = {"q_weight": draw(width), "k_weight": draw(width)}
            q, k, _ = draw(tokens, 3, heads, head_dim).unbind(1)
            return {"q": q, "k": k, **weights, "cos": table[0], "sin": table[1], "across_heads": across}

        def moved(inputs, outputs, both=2):
            return both * 2 * inputs["q"].numel() * inputs["q"].element_size() + 2 * inputs["cos"].numel() * 4

        shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
        n = tokens * heads * head_dim
        how = {"make": make, "ours": ours, "plain": plain, "devices": devices}
        found.append(case(OP, name, shape, flops=20 * n, moved=moved, level=level, **how))
        # Of each of q and k are read itself and the gradient of what was made of it, and its own gradient is written.
        back = {"moved": partial(moved, both=3), "leaves": ("q", "k", "q_weight", "k_weight"), "flops": 50 * n}
        found.append(case(OP, name, shape, level=DEFAULT if level == QUICK else FULL, representative=level == QUICK, **how, **back))
    return found
