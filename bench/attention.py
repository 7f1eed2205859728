"""Cases of attention: every mask on packs of real models, forwards and backwards, in FP8, with text in the clips (joint), and with fewer
heads of keys than of queries (grouped). `temporal` has those along time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tubelet.kernels import FrameCausal, Full, Mask, Spatial, VideoLayout, attention, quantize_rows
from tubelet.kernels.attention.choice import stretches
from tubelet.kernels.attention.schedule import visible_pairs
from tubelet.kernels.fp8 import dequantize_rows

from .harness import DEFAULT, FP8_TOLERANCE, FULL, QUICK, Case, Implementation, Problem
from .peers import Setup, attention_peers
from .sequences import Group, groups, reference

Grids = Sequence[tuple[int, int, int]]


class Inputs(NamedTuple):
    """of one call: q, k, v are views of one tensor where the keys are those of the clips themselves; do only backwards."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor | None
    scales: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Shape:
    """text: keys of each clip, for cross-attention. joint: tokens of text in each clip, after its video or, with text_first, before it; for
    Full alone. kv_heads: of keys and values, if fewer, which is not for backwards. fp8: q, k and v come as E4M3 with a scale for each row.
    """

    grids: Grids
    heads: int
    head_dim: int
    mask: Mask
    text: Sequence[int] | None = None
    backward: bool = False
    fp8: bool = False
    joint: Sequence[int] | None = None
    text_first: bool = False
    kv_heads: int | None = None

    @property
    def tokens(self) -> int:
        return sum(t * h * w for t, h, w in self.grids) + sum(self.joint or ())

    def sequences(self) -> list[Group]:
        """What sees each other."""
        if self.joint is None:
            return groups(self.grids, self.mask, self.text)
        # Text and video of a clip all see each other: one sequence, in which no coordinate matters.
        return groups([(1, 1, t * h * w + words) for (t, h, w), words in zip(self.grids, self.joint, strict=True)], self.mask)

    def problem(self, device: torch.device) -> Problem:
        layout = VideoLayout.pack(self.grids, text=self.joint, text_first=self.text_first, device=device)
        kv_layout = layout if self.text is None else VideoLayout.segments(self.text, device=device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        setup = Setup(self.sequences(), layout, kv_layout, self.mask, self.heads, self.head_dim, dtype)
        heads, kv_heads = sorted({0, self.heads - 1}), self.kv_heads or self.heads

        def make(seed: int) -> Inputs:
            generator = torch.Generator(device).manual_seed(seed)

            def draw(*size):
                return torch.randn(size, generator=generator, device=device, dtype=dtype)

            if self.text is None:
                q, k, v = draw(layout.tokens, self.heads + 2 * kv_heads, self.head_dim).split((self.heads, kv_heads, kv_heads), dim=1)
            else:
                q = draw(layout.tokens, self.heads, self.head_dim)
                k, v = draw(kv_layout.tokens, 2, kv_heads, self.head_dim).unbind(1)
            if not self.fp8:
                return Inputs(q, k, v, draw(*q.shape) if self.backward else None)
            numbers, scales = zip(*(quantize_rows(x) for x in (q, k, v)), strict=True)
            return Inputs(*numbers, None, scales)

        def expected(inputs: Inputs) -> list[Tensor]:
            q, k, v = inputs[:3]
            if inputs.scales is not None:
                q, k, v = (dequantize_rows(x, scale) for x, scale in zip((q, k, v), inputs.scales, strict=True))
            return reference(q, k, v, setup.parts, self.mask, heads, inputs.do)

        def ours(implementation: str, name: str, **how) -> Implementation:
            def build(inputs: Inputs):
                options = {"kv_layout": kv_layout, "scales": inputs.scales, "implementation": implementation}
                return _call(lambda q, k, v: attention(q, k, v, layout, self.mask, **options), inputs)

            return Implementation(name, build, ours=True, **how)

        def with_fp8(function, inputs: Inputs):
            if inputs.scales is None:
                return _call(function, inputs)
            # Of peers in bfloat16, what FP8 is to be faster than: their own numbers are made before the clock starts.
            wide = [dequantize_rows(x, scale, dtype) for x, scale in zip(inputs[:3], inputs.scales, strict=True)]
            return _call(function, Inputs(*wide, None))

        implementations = [ours("auto", "tubelet"), *attention_peers(setup, with_fp8, self.backward)]
        # Beside what "auto" takes, the other.
        like = torch.empty(1, self.heads, self.head_dim, device=device, dtype=dtype).expand(layout.tokens, -1, -1)
        if not self.fp8 and stretches(like, layout, self.mask, kv_layout):
            implementations.append(ours("triton", "tubelet in Triton", comparable=False))
        elif device.type == "cuda" and not self.backward:
            implementations.append(ours("torch", "tubelet in torch", comparable=False))
        pairs, wide = visible_pairs(layout, self.mask, kv_layout), 1 if self.fp8 else dtype.itemsize
        rows = 2 * layout.tokens * self.heads + 2 * kv_layout.tokens * kv_heads  # q and out, k and v
        moved = self.head_dim * rows * wide
        if self.fp8:
            moved += self.heads * self.head_dim * layout.tokens  # the output has two bytes
        return Problem(
            make=make,
            implementations=implementations,
            reference=expected,
            part=lambda result: [x[:, heads] for x in (result if self.backward else [result])],
            dtype=dtype,
            flops=(10 if self.backward else 4) * self.heads * self.head_dim * pairs,
            bytes=2 * moved if self.backward else moved,  # q, k, v, out and do, and dq, dk and dv
            tolerance=FP8_TOLERANCE if self.fp8 else None,
            gradients=self.backward,
        )

    def case(
        self, op: str, name: str, level: int = DEFAULT, series: str | None = None, devices=("cuda",), representative: bool = False
    ) -> Case:
        dtype = "float32" if devices == ("cpu",) else "float8_e4m3fn" if self.fp8 else "bfloat16"
        way = "backward" if self.backward else "forward"
        clips = "x".join(map(str, self.grids[0])) if len(set(self.grids)) == 1 else f"{len(self.grids)} sizes"
        shape = {
            "tokens": self.tokens,
            "clips": len(self.grids),
            "grid": clips,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "mask": str(self.mask),
            "dtype": dtype,
            "pass": way,
        }
        if self.text is not None:
            shape["keys"] = sum(self.text)
        if self.joint is not None:
            shape["words"] = sum(self.joint)
        if self.kv_heads is not None:
            shape["kv_heads"] = self.kv_heads
        return Case(op, f"{name}, {way}{', FP8' if self.fp8 else ''}", shape, self.problem, level, series, devices, representative)


def _call(function, inputs: Inputs):
    if inputs.do is None:
        return lambda: function(inputs.q, inputs.k, inputs.v)
    qkv = [x.detach().requires_grad_() for x in inputs[:3]]
    out = function(*qkv)
    return lambda: torch.autograd.grad(out, qkv, inputs.do, retain_graph=True)


WAN, LATTE, SORA = (21, 30, 52), (16, 32, 32), (15, 30, 53)
SKYREELS, LTX, COGVIDEO, COSMOS = (25, 34, 60), (21, 16, 22), (13, 30, 45), (16, 44, 80)
HUNYUAN, HUNYUAN15, MOCHI, MAGI = (33, 34, 60), (31, 30, 53), (28, 30, 53), (24, 45, 45)
MIXED = [WAN, (1, 64, 64), (16, 32, 32), (9, 20, 36), (21, 45, 80), (5, 30, 52), (1, 30, 52), (33, 16, 16)]
SMALL = [(16, 8, 8)] * 8


def both(level: int, op: str, name: str, grids: Grids, heads: int, head_dim: int, mask: Mask, backward: int = FULL, **more) -> list[Case]:
    """Forwards at one level, backwards at another; what is beside a quick case is representative too."""
    return [
        Shape(grids, heads, head_dim, mask, **more).case(op, name, level),
        Shape(grids, heads, head_dim, mask, backward=True, **more).case(op, name, backward, representative=level == QUICK),
    ]


def cases() -> list[Case]:
    causal, windowed = FrameCausal(chunk=3), FrameCausal(chunk=3, window=7)
    found = [
        *both(QUICK, "attention spatial", "Wan 2.1 1.3B 480p", [WAN], 12, 128, Spatial(), DEFAULT),
        *both(DEFAULT, "attention spatial", "Latte 512p", [LATTE], 16, 72, Spatial()),
        *both(FULL, "attention spatial", "Open-Sora 1.2 480p", [SORA], 16, 72, Spatial()),
        *both(DEFAULT, "attention spatial", "Allegro 720p", [(22, 45, 80)], 24, 96, Spatial()),
        *both(DEFAULT, "attention spatial", "mixed pack", MIXED, 16, 64, Spatial()),
        *both(QUICK, "attention frame-causal", "CausVid (Wan 1.3B) 480p", [WAN], 12, 128, causal, DEFAULT),
        *both(DEFAULT, "attention frame-causal", "Self-Forcing, window", [WAN], 12, 128, windowed),
        *both(FULL, "attention frame-causal", "SkyReels-V2 DF 544p", [SKYREELS], 16, 128, FrameCausal(chunk=5)),
        *both(FULL, "attention frame-causal", "window and sink", [WAN], 12, 128, FrameCausal(chunk=3, window=4, sink=3)),
        *both(DEFAULT, "attention frame-causal", "mixed pack", MIXED, 12, 128, FrameCausal(chunk=4)),
        *both(FULL, "attention frame-causal", "eight small clips, by frame", SMALL, 16, 64, FrameCausal()),
        Shape([WAN], 12, 128, Full(), fp8=True).case("attention full", "Wan 2.1 1.3B 480p", DEFAULT, representative=True),
        *both(QUICK, "attention full", "Wan 2.1 1.3B 480p", [WAN], 12, 128, Full(), DEFAULT),
        *both(DEFAULT, "attention full", "LTX-Video 512p", [LTX], 32, 64, Full()),
        *both(FULL, "attention full", "Allegro, 9 frames 720p", [(9, 45, 80)], 24, 96, Full()),
        *both(FULL, "attention full", "Cosmos 704p", [COSMOS], 16, 128, Full()),
        *both(FULL, "attention full", "Wan 2.1 1.3B 720p", [(21, 45, 80)], 12, 128, Full()),
        *both(DEFAULT, "attention full", "mixed pack", MIXED, 12, 128, Full()),
        *both(DEFAULT, "attention full", "eight small clips", SMALL, 16, 64, Full()),
        *both(QUICK, "attention cross", "Wan 2.1 1.3B 480p", [WAN], 12, 128, Full(), text=[512]),
        *both(DEFAULT, "attention cross", "Latte 512p", [LATTE], 16, 72, Full(), text=[120]),
        *both(DEFAULT, "attention cross", "mixed pack", MIXED, 12, 128, Full(), text=[512, 77, 120, 300, 226, 12, 64, 512]),
        Shape([WAN], 12, 128, causal, fp8=True).case("attention frame-causal", "CausVid (Wan 1.3B) 480p", FULL),
        Shape([LTX], 32, 64, Full(), fp8=True).case("attention full", "LTX-Video 512p", FULL),
        Shape([WAN], 12, 128, Spatial(), fp8=True).case("attention spatial", "Wan 2.1 1.3B 480p", FULL),
        Shape([WAN], 12, 128, Full(), text=[512], fp8=True).case("attention cross", "Wan 2.1 1.3B 480p", FULL),
        Shape(MIXED, 12, 128, Full(), fp8=True).case("attention full", "mixed pack", FULL),
        *both(QUICK, "attention joint", "CogVideoX 2B 480p, text first", [COGVIDEO], 30, 64, Full(), joint=[226], text_first=True),
        *both(DEFAULT, "attention joint", "HunyuanVideo-1.5 480p", [HUNYUAN15], 16, 128, Full(), joint=[320]),
        *both(FULL, "attention joint", "mixed pack", MIXED, 24, 128, Full(), joint=[256, 77, 120, 300, 226, 12, 64, 256]),
        *both(FULL, "attention joint", "HunyuanVideo 544p", [HUNYUAN], 24, 128, Full(), joint=[256]),
        *both(FULL, "attention joint", "Mochi 480p", [MOCHI], 24, 128, Full(), joint=[256]),
        Shape([MAGI], 24, 128, FrameCausal(chunk=6), kv_heads=8).case("attention grouped heads", "MAGI-1 4.5B, four chunks", QUICK),
        Shape([MAGI], 48, 128, FrameCausal(chunk=6), kv_heads=8).case("attention grouped heads", "MAGI-1 24B, four chunks", FULL),
        Shape(MIXED, 24, 128, Full(), kv_heads=8).case("attention grouped heads", "mixed pack", FULL),
    ]
    for name, frames in (("1k", 1), ("2k", 2), ("4k", 4), ("8k", 8), ("16k", 16), ("33k", 32), ("74k", 72)):
        level = DEFAULT if frames in (1, 4, 16, 32) else FULL
        for mask, label in ((Full(), "full"), (Spatial(), "spatial")):
            shape = Shape([(frames, 32, 32)], 12, 128, mask)
            found.append(shape.case("length", f"{label} attention, {name} tokens", level, f"{label} attention"))
    on_cpu = [
        ("attention spatial", "Latte 128p", [(8, 8, 8)], 4, 72, Spatial(), None, QUICK),
        ("attention spatial", "mixed pack", [(8, 8, 8), (1, 16, 16), (4, 12, 8)], 4, 64, Spatial(), None, DEFAULT),
        ("attention frame-causal", "Wan, small", [(7, 10, 14)], 4, 64, FrameCausal(), None, QUICK),
        ("attention full", "Wan, small", [(5, 10, 14)], 4, 128, Full(), None, QUICK),
        ("attention full", "mixed pack", [(5, 10, 14), (1, 16, 16), (8, 6, 6)], 4, 64, Full(), None, DEFAULT),
        ("attention cross", "Wan, small", [(5, 10, 14)], 4, 128, Full(), [77], QUICK),
    ]
    joint = Shape([(5, 10, 14), (1, 16, 16)], 4, 64, Full(), joint=[64, 32], text_first=True)
    found += [
        replace(joint, backward=way).case("attention joint", "two small clips", QUICK + way, devices=("cpu",)) for way in (False, True)
    ]
    grouped = Shape([(6, 10, 14)], 8, 64, FrameCausal(chunk=2), kv_heads=2)
    found.append(grouped.case("attention grouped heads", "MAGI-1, small", QUICK, devices=("cpu",)))
    for op, name, grids, heads, head_dim, mask, text, level in on_cpu:
        found.append(Shape(grids, heads, head_dim, mask, text).case(op, name, level, devices=("cpu",)))
        found.append(Shape(grids, heads, head_dim, mask, text, backward=True).case(op, name, DEFAULT, devices=("cpu",)))
    for frames in (4, 8, 16, 32):
        for mask, label in ((Full(), "full"), (Spatial(), "spatial")):
            shape = Shape([(frames, 8, 8)], 4, 64, mask)
            found.append(shape.case("length", f"{label} attention, {64 * frames} tokens", DEFAULT, f"{label} attention", ("cpu",)))
    return found
