"""Spacetime attention over packs: out = softmax(scale * q k^T + mask) v, the mask a rule on coordinates.

FLOPs: 4 * d * heads * visible (query, key) pairs. Bytes: q, k, v read once and out written once; nothing else is needed, since no mask
matrix exists.
"""

import math

import torch

from ..dispatch import choose
from ..fp8 import FP8, Scales
from ..layout import VideoLayout
from ..masks import Mask
from ..rotary import NormRope, check_norm_rope, qk_norm_rope
from .choice import Stretch, stretches
from .merge import merge_attention
from .operator import implementations, operator, run

__all__ = ["attention", "merge_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    *,
    kv_layout: VideoLayout | None = None,
    scale: float | None = None,
    scales: Scales | None = None,
    norm_rope: NormRope | None = None,
    text_lengths: torch.Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each clip of a pack to itself or to the same clip of another pack.

    q: (tokens, heads, head_dim); k, v: (kv tokens, kv heads, head_dim), kv heads dividing heads; any strides but a unit last one, so views
    of a fused QKV tensor serve. layout: where the queries lie. mask: `Full()`, `Spatial()`, `Temporal(...)` or `FrameCausal(...)`.
    kv_layout: where keys and values lie if not in `layout` (text for cross-attention; a longer clip for a cache), clip i attending to clip
    i. scale: 1 / sqrt(head_dim) by default, not below zero. scales: for q, k and v in float8_e4m3fn, those of their rows, float32 (tokens,
    heads) and twice (kv tokens, kv heads), as `quantize_rows` gives them. norm_rope: what `qk_norm_rope` is to do to q and k before; the
    kernels of Temporal do it where they read them (norms of single heads, tables shared by heads, pairs of neighbours or halves of the head
    dim), else it is called. text_lengths: int32 (clips,), of the keys of each clip's text how many are there, the first ones; the others
    are padding that no query sees, whatever stands there, and have a gradient of zero (through norm_rope, which is done before, if they are
    numbers). Lengths below zero or past the text's end are clamped. The host does not read it. Not for Temporal.
    implementation: "auto" is Triton's on a GPU, but for long clips on Hopper, where SDPA was measured to be faster (see `choice`).
    return_lse: also return the log of the sum of exp(scale * q k^T) over each query's keys, with which `merge_attention` joins results over
    parts of the keys; gradients do not flow back through it.

    Returns out (tokens, heads, head_dim) in q's dtype (for float8_e4m3fn in bfloat16, without a gradient), or (out, lse) with lse (heads,
    tokens), float32 (float64 for float64). A query with no visible key, and every token past the end of the pack, gets zeros and an lse of
    -inf.
    Raises ValueError or TypeError for a wrong shape, dtype, device or stride, or for an implementation that cannot run here.
    """
    kv_layout = layout if kv_layout is None else kv_layout
    _check(q, k, v, layout, mask, kv_layout, scale, scales)
    _check_text_lengths(q, mask, kv_layout, text_lengths)
    if norm_rope is not None and (kv_layout is not layout or scales is not None):
        raise ValueError("norm_rope: expected with q and k of one layout, and without scales, since it is done before both")
    if norm_rope is not None:
        check_norm_rope(q, k, norm_rope)
    if implementation == "auto" and not (return_lse or scales or text_lengths is not None or torch.compiler.is_compiling()):
        parts = stretches(q, layout, mask, kv_layout)
        if parts:
            if norm_rope is not None:
                q, k = qk_norm_rope(q, k, **norm_rope._asdict())
            return _by_stretches(q, k, v, parts, mask, scale)
    # Autograd and FLOP counters know what torch does; what it does not know, and what a graph should not look into, is an operator.
    triton = choose("attention", implementation, *implementations(q, return_lse)) == "triton"
    if norm_rope is not None and not (triton and _on_load(q, mask, norm_rope)):
        q, k = qk_norm_rope(q, k, **norm_rope._asdict(), implementation=implementation)
        norm_rope = None
    if not triton and not torch.compiler.is_compiling():
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, lse = run(q, k, v, scales, layout, mask, kv_layout, scale, return_lse, implementation, text_lengths=text_lengths)
    else:
        rule = [int(number) for number in mask.as_rule()]
        how = (None,) * 6 + (True, None)
        if norm_rope is not None:
            how = tuple(getattr(norm_rope, name) for name in ("q_weight", "k_weight", "cos", "sin", "rows", "norm", "interleaved", "eps"))
        out, lse = operator(
            q, k, v, *(scales or (None,) * 3), *how, text_lengths,
            layout.handle, kv_layout.handle, rule, mask.same_site, scale, return_lse, implementation,
        )  # fmt: skip
    return (out, lse.detach()) if return_lse else out


def _by_stretches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[Stretch], mask: Mask, scale: float | None) -> torch.Tensor:
    """Of clips that the library serves, and of those between them."""
    queries, keys = ([getattr(part, name) for part in parts] for name in ("queries", "keys"))
    outs = [
        attention(
            *qkv, part.layout, mask, kv_layout=part.kv_layout, scale=scale, implementation="torch" if part.library else "auto"
        )
        for part, *qkv in zip(parts, q.split(queries), k.split(keys), v.split(keys), strict=True)
    ]  # fmt: skip
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _on_load(q: torch.Tensor, mask: Mask, how: NormRope) -> bool:
    """Whether the Triton kernels that serve this mask do it where they read q and k."""
    if not mask.same_site or how.across_heads or how.axes is not None or how.q_bias is not None or how.k_bias is not None:
        return False
    if how.cos is None:
        return True
    head_dim, pairs = q.shape[-1], how.cos.shape[-1]
    in_registers = how.interleaved or (2 * pairs == head_dim >= 16 and head_dim & (head_dim - 1) == 0)
    return (
        in_registers
        and how.cos.dim() == 2
        and how.cos.stride() == how.sin.stride()
        and not (how.cos.requires_grad or how.sin.requires_grad)
    )


def _check_text_lengths(q: torch.Tensor, mask: Mask, kv_layout: VideoLayout, text_lengths: torch.Tensor | None) -> None:
    if text_lengths is None:
        return
    if mask.same_site:
        raise ValueError("text_lengths: expected None with Temporal, got a tensor")
    if not isinstance(text_lengths, torch.Tensor):
        raise TypeError(f"text_lengths: expected a tensor, got {type(text_lengths).__name__}")
    clips = kv_layout.capacity.clips if kv_layout.capacity else kv_layout.num_clips
    if text_lengths.dtype != torch.int32 or text_lengths.shape != (clips,) or text_lengths.device != q.device:
        got = f"{text_lengths.dtype} {tuple(text_lengths.shape)} on {text_lengths.device}"
        raise ValueError(f"text_lengths: expected torch.int32 ({clips},) on {q.device}, one for each clip of kv_layout, got {got}")


def _check(q, k, v, layout, mask, kv_layout, scale, scales) -> None:
    """What needs no look at the clips, so that a graph compiled for one pack serves the next; `check_layouts` does the rest."""
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected Full, Spatial, Temporal or FrameCausal, got {type(mask).__name__}")
    for name, where in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(where, VideoLayout):
            raise TypeError(f"{name}: expected a VideoLayout, got {type(where).__name__}")
    dtypes = _DTYPES if scales is None else (FP8,)
    for name, x, where in (("q", q, layout), ("k", k, kv_layout), ("v", v, kv_layout)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected (tokens, heads, head_dim), got shape {tuple(x.shape)}")
        if x.shape[0] != where.tokens:
            raise ValueError(f"{name}: expected {where.tokens} tokens as in its layout, got shape {tuple(x.shape)}")
        if x.dtype not in dtypes or x.dtype != q.dtype:
            wanted = "float16, bfloat16, float32 or float64 (float8_e4m3fn needs scales)" if scales is None else "float8_e4m3fn with scales"
            raise TypeError(f"{name}: expected {wanted}, the same for q, k and v, got {x.dtype} (q is {q.dtype})")
        if x.device != q.device or x.device != where.device:
            raise ValueError(
                f"{name}: expected q, k, v and their layouts on one device, got {x.device} (q on {q.device}, layout on {where.device})"
            )
        if x.shape[0] and x.stride(-1) != 1:
            raise ValueError(f"{name}: expected a unit stride in head_dim, got strides {x.stride()}")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        raise ValueError(f"head_dim: expected one for q, k and v, got {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k, v: expected equal numbers of heads that divide q's {q.shape[1]}, got {k.shape[1]} and {v.shape[1]}")
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"scale: expected a finite number, not below zero, got {scale}")
    if scales is None:
        return
    if len(scales) != 3:
        raise ValueError(f"scales: expected those of q, k and v, got {len(scales)}")
    for name, x, each in zip(("q", "k", "v"), (q, k, v), scales, strict=True):
        if not isinstance(each, torch.Tensor) or each.dtype != torch.float32 or each.shape != x.shape[:2] or each.device != x.device:
            got = f"{each.dtype} {tuple(each.shape)} on {each.device}" if isinstance(each, torch.Tensor) else type(each).__name__
            raise ValueError(f"scales: expected for {name} float32 {tuple(x.shape[:2])} on {x.device}, got {got}")
