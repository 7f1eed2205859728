"""Group norm of frames with SiLU in Triton: the kernels, how they are launched, and the operators of torch.library that call them.

A tile is BLOCK_C channels of BLOCK_P pixels of a frame, in either memory format: wide in what lies side by side. Its channels are those of
several whole groups, each filled up to a power of two, or a part of one. Tile sizes depend on the size of a frame and the numbers of
channels and groups alone, and so do the order of all sums, and the alignment that kernels are compiled for: T and the batch change no bit.

The mean of a tile is rounded, and what its own deviations from it sum to is kept beside it. A group's mean is that of its first tile,
`level`, plus `rest`, which is small: x - level - rest is as exact as x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dispatch import NO_GLUON, as_operator, select
from ..launch import cdiv, launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OP = "group_norm_silu"
NUMBERS = 8192
"""Of a tile."""


class Frames(NamedTuple):
    """How the frames of a tensor lie: sizes, strides in numbers, and which of channels and pixels lie side by side."""

    batch: int
    channels: int
    frames: int
    pixels: int
    stride_batch: int
    stride_frame: int
    stride_other: int
    """Of channels, or, where these lie side by side, of pixels."""
    channels_last: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> "Frames | None":
        """None where neither channels nor pixels lie side by side."""
        if x.dim() == 4:
            x = x[:, :, None]
        batch, channels, frames, height, width = x.shape
        stride_batch, stride_channel, stride_frame, stride_row, stride_pixel = x.stride()
        if width == 1:
            stride_pixel = stride_row
        elif height > 1 and stride_row != width * stride_pixel:
            return None
        pixels = height * width
        if pixels > 1 and stride_channel == 1 and (channels > 1 or stride_pixel != 1):
            return cls(batch, channels, frames, pixels, stride_batch, stride_frame, stride_pixel, True)
        if pixels > 1 and stride_pixel != 1:
            return None
        return cls(batch, channels, frames, pixels, stride_batch, stride_frame, stride_channel, False)

    @property
    def aligned(self) -> bool:
        """Whether all that lies side by side begins at a multiple of eight numbers."""
        beside, apart = (self.channels, self.pixels) if self.channels_last else (self.pixels, self.channels)
        sizes, strides = (self.batch, self.frames, apart), self[4:7]
        return beside % 8 == 0 and all(size == 1 or stride % 8 == 0 for size, stride in zip(sizes, strides, strict=True))


# A tuple of constants goes through all of the functions below: DIMS, the channels, the groups, the channels of a group; those of a group in
# a tile, the groups of a tile, the tiles that a group is split into; the channels and pixels of a tile; whether channels lie side by side;
# and what strides are multiples of, in whose units kernels take them: the compiler looks for multiples of 16.


@triton.jit
def _place(frames, pixels, DIMS):
    """Of this program's tile: the clip, the frame in it, the block of channels, that of pixels and the number of these; the channels,
    their groups, and which are channels, (BLOCK_C,), the pixels, (BLOCK_P,), and which of the tile's numbers are there.
    """
    across: tl.constexpr = (DIMS[1] + DIMS[4] - 1) // DIMS[4] * DIMS[5]
    down = tl.cdiv(pixels, DIMS[7])
    tile = tl.program_id(0) % (down * across)
    frame = tl.program_id(0) // (down * across)
    if DIMS[8]:  # neighbouring programs read neighbouring numbers
        block, part = tile % across, tile // across
    else:
        block, part = tile // down, tile % down
    f = tl.arange(0, DIMS[6])
    group = block // DIMS[5] * DIMS[4] + f // DIMS[3]
    nth = block % DIMS[5] * DIMS[3] + f % DIMS[3]
    if DIMS[4] == 1:
        c = block // DIMS[5] * DIMS[2] + block % DIMS[5] * DIMS[3] + f
    elif DIMS[2] == DIMS[3]:
        c = block * DIMS[6] + f
    else:
        c = group * DIMS[2] + nth
    p = part * DIMS[7] + tl.arange(0, DIMS[7])
    own = (nth < DIMS[2]) & (group < DIMS[1])
    there = own[:, None] & (p < pixels)[None, :]
    return (frame // frames).to(tl.int64), (frame % frames).to(tl.int64), block, part, down, c, group, own, p, there


@triton.jit
def _pixels(pixels, DIMS):
    """The pixels of a frame, given in units where they lie side by side."""
    return pixels if DIMS[8] else pixels * DIMS[9]


@triton.jit
def _at(ptr, clip, frame, c, p, stride_batch, stride_frame, stride_other, DIMS):
    ptr += (clip * stride_batch + frame * stride_frame) * DIMS[9]
    if DIMS[8]:
        at = ptr + p.to(tl.int64)[None, :] * (stride_other * DIMS[9]) + c[:, None]
    else:
        at = ptr + c.to(tl.int64)[:, None] * (stride_other * DIMS[9]) + p[None, :]
    return at


@triton.jit
def _sums(x, DIMS):
    """Of the groups of a tile, (groups,)."""
    return tl.sum(tl.reshape(tl.sum(x, 1), [DIMS[4], DIMS[3]]), 1)


@triton.jit
def _spread(sums, DIMS):
    """To the channels of a tile, (BLOCK_C, 1)."""
    return tl.reshape(tl.broadcast_to(sums[:, None], [DIMS[4], DIMS[3]]), [DIMS[6]])[:, None]


@triton.jit
def _count(nth, part, pixels, DIMS):
    """The numbers of a group in a tile: the nth of its group, and of its pixels."""
    channels = tl.minimum(-(nth * DIMS[3] - DIMS[2]), DIMS[3])  # a constant minus a tensor is taken for a constant
    return (channels * tl.minimum(pixels - part * DIMS[7], DIMS[7])).to(tl.float32)


@triton.jit(do_not_specialize=["frames", "pixels", "stride_batch", "stride_frame", "stride_other"])
def group_statistics(x_ptr, partial_ptr, frames, pixels, stride_batch, stride_frame, stride_other, DIMS):
    """Of each group in a tile: the mean, what the deviations from that still have of one, and the sum of their squares around it, in
    (frames, groups, tiles of a group, 3).
    """
    pixels = _pixels(pixels, DIMS)
    clip, frame, block, part, down, c, _group, _own, p, there = _place(frames, pixels, DIMS)
    x = tl.load(_at(x_ptr, clip, frame, c, p, stride_batch, stride_frame, stride_other, DIMS), mask=there, other=0.0).to(tl.float32)
    count = _count(block % DIMS[5], part, pixels, DIMS)
    mean = _sums(x, DIMS) / count
    x = tl.where(there, x - _spread(mean, DIMS), 0.0)
    rest = _sums(x, DIMS) / count
    x = tl.where(there, x - _spread(rest, DIMS), 0.0)
    squares = _sums(x * x, DIMS)
    group = block // DIMS[5] * DIMS[4] + tl.arange(0, DIMS[4])
    place = ((clip * frames + frame) * DIMS[1] + group) * (down * DIMS[5]) + block % DIMS[5] * down + part
    tl.store(partial_ptr + 3 * place, mean, mask=group < DIMS[1])
    tl.store(partial_ptr + 3 * place + 1, rest, mask=group < DIMS[1])
    tl.store(partial_ptr + 3 * place + 2, squares, mask=group < DIMS[1])


@triton.jit(do_not_specialize=["pixels"])
def merge_statistics(partial_ptr, statistics_ptr, pixels, eps, BLOCK: tl.constexpr, DIMS):
    """Those of a group of a frame: level, rest and the inverse of the standard deviation, (frames, groups, 3) (Chan et al. 1979)."""
    pixels = _pixels(pixels, DIMS)
    down = tl.cdiv(pixels, DIMS[7])
    tiles, count = down * DIMS[5], pixels.to(tl.float32) * DIMS[2]
    partial_ptr += tl.program_id(0).to(tl.int64) * tiles * 3
    level = tl.load(partial_ptr)
    total, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = tl.load(partial_ptr + 3 * i, mask=i < tiles, other=0.0) - level
        here += tl.load(partial_ptr + 3 * i + 1, mask=i < tiles, other=0.0)
        total += tl.where(i < tiles, _count(i // down, i % down, pixels, DIMS) * here, 0.0)
    rest = tl.sum(total, 0) / count
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = tl.load(partial_ptr + 3 * i, mask=i < tiles, other=0.0) - level
        here += tl.load(partial_ptr + 3 * i + 1, mask=i < tiles, other=0.0) - rest
        here = tl.fma(_count(i // down, i % down, pixels, DIMS) * here, here, tl.load(partial_ptr + 3 * i + 2, mask=i < tiles, other=0.0))
        squares += tl.where(i < tiles, here, 0.0)
    statistics_ptr += 3 * tl.program_id(0)
    tl.store(statistics_ptr, level)
    tl.store(statistics_ptr + 1, rest)
    tl.store(statistics_ptr + 2, tl.rsqrt(tl.sum(squares, 0) / count + eps))


@triton.jit
def _per_channel(ptr, i, there):
    return tl.load(ptr + i, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _normalise(x, statistics_ptr, weight_ptr, bias_ptr, frame, c, group, there, DIMS):
    """xhat and z of a tile; the weight and the inverse of the standard deviation of its channels, those that are there."""
    statistics_ptr += (frame * DIMS[1] + group) * 3
    rstd = _per_channel(statistics_ptr, 2, there)
    xhat = (x.to(tl.float32) - _per_channel(statistics_ptr, 0, there) - _per_channel(statistics_ptr, 1, there)) * rstd
    weight = _per_channel(weight_ptr, c, there)
    return xhat, tl.fma(xhat, weight, _per_channel(bias_ptr, c, there)), weight, rstd


@triton.jit(
    do_not_specialize=["frames", "pixels", "stride_xb", "stride_xf", "stride_xo", "stride_ob", "stride_of", "stride_oo"],
)
def group_normalise(
    x_ptr, statistics_ptr, weight_ptr, bias_ptr, out_ptr, frames, pixels, stride_xb, stride_xf, stride_xo, stride_ob, stride_of, stride_oo,
    SILU: tl.constexpr, DIMS,
):  # fmt: skip
    """A tile of the result."""
    pixels = _pixels(pixels, DIMS)
    clip, frame, _block, _part, _down, c, group, own, p, there = _place(frames, pixels, DIMS)
    x = tl.load(_at(x_ptr, clip, frame, c, p, stride_xb, stride_xf, stride_xo, DIMS), mask=there, other=0.0)
    _xhat, z, _weight, _rstd = _normalise(x, statistics_ptr, weight_ptr, bias_ptr, clip * frames + frame, c, group, own, DIMS)
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    at = _at(out_ptr, clip, frame, c, p, stride_ob, stride_of, stride_oo, DIMS)
    tl.store(at, z.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _gradient(dy, z, SILU: tl.constexpr):
    """That of z."""
    dz = dy.to(tl.float32)
    if SILU:
        share = 1.0 / (1.0 + tl.exp(-z))
        dz *= share * tl.fma(z, 1.0 - share, 1.0)
    return dz


@triton.jit(
    do_not_specialize=["frames", "pixels", "stride_xb", "stride_xf", "stride_xo", "stride_yb", "stride_yf", "stride_yo"],
)
def group_gradient_sums(
    x_ptr, dy_ptr, statistics_ptr, weight_ptr, bias_ptr, sums_ptr, frames, pixels,
    stride_xb, stride_xf, stride_xo, stride_yb, stride_yf, stride_yo, SILU: tl.constexpr, DIMS,
):  # fmt: skip
    """The sums of dz and of dz xhat over the pixels of a tile, channel by channel, in (frames, blocks of pixels, 2, channels)."""
    pixels = _pixels(pixels, DIMS)
    clip, frame, _block, part, down, c, group, own, p, there = _place(frames, pixels, DIMS)
    x = tl.load(_at(x_ptr, clip, frame, c, p, stride_xb, stride_xf, stride_xo, DIMS), mask=there, other=0.0)
    dy = tl.load(_at(dy_ptr, clip, frame, c, p, stride_yb, stride_yf, stride_yo, DIMS), mask=there, other=0.0)
    xhat, z, _weight, _rstd = _normalise(x, statistics_ptr, weight_ptr, bias_ptr, clip * frames + frame, c, group, own, DIMS)
    dz = tl.where(there, _gradient(dy, z, SILU), 0.0)
    sums_ptr += ((clip * frames + frame) * down + part) * (2 * DIMS[0]) + c
    tl.store(sums_ptr, tl.sum(dz, 1), mask=own)
    tl.store(sums_ptr + DIMS[0], tl.sum(tl.where(there, dz * xhat, 0.0), 1), mask=own)


@triton.jit(do_not_specialize=["pixels"])
def merge_gradient_sums(sums_ptr, weight_ptr, totals_ptr, means_ptr, pixels, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, DIMS):
    """Of a group of a frame: the two sums of each channel, (frames, 2, channels), and the group's means of them with its weights, (frames,
    groups, 2).
    """
    pixels = _pixels(pixels, DIMS)
    down = tl.cdiv(pixels, DIMS[7])
    frame, group = (tl.program_id(0) // DIMS[1]).to(tl.int64), tl.program_id(0) % DIMS[1]
    nth = tl.arange(0, BLOCK_C)
    c, own = group * DIMS[2] + nth, nth < DIMS[2]
    sums_ptr += frame * down * (2 * DIMS[0]) + c[None, :]
    a, b = tl.zeros([BLOCK, BLOCK_C], tl.float32), tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for start in range(0, down, BLOCK):
        part = start + tl.arange(0, BLOCK)[:, None]
        there = (part < down) & own[None, :]
        a += tl.load(sums_ptr + part * (2 * DIMS[0]), mask=there, other=0.0)
        b += tl.load(sums_ptr + part * (2 * DIMS[0]) + DIMS[0], mask=there, other=0.0)
    a, b = tl.sum(a, 0), tl.sum(b, 0)
    totals_ptr += frame * (2 * DIMS[0]) + c
    tl.store(totals_ptr, a, mask=own)
    tl.store(totals_ptr + DIMS[0], b, mask=own)
    weight = tl.load(weight_ptr + c, mask=own, other=0.0).to(tl.float32)
    count = pixels.to(tl.float32) * DIMS[2]
    means_ptr += 2 * tl.program_id(0)
    tl.store(means_ptr, tl.sum(weight * a, 0) / count)
    tl.store(means_ptr + 1, tl.sum(weight * b, 0) / count)


@triton.jit(
    do_not_specialize=[
        "frames", "pixels", "stride_xb", "stride_xf", "stride_xo", "stride_yb", "stride_yf", "stride_yo",
        "stride_db", "stride_df", "stride_do",
    ],
)  # fmt: skip
def group_gradient(
    x_ptr, dy_ptr, statistics_ptr, means_ptr, weight_ptr, bias_ptr, dx_ptr, frames, pixels,
    stride_xb, stride_xf, stride_xo, stride_yb, stride_yf, stride_yo, stride_db, stride_df, stride_do, SILU: tl.constexpr, DIMS,
):  # fmt: skip
    """A tile of dx = rstd (dz weight - mean(dz weight) - xhat mean(dz weight xhat))."""
    pixels = _pixels(pixels, DIMS)
    clip, frame, _block, _part, _down, c, group, own, p, there = _place(frames, pixels, DIMS)
    x = tl.load(_at(x_ptr, clip, frame, c, p, stride_xb, stride_xf, stride_xo, DIMS), mask=there, other=0.0)
    dy = tl.load(_at(dy_ptr, clip, frame, c, p, stride_yb, stride_yf, stride_yo, DIMS), mask=there, other=0.0)
    nth = clip * frames + frame
    xhat, z, weight, rstd = _normalise(x, statistics_ptr, weight_ptr, bias_ptr, nth, c, group, own, DIMS)
    means_ptr += (nth * DIMS[1] + group) * 2
    mean, along = _per_channel(means_ptr, 0, own), _per_channel(means_ptr, 1, own)
    dx = rstd * (_gradient(dy, z, SILU) * weight - mean - xhat * along)
    tl.store(_at(dx_ptr, clip, frame, c, p, stride_db, stride_df, stride_do, DIMS), dx.to(dx_ptr.dtype.element_ty), mask=there)


def unavailable(x: torch.Tensor, **parameters: torch.Tensor) -> str | None:
    """Why the kernels cannot run on these where torch can, if they cannot."""
    for name, tensor in {"x": x, **parameters}.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}"
    if Frames.of(x) is None:
        return f"neither channels nor pixels of x lie side by side: its strides are {tuple(x.stride())}"
    return None


def tile(channels: int, groups: int, pixels: int, channels_last: bool, aligned: bool) -> tuple:
    """DIMS."""
    own = channels // groups
    own_filled = triton.next_power_of_2(own)
    filled = triton.next_power_of_2(groups * own_filled)
    if channels_last:
        block_c = min(filled, 64 if pixels > 32 else 256)
        block_p = NUMBERS // max(block_c, 16)
    else:
        block_p = 1024 if pixels > 256 else 256 if pixels > 64 else 64
        block_c = min(filled, NUMBERS // block_p)
    per = min(own_filled, block_c)
    return channels, groups, own, per, block_c // per, cdiv(own, per), block_c, block_p, channels_last, 8 if aligned else 1


class Plan(NamedTuple):
    """What the launches of a call share: DIMS, T and the pixels of a frame (in units where they lie side by side), how many tiles, groups
    and blocks of pixels there are, and the strides of the tensors, three for each, in units.
    """

    dims: tuple
    sizes: tuple[int, int]
    tiles: int
    groups: int
    parts: int
    strides: list[list[int]]

    @classmethod
    def of(cls, groups: int, *tensors: torch.Tensor) -> "Plan":
        lie = [Frames.of(tensor) for tensor in tensors]
        batch, channels, frames, pixels, *_, channels_last = lie[0]
        dims = tile(channels, groups, pixels, channels_last, all(each.aligned for each in lie))
        parts, unit = cdiv(pixels, dims[7]), dims[9]
        return cls(
            dims,
            (frames, pixels if channels_last else pixels // unit),
            batch * frames * cdiv(groups, dims[4]) * dims[5] * parts,
            batch * frames * groups,
            parts,
            [[stride // unit for stride in each[4:7]] for each in lie],
        )


def _like(x: torch.Tensor) -> torch.Tensor:
    """Dense, in x's memory format."""
    return torch.empty_like(x, memory_format=_format(x))


