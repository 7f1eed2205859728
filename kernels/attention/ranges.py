"""What the kernels of attention share: constants, and where the rows of a tile and the frames that it sees lie.

RULE is a tuple of constants: causal, chunk, window, sink, sees_known of `masks.visible`.
"""

import torch
import triton
import triton.language as tl

from . import schedule

LEAST_SCALE = 1e-30
"""Stands for a scale of zero, by which the infinity of a hidden score would become NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VIDEO, TEXT = tl.constexpr(schedule.VIDEO), tl.constexpr(schedule.TEXT)
SHIFT = tl.constexpr(1 << 16)
"""Chunks added to a frame before it is divided by a chunk: Triton's division rounds towards zero, the rule's towards minus infinity."""


@triton.jit
def sequence(spans_ptr, clip, site, SITE: tl.constexpr):
    """Of a clip's video, its text (site TEXT) or, if the mask is one of sites, one site: first token, tokens from row to row, rows, rows to
    a frame, first frame.
    """
    spans_ptr += 7 * clip
    base = tl.load(spans_ptr)
    frames = tl.load(spans_ptr + 1)
    frame_rows = tl.maximum(tl.load(spans_ptr + 2), 1)
    rows = frames * tl.load(spans_ptr + 2)
    step = 1
    if SITE:
        step = tl.where(site >= 0, frame_rows, 1)
        base = tl.where(site >= 0, base + site, base)
        rows = tl.where(site >= 0, frames, rows)
        frame_rows = tl.where(site >= 0, 1, frame_rows)
    base = tl.where(site == TEXT, tl.load(spans_ptr + 3), base)
    rows = tl.where(site == TEXT, tl.load(spans_ptr + 4), rows)
    return base, step, rows, frame_rows, tl.load(spans_ptr + 5)


@triton.jit
def text_length(text_lengths_ptr, clip, length):
    """How many tokens of a clip's text, which has room for `length`, are there."""
    if text_lengths_ptr is not None:
        length = clamped(tl.load(text_lengths_ptr + clip), 0, length)
    return length


@triton.jit
def chunk_start(frame, ahead, RULE):
    """The first frame of the chunk that lies `ahead` chunks after that of `frame`."""
    return ((frame + SHIFT * RULE[1]) // RULE[1] + (ahead - SHIFT)) * RULE[1]


@triton.jit
def window(x0, x1, first, frames, OF_KEYS: tl.constexpr, RULE):
    """Which of the `frames` frames from `first` on, counted within them, some and which all of the frames x0 .. x1 see in their window, or
    with OF_KEYS, are seen by: [some_start, some_stop), [every_start, every_stop).
    """
    some_start, some_stop, every_start, every_stop = 0, frames, 0, frames
    if RULE[0] and OF_KEYS:
        some_start, every_start = chunk_start(x0, 0, RULE) - first, chunk_start(x1, 0, RULE) - first
    elif RULE[2] > 0:
        some_start, every_start = chunk_start(x0, 1 - RULE[2], RULE) - first, chunk_start(x1, 1 - RULE[2], RULE) - first
    if RULE[0] and not OF_KEYS:
        some_stop, every_stop = chunk_start(x1, 1, RULE) - first, chunk_start(x0, 1, RULE) - first
    elif RULE[2] > 0:
        some_stop, every_stop = chunk_start(x1, RULE[2], RULE) - first, chunk_start(x0, RULE[2], RULE) - first
    return some_start, some_stop, every_start, every_stop


@triton.jit
def clamped(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


def strides(*tensors: torch.Tensor | None, unit: int = 1) -> list[int]:
    """Of tokens and of heads, in units of elements; zeros for a tensor that is not there."""
    return [stride // unit for x in tensors for stride in (x.stride()[:2] if x is not None else (0, 0))]


def unit_of(*tensors: torch.Tensor) -> int:
    """What kernels take strides of tokens and heads in: the elements in 16 bytes, if all are multiples of it, else 1. The compiler knows a
    product with a constant to be aligned; by itself it looks for multiples of 16 alone, and of those, which need no unit, takes less work.
    """
    unit = 16 // min(x.element_size() for x in tensors)
    found = [stride for x in tensors for stride in x.stride()[:2]]
    return 1 if any(stride % unit for stride in found) or not any(stride % 16 for stride in found) else unit
