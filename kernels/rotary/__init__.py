"""Normalisation of queries and keys with rotary position embedding over the axes of a video.

    q' = R(position) (norm(q) * weight + bias), and k likewise

R turns pairs of channels by angles position * frequency (RoFormer, Su et al. 2021); the channels are split between the axes (t, h, w).
Pairs are neighbouring channels (`interleaved`), or the two halves of the channels that turn, or of those of each axis. Channels past the
table are normalised and not turned. How models do it:

    Wan, SkyReels, Helios     RMS across heads       interleaved, one table for all heads
    HunyuanVideo              RMS per head           interleaved, video tokens only (`rows`)
    CogVideoX, EasyAnimate    LayerNorm per head     interleaved, video tokens only, with a bias
    Mochi                     RMS per head           interleaved, a table per head; where that is learned, torch's implementation runs
    LTX                       RMS across heads       interleaved or halves, a table per head
    Cosmos                    RMS per head           halves
    Allegro                   none                   halves of each axis: axes=(32, 32, 32)

One launch serves q and k: both are read and written once, whatever the norm. What that costs, per element of q and k in bfloat16, and the
floor at 3.35 TB/s of 32,760 tokens (a clip of 81 frames at 480p) with 24 heads of 128 channels for each (the tables add 0.5 / heads of
float32 per element, 2 % here):

    op           reads and writes              bytes   FLOPs    floor
    forward      q, k -> q', k'                    4      10   240 us
      to E4M3    q, k -> q8, k8                    3      13   180 us
    backward     q, k, dq', dk' -> dq, dk          6      22   361 us

Nothing but the inputs is kept for the backward pass, which computes the statistics again. Gradients of weights and biases are summed in
float32 by at most so many programs, each over its tiles in order, and then over the programs: the same call gives the same bits.
"""

from collections.abc import Sequence

import torch

from ..dispatch import HAS_TRITON, choose, select, with_triton
from .reference import NormRope, norm_rope_both_reference, norm_rope_reference, norm_rope_torch

if HAS_TRITON:
    from . import fused, operator

__all__ = ["NormRope", "check_norm_rope", "norm_rope_reference", "qk_norm_rope", "rotary_table"]


