"""The calls beside attention whose kernels are in the ledger of codegen.py, with the widths of real models.

A call is made with tensors that have a shape and no storage (device "meta"), on the function that launches the kernels; each launch is
compiled for a GPU as it would be there, and not run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_FP8 = ("sm_90", "sm_100")
"""Of those with E4M3: gfx942 has another format of eight bits."""


@dataclass(frozen=True)
class Call:
    """run: makes the call. gpus: those to compile it for. narrow: its kernels that neither read nor write enough for 16 bytes at once."""

    run: Callable[[], object]
    gpus: tuple[str, ...] = GPUS
    narrow: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_with_norm_rope(head_dim: int, grid: tuple[int, int, int], backward: bool = False) -> Callable[[], object]:
    """Attention along time that normalises and turns q and k, views of one tensor, on load."""

    def run():
        from tubelet.kernels import NormRope, Temporal, VideoLayout
        from tubelet.kernels.attention.fused import attention_fused, attention_fused_backward

        layout = VideoLayout.pack([grid])
        qkv = meta(layout.tokens, 3, 16, head_dim).unbind(1)
        weight, table = meta(head_dim), meta(grid[0], head_dim // 2, dtype=torch.float32)
        how = NormRope(weight, weight, table, table, rows=meta(layout.tokens, dtype=torch.int32))
        rest = layout, Temporal(), layout, 0.125
        if not backward:
            return attention_fused(*qkv, *rest, how=how)
        out, lse = meta(*qkv[0].shape), meta(16, layout.tokens, dtype=torch.float32)
        return attention_fused_backward(out, *qkv, out, lse, *rest, how=how)

    return run


def residual_and_norm(channels: int, way: str = "", table: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """Gate, residual and modulated norm, or what of them `way` names, of tables that are views of (rows, 9, channels)."""

    def run():
        from tubelet.kernels.norms.fused import norm_fused, norm_fused_backward

        x, rows = meta(32760, channels), meta(32760, dtype=torch.int32)
        gate, shift, scale, *_ = meta(21, 9, channels, dtype=table).unbind(1)
        y, kind, weight = x, "layer", None
        if "norm alone" in way:
            y = gate = None
        if "affine" in way:
            y = gate = shift = scale = rows = None
            kind, weight = "rms", meta(channels, dtype=table)
        if "gate alone" in way:
            kind = shift = scale = None
        if "tanh" in way:
            kind, shift = "rms", None
        parameters = gate, rows, shift, scale, weight, None, kind, 1e-6, "tanh" in way
        if "backward" not in way:
            return norm_fused("", x, y, *parameters, "fp8" in way, "exact" in way)
        wanted = [kind is not None, gate is not None, *(each is not None for each in (gate, shift, scale, weight)), False]
        dout = None if y is None else x
        return norm_fused_backward("", None if kind is None else x, dout, x, y, *parameters, x.dtype, wanted)

    return run


def patches(dim: int, way: str = "", channels: int = 16, patch: tuple[int, int, int] = (1, 2, 2), sizes=((21, 60, 104),)) -> Callable:
    """Embedding of clips, or its backward pass, or projection and norm and back to the clips, of clips of one size or of several."""

    def run():
        from tubelet.kernels.patch_embed.clips import Source
        from tubelet.kernels.patch_embed.embed import embed
        from tubelet.kernels.patch_embed.gradients import (
            gradient_of_table,
            gradient_of_tokens,
            gradients_of_parameters,
            products_over_tokens,
        )
        from tubelet.kernels.patch_embed.project import project_tokens

        clips = [meta(channels, *size) for size in sizes]
        tokens = sum(t // patch[0] * (h // patch[1]) * (w // patch[2]) for t, h, w in sizes)
        source = Source.of(clips, patch)
        if "of tokens" in way:
            source = Source.of([meta(tokens, source.elements)], [])
        x, weight, rows = meta(tokens, dim), meta(dim, source.elements), meta(tokens, dtype=torch.int32)
        if "backward" in way:
            project_tokens("", x, weight, source, across=True)
            products_over_tokens("", meta(tokens, source.elements), x, x.dtype, wide_sums=True)
            return gradient_of_table("", x, rows, 64)
        if "unpatchify" in way:
            shift, scale = meta(21, 2, dim).unbind(1)
            norm = {"shift": shift, "scale": scale, "rows": rows, "kind": "layer", "eps": 1e-6}
            if "gradients" in way:
                d, statistics = meta(tokens, source.elements), meta(tokens, 2, dtype=torch.float32)
                made = d, d, x, statistics, meta(source.elements, dim), meta(source.elements), shift, scale, rows, None, None, "layer"
                gradient_of_tokens("", *made)
                return gradients_of_parameters("", *made)
            return project_tokens("", x, meta(source.elements, dim), source, bias=meta(source.elements), **norm)
        added = {"positions": [x]} if "positions" in way else {}
        if "tables" in way:
            added = {"positions": [meta(64, dim)] * 3, "places": meta(tokens, 3, dtype=torch.float32)}
            added |= {"known": meta(tokens, dtype=torch.bool), "known_weight": meta(dim)}
        return embed("", source, weight, tokens, x.dtype, bias=meta(dim), **added)

    return run


def norm_rope(heads: int, head_dim: int, way: str, **options) -> Callable[[], object]:
    """Of 32,760 tokens, q and k being views of one tensor, whose table has a row for each."""

    def run():
        from tubelet.kernels import NormRope
        from tubelet.kernels.rotary.fused import norm_rope_fused, norm_rope_fused_backward

        q, k, _ = meta(32760, 3, heads, head_dim).unbind(1)
        weight = meta(heads * head_dim if options.get("across_heads") else head_dim)
        table = meta(32760, head_dim // 2, dtype=torch.float32)
        how = NormRope(weight, weight, table, table, **options)
        if way == " backward":
            return norm_rope_fused_backward(meta(*q.shape), meta(*k.shape), q, k, how)
        return norm_rope_fused(q, k, how, (q, k) if way == " in place" else None, fp8=way == " fp8")

    return run


def rows_to_fp8(*channels: int, gelu: str | None = None) -> Callable[[], object]:
    """Rows of 32,760 tokens, or of their GELU, as E4M3."""

    def run():
        from tubelet.kernels.fp8.fused import quantize_fused

        return quantize_fused("", meta(32760, *channels), gelu)

    return run


def product_of_fp8(inner: int, out: int) -> Callable[[], object]:
    def run():
        from tubelet.kernels.fp8.linear import linear_fused

        x8, weight8 = meta(32760, inner, dtype=torch.float8_e4m3fn), meta(out, inner, dtype=torch.float8_e4m3fn)
        scales = meta(32760, dtype=torch.float32), meta(out, dtype=torch.float32)
        return linear_fused(x8, scales[0], weight8, scales[1], meta(out), torch.bfloat16)

    return run


def solver_step(channels: int, dtype: torch.dtype = torch.float32, tabled: bool = True) -> Callable[[], object]:
    """With guidance, an earlier x0 and known tokens; x in `dtype`, the model's outputs in bfloat16."""

    def run():
        from tubelet.kernels.guidance.fused import guided_step_fused

        x, output = meta(32760, channels, dtype=dtype), meta(32760, channels)
        table, rows = meta(4, 5, dtype=torch.float32), meta(32760, dtype=torch.int32) if tabled else None
        guidance = meta(4, dtype=torch.float32) if tabled else torch.tensor(3.5)
        known = meta(32760, dtype=torch.bool)
        return guided_step_fused(x, output, output, x, table if tabled else table[0], guidance, rows, known, dtype)

    return run


