"""Norm and rotation of queries and keys in Triton: device functions on pairs of channels in registers, the two kernels, and how they are
launched.

Channels are held as pairs (a, b), which R turns to (a cos - b sin, a sin + b cos). Pairs of neighbours are read as they lie, 16 bytes a
thread, and split in registers, where both are in one thread; of halves each is read by itself. Tiles are of parts, (heads, tokens, pairs),
with numbers of pairs that are filled up to a power of two: 72 channels leave 7 of 16 threads idle, which a kernel that waits for memory
does not feel. Of norms of single heads a program has a few heads of several tokens; of norms across heads all heads of one token, in parts
of powers of two of heads: 40 are 32 and 8. Weights, biases and angles are loaded as often as they are used, in the shape of the part: each
thread then has what it needs, and that heads and tokens share them is left to the first cache, which has bandwidth to spare. Otherwise
they would go through shared memory, with barriers.

    forwards    xhat = (x - mean) r,   y = R (w xhat + b)
    backwards   g = R^T dy,   dw = sum g xhat,   db = sum g,   h = w g,   dx = r (h - mean(h) - xhat mean(h xhat))

where r = 1 / sqrt(mean((x - mean)^2) + eps), mean(x) and mean(h) being of layer norms alone. Every sum over channels has an order that
depends on widths alone.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..fp8 import FP8, LARGEST
from ..launch import cdiv, constants, launch
from .reference import NormRope

OP = "qk_norm_rope"
LARGEST_HEAD_DIM = 256
LARGEST_SIZE = 16384
"""Of channels that a norm across heads is over."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_WITH_FP8 = (8, 9)
"""Ada."""
E4M3_LARGEST = tl.constexpr(LARGEST)
NORMS = {None: 0, "rms": 1, "layer": 2}
LAYER = tl.constexpr(NORMS["layer"])
MOST_PROGRAMS = 512
"""Backwards, of queries and as many of keys: so many rows of partial sums have the gradients of a weight and of a bias."""


class Part(NamedTuple):
    """Pairs of channels in registers together. head, heads: of the program's. first, second: the channels of the first pair; that of pair j
    is j beyond, or 2 j of neighbours. size: a power of two. pairs: how many there are; and `turned` of them turn, by the angles of the
    table from `column` on.
    """

    head: int
    heads: int
    first: int
    second: int
    size: int
    pairs: int
    turned: int
    column: int


class Tile(NamedTuple):
    """What a program has of queries or of keys at once: `heads` heads, one of `chunks` parts of them, of `tokens` tokens. size: of what a
    norm is over. unit: of strides, of which kernels are told multiples, so that they know addresses to be aligned.
    """

    heads: int
    tokens: int
    chunks: int
    head_dim: int
    size: int
    norm: int
    across: bool
    interleaved: bool
    turns: bool
    unit: int
    parts: tuple[Part, ...]


