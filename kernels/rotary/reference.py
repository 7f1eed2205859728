"""Norm and rotation of queries or keys: the definition in float64, and plain torch; and what is done to both, as one record."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..fp8 import quantize_rows
from ..norms import norm_torch


class NormRope(NamedTuple):
    """The arguments of `qk_norm_rope`, for an op that does the same to q and k where it reads them."""

    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    norm: str | None = "rms"
    across_heads: bool = False
    interleaved: bool = True
    eps: float = 1e-6
    rows: torch.Tensor | None = None
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    axes: tuple[int, ...] | None = None


def pairs_of(pairs: int, interleaved: bool, axes: Sequence[int] | None, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that are the first and the second of each pair of a table."""
    j = torch.arange(pairs, device=device)
    if interleaved:
        return 2 * j, 2 * j + 1
    halves = [axis // 2 for axis in axes] if axes else [pairs]
    half = torch.cat([torch.full((each,), each, device=device) for each in halves])
    start = torch.cat([torch.full((each,), sum(halves[:i]), device=device) for i, each in enumerate(halves)])
    return start + j, start + j + half


def norm_rope_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    how: NormRope,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    fp8: bool = False,
):
    """q and k, new or in `out`, or with `fp8` each as E4M3 and its scales."""
    q, k = (
        _norm_rope_torch(x, weight, bias, how, fp8) for x, weight, bias in ((q, how.q_weight, how.q_bias), (k, how.k_weight, how.k_bias))
    )
    if fp8:
        return quantize_rows(q, implementation="torch"), quantize_rows(k, implementation="torch")
    return (q, k) if out is None else _write(q, k, out, slots)


def _norm_rope_torch(x, weight, bias, how, wide):
    dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
    y = x.to(dtype)
    if how.norm is not None:
        y = norm_torch(y.flatten(1) if how.across_heads else y, how.norm, weight, bias, how.eps).reshape(x.shape)
    if how.cos is None:
        return y.to(dtype).contiguous()
    cos, sin = (table if table.dim() == 3 else table[:, None] for table in (how.cos, how.sin))
    if how.rows is not None:
        cos, sin = (table.index_select(0, how.rows.clamp(min=0)) for table in (cos, sin))
    result = _turn(y, cos, sin, how.interleaved, how.axes)
    if how.rows is not None:
        result = torch.where((how.rows >= 0)[:, None, None], result, y)
    return result.to(dtype)


def _turn(y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, axes: Sequence[int] | None) -> torch.Tensor:
    """The first pairs of y (tokens, heads, head_dim) turned, in the dtype that it and the tables promote to."""
    pairs = cos.shape[-1]
    turned, rest = y[..., : 2 * pairs], y[..., 2 * pairs :]
    wide = torch.promote_types(y.dtype, cos.dtype)
    if interleaved and wide.itemsize > 2 and not torch.compiler.is_compiling():  # half types have no complex numbers, or slow ones
        # Pairs as complex numbers, which a compiler would not fuse: no neighbours are gathered. Each product has one term that is not zero,
        # so that no bit depends on whether the processor rounds once or twice, which it does by a number's place.
        cos, sin = cos.to(wide), sin.to(wide)
        zero = torch.zeros_like(cos)
        z = torch.view_as_complex(turned.to(wide).contiguous().unflatten(-1, (-1, 2)))
        z = z * torch.complex(cos, zero) + z * torch.complex(zero, sin)
        parts = [torch.view_as_real(z).flatten(-2)]
    elif interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        parts = [torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)]
    else:
        parts, start = [], 0
        for each in [turned] if axes is None else turned.split(list(axes), dim=-1):
            a, b = each.chunk(2, dim=-1)
            c, s = (table[..., start : start + a.shape[-1]] for table in (cos, sin))
            start += a.shape[-1]
            parts += [a * c - b * s, a * s + b * c]
    if rest.shape[-1]:
        parts.append(rest)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norm_rope_both_reference(q, k, how, out=None, slots=None, fp8=False):
    """The same by the definition."""
    options = (how.cos, how.sin, how.norm, how.across_heads, how.interleaved, how.eps)
    exact = (
        norm_rope_reference(x.double(), weight, *options, bias, how.axes, how.rows)
        for x, weight, bias in ((q, how.q_weight, how.q_bias), (k, how.k_weight, how.k_bias))
    )
    if fp8:
        return tuple(quantize_rows(x, implementation="reference") for x in exact)
    results = tuple(y.to(x.dtype) for y, x in zip(exact, (q, k), strict=True))
    return results if out is None else _write(*results, out, slots)


def norm_rope_reference(x, weight, cos, sin, norm, across_heads, interleaved, eps, bias=None, axes=None, rows=None):
    """The definition, in float64: pairs as complex numbers, turned by exp(i angle)."""
    y = x.double()
    over = (1, 2) if across_heads else (2,)
    if norm == "layer":
        y = y - y.mean(dim=over, keepdim=True)
    if norm is not None:
        y = y / (y.square().mean(dim=over, keepdim=True) + eps).sqrt()
    shape = x.shape[1:] if across_heads else x.shape[2:]
    if weight is not None:
        y = y * weight.double().view(shape)
    if bias is not None:
        y = y + bias.double().view(shape)
    if cos is not None:
        turn = torch.complex(cos.double(), sin.double())
        turn = turn if turn.dim() == 3 else turn[:, None]
        if rows is not None:
            turn = torch.where((rows >= 0)[:, None, None], turn[rows.long().clamp(min=0)], 1.0)
        first, second = pairs_of(cos.shape[-1], interleaved, axes, x.device)
        turned = torch.complex(y[..., first], y[..., second]) * turn
        y = y.clone()
        y[..., first], y[..., second] = turned.real, turned.imag
    return y.to(x.dtype).contiguous()


def _write(q, k, out, slots):
    """q into its place, and k into its own or into the rows of a cache that `slots` say."""
    out[0].copy_(q)
    if slots is None:
        out[1].copy_(k)
    else:  # what belongs nowhere goes to a row past the end
        rows = out[1].shape[0]
        longer = torch.cat((out[1], out[1].new_empty(1, *out[1].shape[1:])))
        out[1].copy_(longer.index_copy_(0, torch.where((slots < 0) | (slots >= rows), rows, slots).long(), k)[:rows])
    return out
