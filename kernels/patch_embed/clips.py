"""Clips as the kernels take them: tiles of tokens, whose patches are gathered from a clip's pixels or put back.

A tile of tokens lies in one clip, and tells its threads to go along the row of pixels: a patch's neighbours in w are neighbours in memory,
of the same token and of the next, so that a tile is loaded as (channel, frame and row of the patch) x (pixels of a row), 16 bytes at once
where the clips are aligned for it, and turned into (patch elements, tokens) in registers. Tokens that stay tokens are a clip too, of one
row of pixels and as many channels as they have.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..launch import cdiv, launch
from ..layout import VideoLayout
from .reference import grid_of, video_rows, without_gaps

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BLOCK_M = 64
"""Tokens of a tile, but where twice as many leave registers free, so that a weight is read half as often."""
AT_ONCE = 24
"""Clips that are written to a table in a launch."""
OFFSET = 1 << 62

# A clip goes into a kernel as a tuple of ten numbers: how far the next one is, the strides of (channels, T, H, W), the size (T, H, W), its
# first row among the tokens, and how many rows further the next one's is. Clips that are not evenly spaced, or not of one size, go in as a
# table of these on the device, (ten, clips), with the address in place of the first and the first tile in place of the last. The table is
# written by a kernel that has the numbers as arguments: nothing on the host is to outlive the call, and a captured graph holds them.


@triton.jit
def _number(x):
    """As `_argument` hides it."""
    return (x >> 1) - (1 << 61)


def _argument(x: int) -> int:
    """An odd number above 2^32, so that it is passed as int64, and no kernel is compiled anew for a 1, a 0 or a multiple of 16."""
    return 2 * x + OFFSET + 1


@triton.jit(do_not_specialize=["first", "clips"])
def describe_clips(table_ptr, numbers, first, clips, COUNT: tl.constexpr):
    """COUNT columns of the table, from `first` on, as far as there are clips."""
    for i in tl.static_range(COUNT):
        for j in tl.static_range(10):
            tl.store(table_ptr + j * clips.to(tl.int64) + (first + i), _number(numbers[10 * i + j]), mask=first + i < clips)


@triton.jit
def grid_of_tokens(size, PATCH):
    """Rows and columns of tokens in a frame, and tokens of a clip."""
    rows, columns = tl.cdiv(size[1], PATCH[2]), tl.cdiv(size[2], PATCH[3])
    return rows, columns, tl.cdiv(size[0], PATCH[1]) * rows * columns


@triton.jit
def find(tile, base_ptr, table_ptr, clip, clips, VECTOR, BLOCK_M: tl.constexpr, PATCH):
    """The clip of a tile: where it starts, its strides and size, its first row; and the tile's first token in it."""
    if table_ptr is None:
        size = _number(clip[5]).to(tl.int32), _number(clip[6]).to(tl.int32), _number(clip[7]).to(tl.int32)
        _rows, _columns, tokens = grid_of_tokens(size, PATCH)
        tiles = tl.cdiv(tokens, BLOCK_M)
        nth = tile // tiles
        start = base_ptr + nth * _number(clip[0])
        strides = _number(clip[1]), _number(clip[2]), _number(clip[3]), _number(clip[4])
        row = _number(clip[8]) + nth * _number(clip[9])
        first = tile % tiles * BLOCK_M
    else:
        nth = -1
        for i in range(0, clips, 128):
            each = i + tl.arange(0, 128)
            starts = tl.load(table_ptr + 9 * clips.to(tl.int64) + each, mask=each < clips, other=1 << 40)
            nth += tl.sum((starts <= tile).to(tl.int32))
        table_ptr += nth
        step = clips.to(tl.int64)
        start = tl.load(table_ptr).to(base_ptr.dtype)
        strides = tl.load(table_ptr + step), tl.load(table_ptr + 2 * step), tl.load(table_ptr + 3 * step), tl.load(table_ptr + 4 * step)
        size = (
            tl.load(table_ptr + 5 * step).to(tl.int32), tl.load(table_ptr + 6 * step).to(tl.int32),
            tl.load(table_ptr + 7 * step).to(tl.int32),
        )  # fmt: skip
        row = tl.load(table_ptr + 8 * step)
        first = (tile - tl.load(table_ptr + 9 * step).to(tl.int32)) * BLOCK_M
    BYTES: tl.constexpr = VECTOR[0] * VECTOR[1] * base_ptr.dtype.element_ty.primitive_bitwidth // 8
    start = tl.multiple_of(start, BYTES)
    return start, strides, size, row, first


# Constants that go through the functions below: PATCH, the channels of a clip and the sides of a patch; JOINED, the sides in w that a tile
# has side by side, pw or, if that is no power of two, one; VECTOR, how many neighbours in (channels, w) are aligned and known to be there
# together; TAIL, whether a patch may reach past its clip.


