"""Modulated norms and gated residuals: the definition in float64, and plain torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..dispatch import watched
from ..fp8 import quantize_rows


class Modulation(NamedTuple):
    """The norm that follows a gated residual: `shift` and `scale` (rows, channels) or None, and the kind of norm."""

    shift: torch.Tensor | None
    scale: torch.Tensor | None
    kind: str = "layer"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6


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


def modulated_norm_torch(x: torch.Tensor, norm: Modulation, rows: torch.Tensor | None, fp8: bool = False, exact: bool = False):
    """In exact mode the plain expression: the norm in x's dtype, and each step after it in the dtype that torch promotes to."""
    dtype = x.dtype
    if fp8 and not exact:  # rounded once, to E4M3
        x, shift, scale = (None if each is None else each.to(torch.promote_types(each.dtype, torch.float32)) for each in (x, *norm[:2]))
        norm = norm._replace(shift=shift, scale=scale)
    y = norm_torch(x, norm.kind, norm.weight, norm.bias, norm.eps)
    y = y.to(dtype) if exact else y
    y = _with_rows(_multiply_add, rows, [y], [None if norm.scale is None else 1 + norm.scale, norm.shift], exact)
    return quantize_rows(y, implementation="torch") if fp8 else y.to(dtype)


def gated_residual_torch(x, y, gate, rows, norm, tanh_gate=False, fp8=False, exact=False):
    out = _with_rows(_add_product, None if gate is None else rows, [x, y], [gate.tanh() if tanh_gate else gate], exact).to(x.dtype)
    return out if norm is None else (out, modulated_norm_torch(out, norm, rows, fp8, exact))


def _multiply_add(x: torch.Tensor, factor: torch.Tensor | None, term: torch.Tensor | None, exact: bool) -> torch.Tensor:
    """x * factor + term, rounded once, or in exact mode after each step."""
    if factor is not None and term is not None and not exact:
        return torch.addcmul(term, x, factor)
    x = x if factor is None else x * factor
    return x if term is None else x + term


def _add_product(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor | None, exact: bool) -> torch.Tensor:
    return _multiply_add(y, factor, x, exact)


def _with_rows(function: Callable, rows: torch.Tensor | None, tokens: list, tables: list, exact: bool) -> torch.Tensor:
    """function of tensors (tokens, channels), of the row that each token has in tables, and `exact`. On a CPU, where looking at the index
    costs nothing, a row that neighbours share, such as those of a frame, is not written out for each of them.
    """
    if rows is not None and rows.device.type == "cpu" and not watched((rows,)):
        values, counts = torch.unique_consecutive(rows, return_counts=True)
        if 2 * len(values) <= len(rows):
            lengths, shared = counts.tolist(), [None if table is None else _gather(table, values)[:, None] for table in tables]
            if len(set(lengths)) == 1:
                return function(*(x.unflatten(0, (-1, lengths[0])) for x in tokens), *shared, exact).flatten(0, 1)
            if 8 * len(values) < len(rows):
                parts = [x.split(lengths) for x in tokens]
                parts += [[None] * len(values) if table is None else table for table in shared]
                return torch.cat([function(*part, exact) for part in zip(*parts, strict=True)])
    return function(*tokens, *(None if table is None else _gather(table, rows) for table in tables), exact)


def _gather(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return _Gather.apply(table, rows) if table.requires_grad and torch.is_grad_enabled() else table.index_select(0, rows)


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


def modulated_norm_reference(x: torch.Tensor, norm: Modulation, rows: torch.Tensor | None, fp8: bool = False, exact: bool = False):
    """The definition, in float64, which rounds nothing that an exact mode could order."""
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
    return quantize_rows(y, implementation="reference") if fp8 else y.to(x.dtype)


def gated_residual_reference(x, y, gate, rows, norm, tanh_gate=False, fp8=False, exact=False):
    """The definition, in float64; the norm reads the sum before it is rounded."""
    y = y.double()
    if gate is not None:
        y = y * (gate.double().tanh() if tanh_gate else gate.double())[rows.long()]
    out = x.double() + y
    if norm is None:
        return out.to(x.dtype)
    normed = modulated_norm_reference(out, norm, rows, fp8)
    return out.to(x.dtype), normed if fp8 else normed.to(x.dtype)