def rotary_table(
    positions: torch.Tensor, dims: Sequence[int], *, theta: float | Sequence[float] = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (tokens, sum(dims) / 2), of positions (tokens, axes).

    Axis i turns dims[i] channels, pair j by position * theta ** (-2 j / dims[i]). theta: one base, or one for each axis. The table is the
    same for neighbouring channels and for halves (of the whole, or with `axes=dims` of each axis). Positions may be fractions. A model's
    own frequencies, also learned or per head, go in by hand: (positions @ frequencies).cos() and its sin.

    Tables of other libraries that hold each angle twice are sliced once to one for each pair: cos[:, ::2].contiguous() where it is
    repeated beside itself (diffusers, `repeat_interleave`), cos[:, : cos.shape[1] // 2] where the whole is; a complex table is its .real
    and .imag, made contiguous.

    Raises ValueError if the axes do not match or a dim is odd.
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
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm: str | None = "rms",
    across_heads: bool = False,
    interleaved: bool = True,
    axes: Sequence[int] | None = None,
    rows: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    fp8: bool = False,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Normalise q and k over head_dim (or, across_heads, over heads and head_dim), then turn them by cos and sin.

    q, k: (tokens, heads, head_dim), k's heads may be fewer, and without a table its tokens of another number. norm: "rms", "layer" or
    None. q_weight, k_weight, and for "layer" q_bias, k_bias: (head_dim,) or, across_heads, (heads * head_dim,).

    cos, sin: float32 (tokens, pairs), or (tokens, heads, pairs) for angles of each head, with a unit last stride and 2 * pairs <=
    head_dim; None for no rotation. interleaved: pairs are neighbouring channels; else the halves of the first 2 * pairs channels, or, with
    `axes`, numbers of channels that add up to these, the halves of each of them in turn. rows: int32 or int64 (tokens,), the table row of
    each token, which is not checked to be in the table; -1 for a token that is normalised and not turned. Without it a token's own.

    Returns (q', k'), contiguous, in the dtypes of q and k. out: where to write them instead, of the shapes and dtypes of q and k, any
    strides but a unit last one: q and k themselves, views of one fused tensor for instance, or a part of a cache of keys. slots: int32 or
    int64 (tokens,), with `out`, the row of out[1] that takes each key, each at most once, -1 for none; out[1] may then have any number of
    tokens, and a CUDA graph serves a cache that moves. fp8: return ((q8, q_scale), (k8, k_scale)), what `quantize_rows` makes of q' and k'
    before they are rounded, and `attention` takes as `scales`. Neither has a gradient; nor have cos and sin in Triton's implementation,
    which "auto" passes over if they require one.

    Raises ValueError or TypeError on a mismatch, and ValueError if a gradient is required that is not there.
    """
    axes = None if axes is None else tuple(axes)
    how = NormRope(q_weight, k_weight, cos, sin, norm, across_heads, interleaved, eps, rows, q_bias, k_bias, axes)
    check_norm_rope(q, k, how)
    _check_results(q, k, how, out, slots, fp8)
    available = {"torch": norm_rope_torch, "reference": norm_rope_both_reference}
    if HAS_TRITON:
        available = with_triton(q, available, fused.norm_rope_fused, fused.unavailable(q, k, how, out, fp8))
    else:
        available = with_triton(q, available)
    if choose("qk_norm_rope", implementation, *available) == "triton":
        return operator.operate(q, k, how, out, slots, fp8, implementation)
    return select("qk_norm_rope", implementation, *available)(q, k, how, out, slots, fp8)


def check_norm_rope(q: torch.Tensor, k: torch.Tensor, how: NormRope) -> None:
    """Raises ValueError or TypeError where `how` does not fit q and k."""
    _check_heads(q, k, how)
    _check_table(q, k, how)


def _check_heads(q: torch.Tensor, k: torch.Tensor, how: NormRope) -> None:
    if how.norm not in ("rms", "layer", None):
        raise ValueError(f"norm: expected 'rms', 'layer' or None, got {how.norm!r}")
    tensors = (("q", q, how.q_weight, how.q_bias), ("k", k, how.k_weight, how.k_bias))
    for name, x, weight, bias in tensors:
        if x.dim() != 3 or x.shape[2] != q.shape[2] or (how.cos is not None and x.shape[0] != q.shape[0]):
            raise ValueError(
                f"{name}: expected (tokens, heads, head_dim) of q's tokens and head_dim, got {tuple(x.shape)} (q is {tuple(q.shape)})"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device}, where q is, got {x.device}")
        size = x.shape[1] * x.shape[2] if how.across_heads else x.shape[2]
        if weight is not None and (weight.shape != (size,) or how.norm is None):
            raise ValueError(f"{name}_weight: expected ({size},) and a norm, got shape {tuple(weight.shape)} with norm {how.norm!r}")
        if bias is not None and (bias.shape != (size,) or how.norm != "layer"):
            raise ValueError(f"{name}_bias: expected ({size},) and a layer norm, got shape {tuple(bias.shape)} with norm {how.norm!r}")
        for parameter, kind in ((weight, "weight"), (bias, "bias")):
            if parameter is not None and parameter.device != x.device:
                raise ValueError(f"{name}_{kind}: expected a tensor on {x.device}, got {parameter.device}")


def _check_table(q: torch.Tensor, k: torch.Tensor, how: NormRope) -> None:
    cos, sin, rows, axes = how.cos, how.sin, how.rows, how.axes
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    if cos is None:
        if rows is not None or axes is not None:
            raise ValueError("rows, axes: expected None without cos and sin, which they concern")
        return
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, to which .float() rounds a table, got {table.dtype}")
        if table.dim() not in (2, 3) or 2 * table.shape[-1] > q.shape[2] or (rows is None and table.shape[0] != q.shape[0]):
            tokens = q.shape[0] if rows is None else "rows"
            raise ValueError(
                f"{name}: expected ({tokens}, at most {q.shape[2] // 2}) or ({tokens}, heads, the same), got {tuple(table.shape)}"
            )
        if table.dim() == 3 and not table.shape[1] == q.shape[1] == k.shape[1]:
            raise ValueError(
                f"{name}: expected a table of as many heads as q and k, {q.shape[1]} and {k.shape[1]}, got {tuple(table.shape)}"
            )
        if table.device != q.device:
            raise ValueError(f"{name}: expected a tensor on {q.device}, got {table.device}")
        if table.numel() and table.shape[-1] > 1 and table.stride(-1) != 1:
            raise ValueError(f"{name}: expected a unit last stride, got strides {table.stride()}: make it .contiguous() once")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if axes is not None and (how.interleaved or sum(axes) != 2 * cos.shape[-1] or any(axis < 2 or axis % 2 for axis in axes)):
        raise ValueError(
            f"axes: expected even numbers of channels that add up to {2 * cos.shape[-1]}, with interleaved=False, got {axes} with "
            f"interleaved={how.interleaved}"
        )
    if rows is not None:
        _check_index("rows", rows, q)


def _check_index(name: str, index: torch.Tensor, x: torch.Tensor) -> None:
    if index.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected ({x.shape[0]},), one for each token, got shape {tuple(index.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device}, got {index.device}")


def _check_results(q, k, how, out, slots, fp8) -> None:
    if slots is not None:
        if out is None:
            raise ValueError("slots: expected None without out, which they concern")
        _check_index("slots", slots, k)
    if out is not None:
        if fp8:
            raise ValueError("fp8: expected False with out, got True")
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise ValueError(f"out: expected (q_out, k_out), got {type(out).__name__}")
        for name, x, y in (("q", q, out[0]), ("k", k, out[1])):
            shape = (y.shape[0], *x.shape[1:]) if name == "k" and slots is not None else x.shape
            if y.shape != shape or y.dtype != x.dtype or y.device != x.device:
                raise ValueError(
                    f"out: expected for {name} {x.dtype} {tuple(shape)} on {x.device}, got {y.dtype} {tuple(y.shape)} on {y.device}"
                )
            if y.numel() and y.stride(-1) != 1:
                raise ValueError(f"out: expected for {name} a unit last stride, got strides {y.stride()}")
    if (out is not None or fp8) and torch.is_grad_enabled():
        tensors = {"q": q, "k": k} | {name: x for name, x in how._asdict().items() if isinstance(x, torch.Tensor)}
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(f"out, fp8: expected no gradient to be required, since there is none, got {name} with requires_grad")
