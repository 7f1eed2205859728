"""Cases of attention along time: thousands of sequences of 8 to 64 frames, one at each site, in place or after a permutation; also with
QK norm and rotary positions, which the kernel does where it reads q and k.
"""

import torch.nn.functional as F
from tubelet.kernels import NormRope, Temporal, VideoLayout, attention, rotary_table

from . import rotary
from .attention import Shape, both
from .harness import DEFAULT, FULL, QUICK, Case
from .plain import case

OP = "temporal"
CAUSAL = Temporal(causal=True)


def in_steps(q, k, v, q_weight, k_weight, cos, sin, layout):
    """Norm and rotation, then scaled_dot_product_attention of the tokens of each site of one clip."""
    (span,) = layout.clips
    rotated = *rotary.plain(q, k, q_weight, k_weight, cos, sin), v
    q, k, v = (x.unflatten(0, (span.frames, -1)).permute(1, 2, 0, 3) for x in rotated)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(0, 1)


def on_load(q, k, v, q_weight, k_weight, cos, sin, layout, implementation):
    return attention(q, k, v, layout, CAUSAL, norm_rope=NormRope(q_weight, k_weight, cos, sin), implementation=implementation)


def rotated(name: str, grid: tuple[int, int, int], heads: int, head_dim: int, level: int, devices=("cuda",)) -> list[Case]:
    """With norm and rotation before, forwards and backwards."""
    frames, tokens = grid[0], grid[0] * grid[1] * grid[2]

    def make(draw, device):
        layout = VideoLayout.pack([grid], device=device)
        q, k, v = draw(tokens, 3, heads, head_dim).unbind(1)
        cos, sin = rotary_table(layout.positions[:, :1], (head_dim,))
        return {"q": q, "k": k, "v": v, "q_weight": draw(head_dim), "k_weight": draw(head_dim), "cos": cos, "sin": sin, "layout": layout}

    def moved(inputs, outputs):
        return (2 if outputs[1] else 1) * 4 * inputs["q"].numel() * inputs["q"].element_size() + 2 * inputs["cos"].numel() * 4

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "grid": "x".join(map(str, grid)), "mask": str(CAUSAL)}
    products = heads * head_dim * tokens * (frames + 1) / 2
    how = {"make": make, "ours": on_load, "plain": in_steps, "moved": moved, "devices": devices, "representative": True}
    leaves = ("q", "k", "v", "q_weight", "k_weight")
    return [
        case(OP, f"{name}, norm and rotary on load", shape, flops=4 * products, level=level, **how),
        case(OP, f"{name}, norm and rotary on load", shape, flops=10 * products, level=level, leaves=leaves, **how),
    ]


def cases() -> list[Case]:
    causal, free = CAUSAL, Temporal(causal=False)
    found = [
        *both(QUICK, OP, "16 frames, 4096 sites", [(16, 64, 64)], 16, 64, free, DEFAULT),
        *rotated("Open-Sora 1.2 480p, 15 frames", (15, 30, 53), 16, 72, DEFAULT),
        *both(DEFAULT, OP, "Wan 2.1 1.3B 480p, 21 frames", [(21, 30, 52)], 12, 128, free),
        *both(DEFAULT, OP, "Latte 512p, 16 frames", [(16, 32, 32)], 16, 72, free),
        *both(FULL, OP, "Open-Sora 1.2 480p, 15 frames", [(15, 30, 53)], 16, 72, free),
        *both(FULL, OP, "32 frames, 3600 sites", [(32, 45, 80)], 24, 128, free),
        *both(FULL, OP, "8 frames, 4096 sites, causal", [(8, 64, 64)], 16, 64, causal),
        *both(DEFAULT, OP, "16 frames, 4096 sites, causal", [(16, 64, 64)], 16, 64, causal, DEFAULT),
        *both(FULL, OP, "32 frames, 2048 sites, causal", [(32, 32, 64)], 16, 64, causal),
        *both(FULL, OP, "64 frames, 1560 sites, causal", [(64, 30, 52)], 12, 128, causal),
        *both(FULL, OP, "64 frames, 1024 sites, window", [(64, 32, 32)], 16, 96, Temporal(causal=True, window=16)),
        *both(DEFAULT, OP, "AnimateDiff, 16 frames, 2 x 4096 sites", [(16, 64, 64)] * 2, 8, 40, free),
        *both(DEFAULT, OP, "mixed pack", [(21, 30, 52), (1, 64, 64), (16, 32, 32), (64, 20, 36), (8, 45, 80)], 12, 128, causal),
        *both(FULL, OP, "16 frames, 70,000 sites", [(16, 250, 280)], 4, 64, free),
        Shape([(16, 64, 64)], 16, 64, free, fp8=True).case(OP, "16 frames, 4096 sites", FULL),
        *rotated("16 frames, 64 sites", (16, 8, 8), 4, 64, DEFAULT, ("cpu",)),
    ]
    for frames in (8, 16, 32, 64):
        found.append(Shape([(frames, 32, 32)], 12, 128, causal).case("length", f"temporal attention, {frames} frames", DEFAULT, "temporal"))
    on_cpu = [
        ("16 frames, 64 sites", [(16, 8, 8)], 4, 64, free, QUICK),
        ("8 frames, 256 sites, causal", [(8, 16, 16)], 4, 64, causal, DEFAULT),
        ("mixed pack", [(16, 8, 8), (1, 16, 16), (8, 12, 8)], 4, 72, causal, DEFAULT),
    ]
    for name, grids, heads, head_dim, mask, level in on_cpu:
        found.append(Shape(grids, heads, head_dim, mask).case(OP, name, level, devices=("cpu",)))
        found.append(Shape(grids, heads, head_dim, mask, backward=True).case(OP, name, DEFAULT, devices=("cpu",)))
    return found
