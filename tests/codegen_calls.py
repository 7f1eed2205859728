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
            (128, 21, " backward", GPUS[1:2]),
            (64, 200, " backward", GPUS[1:2]),
        )
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
}