class Table(NamedTuple):
    """Angles: cos and sin, strides in units, and the row of each token, None where that is its number."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor | None
    stride_ct: int
    stride_ch: int
    stride_st: int
    stride_sh: int
    unit: int
    of_heads: bool


class Forward(NamedTuple):
    """Beside queries or keys: where results go, as E4M3 if there is a place for scales, and what makes them."""

    out: torch.Tensor
    scale: torch.Tensor | None
    slots: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    stride_t: int
    stride_h: int
    stride_out_t: int
    stride_out_h: int
    tile: Tile


class Backward(NamedTuple):
    """Beside queries or keys: the gradients of results and theirs, and where partial sums for the weight and the bias go."""

    dout: torch.Tensor
    dx: torch.Tensor
    weight: torch.Tensor | None
    weight_sums: torch.Tensor | None
    bias_sums: torch.Tensor | None
    stride_t: int
    stride_h: int
    stride_dout_t: int
    stride_dout_h: int
    tile: Tile


# ---------------------------------------------------------------------------------------- loaded values: tuples a, b of each part in turn


@triton.jit
def _within(x, PART):
    """Zeros past the pairs that there are."""
    if PART.pairs < PART.size:
        x = tl.where((tl.arange(0, PART.size) < PART.pairs)[None, None, :], x, 0.0)
    return x


@triton.jit
def _part_mean(x, TILE):
    s = tl.sum(x, 2, keep_dims=True)
    return tl.sum(s, 0, keep_dims=True) if TILE.across else s


@triton.jit
def mean_product(x, y, TILE):
    """The mean of x y over what a norm is over, (heads or 1, tokens, 1)."""
    total = _part_mean(x[0] * y[0] + x[1] * y[1], TILE)
    for i in tl.static_range(1, len(TILE.parts)):
        total += _part_mean(x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1], TILE)
    return total * (1.0 / TILE.size)


@triton.jit
def less_mean(x, TILE):
    """x less its mean; zeros past the channels."""
    total = _part_mean(x[0] + x[1], TILE)
    for i in tl.static_range(1, len(TILE.parts)):
        total += _part_mean(x[2 * i] + x[2 * i + 1], TILE)
    mean = total * (1.0 / TILE.size)
    y = ()
    for i in tl.static_range(len(x)):
        y += (_within(x[i] - mean, TILE.parts[i // 2]),)
    return y


@triton.jit
def normalise(x, there, eps, TILE):
    """xhat and r, zero where tokens are not `there`, (1, tokens, 1)."""
    if TILE.norm == LAYER:
        x = less_mean(x, TILE)
    r = tl.where(there, tl.rsqrt(mean_product(x, x, TILE) + eps), 0.0)
    return scaled(x, r), r


@triton.jit
def scaled(x, factor):
    y = ()
    for i in tl.static_range(len(x)):
        y += (x[i] * factor,)
    return y


@triton.jit
def affine(x, weight, bias):
    """weight x + bias, either () for none."""
    y = ()
    for i in tl.static_range(len(x)):
        each = x[i]
        if len(weight) > 0:
            each *= weight[i]
        if len(bias) > 0:
            each += bias[i]
        y += (each,)
    return y


@triton.jit
def turn(x, angles, TILE):
    """Pairs turned by angles, a tuple (cos, sin) of each part in turn, () for none."""
    y = ()
    for i in tl.static_range(len(TILE.parts)):
        if len(angles) > 0 and TILE.parts[i].turned > 0:
            a, b, cos, sin = x[2 * i], x[2 * i + 1], angles[2 * i], angles[2 * i + 1]
            y += (tl.fma(a, cos, -(b * sin)), tl.fma(a, sin, b * cos))
        else:
            y += (x[2 * i], x[2 * i + 1])
    return y


@triton.jit
def norm_backward(h, xhat, r, TILE):
    """dx from the gradient h of xhat."""
    if TILE.norm == LAYER:
        h = less_mean(h, TILE)
    along = mean_product(h, xhat, TILE)
    dx = ()
    for i in tl.static_range(len(h)):
        dx += ((h[i] - xhat[i] * along) * r,)
    return dx


# ------------------------------------------------------------------------------------------------------------------- loads and stores


@triton.jit
def _load_pairs(rows, there, PART, TILE):
    """a and b of a part, float32, from where the channels of rows, (heads, tokens, 1), begin; zeros where nothing is."""
    if TILE.interleaved:
        d = tl.arange(0, 2 * PART.size)[None, None, :]
        has = there if PART.pairs == PART.size else there & (d < 2 * PART.pairs)
        x = tl.load(rows + PART.first + d, mask=has, other=0.0)
        x = tl.reshape(x, [x.shape[0], x.shape[1], PART.size, 2])
        a, b = tl.split(x)
    else:
        j = tl.arange(0, PART.size)[None, None, :]
        has = there if PART.pairs == PART.size else there & (j < PART.pairs)
        a = tl.load(rows + PART.first + j, mask=has, other=0.0)
        b = tl.load(rows + PART.second + j, mask=has, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(rows, a, b, there, PART, TILE):
    a, b = a.to(rows.dtype.element_ty), b.to(rows.dtype.element_ty)
    if TILE.interleaved:
        d = tl.arange(0, 2 * PART.size)[None, None, :]
        has = there if PART.pairs == PART.size else there & (d < 2 * PART.pairs)
        x = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * PART.size])
        tl.store(rows + PART.first + d, x, mask=has)
    else:
        j = tl.arange(0, PART.size)[None, None, :]
        has = there if PART.pairs == PART.size else there & (j < PART.pairs)
        tl.store(rows + PART.first + j, a, mask=has)
        tl.store(rows + PART.second + j, b, mask=has)


@triton.jit
def _heads(head, PART):
    """Of a part, (heads, 1, 1), where the program's first is `head`."""
    return (tl.arange(0, PART.heads) + PART.head + head)[:, None, None]


