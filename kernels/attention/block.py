"""Attention over packs in Triton, tile by tile, on any GPU that Triton serves.

    out_i = sum_j p_ij v_j,   p_ij = exp(scale q_i . k_j - lse_i),   lse_i = log sum_j exp(scale q_i . k_j),   j over what i may see

with the softmax computed online (Milakov & Gimelshein 2018; Dao et al. 2022, FlashAttention) and recomputed in the backward pass from lse:

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . out_i),   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

What a tile of queries sees is a few stretches of keys, found by arithmetic from the clip's row in the layout's table and the mask's rule:
the frames of its window, whose middle all of its queries see (no mask is applied there) and whose edges some do (there the rule is applied
to each pair); and to their left and right what every query sees: the sink, the known frames, the text. So a mask costs at most the partial
tiles at the ends of these stretches. One kernel serves clips, frames and, through strides, single sites.

FLOPs: 4 d heads per visible pair forwards, 10 d backwards (the scores are computed again). Bytes: q, k, v read and out written once at
best; a tile of BLOCK_M queries reads all of its keys, so each key crosses from L2 once for every BLOCK_M queries that see it.

Head dims that are no power of two are split in two that are (72 = 64 + 16, the second filled up from 8; 80 = 64 + 16, 96 = 64 + 32), where
that is less than the next power of two.
"""

from dataclasses import dataclass, replace
from types import FunctionType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import VideoLayout
from ..masks import Mask, visible
from . import schedule
from .schedule import Clips, tiles

LARGEST_HEAD_DIM = 256

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VIDEO, TEXT = tl.constexpr(schedule.VIDEO), tl.constexpr(schedule.TEXT)
SHIFT = tl.constexpr(1 << 16)
"""Chunks added to a frame before it is divided by a chunk: Triton's division rounds towards zero, the rule's towards minus infinity."""

# The rule as a device function; Triton's interpreter wants to find `tl` among its globals.
_visible = triton.jit(FunctionType(visible.__code__, globals(), visible.__name__))


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: tile sizes of queries and keys, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """Those of the three kernels."""

    forward: Config
    queries: Config
    keys: Config


