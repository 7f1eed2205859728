"""Normalisation with modulation, and the gated residual that precedes it in a diffusion transformer (adaLN; Peebles & Xie 2023).

    modulated_norm:  y = norm(x) * (1 + scale[row]) + shift[row]
    gated_residual:  x' = x + gate[row] * y, and optionally modulated_norm(x') in the same pass

Each token finds its row of the modulation table through an int32 index, so that a condition that is shared by a frame or a clip is stored
once. All are bound by memory: everything is read and written once, norms included, and written again as E4M3 with a scale for each token
(`quantize_rows`) for a product in FP8 if that is asked for. What they cost, per element of x, in bfloat16, and the floor at 3.35 TB/s of
32,760 tokens of 3072 channels (a clip of 81 frames at 480p):

    op                                        reads and writes                      bytes   FLOPs    floor
    modulated_norm                            x -> y                                    4       8   120 us
      to E4M3                                 x -> y8                                   3      10    90 us
      backward                                dy, x -> dx                               6      20   180 us
    gated_residual                            x, y -> x'                                6       2   180 us
      backward                                dx', y -> dy                              6       4   180 us
    gated_residual and norm                   x, y -> x', normed                        8      10   240 us
      to E4M3                                 x, y -> x', normed8                       7      12   210 us
      backward                                dnormed, dx', x', y -> dx, dy            12      24   361 us

The gradients of tables and parameters cost nothing more to read: they are summed while those of x and y are computed, chunk by chunk of 32
tokens or more of a row, whose float32 sums, up to three, are written and read once more: at most 0.75 bytes per element, unless rows have
fewer tokens than that. Before that the row index is sorted. No sum is atomic, and all are in float32: the same call gives the same bits,
and the sums of a row of the tables have the same bits whatever else is in the pack.

By default a result of the kernels is rounded once, at its end. With `exact` it is rounded where the plain expression of torch rounds, whose
numbers a model that was trained or validated with it may want back: the norm (with weight and bias, as `F.layer_norm` and `F.rms_norm` do)
to x's dtype, 1 + scale, the product, the sum, each to the dtype that torch promotes to; the gate's tanh and product and the sum; and the
norm reads the rounded x'. That costs no bytes, and up to six roundings for each element. x' without a tanh is then bit for bit that of the
plain expression; of the norm, in half precision, 99.98 % of the elements are, measured against the library on a CPU (99.9 % is what the
tests demand; by default it is 60 to 77 %), and the others lie a rounding of an intermediate result away: there the last bits of float32
decide, since statistics are summed in another order.
In float32 results agree to these last bits, as by default. The backward pass is the same in both modes: it reads the rounded x'.
"""

import torch

from ..dispatch import HAS_TRITON, choose, select, with_triton
from .reference import (
    Modulation,
    gated_residual_reference,
    gated_residual_torch,
    modulated_norm_reference,
    modulated_norm_torch,
    norm_torch,
)

if HAS_TRITON:
    from . import fused

