"""Attention as operators of torch.library: a graph of torch.compile holds a call whole, and FLOP counters know what it costs.

An operator takes tensors and numbers. A layout goes in by its handle and a mask by its rule, so that a graph compiled once serves every
pack: what depends on a layout is looked up, and checked, when the call runs.

    forwards 4 d, backwards 10 d floating-point operations for each head and each pair of tokens that see each other
"""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import HAS_TRITON, as_operator, choose, select, with_triton
from ..fp8 import OUT_OF_FP8, Scales, dequantize_rows
from ..layout import VideoLayout
from ..masks import Mask, RuleMask
from ..rotary import NormRope
from .grouped import attention_grouped, attention_grouped_backward, attention_grouped_lse
from .reference import attention_reference
from .schedule import visible_pairs

if HAS_TRITON:
    from . import fused


def implementations(q: torch.Tensor, with_lse: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """What can run on q, the preferred first, and why the rest cannot. Each takes what `attention_reference` takes, and gives (out, lse),
    or without `with_lse` out alone where lse costs something.
    """
    available = {"torch": attention_grouped_lse if with_lse else attention_grouped, "reference": attention_reference}
    return with_triton(q, available, fused.attention_fused, fused.unavailable(q)) if HAS_TRITON else with_triton(q, available)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: Scales | None,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    with_lse: bool,
    implementation: str,
    how: NormRope | None = None,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse), by the implementation that is asked for; no lse where none is asked for and it costs something.

    how: what Triton's does to q and k on load.
    """
    check_layouts(layout, mask, kv_layout)
    function = select("attention", implementation, *implementations(q, with_lse))
    if HAS_TRITON and function is fused.attention_fused:
        return function(q, k, v, layout, mask, kv_layout, scale, scales, how=how, text_lengths=text_lengths)
    if scales is not None:
        q, k, v = (dequantize_rows(x, each) for x, each in zip((q, k, v), scales, strict=True))
    result, dtype = function(q, k, v, layout, mask, kv_layout, scale, text_lengths), q.dtype if scales is None else OUT_OF_FP8
    out, lse = (result, None) if isinstance(result, torch.Tensor) else result
    return out.to(dtype), lse  # autocast gives another


def check_layouts(layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> None:
    """Raises ValueError if the clips of the two cannot attend to each other."""
    if layout is kv_layout:
        return
    if layout.num_clips != kv_layout.num_clips:
        raise ValueError(f"kv_layout: expected {layout.num_clips} clips as in layout, got {kv_layout.num_clips}")
    if mask.same_site:
        for i, (a, b) in enumerate(zip(layout.clips, kv_layout.clips, strict=True)):
            if b.frames and a.frames and a.grid[1:] != b.grid[1:]:
                raise ValueError(f"kv_layout: Temporal needs clip {i} on one (H, W) grid, got {a.grid[1:]} and {b.grid[1:]}")


@as_operator("tubelet::attention")
def operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    interleaved: bool,
    eps: float | None,
    text_lengths: torch.Tensor | None,
    layout: int,
    kv_layout: int,
    rule: list[int],
    same_site: bool,
    scale: float | None,
    with_lse: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`run`, with the scales and what is done on load (nothing if eps is None) one by one, layouts as handles, a mask as its rule.

    No lse is an empty tensor.
    """
    how = None if eps is None else NormRope(q_weight, k_weight, cos, sin, norm, interleaved=interleaved, eps=eps, rows=rows)
    scales = None if q_scale is None else (q_scale, k_scale, v_scale)
    mask, layouts = RuleMask.of(rule, same_site), (VideoLayout.of_handle(layout), VideoLayout.of_handle(kv_layout))
    out, lse = run(q, k, v, scales, layouts[0], mask, layouts[1], _scale(scale, q), with_lse, implementation, how, text_lengths)
    lse = q.new_empty(0, dtype=_dtype_of_lse(q)) if lse is None else lse.contiguous()
    lse.untyped_storage().layouts = layouts  # saved for the backward pass of a compiled graph, it keeps them alive until then
    return out.contiguous(), lse


