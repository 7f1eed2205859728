"""Spacetime attention over packs: out = softmax(scale * q k^T + mask) v, the mask a rule on coordinates.

FLOPs: 4 * d * heads * visible (query, key) pairs. Bytes: q, k, v read once and out written once; nothing else is needed, since no mask
matrix exists.
"""

import math
from collections.abc import Callable

import torch

from ..dispatch import select
from ..layout import VideoLayout
from ..masks import Mask
from .grouped import attention_grouped, attention_grouped_lse
from .merge import merge_attention
from .reference import attention_reference

try:
    from . import block
except ModuleNotFoundError as error:  # a CPU needs no triton
    if error.name != "triton":
        raise
    block = None

__all__ = ["attention", "merge_attention"]

NO_GLUON = "this op has no Gluon kernel yet"
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
    return_lse: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each clip of a pack to itself or to the same clip of another pack.

    q: (tokens, heads, head_dim); k, v: (kv tokens, kv heads, head_dim), kv heads dividing heads; any strides but a unit last one, so views
    of a fused QKV tensor serve. layout: where the queries lie. mask: `Full()`, `Spatial()`, `Temporal(...)` or `FrameCausal(...)`.
    kv_layout: where keys and values lie if not in `layout` (text for cross-attention; a longer clip for a cache), clip i attending to clip
    i. scale: 1 / sqrt(head_dim) by default. return_lse: also return the log of the sum of exp(scale * q k^T) over each query's keys, with
    which `merge_attention` joins results over parts of the keys; gradients do not flow back through it.

    Returns out (tokens, heads, head_dim) in q's dtype, or (out, lse) with lse (heads, tokens), float32 (float64 for float64). A query with
    no visible key, and every token past the end of the pack, gets zeros and an lse of -inf.
    Raises ValueError or TypeError for a wrong shape, dtype, device or stride, or for an implementation that cannot run here.
    """
    kv_layout = layout if kv_layout is None else kv_layout
    _check(q, k, v, layout, mask, kv_layout)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    elif not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    run = select("attention", implementation, *_implementations(q, return_lse))
    result = run(q, k, v, layout, mask, kv_layout, scale)
    if isinstance(result, torch.Tensor):
        return result
    out, lse = result
    return (out, lse.detach()) if return_lse else out


def _implementations(q: torch.Tensor, return_lse: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can run on q, the preferred first, and why the rest cannot."""
    available = {"torch": attention_grouped_lse if return_lse else attention_grouped, "reference": attention_reference}
    reason = "triton is not installed" if block is None else block.unavailable(q)
    if reason is not None:
        return available, {"triton": f"the Triton kernel: {reason}", "gluon": NO_GLUON}
    triton = {"triton": block.attention_block}
    return triton | available if q.device.type == "cuda" else available | triton, {"gluon": NO_GLUON}


def _check(q, k, v, layout, mask, kv_layout) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: expected Full, Spatial, Temporal or FrameCausal, got {type(mask).__name__}")
    for name, where in (("layout", layout), ("kv_layout", kv_layout)):
        if not isinstance(where, VideoLayout):
            raise TypeError(f"{name}: expected a VideoLayout, got {type(where).__name__}")
    for name, x, where in (("q", q, layout), ("k", k, kv_layout), ("v", v, kv_layout)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected (tokens, heads, head_dim), got shape {tuple(x.shape)}")
        if x.shape[0] != where.tokens:
            raise ValueError(f"{name}: expected {where.tokens} tokens as in its layout, got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, the same for q, k and v, got {x.dtype} (q is {q.dtype})"
            )
        if x.device != q.device or x.device.type != where.device.type:
            raise ValueError(
                f"{name}: expected q, k, v and their layouts on one device, got {x.device} (q on {q.device}, layout on {where.device})"
            )
        if x.shape[0] and x.stride(-1) != 1:
            raise ValueError(f"{name}: expected a unit stride in head_dim, got strides {x.stride()}")
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        raise ValueError(f"head_dim: expected one for q, k and v, got {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k, v: expected equal numbers of heads that divide q's {q.shape[1]}, got {k.shape[1]} and {v.shape[1]}")
    if layout.num_clips != kv_layout.num_clips:
        raise ValueError(f"kv_layout: expected {layout.num_clips} clips as in layout, got {kv_layout.num_clips}")
    if mask.same_site:
        for i, (a, b) in enumerate(zip(layout.clips, kv_layout.clips, strict=True)):
            if b.frames and a.frames and a.grid[1:] != b.grid[1:]:
                raise ValueError(f"kv_layout: {type(mask).__name__} needs clip {i} on one (H, W) grid, got {a.grid[1:]} and {b.grid[1:]}")