def default_configs(head_dim: int, dtype: torch.dtype, shared_memory: int = 227 * 1024, amd: bool = False) -> Configs:
    """A rule for where nothing was measured: large tiles that compile without spills (tests/codegen.json), with as many stages as
    `shared_memory`, in bytes a block, has room for.
    """
    if dtype.itemsize > 2:
        small = Config(32, 32, 4, 1)
        configs = Configs(Config(64, 32, 4, 2) if head_dim <= 128 else small, small, small)
    elif head_dim > 128:
        configs = Configs(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1))
    elif amd and head_dim > 64:
        configs = Configs(Config(64, 64, 4, 1), Config(64, 32, 8, 1), Config(16, 64, 8, 1))
    elif amd:
        configs = Configs(Config(128, 64, 4, 1), Config(64, 64, 8, 1), Config(32, 64, 8, 1))
    elif head_dim > 64:
        configs = Configs(Config(128, 64, 8, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2))
    else:
        configs = Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2))
    row = sum(split_head_dim(head_dim)) * dtype.itemsize
    # The tile that stays and those that stream: q against k and v; q and do against k and v; k and v against q and do.
    sizes = [(c.block_m * (1 + i), c.block_n) if i < 2 else (2 * c.block_n, c.block_m) for i, c in enumerate(configs)]
    return Configs(
        *(
            replace(config, num_stages=max(1, min(config.num_stages, (shared_memory // row - stays) // (2 * streams))))
            for config, (stays, streams) in zip(configs, sizes, strict=True)
        )
    )


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Two powers of two that cover head_dim, the second 0 where one does as well. A matrix product takes 16 at least."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(head_dim - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


# Two tuples of constants go through all of the functions below:
# RULE: causal, chunk, window, sink, sees_known of `visible`.
# DIMS: the head dim, and the two parts it is split into.

# ----------------------------------------------------------------------------------------------------------- where a tile's rows lie


@triton.jit
def _sequence(spans_ptr, clip, site, SITE: tl.constexpr):
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
def _chunk_start(frame, ahead, RULE):
    """The first frame of the chunk that lies `ahead` chunks after that of `frame`."""
    return ((frame + SHIFT * RULE[1]) // RULE[1] + (ahead - SHIFT)) * RULE[1]


@triton.jit
def _window(x0, x1, first, frames, OF_KEYS: tl.constexpr, RULE):
    """Which of the `frames` frames from `first` on, counted within them, some and which all of the frames x0 .. x1 see in their window, or
    with OF_KEYS, are seen by: [some_start, some_stop), [every_start, every_stop).
    """
    some_start, some_stop, every_start, every_stop = 0, frames, 0, frames
    if RULE[0] and OF_KEYS:
        some_start, every_start = _chunk_start(x0, 0, RULE) - first, _chunk_start(x1, 0, RULE) - first
    elif RULE[2] > 0:
        some_start, every_start = _chunk_start(x0, 1 - RULE[2], RULE) - first, _chunk_start(x1, 1 - RULE[2], RULE) - first
    if RULE[0] and not OF_KEYS:
        some_stop, every_stop = _chunk_start(x1, 1, RULE) - first, _chunk_start(x0, 1, RULE) - first
    elif RULE[2] > 0:
        some_stop, every_stop = _chunk_start(x1, RULE[2], RULE) - first, _chunk_start(x0, RULE[2], RULE) - first
    return some_start, some_stop, every_start, every_stop


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _load(ptr, base, step, rows, stop, stride, START: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr, DIMS):
    """Channels START .. START + SIZE of rows of a sequence, (rows, SIZE), zeros past the head dim and past `stop`, which WHOLE tiles do not
    reach.
    """
    d = START + tl.arange(0, SIZE)
    pointers = ptr + (base + rows * step).to(tl.int64)[:, None] * stride + d[None, :]
    if DIMS[0] >= START + SIZE:
        x = tl.load(pointers) if WHOLE else tl.load(pointers, mask=(rows < stop)[:, None], other=0.0)
    else:
        there = (d < DIMS[0])[None, :]
        x = tl.load(pointers, mask=there if WHOLE else (rows < stop)[:, None] & there, other=0.0)
    return x


@triton.jit
def _load_both(ptr, base, step, rows, stop, stride, WHOLE: tl.constexpr, DIMS):
    """Both parts of the rows' channels; the first twice if there is no second."""
    x1 = _load(ptr, base, step, rows, stop, stride, 0, DIMS[1], WHOLE, DIMS)
    x2 = x1
    if DIMS[2] > 0:
        x2 = _load(ptr, base, step, rows, stop, stride, DIMS[1], DIMS[2], WHOLE, DIMS)
    return x1, x2


@triton.jit
def _store(ptr, x, base, step, rows, stop, stride, START: tl.constexpr, SIZE: tl.constexpr, DIMS):
    d = START + tl.arange(0, SIZE)
    pointers = ptr + (base + rows * step).to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (d < DIMS[0])[None, :])


@triton.jit
def _store_both(ptr, x1, x2, base, step, rows, stop, stride, DIMS):
    _store(ptr, x1, base, step, rows, stop, stride, 0, DIMS[1], DIMS)
    if DIMS[2] > 0:
        _store(ptr, x2, base, step, rows, stop, stride, DIMS[1], DIMS[2], DIMS)


@triton.jit
def _product(a1, a2, b1, b2, DIMS):
    """a b^T over the channels, float32."""
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if DIMS[2] > 0:
        s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    return s


@triton.jit
def _add_product(acc1, acc2, a, b1, b2, DIMS):
    """acc + a b, of each part of the channels."""
    acc1 = tl.dot(a, b1, acc1, input_precision="ieee")
    if DIMS[2] > 0:
        acc2 = tl.dot(a, b2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def _hide(s, t, u, known, free, RULE):
    """Scores s, -inf where a query's frame t may not see a key's u; as they are if `free`. t, u and known broadcast."""
    shift: tl.constexpr = SHIFT * RULE[1]
    sink: tl.constexpr = RULE[3] + shift if RULE[3] > 0 else 0
    return tl.where(_visible(t + shift, u + shift, known, RULE[0], RULE[1], RULE[2], sink, RULE[4]) | free, s, -float("inf"))


@triton.jit
def _visit(BODY: tl.constexpr, state, context, rows, start, stop, every_start, every_stop, BLOCK: tl.constexpr, RULE, DIMS):
    """BODY over the tiles of rows start .. stop of a sequence; those in every_start .. every_stop need no mask."""
    if RULE[0] or RULE[2] > 0:
        every_start = _clip(every_start, start, stop)
        every_stop = _clip(every_stop, every_start, stop)
        first = tl.minimum(start + tl.cdiv(every_start - start, BLOCK) * BLOCK, stop)
        last = tl.maximum(first, start + (every_stop - start) // BLOCK * BLOCK)
        state = BODY(state, context, rows, start, first, True, False, BLOCK, RULE, DIMS)
        state = BODY(state, context, rows, first, last, False, True, BLOCK, RULE, DIMS)
        state = BODY(state, context, rows, last, stop, True, False, BLOCK, RULE, DIMS)
    else:
        last = start + (stop - start) // BLOCK * BLOCK
        state = BODY(state, context, rows, start, last, False, True, BLOCK, RULE, DIMS)
        state = BODY(state, context, rows, last, stop, False, False, BLOCK, RULE, DIMS)
    return state


@triton.jit
def _visit_keys(
    BODY: tl.constexpr, state, context, x0, x1, clip, site, spans_ptr, runs_ptr, run_offsets_ptr,
    SITE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """BODY over all keys that a tile of queries sees, whose frames are x0 .. x1."""
    rows = _sequence(spans_ptr, clip, tl.maximum(site, VIDEO), SITE)  # text sees the whole video
    text = _sequence(spans_ptr, clip, TEXT, SITE)
    frames = tl.load(spans_ptr + 7 * clip + 1)
    _, _, _, frame_rows, first = rows
    some_start, some_stop, every_start, every_stop = _window(x0, x1, first, frames, False, RULE)
    some_start = tl.where(site == TEXT, 0, _clip(some_start, 0, frames))
    some_stop = tl.where(site == TEXT, frames, _clip(some_stop, some_start, frames))
    every_start = tl.where(site == TEXT, 0, every_start)
    every_stop = tl.where(site == TEXT, frames, every_stop)
    state = _visit(
        BODY, state, context, rows, some_start * frame_rows, some_stop * frame_rows, every_start * frame_rows, every_stop * frame_rows,
        BLOCK, RULE, DIMS,
    )  # fmt: skip
    # To the left and right of the window every query sees the same frames.
    sink = 0
    if RULE[3] > 0:
        sink = _clip(-(first - RULE[3]), 0, some_start)  # a constant minus a tensor is taken for a constant
        state = BODY(state, context, rows, 0, sink * frame_rows, False, False, BLOCK, RULE, DIMS)
    if RULE[4]:
        for run in range(tl.load(run_offsets_ptr + clip), tl.load(run_offsets_ptr + clip + 1)):
            start, stop = tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1)
            left, right = tl.minimum(stop, some_start), tl.maximum(start, some_stop)
            state = BODY(state, context, rows, tl.maximum(start, sink) * frame_rows, left * frame_rows, False, False, BLOCK, RULE, DIMS)
            state = BODY(state, context, rows, right * frame_rows, stop * frame_rows, False, False, BLOCK, RULE, DIMS)
    _, _, length, _, _ = text
    return BODY(state, context, text, 0, length, False, False, BLOCK, RULE, DIMS)


@triton.jit
def _visit_queries(
    BODY: tl.constexpr, state, context, x0, x1, any_known, clip, site, spans_ptr, SITE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS
):
    """BODY over all queries that see a tile of keys, whose frames are x0 .. x1."""
    rows = _sequence(spans_ptr, clip, tl.maximum(site, VIDEO), SITE)
    text = _sequence(spans_ptr, clip, TEXT, SITE)
    frames = tl.load(spans_ptr + 7 * clip + 1)
    _, _, _, frame_rows, first = rows
    some_start, some_stop, every_start, every_stop = _window(x0, x1, first, frames, True, RULE)
    if RULE[3] > 0:
        some_stop = tl.where(x0 < RULE[3], frames, some_stop)
    some_start = tl.where((site == TEXT) | any_known, 0, _clip(some_start, 0, frames))
    some_stop = tl.where((site == TEXT) | any_known, frames, _clip(some_stop, some_start, frames))
    every_start = tl.where(site == TEXT, 0, every_start)
    every_stop = tl.where(site == TEXT, frames, every_stop)
    state = _visit(
        BODY, state, context, rows, some_start * frame_rows, some_stop * frame_rows, every_start * frame_rows, every_stop * frame_rows,
        BLOCK, RULE, DIMS,
    )  # fmt: skip
    _, _, length, _, _ = text
    return BODY(state, context, text, 0, length, False, False, BLOCK, RULE, DIMS)


@triton.jit
def _keys_of(known_ptr, rows, stop, first, frame_rows, RULE):
    """The frames of rows of keys, and whether they are known."""
    frame = rows // frame_rows
    known = rows < stop
    if RULE[4]:
        known = tl.load(known_ptr + frame, mask=rows < stop, other=0) != 0
    return first + frame, known


# --------------------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _attend(state, context, keys, begin, end, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS):
    """The online softmax of a tile of queries over rows begin .. end of a sequence of keys."""
    acc1, acc2, peak, total = state
    q1, q2, t, free, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2 = context
    base, step, _, frame_rows, first = keys
    for n in range(begin, end, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        k1, k2 = _load_both(k_ptr, base, step, rows, end, stride_kt, WHOLE, DIMS)
        s = _product(q1, q2, k1, k2, DIMS) * scale_log2
        if RULED:
            u, known = _keys_of(known_ptr, rows, end, first, frame_rows, RULE)
            s = _hide(s, t[:, None], u[None, :], known[None, :], free, RULE)
        if not WHOLE:
            s = tl.where((rows < end)[None, :], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        level = new_peak
        if RULED:  # a query may have seen nothing yet
            level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(s - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(p, 1)
        peak = new_peak
        v1, v2 = _load_both(v_ptr, base, step, rows, end, stride_vt, WHOLE, DIMS)
        acc1, acc2 = _add_product(acc1 * fade[:, None], acc2 * fade[:, None], p.to(v1.dtype), v1, v2, DIMS)
    return acc1, acc2, peak, total


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def block_forward(
    tiles_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans_ptr, kv_spans_ptr, known_ptr, runs_ptr, run_offsets_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh, scale_log2, num_tiles,
    GROUP: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """A tile of queries of one head. Neighbouring programs share the head, so that its keys stay in L2."""
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = _sequence(spans_ptr, clip, site, SITE)
    rows = row + tl.arange(0, BLOCK_M)
    q1, q2 = _load_both(q_ptr + head * stride_qh, base, step, rows, stop, stride_qt, False, DIMS)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    known_ptr += tl.load(kv_spans_ptr + 7 * clip + 6)
    context = q1, q2, first + rows // frame_rows, site == TEXT, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2
    acc1 = tl.zeros([BLOCK_M, DIMS[1]], tl.float32)
    acc2 = tl.zeros([BLOCK_M, DIMS[2] if DIMS[2] > 0 else 1], tl.float32)
    state = acc1, acc2, tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(row + BLOCK_M, stop) - 1
    acc1, acc2, peak, total = _visit_keys(
        _attend, state, context, first + row // frame_rows, first + last // frame_rows, clip, site, kv_spans_ptr, runs_ptr, run_offsets_ptr,
        SITE, BLOCK_N, RULE, DIMS,
    )  # fmt: skip
    share = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]  # a query that saw nothing gives zeros, NaN stays NaN
    _store_both(out_ptr + head * stride_oh, acc1 * share, acc2 * share, base, step, rows, stop, stride_ot, DIMS)
    lse = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head * stride_lh + base + rows * step, lse, mask=rows < stop)


# -------------------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_lse(lse_ptr, base, step, rows, stop):
    """In units of log 2; infinite for a query that saw nothing or is not there, so that it gives weights of zero."""
    lse = tl.load(lse_ptr + base + rows * step, mask=rows < stop, other=-float("inf")) * LOG2_E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def _pull(state, context, keys, begin, end, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS):
    """Adds to dq of a tile of queries what comes from rows begin .. end of a sequence of keys."""
    dq1, dq2 = state
    q1, q2, do1, do2, lse, delta, t, free, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2 = context
    base, step, _, frame_rows, first = keys
    for n in range(begin, end, BLOCK):
        rows = n + tl.arange(0, BLOCK)
        k1, k2 = _load_both(k_ptr, base, step, rows, end, stride_kt, WHOLE, DIMS)
        v1, v2 = _load_both(v_ptr, base, step, rows, end, stride_vt, WHOLE, DIMS)
        s = _product(q1, q2, k1, k2, DIMS) * scale_log2
        if RULED:
            u, known = _keys_of(known_ptr, rows, end, first, frame_rows, RULE)
            s = _hide(s, t[:, None], u[None, :], known[None, :], free, RULE)
        if not WHOLE:
            s = tl.where((rows < end)[None, :], s, -float("inf"))
        ds = tl.exp2(s - lse[:, None]) * (_product(do1, do2, v1, v2, DIMS) - delta[:, None])
        dq1, dq2 = _add_product(dq1, dq2, ds.to(k1.dtype), k1, k2, DIMS)
    return dq1, dq2


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def block_backward_queries(
    tiles_ptr, q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, spans_ptr, kv_spans_ptr, known_ptr, runs_ptr,
    run_offsets_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_dot, stride_doh,
    stride_lh, scale, num_tiles,
    GROUP: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """dq of a tile of queries of one head, and its do . out for the other kernel. dq lies as out does."""
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = _sequence(spans_ptr, clip, site, SITE)
    rows = row + tl.arange(0, BLOCK_M)
    q1, q2 = _load_both(q_ptr + head * stride_qh, base, step, rows, stop, stride_qt, False, DIMS)
    do1, do2 = _load_both(do_ptr + head * stride_doh, base, step, rows, stop, stride_dot, False, DIMS)
    out1, out2 = _load_both(out_ptr + head * stride_oh, base, step, rows, stop, stride_ot, False, DIMS)
    delta = tl.sum(do1.to(tl.float32) * out1.to(tl.float32), 1)
    if DIMS[2] > 0:
        delta += tl.sum(do2.to(tl.float32) * out2.to(tl.float32), 1)
    tl.store(delta_ptr + head * stride_lh + base + rows * step, delta, mask=rows < stop)
    lse = _load_lse(lse_ptr + head * stride_lh, base, step, rows, stop)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    known_ptr += tl.load(kv_spans_ptr + 7 * clip + 6)
    t = first + rows // frame_rows
    context = q1, q2, do1, do2, lse, delta, t, site == TEXT, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale * LOG2_E
    state = tl.zeros([BLOCK_M, DIMS[1]], tl.float32), tl.zeros([BLOCK_M, DIMS[2] if DIMS[2] > 0 else 1], tl.float32)
    last = tl.minimum(row + BLOCK_M, stop) - 1
    dq1, dq2 = _visit_keys(
        _pull, state, context, first + row // frame_rows, first + last // frame_rows, clip, site, kv_spans_ptr, runs_ptr, run_offsets_ptr,
        SITE, BLOCK_N, RULE, DIMS,
    )  # fmt: skip
    _store_both(dq_ptr + head * stride_oh, dq1 * scale, dq2 * scale, base, step, rows, stop, stride_ot, DIMS)


@triton.jit
def _push(state, context, queries, begin, end, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS):
    """Adds to dk and dv of a tile of keys what comes from rows begin .. end of a sequence of queries."""
    dk1, dk2, dv1, dv2 = state
    k1, k2, v1, v2, u, known, free, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, scale_log2 = context
    base, step, _, frame_rows, first = queries
    for m in range(begin, end, BLOCK):
        rows = m + tl.arange(0, BLOCK)
        q1, q2 = _load_both(q_ptr, base, step, rows, end, stride_qt, WHOLE, DIMS)
        do1, do2 = _load_both(do_ptr, base, step, rows, end, stride_dot, WHOLE, DIMS)
        lse = _load_lse(lse_ptr, base, step, rows, end)
        delta = tl.load(delta_ptr + base + rows * step, mask=rows < end, other=0.0)
        # Everything is transposed, (keys, queries), as the products below need it.
        s = _product(k1, k2, q1, q2, DIMS) * scale_log2
        if RULED:
            s = _hide(s, (first + rows // frame_rows)[None, :], u[:, None], known[:, None], free, RULE)
        p = tl.exp2(s - lse[None, :])
        dv1, dv2 = _add_product(dv1, dv2, p.to(do1.dtype), do1, do2, DIMS)
        ds = p * (_product(v1, v2, do1, do2, DIMS) - delta[None, :])
        dk1, dk2 = _add_product(dk1, dk2, ds.to(q1.dtype), q1, q2, DIMS)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def block_backward_keys(
    tiles_ptr, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, spans_ptr, kv_spans_ptr, known_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh, stride_lh, scale,
    num_tiles,
    GROUP: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """dk and dv of a tile of keys of one head of keys, from all heads of queries that share it, in their order."""
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    kv_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = _sequence(kv_spans_ptr, clip, site, SITE)
    rows = row + tl.arange(0, BLOCK_N)
    k1, k2 = _load_both(k_ptr + kv_head * stride_kh, base, step, rows, stop, stride_kt, False, DIMS)
    v1, v2 = _load_both(v_ptr + kv_head * stride_vh, base, step, rows, stop, stride_vt, False, DIMS)
    u, known = _keys_of(known_ptr + tl.load(kv_spans_ptr + 7 * clip + 6), rows, tl.where(site == TEXT, 0, stop), first, frame_rows, RULE)
    any_known = False
    if RULE[4]:
        any_known = tl.max(known.to(tl.int32)) > 0
    dk1 = tl.zeros([BLOCK_N, DIMS[1]], tl.float32)
    dk2 = tl.zeros([BLOCK_N, DIMS[2] if DIMS[2] > 0 else 1], tl.float32)
    state = dk1, dk2, dk1, dk2
    last = tl.minimum(row + BLOCK_N, stop) - 1
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        context = (
            k1, k2, v1, v2, u, known, site == TEXT, q_ptr + head * stride_qh, do_ptr + head * stride_doh, lse_ptr + head * stride_lh,
            delta_ptr + head * stride_lh, stride_qt, stride_dot, scale * LOG2_E,
        )  # fmt: skip
        state = _visit_queries(
            _push, state, context, first + row // frame_rows, first + last // frame_rows, any_known, clip, site, spans_ptr,
            SITE, BLOCK_M, RULE, DIMS,
        )  # fmt: skip
    dk1, dk2, dv1, dv2 = state
    _store_both(dk_ptr + kv_head * stride_dkh, dk1 * scale, dk2 * scale, base, step, rows, stop, stride_dkt, DIMS)
    _store_both(dv_ptr + kv_head * stride_dkh, dv1, dv2, base, step, rows, stop, stride_dkt, DIMS)


# ------------------------------------------------------------------------------------------------------------------------------ host


class _BlockAttention(torch.autograd.Function):
    """out (tokens, heads, head_dim) and lse (heads, tokens) of q, k, v over tables of their layouts."""

    @staticmethod
    def forward(ctx, q, k, v, layout, mask, kv_layout, scale, configs):
        make = torch.zeros if layout.capacity else torch.empty  # tokens past the end of the pack are in no tile
        out = make(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32, device=q.device)
        launch = _Launch(q, k, layout, mask, kv_layout)
        launch(
            block_forward, configs.forward, tiles(layout, configs.forward.block_m, mask, kv_layout), q.shape[1],
            q, k, v, out, lse, *launch.tables, *_strides(q, k, v, out), lse.stride(0), scale * LOG2_E.value,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = layout, mask, kv_layout, scale, configs
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, do, _):
        q, k, v, out, lse = ctx.saved_tensors
        layout, mask, kv_layout, scale, configs = ctx.rest
        if do.stride(-1) != 1:
            do = do.contiguous()
        dq = (torch.zeros_like if layout.capacity else torch.empty_like)(out)
        dk, dv = ((torch.zeros if kv_layout.capacity else torch.empty)(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        delta = torch.zeros_like(lse)
        launch = _Launch(q, k, layout, mask, kv_layout)
        launch(
            block_backward_queries, configs.queries, tiles(layout, configs.queries.block_m, mask, kv_layout), q.shape[1],
            q, k, v, out, do, dq, lse, delta, *launch.tables, *_strides(q, k, v, out, do), lse.stride(0), scale,
        )  # fmt: skip
        launch(
            block_backward_keys, configs.keys, tiles(kv_layout, configs.keys.block_n, mask, layout, of_keys=True), k.shape[1],
            q, k, v, do, dk, dv, lse, delta, *launch.tables[:3], *_strides(q, k, v, do, dk), lse.stride(0), scale,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


class _Launch:
    """What the three launches of a call share."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, layout: VideoLayout, mask: Mask, kv_layout: VideoLayout):
        kv = Clips.of(kv_layout)
        self.tables = (Clips.of(layout).spans, kv.spans, kv.known, kv.runs, kv.run_offsets)
        self.same_site, self.group, self.head_dim = mask.same_site, q.shape[1] // k.shape[1], q.shape[2]
        self.rule = mask.as_rule()
        if not kv_layout.capacity and not any(any(clip.known) for clip in kv_layout.clips):
            self.rule = self.rule._replace(sees_known=False)  # nothing is known, and nothing is read to find that out

    def __call__(self, kernel, config: Config, table: torch.Tensor, heads: int, *arguments) -> None:
        """Run `kernel` for each tile of `table` and each head."""
        with torch.cuda.device_of(table):
            kernel[(len(table) * heads,)](
                table,
                *arguments,
                len(table),
                GROUP=self.group,
                SITE=self.same_site,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                RULE=tuple(map(tl.constexpr, self.rule)),
                DIMS=tuple(map(tl.constexpr, (self.head_dim, *split_head_dim(self.head_dim)))),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of tokens and of heads."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def attention_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    configs: Configs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and result as `attention_reference`, for float16, bfloat16 and float32 and head dims up to 256. No gradient comes back
    through lse.
    """
    configs = configs or default_configs(q.shape[2], q.dtype, **_limits(q.device))
    return _BlockAttention.apply(q, k, v, layout, mask, kv_layout, scale, configs)


def unavailable(q: torch.Tensor) -> str | None:
    """Why the kernel cannot run on q, if it cannot."""
    if q.dtype == torch.float64:
        return "the kernel computes in float32; float64 has the reference"
    if q.shape[2] > LARGEST_HEAD_DIM:
        return f"head_dim {q.shape[2]} is above {LARGEST_HEAD_DIM}"
    if q.device.type != "cuda" and isinstance(block_forward, triton.JITFunction):
        return f"it needs a GPU, and the tensors are on {q.device} (TRITON_INTERPRET=1, set before the import, interprets it)"
    return None


def _limits(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    amd = torch.version.hip is not None
    return {"shared_memory": 64 * 1024 if amd else torch.cuda.get_device_properties(device).shared_memory_per_block_optin, "amd": amd}