@operator.register_fake
def _(q, k, v, q_scale, *rest):
    with_lse, implementation = rest[-2:]
    has_lse = with_lse or choose("attention", implementation, *implementations(q, with_lse)) != "torch"
    out = q.new_empty(q.shape, dtype=q.dtype if q_scale is None else OUT_OF_FP8)
    return out, q.new_empty((q.shape[1], q.shape[0]) if has_lse else 0, dtype=_dtype_of_lse(q))


def _dtype_of_lse(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@as_operator("tubelet::attention_backward")
def operator_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    interleaved: bool,
    eps: float | None,
    text_lengths: torch.Tensor | None,
    layout: int,
    kv_layout: int,
    rule: list[int],
    same_site: bool,
    scale: float | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and the gradients of the two weights, empty where there is none."""
    mask, layouts = RuleMask.of(rule, same_site), (VideoLayout.of_handle(layout), VideoLayout.of_handle(kv_layout))
    if choose("attention", implementation, *implementations(q, False)) != "triton":
        grads = attention_grouped_backward(do, q, k, v, layouts[0], mask, layouts[1], _scale(scale, q), text_lengths)
        return *grads, q.new_empty(0), q.new_empty(0)
    how = None if eps is None else NormRope(q_weight, k_weight, cos, sin, norm, interleaved=interleaved, eps=eps, rows=rows)
    do = do if do.stride(-1) == 1 else do.contiguous()
    rest = layouts[0], mask, layouts[1], _scale(scale, q)
    grads = fused.attention_fused_backward(do, q, k, v, out, lse, *rest, how=how, text_lengths=text_lengths)
    return *grads[:3], *(q.new_empty(0) if grad is None else grad for grad in grads[3:] or (None, None))


@operator_backward.register_fake
def _(do, q, k, v, out, lse, q_weight, k_weight, *rest):
    weights = (q.new_empty(0) if weight is None else weight for weight in (q_weight, k_weight))
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *weights))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *_ = inputs
    tensors, how, text_lengths, (*layouts_and_mask, _with_lse, implementation) = inputs[6:11], inputs[11:14], inputs[14], inputs[15:]
    ctx.save_for_backward(q, k, v, *output, *tensors, text_lengths)
    ctx.layouts = getattr(output[1].untyped_storage(), "layouts", None)  # hooks may put what is saved elsewhere, in another storage
    ctx.rest = how, (*layouts_and_mask, implementation)


def _backward(ctx, do, _):
    *tensors, text_lengths = ctx.saved_tensors
    how, rest = ctx.rest
    *grads, dq_weight, dk_weight = operator_backward(do, *tensors, *how, text_lengths, *rest)
    q_weight, k_weight = tensors[5:7]
    weights = (None if weight is None else grad for weight, grad in ((q_weight, dq_weight), (k_weight, dk_weight)))
    return *grads, None, None, None, *weights, *[None] * 14


operator.register_autograd(_backward, setup_context=_setup_context)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@register_flop_formula(torch.ops.tubelet.attention, get_raw=True)
def _flops(q, *rest, out_val=None) -> int:
    layout, kv_layout, rule, same_site, *_ = rest[14:]
    pairs = visible_pairs(VideoLayout.of_handle(layout), RuleMask.of(rule, same_site), VideoLayout.of_handle(kv_layout))
    return 4 * q.shape[1] * q.shape[2] * pairs


@register_flop_formula(torch.ops.tubelet.attention_backward, get_raw=True)
def _backward_flops(do, q, *rest, out_val=None) -> int:
    layout, kv_layout, rule, same_site, *_ = rest[13:]
    pairs = visible_pairs(VideoLayout.of_handle(layout), RuleMask.of(rule, same_site), VideoLayout.of_handle(kv_layout))
    return 10 * q.shape[1] * q.shape[2] * pairs