@triton.jit
def _load(ptr, head, token, there, stride_h, stride_t, TILE):
    """All parts of tokens, (1, tokens, 1), strides in elements."""
    x = ()
    for i in tl.static_range(len(TILE.parts)):
        x += _load_pairs(ptr + _heads(head, TILE.parts[i]) * stride_h + token * stride_t, there, TILE.parts[i], TILE)
    return x


@triton.jit
def _store(ptr, x, head, token, there, stride_h, stride_t, TILE):
    for i in tl.static_range(len(TILE.parts)):
        rows = ptr + _heads(head, TILE.parts[i]) * stride_h + token * stride_t
        _store_pairs(rows, x[2 * i], x[2 * i + 1], there, TILE.parts[i], TILE)


@triton.jit
def _load_parameter(ptr, TILE):
    """A weight or a bias of each of the tile's numbers; () for None."""
    x = ()
    if ptr is not None:
        for i in tl.static_range(len(TILE.parts)):
            if TILE.across:  # noqa: SIM108, the two are of other shapes
                rows = ptr + _heads(0, TILE.parts[i]) * TILE.head_dim
            else:
                rows = ptr + tl.zeros([TILE.heads, TILE.tokens, 1], tl.int32)
            x += _load_pairs(rows, tl.full([1, 1, 1], True, tl.int1), TILE.parts[i], TILE)
    return x


@triton.jit
def _load_angle(ptr, has, other: tl.constexpr, PART):
    j = tl.arange(0, PART.size)[None, None, :]
    return tl.load(ptr + PART.column + j, mask=has if PART.turned == PART.size else has & (j < PART.turned), other=other)


@triton.jit
def load_angles(table, head, token, there, table_rows, TILE):
    """cos and sin of the pairs of each part, 0 where none turns, 1 and 0 for pairs and tokens that do not; () without a table."""
    angles = ()
    if TILE.turns:
        row = token
        if table.rows is not None:
            row = tl.load(table.rows + token, mask=there, other=-1).to(tl.int64)
        has = there & (row >= 0) & (row < table_rows)
        cos, sin = table.cos + row * (table.stride_ct * table.unit), table.sin + row * (table.stride_st * table.unit)
        for i in tl.static_range(len(TILE.parts)):
            if TILE.parts[i].turned == 0:
                angles += (0, 0)
            elif table.of_heads:
                heads = _heads(head, TILE.parts[i])
                angles += (
                    _load_angle(cos + heads * (table.stride_ch * table.unit), has, 1.0, TILE.parts[i]),
                    _load_angle(sin + heads * (table.stride_sh * table.unit), has, 0.0, TILE.parts[i]),
                )
            else:
                none = tl.zeros([TILE.parts[i].heads, 1, 1], tl.int32)
                angles += (_load_angle(cos + none, has, 1.0, TILE.parts[i]), _load_angle(sin + none, has, 0.0, TILE.parts[i]))
    return angles