def group_norm(channels: int, groups: int, size: tuple[int, int, int], last: bool = False, backward: bool = False) -> Callable[[], object]:
    """Of a clip of so many frames and pixels, channels-last if `last`."""

    def run():
        from tubelet.kernels.group_norm.fused import group_norm_fused, group_norm_fused_backward

        x, weight = meta(1, channels, *size), meta(channels)
        x = x.to(memory_format=torch.channels_last_3d) if last else x
        if not backward:
            return group_norm_fused(x, weight, weight, groups, 1e-6, True)
        statistics = meta(size[0], groups, 3, dtype=torch.float32)
        return group_norm_fused_backward(x, x, weight, weight, statistics, groups, True, [True] * 3)

    return run


CALLS: dict[str, Call] = {
    **{  # 200 frames: the block kernels
        f"norm, rope, temporal{way} {dim} x {frames}": Call(attention_with_norm_rope(dim, (frames, 4, 4), bool(way)), gpus)
        for dim, frames, way, gpus in (
            (64, 16, "", GPUS[:3]),
            (72, 16, "", GPUS[1:2]),
            (128, 21, "", GPUS[:3]),
            (64, 200, "", GPUS[1:2]),
            (128, 100, "", GPUS[1:2]),
            (64, 16, " backward", GPUS[:3]),
            (64, 200, " backward", GPUS[1:2]),
        )
    },
    **{
        f"norm, rope {name}{way}": Call(norm_rope(*widths, way, **options), gpus)
        for name, widths, options, ways, gpus in (
            ("24 x 128", (24, 128), {}, ("", " backward", " in place"), GPUS),
            ("of 40 x 128 across heads", (40, 128), {"across_heads": True}, ("", " backward"), GPUS),
            ("halves 32 x 128", (32, 128), {"interleaved": False}, ("", " backward"), GPUS[1:2]),
            ("16 x 72", (16, 72), {}, ("", " backward"), GPUS[1:2]),
            ("layer 48 x 64", (48, 64), {"norm": "layer"}, ("", " backward"), GPUS[1:2]),
            ("24 x 128", (24, 128), {}, (" fp8",), WITH_FP8),
        )
        for way in ways
    },
    **{f"gate, residual, norm{way} 3072": Call(residual_and_norm(3072, way)) for way in ("", " norm alone", " gate alone")},
    **{
        f"gate, residual, norm{way} {channels}": Call(residual_and_norm(channels, way), GPUS[1:2])
        for channels, way in ((1152, ""), (1920, ""), (4096, ""), (5120, ""), (3072, " exact"), (3072, " tanh"))
    },
    "gate, residual, norm 5120, float32 tables": Call(residual_and_norm(5120, table=torch.float32), GPUS[1:2]),
    "gate, residual, norm affine 128": Call(residual_and_norm(128, " affine")),
    "gate, residual, norm fp8 3072": Call(residual_and_norm(3072, " fp8"), WITH_FP8),
    "gate, residual, norm alone fp8 3072": Call(residual_and_norm(3072, " norm alone fp8"), WITH_FP8, ("norm_forward",)),  # stores 8 bytes
    "gate, residual, norm backward 3072": Call(residual_and_norm(3072, " backward"), narrow=("sum_chunks",)),
    "gate, residual, norm affine backward 128": Call(residual_and_norm(128, " affine backward"), narrow=("sum_chunks",)),
    **{
        f"gate, residual, norm{way} backward {channels}": Call(residual_and_norm(channels, way + " backward"), GPUS[1:2], ("sum_chunks",))
        for channels, way in ((1152, ""), (1920, ""), (4096, ""), (5120, ""), (3072, " norm alone"), (3072, " gate alone"), (3072, " tanh"))
    },
    "gate, residual, norm backward 5120, float32 tables": Call(
        residual_and_norm(5120, " backward", torch.float32), GPUS[1:2], ("sum_chunks",)
    ),
    **{f"patches{way} {dim}": Call(patches(dim, way)) for dim, way in ((1536, ""), (1536, " tables"), (1536, " unpatchify"))},
    **{f"patches{way} 5120": Call(patches(5120, way), GPUS[1:2]) for way in ("", " of tokens", " unpatchify", " unpatchify of tokens")},
    **{
        f"patches unpatchify gradients {dim} of {channels}": Call(patches(dim, " unpatchify gradients", channels), gpus, ("sum_parts",))
        for dim, channels, gpus in ((1536, 16, GPUS), (5120, 16, GPUS[1:2]), (3072, 48, GPUS[1:2]))
    },
    **{
        f"patches backward {dim}": Call(patches(dim, " backward"), gpus, ("sum_rows", "sum_parts"))
        for dim, gpus in ((1536, GPUS), (5120, GPUS[1:2]))
    },
    "patches of several sizes 1536": Call(patches(1536, sizes=((21, 60, 104), (1, 128, 128), (5, 40, 72))), narrow=("describe_clips",)),
    **{  # CogVideoX 2B, and 1.5, whose rows of 90 and 170 pixels are aligned to 4 bytes
        f"patches{way} {dim}": Call(patches(dim, way, 16, patch, (size,)), GPUS[1:2], ("tokens_to_clips", "sum_rows", "sum_parts"))
        for dim, patch, size in ((1920, (1, 2, 2), (13, 60, 90)), (3072, (2, 2, 2), (22, 96, 170)))
        for way in (" positions", " unpatchify", " backward")
    },
    **{f"patches{way} of 48 channels 3072": Call(patches(3072, way, 48)) for way in ("", " unpatchify")},  # Wan 2.2 5B
    **{  # stores of 8 bytes
        f"rows to fp8{name}": Call(rows_to_fp8(*channels, gelu=gelu), WITH_FP8, narrow)
        for name, channels, gelu, narrow in (
            (" 3072", (3072,), None, ("quantize_forward",)),
            (" 24 x 128", (24, 128), None, ()),
            (", GELU 13824", (13824,), "tanh", ("quantize_forward",)),
            (", GELU 8960", (8960,), "tanh", ("quantize_forward",)),
            (", exact GELU 13824", (13824,), "none", ("quantize_forward",)),
        )
    },
    **{f"product of fp8 {inner} x {out}": Call(product_of_fp8(inner, out), WITH_FP8) for inner, out in ((2048, 2048), (2048, 8192))},
    "solver step 64": Call(solver_step(64)),
    "solver step bfloat16 64": Call(solver_step(64, torch.bfloat16)),
    "solver step of one row 192": Call(solver_step(192, tabled=False), GPUS[1:2]),
    **{
        f"group norm{way} {channels} of {groups}": Call(
            group_norm(channels, groups, (17, 60, 104), "last" in way, "backward" in way),
            gpus,
            ("merge_statistics", "group_statistics", "group_gradient_sums", "merge_gradient_sums")  # whose results are few
            + (("group_normalise", "group_gradient") if "last" in way and channels < 8 * groups else ()),  # a group has 8 bytes of a row
        )
        for way in ("", " channels last", " backward", " channels last backward")
        for channels, groups, gpus in ((512, 32, GPUS), (128, 32, GPUS[1:2]))
    },
}
