"""Normalisation of queries and keys with rotary position embedding over the axes of a video.

    q' = R(position) norm(q) * weight, and k likewise

R turns pairs of channels by angles position * frequency (RoFormer, Su et al. 2021); the channels are split between the axes (t, h, w).
Pairs are neighbouring channels (`interleaved`) or the two halves of the rotated channels. Channels past the table are normalised and not
turned. Fused, q and k are read and written once: 4 * tokens * heads * head_dim elements, about 10 FLOPs each; memory binds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .dispatch import select
from .norms import norm_torch


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


def rotary_table(
    positions: torch.Tensor, dims: Sequence[int], *, theta: float | Sequence[float] = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (tokens, sum(dims) / 2), of positions (tokens, axes).

    Axis i turns dims[i] channels, pair j by position * theta ** (-2 j / dims[i]). theta: one base, or one for each axis. Raises ValueError
    if the axes do not match or a dim is odd.
    """
    thetas = list(theta) if isinstance(theta, Sequence) else [theta] * len(dims)
    if positions.dim() != 2 or positions.shape[1] != len(dims) or len(thetas) != len(dims):
        raise ValueError(
            f"positions: expected (tokens, {len(dims)}) for dims {tuple(dims)}, got {tuple(positions.shape)}, {len(thetas)} thetas"
        )
    if any(dim % 2 for dim in dims):
        raise ValueError(f"dims: expected even numbers of channels, got {tuple(dims)}")
    angles = []
    for axis, (dim, base) in enumerate(zip(dims, thetas, strict=True)):
        frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1))
        angles.append(positions[:, axis].double()[:, None] * frequencies)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    norm: str | None = "rms",
    across_heads: bool = False,
    interleaved: bool = True,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise q and k over head_dim (or, across_heads, over heads and head_dim), then turn them by cos and sin.

    q, k: (tokens, heads, head_dim), k's heads may be fewer. q_weight, k_weight: (head_dim,) or, across_heads, (heads * head_dim,). cos,
    sin: (tokens, pairs) float32, 2 * pairs <= head_dim, or None for no rotation. norm: "rms", "layer" or None. Returns contiguous tensors
    in the dtypes of q and k. Raises ValueError on a mismatch.
    """
    if norm not in ("rms", "layer", None):
        raise ValueError(f"norm: expected 'rms', 'layer' or None, got {norm!r}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        if x.dim() != 3 or x.shape[::2] != q.shape[::2]:
            raise ValueError(
                f"{name}: expected (tokens, heads, head_dim) of q's tokens and head_dim, got {tuple(x.shape)} (q is {tuple(q.shape)})"
            )
        size = x.shape[1] * x.shape[2] if across_heads else x.shape[2]
        if weight is not None and (weight.shape != (size,) or norm is None):
            raise ValueError(f"{name}_weight: expected ({size},) and a norm, got shape {tuple(weight.shape)} with norm {norm!r}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (table.dim() != 2 or table.shape[0] != q.shape[0] or 2 * table.shape[1] > q.shape[2]):
            raise ValueError(f"{name}: expected ({q.shape[0]}, at most {q.shape[2] // 2}), got {tuple(table.shape)}")
    if cos is not None and cos.shape != sin.shape:
        raise ValueError(f"sin: expected the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    run = select(
        "qk_norm_rope",
        implementation,
        {"torch": _norm_rope_torch, "reference": norm_rope_reference},
        {"triton": "this op has no Triton kernel yet", "gluon": "this op has no Gluon kernel"},
    )
    return tuple(run(x, weight, cos, sin, norm, across_heads, interleaved, eps) for x, weight in ((q, q_weight), (k, k_weight)))


def _norm_rope_torch(x, weight, cos, sin, norm, across_heads, interleaved, eps):
    y = x.flatten(1) if across_heads else x
    if norm is not None:
        y = norm_torch(y, norm, weight, None, eps)
    y = y.reshape(x.shape)
    if cos is None:
        return y.to(x.dtype).contiguous()
    pairs = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = y[..., : 2 * pairs], y[..., 2 * pairs :]
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    parts = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((turned, rest), dim=-1).to(x.dtype)


def norm_rope_reference(x, weight, cos, sin, norm, across_heads, interleaved, eps):
    """The definition, in float64: pairs as complex numbers, turned by exp(i angle)."""
    y = x.double()
    over = (1, 2) if across_heads else (2,)
    if norm == "layer":
        y = y - y.mean(dim=over, keepdim=True)
    if norm is not None:
        y = y / (y.square().mean(dim=over, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * (weight.double().view(x.shape[1:]) if across_heads else weight.double())
    if cos is not None:
        pairs = cos.shape[1]
        first = torch.arange(pairs, device=x.device) * (2 if interleaved else 1)
        second = first + (1 if interleaved else pairs)
        turned = torch.complex(y[..., first], y[..., second]) * torch.complex(cos.double(), sin.double())[:, None]
        y = y.clone()
        y[..., first], y[..., second] = turned.real, turned.imag
    return y.to(x.dtype).contiguous()
