"""Which clips "auto" leaves to the library's attention.

It is a matter of each clip: it is computed in the same way whatever else is in the pack. On an H200 (the committed result), SDPA of
`attention_grouped`, which is cuDNN's there, took 57 % of the Triton kernels' time within frames of 1,560 tokens, 82 % for 32,760 tokens and
86 % for chunks of frames; backwards SDPA by itself took 59 %, 56 % and 76 %. Along time it takes several times as long as they do.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from ..layout import ClipSpan, VideoLayout
from ..masks import Mask
from .grouped import batches_of

LEAST_FLOPS = 10**10
"""Of a call of SDPA: fewer take a Hopper about as long as the host takes to launch the call."""


class Stretch(NamedTuple):
    """Clips beside each other, as packs of their own: how many queries and keys they have, where these lie, and whether they, one clip, are
    left to the library.
    """

    queries: int
    keys: int
    layout: VideoLayout
    kv_layout: VideoLayout
    library: bool


def stretches(q: torch.Tensor, layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> list[Stretch]:
    """Those of a pack, of which at least one is left to the library; none where no clip is."""
    if q.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(q.device) != (9, 0):
        return []
    if mask.same_site or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > 128 or q.shape[2] % 8:
        return []
    # Sums of cuDNN's backward pass may come in any order.
    if torch.are_deterministic_algorithms_enabled() or not torch.backends.cuda.cudnn_sdp_enabled():
        return []
    if layout.capacity is not None or kv_layout.capacity is not None:  # which may be refilled
        return []
    # Autocast would give SDPA another dtype; and what does not fit is told by those who run.
    if (torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != q.dtype) or layout.num_clips != kv_layout.num_clips:
        return []
    return plan(4 * q.shape[1] * q.shape[2], layout, mask, kv_layout)


def plan(flops: int, layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> list[Stretch]:
    """`stretches`, wherever; flops: of a pair of tokens."""
    key = ("stretches", flops, mask, None if kv_layout is layout else kv_layout.clips)
    if key not in layout.cache:
        found = list(_stretches(flops, layout, mask, kv_layout))
        layout.cache[key] = found if any(each.library for each in found) else []
    return layout.cache[key]


def _stretches(flops: int, layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> Iterator[Stretch]:
    pairs = [(i, *pair) for i, pair in enumerate(zip(layout.clips, kv_layout.clips, strict=True))]
    alone = {i: _pack(layout, kv_layout, [pair]) for i, *pair in pairs if flops * _tokens(pair[0]) * _tokens(pair[1]) >= LEAST_FLOPS}
    long = {i for i, packs in alone.items() if _long_calls(flops, mask, *packs)}
    for nth, group in groupby(pairs, key=lambda pair: pair[0] if pair[0] in long else -1):
        clips = [pair for _, *pair in group]
        packs = alone[nth] if nth >= 0 else _pack(layout, kv_layout, clips)
        yield Stretch(packs[0].tokens, packs[1].tokens, *packs, nth >= 0)


def _tokens(clip: ClipSpan) -> int:
    return clip.stop - clip.start


def _pack(layout: VideoLayout, kv_layout: VideoLayout, clips: list) -> tuple[VideoLayout, VideoLayout]:
    """These pairs of clips, which follow each other, as packs of their own; one, if they are of one."""

    def moved(spans: list[ClipSpan], where: VideoLayout) -> VideoLayout:
        start = spans[0].start
        spans = [replace(span, video_start=span.video_start - start, text_start=span.text_start - start) for span in spans]
        return VideoLayout(spans, None, where.device)

    queries, keys = (list(spans) for spans in zip(*clips, strict=True))
    packed = moved(queries, layout)
    return packed, packed if kv_layout is layout else moved(keys, kv_layout)


def _long_calls(flops: int, mask: Mask, layout: VideoLayout, kv_layout: VideoLayout) -> bool:
    """Whether SDPA gets views of q, k and v, and no mask, in calls that are all worth it."""
    batches = batches_of(layout, mask, kv_layout)
    return bool(batches) and all(
        batch.visible is None
        and None not in (batch.queries_view, batch.keys_view)
        and flops * batch.queries.numel() * batch.keys.shape[1] >= LEAST_FLOPS
        for batch in batches
    )