@triton.jit
def _place(program, tokens, TILE):
    """The first head and the tokens, (1, tokens, 1), of a program; neighbours have other heads of the same tokens."""
    head = (program % TILE.chunks * TILE.heads).to(tl.int64)
    token = (program // TILE.chunks * TILE.tokens + tl.arange(0, TILE.tokens))[None, :, None]
    return head, token.to(tl.int64), token < tokens


# ---------------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _quantised(x, scale_ptr, head, token, there, tokens, TILE):
    """x over the scale of each row, which is stored head by head."""
    y = ()
    for i in tl.static_range(len(TILE.parts)):
        # Of numbers not below zero, the order is that of their bits, and NaN above all.
        largest = tl.zeros([TILE.parts[i].heads, TILE.tokens, 1], tl.int32)
        for j in tl.static_range(len(TILE.parts)):
            if TILE.parts[j].head == TILE.parts[i].head:
                a, b = tl.abs(x[2 * j]).to(tl.int32, bitcast=True), tl.abs(x[2 * j + 1]).to(tl.int32, bitcast=True)
                largest = tl.maximum(largest, tl.max(tl.maximum(a, b), 2, keep_dims=True))
        largest = largest.to(tl.float32, bitcast=True)
        scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full(largest.shape, E4M3_LARGEST, tl.float32)))
        if TILE.parts[i].first == 0:
            tl.store(scale_ptr + _heads(head, TILE.parts[i]) * tokens + token, scale, mask=there)
        y += (tl.div_rn(x[2 * i], tl.broadcast_to(scale, x[2 * i].shape)), tl.div_rn(x[2 * i + 1], tl.broadcast_to(scale, x[2 * i].shape)))
    return y


@triton.jit
def _forward(x_ptr, side, table, program, tokens, table_rows, slot_rows, eps, TILE):
    head, token, there = _place(program, tokens, TILE)
    x = _load(x_ptr, head, token, there, side.stride_h * TILE.unit, side.stride_t * TILE.unit, TILE)
    # All that is read is asked for before the first sum waits for it.
    angles = load_angles(table, head, token, there, table_rows, TILE)
    weight, bias = _load_parameter(side.weight, TILE), _load_parameter(side.bias, TILE)
    row = token
    if side.slots is not None:
        row = tl.load(side.slots + token, mask=there, other=-1).to(tl.int64)
    if TILE.norm > 0:
        x, _r = normalise(x, there, eps, TILE)
    x = turn(affine(x, weight, bias), angles, TILE)
    if side.scale is not None:
        x = _quantised(x, side.scale, head, token, there, tokens, TILE)
    if side.slots is not None:
        there = (row >= 0) & (row < slot_rows)
    _store(side.out, x, head, row, there, side.stride_out_h * TILE.unit, side.stride_out_t * TILE.unit, TILE)


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "q_programs", "table_rows", "slot_rows"])
def rotary_forward(q_ptr, k_ptr, q, k, table, q_tokens, k_tokens, q_programs, table_rows, slot_rows, eps):
    """A tile of queries, or of keys."""
    program = tl.program_id(0)
    if program < q_programs:
        _forward(q_ptr, q, table, program, q_tokens, table_rows, 0, eps, q.tile)
    else:
        _forward(k_ptr, k, table, program - q_programs, k_tokens, table_rows, slot_rows, eps, k.tile)


@triton.jit
def _no_sums(TILE):
    sums = ()
    for i in tl.static_range(len(TILE.parts)):
        zeros = tl.zeros([TILE.parts[i].heads if TILE.across else 1, TILE.tokens, TILE.parts[i].size], tl.float32)
        sums += (zeros, zeros)
    return sums


