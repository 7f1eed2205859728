"""Norm and rotation of queries and keys as operators of torch.library, of what the kernels of `fused` compute, with their gradients."""

import torch

from ..dispatch import NO_GLUON, as_operator, select
from ..fp8 import FP8
from .fused import OP, norm_rope_fused, norm_rope_fused_backward
from .reference import NormRope


def operate(q, k, how: NormRope, out, slots, fp8: bool, implementation: str):
    """The operator that does it, and its results as `qk_norm_rope` gives them."""
    how = _flat(how)
    if out is not None:
        operator_out(q, k, *out, slots, *how, implementation)
        return tuple(out)
    if fp8:
        q8, q_scale, k8, k_scale = operator_fp8(q, k, *how, implementation)
        return (q8, q_scale), (k8, k_scale)
    return operator(q, k, *how, implementation)


def _flat(how: NormRope) -> tuple:
    """As operators take it, tensors first."""
    axes = None if how.axes is None else list(how.axes)
    tensors = how.q_weight, how.k_weight, how.q_bias, how.k_bias, how.cos, how.sin, how.rows
    return *tensors, how.norm, how.across_heads, how.interleaved, axes, how.eps


def _how(q_weight, k_weight, q_bias, k_bias, cos, sin, rows, norm, across_heads, interleaved, axes, eps) -> NormRope:
    axes = None if axes is None else tuple(axes)
    return NormRope(q_weight, k_weight, cos, sin, norm, across_heads, interleaved, eps, rows, q_bias, k_bias, axes)


def _select(implementation: str):
    return select(OP, implementation, {"triton": norm_rope_fused}, {"gluon": NO_GLUON})


@as_operator("tubelet::qk_norm_rope")
def operator(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    across_heads: bool,
    interleaved: bool,
    axes: list[int] | None,
    eps: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q', k'."""
    how = _how(q_weight, k_weight, q_bias, k_bias, cos, sin, rows, norm, across_heads, interleaved, axes, eps)
    return _select(implementation)(q, k, how)[:2]


@operator.register_fake
def _(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@as_operator("tubelet::qk_norm_rope_fp8")
def operator_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    across_heads: bool,
    interleaved: bool,
    axes: list[int] | None,
    eps: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q', its scales, k', its scales."""
    how = _how(q_weight, k_weight, q_bias, k_bias, cos, sin, rows, norm, across_heads, interleaved, axes, eps)
    q8, k8, q_scale, k_scale = _select(implementation)(q, k, how, fp8=True)
    return q8, q_scale, k8, k_scale


@operator_fp8.register_fake
def _(q, k, *rest):
    return tuple(
        result for x in (q, k) for result in (x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[1], x.shape[0], dtype=torch.float32).t())
    )


@torch.library.custom_op("tubelet::qk_norm_rope_out", mutates_args=("q_out", "k_out"))
def operator_out(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    slots: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    across_heads: bool,
    interleaved: bool,
    axes: list[int] | None,
    eps: float,
    implementation: str,
) -> None:
    """q' into q_out and k' into k_out, or the rows of it that `slots` say."""
    how = _how(q_weight, k_weight, q_bias, k_bias, cos, sin, rows, norm, across_heads, interleaved, axes, eps)
    _select(implementation)(q, k, how, (q_out, k_out), slots)


@operator_out.register_fake
def _(q, k, *rest):
    return None


@as_operator("tubelet::qk_norm_rope_backward")
def operator_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: torch.Tensor | None,
    norm: str | None,
    across_heads: bool,
    interleaved: bool,
    axes: list[int] | None,
    eps: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the first six after dq and dk; empty where there is none, or none of a parameter is wanted."""
    how = _how(q_weight, k_weight, q_bias, k_bias, cos, sin, rows, norm, across_heads, interleaved, axes, eps)
    return tuple(q.new_empty(0) if grad is None else grad for grad in norm_rope_fused_backward(dq, dk, q, k, how, wanted))


@operator_backward.register_fake
def _(dq, dk, q, k, q_weight, k_weight, q_bias, k_bias, *rest):
    parameters = zip((q_weight, k_weight, q_bias, k_bias), rest[-1], strict=True)
    likes = (q, k, *(x if want else None for x, want in parameters))
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in likes)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.how = inputs[9:-1]


def _backward_of_operator(ctx, dq, dk):
    wanted = list(ctx.needs_input_grad[2:6])
    dq, dk, *parameters = operator_backward(dq, dk, *ctx.saved_tensors, *ctx.how, wanted)
    return dq, dk, *(grad if want else None for grad, want in zip(parameters, wanted, strict=True)), *(None,) * 9


operator.register_autograd(_backward_of_operator, setup_context=_save)