@triton.jit
def _pixels(strides, size, first, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH):
    """Where patch elements k .. k + BLOCK_K of the tokens first .. first + BLOCK_M are, (BLOCK_K / JOINED, BLOCK_M * JOINED), and whether
    they are there.
    """
    rows, columns, tokens = grid_of_tokens(size, PATCH)
    element = k + JOINED * tl.arange(0, BLOCK_K // JOINED)
    dw = element % PATCH[3]
    dh = element // PATCH[3] % PATCH[2]
    dt = element // (PATCH[3] * PATCH[2]) % PATCH[1]
    channel = element // (PATCH[3] * PATCH[2] * PATCH[1])
    column = tl.arange(0, BLOCK_M * JOINED)
    token = first + column // JOINED
    t, h, w = token // (rows * columns) * PATCH[1], token // columns % rows * PATCH[2], token % columns * PATCH[3] + column % JOINED
    down = channel * strides[0] + dt * strides[1] + dh * strides[2] + dw * strides[3]
    along = t * strides[1] + h * strides[2] + w * strides[3]
    offsets = down[:, None] + along[None, :]
    there = (element < PATCH[0] * PATCH[1] * PATCH[2] * PATCH[3])[:, None] & (token < tokens)[None, :]
    if TAIL:
        there &= (dt[:, None] + t[None, :] < size[0]) & (dh[:, None] + h[None, :] < size[1]) & (dw[:, None] + w[None, :] < size[2])
    offsets = tl.max_contiguous(tl.multiple_of(offsets, [VECTOR[0], VECTOR[1]]), [VECTOR[0], VECTOR[1]])
    return offsets, tl.max_constancy(there, [VECTOR[0], VECTOR[1]])


@triton.jit
def gather(
    start, strides, size, first, k, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH,
):  # fmt: skip
    """Patch elements k .. k + BLOCK_K, (BLOCK_K, BLOCK_M); zeros past the clip, the patch and the tokens."""
    offsets, there = _pixels(strides, size, first, k, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
    x = tl.load(start + offsets, mask=there, other=0.0).to(DTYPE)
    if JOINED > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, [BLOCK_K // JOINED, BLOCK_M, JOINED]), [0, 2, 1]), [BLOCK_K, BLOCK_M])
    return x


@triton.jit
def put(
    x, start, strides, size, first, k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr, VECTOR, TAIL: tl.constexpr, PATCH,
):  # fmt: skip
    """The inverse."""
    offsets, there = _pixels(strides, size, first, k, BLOCK_M, BLOCK_K, JOINED, VECTOR, TAIL, PATCH)
    x = x.to(start.dtype.element_ty)
    if JOINED > 1:
        x = tl.reshape(tl.permute(tl.reshape(x, [BLOCK_K // JOINED, JOINED, BLOCK_M]), [0, 2, 1]), [BLOCK_K // JOINED, BLOCK_M * JOINED])
    tl.store(start + offsets, x, mask=there)


@triton.jit
def weights(weight_ptr, stride, out, along, there_out, there_along, ACROSS: tl.constexpr):
    """weight[out, along], (out, along), or with ACROSS weight[along, out]."""
    if ACROSS:
        pointers = weight_ptr + out[:, None] + along[None, :].to(tl.int64) * stride
    else:
        pointers = weight_ptr + out[:, None].to(tl.int64) * stride + along[None, :]
    return tl.load(pointers, mask=there_out[:, None] & there_along[None, :], other=0.0)


def unavailable(weight: Tensor, *others) -> str | None:
    """Why the kernels cannot run with this weight and others, tensors whose channels are to be neighbours, or dtypes, or None."""
    for other in (weight, *others):
        dtype = other.dtype if isinstance(other, Tensor) else other
        if dtype is not None and dtype not in DTYPES:
            return f"it has no {dtype}"
        if isinstance(other, Tensor) and other.shape[-1] > 1 and other.stride(-1) != 1:
            return f"the channels of a tensor {tuple(other.shape)} are {other.stride(-1)} numbers apart, not one"
    return None


class Clips(NamedTuple):
    """Clips as the kernels take them. tiles: of their tokens; constants: as above."""

    base: Tensor
    table: Tensor | None
    clip: tuple[int, ...]
    count: int
    tiles: int
    constants: dict


def place(op: str, clips: Sequence[Tensor], starts: Sequence[int], patch: Sequence[int], block_m: int = BLOCK_M) -> Clips:
    """Clips (channels, T, H, W), whose tokens start at these rows. A table of them, if there is to be one, is written on the device."""
    first = clips[0]
    each = [cdiv(math.prod(grid_of(clip, patch)), block_m) for clip in clips]
    spaced = [clip.data_ptr() - first.data_ptr() for clip in clips]
    step, spacing = (starts[1] - starts[0], spaced[1]) if len(clips) > 1 else (0, 0)
    numbers = [(*clip.stride(), *clip.shape[1:], start) for clip, start in zip(clips, starts, strict=True)]
    even = spacing % first.element_size() == 0 and all(
        clip.shape == first.shape and clip.stride() == first.stride() and start == starts[0] + i * step and at == i * spacing
        for i, (clip, start, at) in enumerate(zip(clips, starts, spaced, strict=True))
    )
    table = None
    if not even:
        table = torch.empty(10, len(clips), dtype=torch.int64, device=first.device)
        columns = zip((clip.data_ptr() for clip in clips), numbers, accumulate(each, initial=0), strict=False)
        flat = [_argument(number) for address, rest, tile in columns for number in (address, *rest, tile)]
        flat += [_argument(0)] * (-len(flat) % (10 * AT_ONCE))
        for i in range(0, len(clips), AT_ONCE):
            launch(op, describe_clips, 1, table, tuple(flat[10 * i : 10 * (i + AT_ONCE)]), i, len(clips), COUNT=AT_ONCE, num_warps=1)
    clip = tuple(map(_argument, (spacing // first.element_size(), *numbers[0], step)))
    constants = {
        "BLOCK_M": block_m,
        "PATCH": (first.shape[0], *patch),
        "JOINED": patch[2] if patch[2] in (2, 4, 8) else 1,
        "VECTOR": _vector(clips, patch),
        "TAIL": any(side % p for clip in clips for side, p in zip(clip.shape[1:], patch, strict=True)),
    }
    return Clips(first, table, clip, len(clips), sum(each), constants)


def _vector(clips: Sequence[Tensor], patch: Sequence[int]) -> tuple[int, int]:
    """How many neighbours in channels, and in w, are aligned, to 16 bytes at most, and there together in every patch."""
    size = clips[0].element_size()
    along = across = 16 // size
    for clip in clips:
        strides = [stride if side > 1 else 0 for stride, side in zip(clip.stride(), clip.shape, strict=True)]
        aligned = clip.data_ptr() // size
        along = math.gcd(along, aligned, *strides[:3], clip.shape[3]) if clip.stride(3) == 1 else 1
        across = math.gcd(across, aligned, *strides[1:], clip.shape[0]) if clip.stride(0) == 1 else 1
        if patch[2] not in (1, 2, 4, 8) or along < patch[2]:
            along = 1
        if math.prod(patch) > 1:
            across = 1
    return (1, along) if along >= across else (across, 1)


def one_after_the_other(clips: Sequence[Tensor], patch: Sequence[int]) -> list[int]:
    """Where their tokens start in a pack of them alone."""
    return list(accumulate((math.prod(grid_of(clip, patch)) for clip in clips[:-1]), initial=0))


def as_clip(tokens: Tensor) -> Tensor:
    """Tokens (tokens, channels) as a clip of one row of pixels, whose patches of one they are."""
    return tokens.T[:, None, None, :]


def unit_of(*tensors: Tensor | None) -> int:
    """8 if all strides of rows are multiples of it, else 1: the compiler would look for multiples of 16."""
    return 8 if all(x is None or x.stride(0) % 8 == 0 for x in tensors) else 1


def strides_of(unit: int, *tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) // unit for x in tensors]


def as_bytes(marks: Tensor | None) -> Tensor | None:
    """Of bool, as kernels read it."""
    return None if marks is None else marks.contiguous().view(torch.uint8)


def power(n: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(n)))


class Source(NamedTuple):
    """What tokens come from, or go to: clips, or tokens; where the clips start among the tokens; and which tokens are used, on the device,
    None for all that are in a clip.
    """

    clips: Sequence[Tensor]
    starts: Sequence[int]
    patch: Sequence[int]
    used: Tensor | None = None

    @classmethod
    def of(cls, sources: Sequence[Tensor], patch: Sequence[int] | None, layout: VideoLayout | None = None) -> "Source":
        """patch: None, or empty, for tokens."""
        if not patch:
            used = None if without_gaps(layout) else layout.table("video rows", video_rows)
            return cls([as_clip(sources[0])], [0], (1, 1, 1), used)
        if layout is not None:
            return cls(sources, [clip.video_start for clip in layout.clips], patch)
        return cls(sources, one_after_the_other(sources, patch), patch)

    @property
    def elements(self) -> int:
        """Of a patch."""
        return self.clips[0].shape[0] * math.prod(self.patch)


def before_hopper() -> bool:
    """Whether the products are those of single warps, which would spill the sums of wide tiles."""
    return 0 < compute_capability() < 90


def compute_capability() -> int:
    """Ten times that of an NVIDIA GPU, else 0."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