__all__ = ["Modulation", "gated_residual", "modulated_norm", "norm_torch"]


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
    fp8: bool = False,
    exact: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = norm(x) * (1 + scale[rows]) + shift[rows], in x's dtype, computed in float32 or better (by "torch", whose functions round to half
    precision in between, in their dtype).

    x: (tokens, channels). shift, scale: (rows, channels) or None, of any floating point dtype. rows: int32 or int64 (tokens,), the table
    row of each token, which is not checked to be in the table; needed with shift or scale. kind: "layer" (LayerNorm) or "rms" (Zhang &
    Sennrich 2019). weight, bias: (channels,) of the norm itself. exact: round in the order of the plain torch expression (see the module);
    "reference" rounds nothing.

    fp8: give (y8, scales) instead, what `quantize_rows` makes of y before that is rounded to x's dtype (in exact mode, of the plain
    expression's y): float8_e4m3fn (tokens, channels) and float32 (tokens,). It has no gradient.

    Gradients of shift, scale, weight and bias are summed over the tokens in float32. Raises ValueError or TypeError on a mismatch, and
    ValueError if a gradient of FP8 is required.
    """
    _check_tokens(x)
    _check_table(x, rows, shift=shift, scale=scale)
    _check_norm(x, kind, weight, bias)
    if fp8:
        _check_no_gradient(x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    rows = None if shift is None and scale is None else rows
    available = _implementations(
        "modulated_norm",
        {"torch": modulated_norm_torch, "reference": modulated_norm_reference},
        x,
        fp8,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
    )
    if choose("modulated_norm", implementation, *available) == "triton":
        y, scales = fused.modulated_norm(x, shift, scale, rows, weight, bias, kind, eps, fp8, exact, implementation)
        return (y, scales) if fp8 else y
    run = select("modulated_norm", implementation, *available)
    return run(x, Modulation(shift, scale, kind, weight, bias, eps), rows, fp8, exact)


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    norm: Modulation | None = None,
    tanh_gate: bool = False,
    fp8: bool = False,
    exact: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """x' = x + gate[rows] * y, in x's dtype; with `norm`, (x', the modulated norm of x') in one pass.

    x, y: (tokens, channels). gate: (rows, channels) or None for a plain residual. rows: int32 or int64 (tokens,), shared by gate, shift and
    scale, not checked to be in the tables. norm: reads x' before it is rounded, where an implementation can. tanh_gate: tanh(gate) in
    place of gate (Mochi). exact: round in the order of the plain torch expression (see the module); "reference" rounds nothing. fp8: the
    norm comes as E4M3, (x', (y8, scales)), as in `modulated_norm`, without a gradient. Raises ValueError or TypeError on a mismatch, and
    ValueError if a gradient of FP8 is required.
    """
    _check_tokens(x)
    if y.shape != x.shape:
        raise ValueError(f"y: expected the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    _check_beside(x, y=y)
    if norm is None:
        _check_table(x, rows, gate=gate)
    else:
        _check_table(x, rows, gate=gate, shift=norm.shift, scale=norm.scale)
        _check_norm(x, norm.kind, norm.weight, norm.bias)
    if tanh_gate and gate is None:
        raise ValueError("tanh_gate: expected False without a gate, got True")
    if fp8:
        if norm is None:
            raise ValueError("fp8: expected False without a norm, which is what it concerns, got True")
        _check_no_gradient(x=x, y=y, gate=gate, shift=norm.shift, scale=norm.scale, weight=norm.weight, bias=norm.bias)
    shift, scale, kind, weight, bias, eps = norm or Modulation(None, None, None)
    rows = None if gate is None and shift is None and scale is None else rows
    available = _implementations(
        "gated_residual",
        {"torch": gated_residual_torch, "reference": gated_residual_reference},
        x,
        fp8,
        y=y,
        gate=gate,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
    )
    if choose("gated_residual", implementation, *available) != "triton":
        return select("gated_residual", implementation, *available)(x, y, gate, rows, norm, tanh_gate, fp8, exact)
    out, normed, scales = fused.gated_residual(
        x, y, gate, rows, shift, scale, weight, bias, kind, eps, tanh_gate, fp8, exact, implementation
    )
    return out if norm is None else (out, (normed, scales) if fp8 else normed)


def _implementations(op, others, x, fp8, **tensors):
    if not HAS_TRITON:
        return with_triton(x, others)
    return with_triton(x, others, getattr(fused, op), fused.unavailable(x, fp8, **tensors))


def _check_tokens(x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected (tokens, channels), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating point dtype, got {x.dtype}")


def _check_beside(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {other.device}")


def _check_table(x: torch.Tensor, rows: torch.Tensor | None, **tables: torch.Tensor | None) -> None:
    given = {name: table for name, table in tables.items() if table is not None}
    first = next(iter(given.values()), None)
    for name, table in given.items():
        if table.dim() != 2 or table.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected (rows, {x.shape[1]}), got shape {tuple(table.shape)}")
        if table.shape[0] != first.shape[0]:
            raise ValueError(f"{name}: expected {first.shape[0]} rows as {next(iter(given))} has, got shape {tuple(table.shape)}")
    _check_beside(x, **given, rows=rows)
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
    _check_beside(x, weight=weight, bias=bias)
    if kind == "rms" and bias is not None:
        raise ValueError("bias: expected None, since an RMS norm has no bias")


def _check_no_gradient(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(f"fp8: expected no gradient to be required, since there is none, got {name} with requires_grad")