@triton.jit
def _add(sums, x, TILE):
    """x, summed over heads that share a parameter."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (sums[i] + (x[i] if TILE.across else tl.sum(x[i], 0, keep_dims=True)),)
    return y


@triton.jit
def _store_sums(ptr, sums, program, TILE):
    ptr += program.to(tl.int64) * TILE.size
    for i in tl.static_range(len(TILE.parts)):
        rows = ptr + _heads(0, TILE.parts[i]) * TILE.head_dim if TILE.across else ptr + tl.zeros([1, 1, 1], tl.int32)
        a, b = tl.sum(sums[2 * i], 1, keep_dims=True), tl.sum(sums[2 * i + 1], 1, keep_dims=True)
        _store_pairs(rows, a, b, tl.full([1, 1, 1], True, tl.int1), TILE.parts[i], TILE)


@triton.jit
def _backward(x_ptr, side, table, program, programs, tokens, table_rows, eps, TILE):
    weight_sums, bias_sums = _no_sums(TILE), _no_sums(TILE)
    tiles = tl.cdiv(tokens, TILE.tokens) * TILE.chunks
    for i in tl.range(tl.cdiv(tiles - program, programs), disable_licm=True):
        head, token, there = _place(program + i * programs, tokens, TILE)
        g = _load(side.dout, head, token, there, side.stride_dout_h * TILE.unit, side.stride_dout_t * TILE.unit, TILE)
        if TILE.norm > 0:
            x = _load(x_ptr, head, token, there, side.stride_h * TILE.unit, side.stride_t * TILE.unit, TILE)
        angles = load_angles(table, head, token, there, table_rows, TILE)
        back = ()
        for j in tl.static_range(len(angles)):
            back += (-angles[j] if j % 2 == 1 else angles[j],)
        g = turn(g, back, TILE)
        if TILE.norm > 0:
            xhat, r = normalise(x, there, eps, TILE)
            if side.weight_sums is not None:
                products = ()
                for j in tl.static_range(len(g)):
                    products += (g[j] * xhat[j],)
                weight_sums = _add(weight_sums, products, TILE)
            if side.bias_sums is not None:
                bias_sums = _add(bias_sums, g, TILE)
            g = norm_backward(affine(g, _load_parameter(side.weight, TILE), ()), xhat, r, TILE)
        _store(side.dx, g, head, token, there, TILE.head_dim, TILE.head_dim * TILE.heads * TILE.chunks, TILE)
    if side.weight_sums is not None:
        _store_sums(side.weight_sums, weight_sums, program, TILE)
    if side.bias_sums is not None:
        _store_sums(side.bias_sums, bias_sums, program, TILE)


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "q_programs", "k_programs", "table_rows"])
def rotary_backward(q_ptr, k_ptr, q, k, table, q_tokens, k_tokens, q_programs, k_programs, table_rows, eps):
    """Some of the tiles of queries, or of keys, one after the other."""
    program = tl.program_id(0)
    if program < q_programs:
        _backward(q_ptr, q, table, program, q_programs, q_tokens, table_rows, eps, q.tile)
    else:
        _backward(k_ptr, k, table, program - q_programs, k_programs, k_tokens, table_rows, eps, k.tile)


# ---------------------------------------------------------------------------------------------------------------------------- launches


def channel_parts(head_dim: int, pairs: int, interleaved: bool, axes: Sequence[int] | None) -> list[Part]:
    """Those of one head, of whose channels `pairs` pairs turn."""
    if interleaved:
        return [Part(0, 0, 0, 1, triton.next_power_of_2(head_dim // 2), head_dim // 2, pairs, 0)]
    parts, first = [], 0
    for channels in (*(axes or (2 * pairs,)), head_dim - 2 * pairs):
        half = channels // 2
        turned = half if first < 2 * pairs else 0  # the last ones do not, and are in pairs too
        if half:
            parts.append(Part(0, 0, first, first + half, triton.next_power_of_2(half), half, turned, first // 2))
        first += channels
    return parts


def powers_of_two(count: int) -> list[int]:
    """Those that add up to `count`, the largest first."""
    return [1 << bit for bit in range(count.bit_length() - 1, -1, -1) if count >> bit & 1]


@lru_cache(1024)
def tiles_of(
    heads: tuple[int, int],
    head_dim: int,
    pairs: int,
    norm: str | None,
    across: bool,
    interleaved: bool,
    axes: tuple[int, ...] | None,
    biased: bool,
    units: tuple[int, int],
    itemsize: int,
    backward: bool,
) -> tuple[Tile, Tile, int]:
    """Tiles of queries and of keys, of numbers of so many bytes, and their warps."""
    channels, across = channel_parts(head_dim, pairs, interleaved, axes), across and norm is not None
    row = sum(2 * part.size for part in channels)
    narrowest = min(part.size for part in channels) * (2 if interleaved else 1)
    tokens, groups = 1, [powers_of_two(count) for count in heads]
    if across:  # so many channels a thread as its registers hold
        most = 24 if backward and (itemsize > 2 or biased) else 40
        warps = min(max(2, triton.next_power_of_2(cdiv(max(heads) * row, 32 * most))), 16)
    else:
        warps, most = 4, _floor(128 * (24 if backward and norm is not None else 48) // row)
        # Tokens for each thread to have 16 bytes of the narrowest part; heads of them, to share angles; more tokens where these are few.
        tokens = max(1, min(128 * 16 // itemsize // narrowest, most))
        together = min(_floor(max(1, most // tokens)), math.gcd(*heads) & -math.gcd(*heads))
        tokens = max(tokens, _floor(most // together))
        groups = [[together]] * 2
    return *(
        Tile(
            count if across else together, tokens, 1 if across else count // together, head_dim, count * head_dim if across else head_dim,
            NORMS[norm], across, interleaved, pairs > 0, unit,
            tuple(part._replace(head=sum(each[:i]), heads=group) for i, group in enumerate(each) for part in channels),
        )
        for count, each, unit in zip(heads, groups, units, strict=True)
    ), warps  # fmt: skip


def _floor(x: int) -> int:
    """The largest power of two up to x, or 0."""
    return 1 << (x.bit_length() - 1) if x else 0


def _unit(strides: Sequence[int], itemsize: int) -> int:
    """The largest power of two that divides the strides, 16 bytes at most."""
    return math.gcd(16 // itemsize, *strides)


def _tiles(
    q: torch.Tensor, k: torch.Tensor, how: NormRope, others: Sequence[torch.Tensor], backward: bool = False
) -> tuple[Tile, Tile, int]:
    """Those of q, of k, and warps. others: what is read or written beside them."""
    units = tuple(
        _unit((*x.stride()[:2], *y.stride()[:2]), max(x.element_size(), y.element_size())) for x, y in zip((q, k), others, strict=True)
    )
    pairs = 0 if how.cos is None else how.cos.shape[-1]
    itemsize = min(q.element_size(), k.element_size())
    biased = how.q_bias is not None or how.k_bias is not None
    return tiles_of(
        (q.shape[1], k.shape[1]), q.shape[2], pairs, how.norm, how.across_heads, how.interleaved, how.axes, biased, units, itemsize,
        backward,
    )  # fmt: skip


def _table(how: NormRope) -> tuple[Table | None, int]:
    """The table, if anything turns, and its rows."""
    if how.cos is None or not how.cos.shape[-1]:
        return None, 0
    of_heads = how.cos.dim() == 3
    strides = [each.stride(i) if i < each.dim() - 1 else 0 for each in (how.cos, how.sin) for i in (0, 1)]
    unit = _unit(strides, how.cos.element_size())
    rows = None if how.rows is None else how.rows.contiguous()
    table = Table(how.cos, how.sin, rows, *(stride // unit for stride in strides), tl.constexpr(unit), tl.constexpr(of_heads))
    return table, how.cos.shape[0]


def _side_by_side(how: NormRope) -> NormRope:
    """With the numbers of weights and biases next to each other, as kernels read them."""
    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    apart = {name: x.contiguous() for name in names if (x := getattr(how, name)) is not None and not x.is_contiguous()}
    return how._replace(**apart) if apart else how


def _number_of_tiles(x: torch.Tensor, tile: Tile) -> int:
    return cdiv(x.shape[0], tile.tokens) * tile.chunks


def _strides(x: torch.Tensor, unit: int) -> tuple[int, int]:
    return x.stride(0) // unit, x.stride(1) // unit


def norm_rope_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    how: NormRope,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    fp8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q', k', new or in `out`, and with `fp8` their scales."""
    if out is None:
        out = tuple(x.new_empty(x.shape, dtype=FP8 if fp8 else x.dtype) for x in (q, k))
    scales = tuple(x.new_empty(x.shape[1], x.shape[0], dtype=torch.float32) if fp8 else None for x in (q, k))
    how = _side_by_side(how)
    q_tile, k_tile, warps = _tiles(q, k, how, out)
    slots = None if slots is None else slots.contiguous()
    sides = (
        Forward(
            y, scale, slot, weight, bias, *_strides(x, tile.unit), *_strides(y, tile.unit), constants(tile)
        )
        for x, y, scale, slot, weight, bias, tile in (
            (q, out[0], scales[0], None, how.q_weight, how.q_bias, q_tile), (k, out[1], scales[1], slots, how.k_weight, how.k_bias, k_tile),
        )
    )  # fmt: skip
    programs, (table, table_rows) = _number_of_tiles(q, q_tile), _table(how)
    launch(
        OP, rotary_forward, programs + _number_of_tiles(k, k_tile), q, k, *sides, table, q.shape[0], k.shape[0], programs, table_rows,
        out[1].shape[0], how.eps, num_warps=warps,
    )  # fmt: skip
    return *out, *(scale if scale is None else scale.t() for scale in scales)