def _format(x: torch.Tensor) -> torch.memory_format:
    if not Frames.of(x).channels_last:
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _frames_of(x: torch.Tensor) -> int:
    return x.shape[0] * (x.shape[2] if x.dim() == 5 else 1)


def group_norm_fused(x, weight, bias, groups, eps, silu):
    """(out, the statistics of each frame and group: level, rest and the inverse of the standard deviation)."""
    out, statistics = _like(x), x.new_empty(_frames_of(x), groups, 3, dtype=torch.float32)
    if not x.numel():
        return out, statistics.zero_()
    weight, bias = weight.contiguous(), bias.contiguous()
    plan = Plan.of(groups, x, out)
    (of_x, of_out), shared = plan.strides, {"DIMS": plan.dims, "num_warps": 8}
    partial = x.new_empty(plan.groups, plan.dims[5] * plan.parts, 3, dtype=torch.float32)
    launch(OP, group_statistics, plan.tiles, x, partial, *plan.sizes, *of_x, **shared)
    launch(OP, merge_statistics, plan.groups, partial, statistics, plan.sizes[1], eps, BLOCK=512, DIMS=plan.dims, num_warps=4)
    launch(OP, group_normalise, plan.tiles, x, statistics, weight, bias, out, *plan.sizes, *of_x, *of_out, SILU=silu, **shared)
    return out, statistics


