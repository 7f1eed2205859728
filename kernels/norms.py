"""Normalisation with modulation, and the gated residual that precedes it in a diffusion transformer (adaLN; Peebles & Xie 2023).

    modulated_norm:  y = norm(x) * (1 + scale[row]) + shift[row]
    gated_residual:  x' = x + gate[row] * y, and optionally modulated_norm(x') in the same pass

Each token finds its row of the modulation table through an int32 index, so that a condition that is shared by a frame or a clip is stored
once. Fused, the first reads x and writes y: 2 * tokens * channels elements, about 8 FLOPs each; the second with its norm reads two and
writes two. Both are bound by memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dispatch import select


class Modulation(NamedTuple):
    """The norm that follows a gated residual: `shift` and `scale` (rows, channels) or None, and the kind of norm."""

    shift: torch.Tensor | None
    scale: torch.Tensor | None
    kind: str = "layer"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6


def modulated_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> torch.Tensor:
    """y = norm(x) * (1 + scale[rows]) + shift[rows], in x's dtype, computed in float32 or better.

    x: (tokens, channels). shift, scale: (rows, channels) or None. rows: int32 or int64 (tokens,), the table row of each token; needed with
    shift or scale. kind: "layer" (LayerNorm) or "rms" (Zhang & Sennrich 2019). weight, bias: (channels,) of the norm itself. Raises
    ValueError or TypeError on a mismatch.
    """
    _check_tokens(x)
    _check_table(x, rows, shift=shift, scale=scale)
    _check_norm(x, kind, weight, bias)
    run = select("modulated_norm", implementation, {"torch": _modulated_norm_torch, "reference": modulated_norm_reference}, _PENDING)
    return run(x, Modulation(shift, scale, kind, weight, bias, eps), rows)


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    norm: Modulation | None = None,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x' = x + gate[rows] * y, in x's dtype; with `norm`, (x', the modulated norm of x') in one pass.

    x, y: (tokens, channels). gate: (rows, channels) or None for a plain residual. rows: int32 or int64 (tokens,), shared by gate, shift and
    scale. Raises ValueError or TypeError on a mismatch.
    """
    _check_tokens(x)
    if y.shape != x.shape:
        raise ValueError(f"y: expected the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    _check_table(x, rows, gate=gate)
    if norm is not None:
        _check_table(x, rows, shift=norm.shift, scale=norm.scale)
        _check_norm(x, norm.kind, norm.weight, norm.bias)
    run = select("gated_residual", implementation, {"torch": _gated_residual_torch, "reference": gated_residual_reference}, _PENDING)
    return run(x, y, gate, rows, norm)


_PENDING = {"triton": "this op has no Triton kernel yet", "gluon": "this op has no Gluon kernel"}


def _check_tokens(x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected (tokens, channels), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating point dtype, got {x.dtype}")


def _check_table(x: torch.Tensor, rows: torch.Tensor | None, **tables: torch.Tensor | None) -> None:
    given = {name: table for name, table in tables.items() if table is not None}
    for name, table in given.items():
        if table.dim() != 2 or table.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected (rows, {x.shape[1]}), got shape {tuple(table.shape)}")
        if table.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {table.device}")
    if given and rows is None:
        raise ValueError(f"rows: expected the table row of each token along with {' and '.join(given)}, got None")
    if rows is not None:
        if rows.shape != x.shape[:1]:
            raise ValueError(f"rows: expected ({x.shape[0]},), one for each token, got shape {tuple(rows.shape)}")
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows: expected int32 or int64, got {rows.dtype}")


def _check_norm(x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected ({x.shape[1]},), got shape {tuple(parameter.shape)}")
    if kind == "rms" and bias is not None:
        raise ValueError("bias: expected None, since an RMS norm has no bias")


def norm_torch(x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The library's norm over the last axis, in x's dtype or in float32."""
    size = x.shape[-1:]
    if kind == "layer" and weight is None and bias is None:
        return F.layer_norm(x, size, eps=eps)  # accumulates in float32 for half precision
    # The others in float32: the library composes its RMS norm of several passes, slow in half precision, and on a CPU sums the gradient of
    # a weight over the tokens in x's dtype: in bfloat16 that is 7 % off at 3000 tokens.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
    return F.layer_norm(x, size, weight, bias, eps) if kind == "layer" else F.rms_norm(x, size, weight, eps)


def _modulated_norm_torch(x: torch.Tensor, norm: Modulation, rows: torch.Tensor | None) -> torch.Tensor:
    y = norm_torch(x, norm.kind, norm.weight, norm.bias, norm.eps)
    if norm.scale is not None:
        y = y * (1 + _Gather.apply(norm.scale, rows))
    if norm.shift is not None:
        y = y + _Gather.apply(norm.shift, rows)
    return y.to(x.dtype)


def _gated_residual_torch(x, y, gate, rows, norm):
    out = (x + (y if gate is None else y * _Gather.apply(gate, rows))).to(x.dtype)
    return out if norm is None else (out, _modulated_norm_torch(out, norm, rows))


class _Gather(torch.autograd.Function):
    """table[rows]. The library's own backward sums a row's gradient over its tokens in the table's dtype, and in bfloat16 that sum stalls:
    6 % off at 2000 tokens a row. Here it is summed in float32.
    """

    @staticmethod
    def forward(ctx, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = table.shape
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return wide.new_zeros(ctx.shape).index_add_(0, ctx.saved_tensors[0], wide).to(grad.dtype), None


def modulated_norm_reference(x: torch.Tensor, norm: Modulation, rows: torch.Tensor | None) -> torch.Tensor:
    """The definition, in float64."""
    y = x.double()
    if norm.kind == "layer":
        y = y - y.mean(dim=-1, keepdim=True)
    y = y / (y.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        y = y * norm.weight.double()
    if norm.bias is not None:
        y = y + norm.bias.double()
    if norm.scale is not None:
        y = y * (1 + norm.scale.double()[rows.long()])
    if norm.shift is not None:
        y = y + norm.shift.double()[rows.long()]
    return y.to(x.dtype)


def gated_residual_reference(x, y, gate, rows, norm):
    """The definition, in float64; the norm reads the sum before it is rounded."""
    out = x.double() + (y.double() if gate is None else y.double() * gate.double()[rows.long()])
    if norm is None:
        return out.to(x.dtype)
    return out.to(x.dtype), modulated_norm_reference(out, norm, rows).to(x.dtype)
