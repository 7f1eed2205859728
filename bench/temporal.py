"""Cases of attention along time: thousands of sequences of 8 to 64 frames, one at each site, in place or after a permutation."""

from tubelet.kernels import Temporal

from .attention import Shape, both
from .harness import DEFAULT, FULL, QUICK, Case

OP = "temporal"


def cases() -> list[Case]:
    causal, free = Temporal(causal=True), Temporal(causal=False)
    found = [
        *both(QUICK, OP, "16 frames, 4096 sites", [(16, 64, 64)], 16, 64, free, DEFAULT),
        *both(DEFAULT, OP, "Wan 2.1 1.3B 480p, 21 frames", [(21, 30, 52)], 12, 128, free, DEFAULT),
        *both(DEFAULT, OP, "Latte 512p, 16 frames", [(16, 32, 32)], 16, 72, free, DEFAULT),
        *both(DEFAULT, OP, "Open-Sora 1.2 480p, 15 frames", [(15, 30, 53)], 16, 72, free),
        *both(DEFAULT, OP, "32 frames, 3600 sites", [(32, 45, 80)], 24, 128, free),
        *both(DEFAULT, OP, "8 frames, 4096 sites, causal", [(8, 64, 64)], 16, 64, causal),
        *both(DEFAULT, OP, "16 frames, 4096 sites, causal", [(16, 64, 64)], 16, 64, causal, DEFAULT),
        *both(FULL, OP, "32 frames, 2048 sites, causal", [(32, 32, 64)], 16, 64, causal),
        *both(DEFAULT, OP, "64 frames, 1560 sites, causal", [(64, 30, 52)], 12, 128, causal),
        *both(FULL, OP, "64 frames, 1024 sites, window", [(64, 32, 32)], 16, 96, Temporal(causal=True, window=16)),
        *both(DEFAULT, OP, "AnimateDiff, 16 frames, 2 x 4096 sites", [(16, 64, 64)] * 2, 8, 40, free),
        *both(DEFAULT, OP, "mixed pack", [(21, 30, 52), (1, 64, 64), (16, 32, 32), (64, 20, 36), (8, 45, 80)], 12, 128, causal),
        *both(FULL, OP, "16 frames, 70,000 sites", [(16, 250, 280)], 4, 64, free),
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