def norm_rope_fused_backward(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, how: NormRope, wanted: Sequence[bool] = (True,) * 4
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of q, k, and of their weights and biases, q_weight, k_weight, q_bias, k_bias, those that are there and wanted."""
    how = _side_by_side(how)
    douts = tuple(d if not d.numel() or d.stride(-1) == 1 else d.contiguous() for d in (dq, dk))
    grads = tuple(x.new_empty(x.shape) for x in (q, k))
    parameters = how.q_weight, how.k_weight, how.q_bias, how.k_bias
    q_tile, k_tile, warps = _tiles(q, k, how, douts, backward=True)
    tiles, programs, sums, sides = (q_tile, k_tile), [], [None] * 4, []
    for i, (x, dout, dx, tile) in enumerate(zip((q, k), douts, grads, tiles, strict=True)):
        programs.append(min(_number_of_tiles(x, tile), MOST_PROGRAMS))
        for j in (i, i + 2):
            if parameters[j] is not None and wanted[j]:
                sums[j] = x.new_empty(programs[i], tile.size, dtype=torch.float32)
        strides = (*_strides(x, tile.unit), *_strides(dout, tile.unit))
        sides.append(Backward(dout, dx, parameters[i], sums[i], sums[i + 2], *strides, constants(tile)))
    table, table_rows = _table(how)
    launch(
        OP, rotary_backward, sum(programs), q, k, *sides, table, q.shape[0], k.shape[0], *programs, table_rows, how.eps, num_warps=warps,
    )  # fmt: skip
    return *grads, *(None if each is None else each.sum(0).to(x.dtype) for each, x in zip(sums, parameters, strict=True))


def unavailable(q: torch.Tensor, k: torch.Tensor, how: NormRope, out: Sequence[torch.Tensor] | None, fp8: bool) -> str | None:
    """Why the kernels cannot do this to q and k, if they cannot."""
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, not float16, bfloat16 or float32"
        if x.numel() and x.stride(-1) != 1:
            return f"{name} has no unit stride in head_dim"
    head_dim, heads = q.shape[2], max(q.shape[1], k.shape[1])
    if head_dim > LARGEST_HEAD_DIM or head_dim % 2 or not head_dim or not min(q.shape[1], k.shape[1]):
        return f"{q.shape[1]} and {k.shape[1]} heads of {head_dim} channels: it takes even numbers of these, up to {LARGEST_HEAD_DIM}"
    if how.across_heads and heads * head_dim > LARGEST_SIZE:
        return f"a norm across {heads * head_dim} channels is above {LARGEST_SIZE}"
    if torch.is_grad_enabled() and how.cos is not None and (how.cos.requires_grad or how.sin.requires_grad):
        return "cos and sin require gradients, which it does not give"
    if fp8 and q.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(q.device) < FIRST_WITH_FP8):
        return "this GPU has no E4M3"
    return None