def group_norm_fused_backward(dout, x, weight, bias, statistics, groups, silu, wanted):
    """dx, dweight and dbias, those that are wanted."""
    dx = _like(x) if wanted[0] else None
    dweight, dbias = (torch.empty_like(each) if want else None for each, want in zip((weight, bias), wanted[1:], strict=True))
    if not x.numel():
        return dx, *(None if each is None else each.zero_() for each in (dweight, dbias))
    lies = Frames.of(dout)
    if lies is None or lies.channels_last != Frames.of(x).channels_last:
        dout = dout.contiguous(memory_format=_format(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    plan = Plan.of(groups, x, dout)
    channels, shared = x.shape[1], {"SILU": silu, "DIMS": plan.dims, "num_warps": 8}
    of_x, of_dout = plan.strides
    sums = x.new_empty(_frames_of(x), plan.parts, 2, channels, dtype=torch.float32)
    totals, means = x.new_empty(_frames_of(x), 2, channels, dtype=torch.float32), x.new_empty(plan.groups, 2, dtype=torch.float32)
    launch(OP, group_gradient_sums, plan.tiles, x, dout, statistics, weight, bias, sums, *plan.sizes, *of_x, *of_dout, **shared)
    block = triton.next_power_of_2(plan.dims[2])
    launch(
        OP, merge_gradient_sums, plan.groups, sums, weight, totals, means, plan.sizes[1],
        BLOCK_C=block, BLOCK=max(1, 2048 // block), DIMS=plan.dims, num_warps=4,
    )  # fmt: skip
    if dx is not None:
        of_dx = Plan.of(groups, x, dout, dx).strides[2]
        launch(OP, group_gradient, plan.tiles, x, dout, statistics, means, weight, bias, dx, *plan.sizes, *of_x, *of_dout, *of_dx, **shared)
    db, dw = totals.sum(0)
    return dx, *(None if each is None else each.copy_(d) for each, d in ((dweight, dw), (dbias, db)))


@as_operator("tubelet::group_norm_silu")
def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return select(OP, implementation, {"triton": group_norm_fused}, {"gluon": NO_GLUON})(x, weight, bias, groups, eps, silu)


@group_norm_silu.register_fake
def _(x, weight, bias, groups, eps, silu, implementation):
    return _like(x), x.new_empty(_frames_of(x), groups, 3, dtype=torch.float32)


@as_operator("tubelet::group_norm_silu_backward")
def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    statistics: torch.Tensor,
    groups: int,
    silu: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias, empty where not wanted."""
    grads = group_norm_fused_backward(dout, x, weight, bias, statistics, groups, silu, wanted)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@backward.register_fake
def _(dout, x, weight, bias, statistics, groups, silu, wanted):
    likes = _like(x), torch.empty_like(weight), torch.empty_like(bias)
    return tuple(like if want else x.new_empty(0) for like, want in zip(likes, wanted, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, groups, _eps, silu, _implementation = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.how = groups, silu


def _backward(ctx, dout, _):
    wanted = list(ctx.needs_input_grad[:3])
    grads = backward(dout, *ctx.saved_tensors, *ctx.how, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 4


group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
