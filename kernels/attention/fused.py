"""The Triton implementation of attention: which of its kernels serves which part of a call, and with which settings.

`hopper` serves calls forwards where it was tuned and can. Else, of a mask of single sites, `temporal` serves the frames of short clips, and
`block` the rest: all clips of other masks, long clips, text. Which kernel serves a clip, and the sizes of its tiles, never depend on what
else is in the pack, since the order of sums does.
"""

from dataclasses import replace

import torch

from ..fp8 import FP8, OUT_OF_FP8, Scales
from ..layout import VideoLayout
from ..masks import Mask
from ..rotary import NormRope
from . import block, hopper, temporal
from .configs import Configs, configs_for, default_configs, kind_of, limits
from .norm_rope import Turns
from .ranges import LEAST_SCALE, LOG2_E, strides, unit_of
from .schedule import tiles

LARGEST_HEAD_DIM = 256
FIRST_WITH_FP8 = (8, 9)
"""Ada."""


def attention_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    scales: Scales | None = None,
    configs: Configs | None = None,
    how: NormRope | None = None,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and result as `attention_reference`, for float16, bfloat16, float32 and, with scales, E4M3; head dims to 256.

    how: what is done to q and k on load, of a mask of single sites.
    """
    configs = configs or configs_for(q, mask)
    make = torch.zeros if layout.capacity else torch.empty  # tokens past the end of the pack are in no tile
    out = make(q.shape, dtype=OUT_OF_FP8 if q.dtype == FP8 else q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if layout.capacity:
        lse.fill_(-torch.inf)
    if configs.specialised:
        if hopper.unavailable(q, k, v, mask, text_lengths) is None:
            hopper.forward_hopper(q, k, v, out, lse, layout, mask, kv_layout, scale, configs.forward)
            return out, lse
        configs = default_configs(q.shape[2], q.dtype, kind_of(mask), **limits(q.device))  # what was tuned is for the other kernel
    scales, scale_log2 = scales or (None, None, None), max(scale, LEAST_SCALE) * LOG2_E.value
    launch, turns = block.Launch(q, k, layout, mask, kv_layout, text_lengths), Turns(how, q.shape[2])
    longest = temporal.longest(q) if mask.same_site else 0
    if longest:
        temporal.forward_temporal(launch, q, k, v, out, lse, layout, kv_layout, scale_log2, turns)
    table = tiles(layout, configs.forward.block_m, mask, kv_layout, longer_than=longest)
    if not len(table):
        return out, lse
    unit = unit_of(q, k, v, out)
    launch(
        block.block_forward, configs.forward, table, q.shape[1],
        *turns(), q, k, v, out, *scales, lse, *launch.tables, *strides(q, k, v, out, unit=unit), *strides(*scales), lse.stride(0),
        scale_log2, SITE=mask.same_site, UNIT=unit,
    )  # fmt: skip
    return out, lse


def attention_fused_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    configs: Configs | None = None,
    how: NormRope | None = None,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv, contiguous, from do (tokens, heads, head_dim), which has a unit last stride, and what `attention_fused` took and gave.

    With `how` also the gradients of its two weights, None for one that is not there.
    """
    configs = configs or configs_for(q, mask)
    dq = (torch.zeros if layout.capacity else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    make = torch.zeros if kv_layout.capacity or text_lengths is not None else torch.empty
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    delta, scale = torch.zeros_like(lse), max(scale, LEAST_SCALE)
    launch, turns = block.Launch(q, k, layout, mask, kv_layout, text_lengths), Turns(how, q.shape[2])
    longest = temporal.longest(q, backward=True) if mask.same_site else 0
    unit = unit_of(q, k, v, out, do)
    table = tiles(layout, configs.queries.block_m, mask, kv_layout, longer_than=longest)
    launch(
        block.block_backward_queries, configs.queries, table, q.shape[1],
        *turns(len(table) * q.shape[1], queries=True), q, k, v, out, do, dq, lse, delta, *launch.tables,
        *strides(q, k, v, out, do, dq, unit=unit), lse.stride(0), scale, SITE=mask.same_site, UNIT=unit,
    )  # fmt: skip
    if longest:  # between the two: it needs what the first finds for text, and the second, for text, needs what it finds
        temporal.backward_temporal(launch, do, q, k, v, out, lse, delta, dq, dk, dv, layout, kv_layout, scale, turns)
    if how is not None:  # turning the queries takes registers
        configs = configs._replace(keys=replace(configs.keys, block_m=min(32, configs.keys.block_m)))
    table = tiles(kv_layout, configs.keys.block_n, mask, layout, of_keys=True, longer_than=longest)
    launch(
        block.block_backward_keys, configs.keys, table, k.shape[1],
        *turns(len(table) * k.shape[1], keys=True), q, k, v, do, dk, dv, lse, delta, *launch.tables[:3], launch.tables[5],
        *strides(q, k, v, do, dk, unit=unit), lse.stride(0), scale, SITE=mask.same_site, UNIT=unit,
    )  # fmt: skip
    return dq, dk, dv, *turns.weight_gradients()


def unavailable(q: torch.Tensor) -> str | None:
    """Why the kernels cannot run on q where others can, if they cannot."""
    if q.shape[2] > LARGEST_HEAD_DIM:
        return f"head_dim {q.shape[2]} is above {LARGEST_HEAD_DIM}"
    if q.dtype == FP8 and q.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(q.device) < FIRST_WITH_FP8):
        return "this GPU has no E4M3"
    return None
