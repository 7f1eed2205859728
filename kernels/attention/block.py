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

q, k and v in FP8 (E4M3) come with a scale for each of their rows. Those of q join the softmax's, those of k are a product for each score;
those of v weigh the weights, relative to the largest of their tile, whose own is put on the sums by the factor that fades them.

Whether a product and a sum are rounded as one is written out (`tl.fma`) and not left to the compiler, which may choose one way in one
variant of a kernel and another in the next: a pack with known frames takes another variant than a pack without.

Head dims that are no power of two are split in two or three that are (72 = 64 + 16, the second filled up from 8; 80 = 64 + 16, 96 = 64 +
32, 112 = 64 + 32 + 16), where that is less than the next power of two.
"""

from types import FunctionType

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..layout import VideoLayout
from ..masks import Mask, visible
from .configs import Config, split_head_dim
from .norm_rope import norm_rope, norm_rope_backward, store_weight_gradient
from .ranges import LN_2, LOG2_E, SHIFT, TEXT, VIDEO, clamped, sequence, text_length, window
from .schedule import Clips

PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
"""Of products of float32: as three of TF32, which tensor cores compute, in place of threads that spill their registers."""
HEADROOM = tl.constexpr(8)
"""Weights in FP8 are at most 2^8, near the 448 where E4M3 ends, since it ends below at 2^-9."""

# The rule as a device function; Triton's interpreter wants to find `tl` among its globals.
_visible = triton.jit(FunctionType(visible.__code__, globals(), visible.__name__))


# Two tuples of constants go through all of the functions below: RULE, as in `ranges`, and
# DIMS: the head dim, and the parts that it is split into: three, zero where there are fewer.
# They, and TURN, what is done to the rows that are visited, are arguments of their own, since
# Triton 3.6 takes the constants of a tuple that is assigned to a name for tensors.


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
def _load_parts(ptr, base, step, rows, stop, stride, WHOLE: tl.constexpr, DIMS):
    """All channels of the rows, a tuple of parts."""
    x = (_load(ptr, base, step, rows, stop, stride, 0, DIMS[1], WHOLE, DIMS),)
    if DIMS[2] > 0:
        x += (_load(ptr, base, step, rows, stop, stride, DIMS[1], DIMS[2], WHOLE, DIMS),)
    if DIMS[3] > 0:
        x += (_load(ptr, base, step, rows, stop, stride, DIMS[1] + DIMS[2], DIMS[3], WHOLE, DIMS),)
    return x


@triton.jit
def _load_scales(ptr, base, step, rows, stop, stride):
    return tl.load(ptr + (base + rows * step).to(tl.int64) * stride, mask=rows < stop, other=0.0)


@triton.jit
def _store(ptr, x, base, step, rows, stop, stride, START: tl.constexpr, SIZE: tl.constexpr, DIMS):
    d = START + tl.arange(0, SIZE)
    pointers = ptr + (base + rows * step).to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (d < DIMS[0])[None, :])


@triton.jit
def _store_parts(ptr, x, base, step, rows, stop, stride, DIMS):
    _store(ptr, x[0], base, step, rows, stop, stride, 0, DIMS[1], DIMS)
    if DIMS[2] > 0:
        _store(ptr, x[1], base, step, rows, stop, stride, DIMS[1], DIMS[2], DIMS)
    if DIMS[3] > 0:
        _store(ptr, x[2], base, step, rows, stop, stride, DIMS[1] + DIMS[2], DIMS[3], DIMS)


@triton.jit
def _zeros(ROWS: tl.constexpr, DIMS):
    x = (tl.zeros([ROWS, DIMS[1]], tl.float32),)
    if DIMS[2] > 0:
        x += (tl.zeros([ROWS, DIMS[2]], tl.float32),)
    if DIMS[3] > 0:
        x += (tl.zeros([ROWS, DIMS[3]], tl.float32),)
    return x


@triton.jit
def _times(x, factor, DIMS):
    y = (x[0] * factor,)
    if DIMS[2] > 0:
        y += (x[1] * factor,)
    if DIMS[3] > 0:
        y += (x[2] * factor,)
    return y


@triton.jit
def _product(a, b, DIMS):
    """a b^T over the channels, float32."""
    precision: tl.constexpr = PRECISION if a[0].dtype == tl.float32 else None
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=precision)
    if DIMS[2] > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=precision)
    if DIMS[3] > 0:
        s = tl.dot(a[2], tl.trans(b[2]), s, input_precision=precision)
    return s


@triton.jit
def _add_product(acc, a, b, DIMS):
    """acc + a b, of each part of the channels of b."""
    precision: tl.constexpr = PRECISION if a.dtype == tl.float32 else None
    # Hopper sums products of FP8 with 14 bits: over many keys they are to be summed in float32.
    imprecise: tl.constexpr = a.shape[1] if a.dtype.is_fp8() else None
    y = (tl.dot(a, b[0], acc[0], input_precision=precision, max_num_imprecise_acc=imprecise),)
    if DIMS[2] > 0:
        y += (tl.dot(a, b[1], acc[1], input_precision=precision, max_num_imprecise_acc=imprecise),)
    if DIMS[3] > 0:
        y += (tl.dot(a, b[2], acc[2], input_precision=precision, max_num_imprecise_acc=imprecise),)
    return y


@triton.jit
def _hide(s, t, u, known, free, RULE):
    """Scores s, -inf where a query's frame t may not see a key's u; as they are if `free`. t, u and known broadcast."""
    shift: tl.constexpr = SHIFT * RULE[1]
    sink: tl.constexpr = RULE[3] + shift if RULE[3] > 0 else 0
    return tl.where(_visible(t + shift, u + shift, known, RULE[0], RULE[1], RULE[2], sink, RULE[4]) | free, s, -float("inf"))


@triton.jit
def _after(i, skip):
    """Row i of those that are left when rows skip[0] .. skip[1] are left out."""
    return i + tl.where(i < skip[0], 0, skip[1] - skip[0])


@triton.jit
def _visit(BODY: tl.constexpr, state, context, rows, start, stop, every_start, every_stop, BLOCK: tl.constexpr, RULE, DIMS, TURN):
    """BODY over the tiles of rows start .. stop of a sequence; those in every_start .. every_stop need no mask.

    These come first: where a loop with a mask ran before one without, ptxas would have products of warp groups wait for each other (its
    warning C7515). What lies to their left and right is one loop, since each loop takes a while to get going.
    """
    if RULE[0] or RULE[2] > 0:
        every_start = clamped(every_start, start, stop)
        every_stop = clamped(every_stop, every_start, stop)
        first = tl.minimum(start + tl.cdiv(every_start - start, BLOCK) * BLOCK, stop)
        last = tl.maximum(first, start + (every_stop - start) // BLOCK * BLOCK)
        state = BODY(state, context, rows, first, last, (0, 0), False, True, BLOCK, RULE, DIMS, TURN)
        state = BODY(state, context, rows, start, stop, (first, last), True, False, BLOCK, RULE, DIMS, TURN)
    else:
        last = start + (stop - start) // BLOCK * BLOCK
        state = BODY(state, context, rows, start, last, (0, 0), False, True, BLOCK, RULE, DIMS, TURN)
        state = BODY(state, context, rows, last, stop, (0, 0), False, False, BLOCK, RULE, DIMS, TURN)
    return state


@triton.jit
def _visit_keys(
    BODY: tl.constexpr, state, context, x0, x1, clip, site, spans_ptr, runs_ptr, run_offsets_ptr, text_lengths_ptr,
    SITE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS, TURN,
):  # fmt: skip
    """BODY over all keys that a tile of queries sees, whose frames are x0 .. x1."""
    rows = sequence(spans_ptr, clip, tl.maximum(site, VIDEO), SITE)  # text sees the whole video
    text = sequence(spans_ptr, clip, TEXT, SITE)
    frames = tl.load(spans_ptr + 7 * clip + 1)
    _, _, _, frame_rows, first = rows
    some_start, some_stop, every_start, every_stop = window(x0, x1, first, frames, False, RULE)
    some_start = tl.where(site == TEXT, 0, clamped(some_start, 0, frames))
    some_stop = tl.where(site == TEXT, frames, clamped(some_stop, some_start, frames))
    every_start = tl.where(site == TEXT, 0, every_start)
    every_stop = tl.where(site == TEXT, frames, every_stop)
    state = _visit(
        BODY, state, context, rows, some_start * frame_rows, some_stop * frame_rows, every_start * frame_rows, every_stop * frame_rows,
        BLOCK, RULE, DIMS, TURN,
    )  # fmt: skip
    # To the left and right of the window every query sees the same frames.
    sink = 0
    if RULE[3] > 0:
        sink = clamped(-(first - RULE[3]), 0, some_start)  # a constant minus a tensor is taken for a constant
        state = BODY(state, context, rows, 0, sink * frame_rows, (0, 0), False, False, BLOCK, RULE, DIMS, TURN)
    if RULE[4]:
        for run in range(tl.load(run_offsets_ptr + clip), tl.load(run_offsets_ptr + clip + 1)):
            start, stop = tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1)
            left, right = tl.minimum(stop, some_start), tl.maximum(start, some_stop)
            state = BODY(
                state, context, rows, tl.maximum(start, sink) * frame_rows, left * frame_rows, (0, 0), False, False, BLOCK, RULE, DIMS, TURN
            )
            state = BODY(state, context, rows, right * frame_rows, stop * frame_rows, (0, 0), False, False, BLOCK, RULE, DIMS, TURN)
    _, _, length, _, _ = text
    length = text_length(text_lengths_ptr, clip, length)
    return BODY(state, context, text, 0, length, (0, 0), False, False, BLOCK, RULE, DIMS, TURN)


@triton.jit
def _visit_queries(
    BODY: tl.constexpr, state, context, x0, x1, any_known, clip, site, spans_ptr, SITE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS, TURN
):
    """BODY over all queries that see a tile of keys, whose frames are x0 .. x1."""
    rows = sequence(spans_ptr, clip, tl.maximum(site, VIDEO), SITE)
    text = sequence(spans_ptr, clip, TEXT, SITE)
    frames = tl.load(spans_ptr + 7 * clip + 1)
    _, _, _, frame_rows, first = rows
    some_start, some_stop, every_start, every_stop = window(x0, x1, first, frames, True, RULE)
    if RULE[3] > 0:
        some_stop = tl.where(x0 < RULE[3], frames, some_stop)
    some_start = tl.where((site == TEXT) | any_known, 0, clamped(some_start, 0, frames))
    some_stop = tl.where((site == TEXT) | any_known, frames, clamped(some_stop, some_start, frames))
    every_start = tl.where(site == TEXT, 0, every_start)
    every_stop = tl.where(site == TEXT, frames, every_stop)
    state = _visit(
        BODY, state, context, rows, some_start * frame_rows, some_stop * frame_rows, every_start * frame_rows, every_stop * frame_rows,
        BLOCK, RULE, DIMS, TURN,
    )  # fmt: skip
    _, _, length, _, _ = text
    return BODY(state, context, text, 0, length, (0, 0), False, False, BLOCK, RULE, DIMS, TURN)


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
def _attend(state, context, keys, begin, end, skip, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS, TURN):
    """The online softmax of a tile of queries over rows begin .. end, but skip[0] .. skip[1], of a sequence of keys."""
    acc, peak, total, unit = state
    q, t, free, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2, k_scale_ptr, v_scale_ptr, stride_kst, stride_vst = context
    base, step, _, frame_rows, first = keys
    IS_FP8: tl.constexpr = q[0].dtype.is_fp8()
    for i in range(begin, end - (skip[1] - skip[0]), BLOCK):
        rows = _after(i, skip) + tl.arange(0, BLOCK)
        k = _load_parts(k_ptr, base, step, rows, end, stride_kt, WHOLE, DIMS)
        k = norm_rope(k, base + rows * step, rows < end, TURN, DIMS)
        s = _product(q, k, DIMS)
        if IS_FP8:
            s *= _load_scales(k_scale_ptr, base, step, rows, end, stride_kst)[None, :]
        if RULED:
            u, known = _keys_of(known_ptr, rows, end, first, frame_rows, RULE)
            s = _hide(s, t[:, None], u[None, :], known[None, :], free, RULE)
        if not WHOLE:
            s = tl.where((rows < end)[None, :], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        level = new_peak
        if RULED:  # a query may have seen nothing yet
            level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        fade = tl.exp2(peak - level)
        if IS_FP8:
            p = tl.exp2(tl.fma(s, scale_log2[:, None], -(level - HEADROOM)[:, None]))
        else:
            p = tl.exp2(tl.fma(s, scale_log2, -level[:, None]))
        total = tl.fma(total, fade, tl.sum(p, 1))
        peak = new_peak
        v = _load_parts(v_ptr, base, step, rows, end, stride_vt, WHOLE, DIMS)
        if IS_FP8:
            v_scale = _load_scales(v_scale_ptr, base, step, rows, end, stride_vst)
            new_unit = tl.max(v_scale)
            p *= (v_scale / new_unit)[None, :]
            fade *= unit / new_unit
            unit = new_unit
        acc = _add_product(_times(acc, fade[:, None], DIMS), p.to(v[0].dtype), v, DIMS)
    return acc, peak, total, unit


@triton.jit(do_not_specialize=["num_tiles", "stride_lh", "stride_qsh", "stride_ksh", "stride_vsh"])
def block_forward(
    tiles_ptr, q_turn, k_turn, q_ptr, k_ptr, v_ptr, out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, lse_ptr, spans_ptr, kv_spans_ptr,
    known_ptr, runs_ptr, run_offsets_ptr, text_lengths_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_qst, stride_qsh, stride_kst, stride_ksh, stride_vst, stride_vsh, stride_lh, scale_log2, num_tiles,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """A tile of queries of one head. Neighbouring programs share the head, so that its keys stay in L2."""
    (
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    ) = (
        stride_qt * UNIT, stride_qh * UNIT, stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT, stride_ot * UNIT,
        stride_oh * UNIT,
    )  # fmt: skip
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = sequence(spans_ptr, clip, site, SITE)
    rows = row + tl.arange(0, BLOCK_M)
    q = _load_parts(q_ptr + head * stride_qh, base, step, rows, stop, stride_qt, False, DIMS)
    q = norm_rope(q, base + rows * step, rows < stop, q_turn, DIMS)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    if q_ptr.dtype.element_ty.is_fp8():
        scale_log2 *= _load_scales(q_scale_ptr + head * stride_qsh, base, step, rows, stop, stride_qst)
        k_scale_ptr += head // GROUP * stride_ksh
        v_scale_ptr += head // GROUP * stride_vsh
    known_ptr += tl.load(kv_spans_ptr + 7 * clip + 6)
    context = (
        q, first + rows // frame_rows, site == TEXT, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2,
        k_scale_ptr, v_scale_ptr, stride_kst, stride_vst,
    )  # fmt: skip
    acc = _zeros(BLOCK_M, DIMS)
    state = acc, tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32), 1.0
    last = tl.minimum(row + BLOCK_M, stop) - 1
    acc, peak, total, unit = _visit_keys(
        _attend, state, context, first + row // frame_rows, first + last // frame_rows, clip, site, kv_spans_ptr, runs_ptr, run_offsets_ptr,
        text_lengths_ptr, SITE, BLOCK_N, RULE, DIMS, k_turn,
    )  # fmt: skip
    share = tl.where(total == 0.0, 0.0, unit / total)[:, None]  # a query that saw nothing gives zeros, NaN stays NaN
    _store_parts(out_ptr + head * stride_oh, _times(acc, share, DIMS), base, step, rows, stop, stride_ot, DIMS)
    if q_ptr.dtype.element_ty.is_fp8():
        peak -= HEADROOM
    lse = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head * stride_lh + base + rows * step, lse, mask=rows < stop)


# -------------------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_lse(lse_ptr, base, step, rows, stop):
    """In units of log 2; infinite for a query that saw nothing or is not there, so that it gives weights of zero."""
    lse = tl.load(lse_ptr + base + rows * step, mask=rows < stop, other=-float("inf")) * LOG2_E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def _inner(a, b, DIMS):
    """The inner products of rows, float32."""
    delta = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if DIMS[2] > 0:
        delta += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    if DIMS[3] > 0:
        delta += tl.sum(a[2].to(tl.float32) * b[2].to(tl.float32), 1)
    return delta


@triton.jit
def _pull(state, context, keys, begin, end, skip, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS, TURN):
    """Adds to dq of a tile of queries what comes from rows begin .. end, but skip[0] .. skip[1], of a sequence of keys."""
    dq = state
    q, do, lse, delta, t, free, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2 = context
    base, step, _, frame_rows, first = keys
    for i in range(begin, end - (skip[1] - skip[0]), BLOCK):
        rows = _after(i, skip) + tl.arange(0, BLOCK)
        k = _load_parts(k_ptr, base, step, rows, end, stride_kt, WHOLE, DIMS)
        k = norm_rope(k, base + rows * step, rows < end, TURN, DIMS)
        v = _load_parts(v_ptr, base, step, rows, end, stride_vt, WHOLE, DIMS)
        s = _product(q, k, DIMS)
        if RULED:
            u, known = _keys_of(known_ptr, rows, end, first, frame_rows, RULE)
            s = _hide(s, t[:, None], u[None, :], known[None, :], free, RULE)
        if not WHOLE:
            s = tl.where((rows < end)[None, :], s, -float("inf"))
        ds = tl.exp2(tl.fma(s, scale_log2, -lse[:, None])) * (_product(do, v, DIMS) - delta[:, None])
        dq = _add_product(dq, ds.to(k[0].dtype), k, DIMS)
    return dq


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def block_backward_queries(
    tiles_ptr, q_turn, k_turn, q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, spans_ptr, kv_spans_ptr, known_ptr,
    runs_ptr, run_offsets_ptr, text_lengths_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dot, stride_doh, stride_dqt, stride_dqh, stride_lh, scale, num_tiles,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """dq of a tile of queries of one head, and its do . out for the other kernel."""
    (
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_dot, stride_doh, stride_dqt,
        stride_dqh,
    ) = (
        stride_qt * UNIT, stride_qh * UNIT, stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT, stride_ot * UNIT,
        stride_oh * UNIT, stride_dot * UNIT, stride_doh * UNIT, stride_dqt * UNIT, stride_dqh * UNIT,
    )  # fmt: skip
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = sequence(spans_ptr, clip, site, SITE)
    rows = row + tl.arange(0, BLOCK_M)
    q = _load_parts(q_ptr + head * stride_qh, base, step, rows, stop, stride_qt, False, DIMS)
    q = norm_rope(q, base + rows * step, rows < stop, q_turn, DIMS)
    do = _load_parts(do_ptr + head * stride_doh, base, step, rows, stop, stride_dot, False, DIMS)
    out = _load_parts(out_ptr + head * stride_oh, base, step, rows, stop, stride_ot, False, DIMS)
    delta = _inner(do, out, DIMS)
    tl.store(delta_ptr + head * stride_lh + base + rows * step, delta, mask=rows < stop)
    lse = _load_lse(lse_ptr + head * stride_lh, base, step, rows, stop)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    known_ptr += tl.load(kv_spans_ptr + 7 * clip + 6)
    t = first + rows // frame_rows
    context = q, do, lse, delta, t, site == TEXT, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale * LOG2_E
    state = _zeros(BLOCK_M, DIMS)
    last = tl.minimum(row + BLOCK_M, stop) - 1
    dq = _visit_keys(
        _pull, state, context, first + row // frame_rows, first + last // frame_rows, clip, site, kv_spans_ptr, runs_ptr, run_offsets_ptr,
        text_lengths_ptr, SITE, BLOCK_N, RULE, DIMS, k_turn,
    )  # fmt: skip
    dq = _times(dq, scale, DIMS)
    if q_turn is not None:
        # Loaded again rather than kept in registers meanwhile.
        raw = _load_parts(q_ptr + head * stride_qh, base, step, rows, stop, stride_qt, False, DIMS)
        dq, dw = norm_rope_backward(dq, raw, base + rows * step, rows < stop, q_turn, DIMS)
        store_weight_gradient(dw, q_turn, DIMS)
    _store_parts(dq_ptr + head * stride_dqh, dq, base, step, rows, stop, stride_dqt, DIMS)


@triton.jit
def _push(state, context, queries, begin, end, skip, RULED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, RULE, DIMS, TURN):
    """Adds to dk and dv of a tile of keys what comes from rows begin .. end, but skip[0] .. skip[1], of a sequence of queries."""
    dk, dv = state
    k, v, u, known, free, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, scale_log2 = context
    base, step, _, frame_rows, first = queries
    for i in range(begin, end - (skip[1] - skip[0]), BLOCK):
        rows = _after(i, skip) + tl.arange(0, BLOCK)
        q = _load_parts(q_ptr, base, step, rows, end, stride_qt, WHOLE, DIMS)
        q = norm_rope(q, base + rows * step, rows < end, TURN, DIMS)
        do = _load_parts(do_ptr, base, step, rows, end, stride_dot, WHOLE, DIMS)
        lse = _load_lse(lse_ptr, base, step, rows, end)
        delta = tl.load(delta_ptr + base + rows * step, mask=rows < end, other=0.0)
        # Everything is transposed, (keys, queries), as the products below need it.
        s = _product(k, q, DIMS)
        if RULED:
            s = _hide(s, (first + rows // frame_rows)[None, :], u[:, None], known[:, None], free, RULE)
        p = tl.exp2(tl.fma(s, scale_log2, -lse[None, :]))
        dv = _add_product(dv, p.to(do[0].dtype), do, DIMS)
        ds = p * (_product(v, do, DIMS) - delta[None, :])
        dk = _add_product(dk, ds.to(q[0].dtype), q, DIMS)
    return dk, dv


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def block_backward_keys(
    tiles_ptr, q_turn, k_turn, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, spans_ptr, kv_spans_ptr, known_ptr,
    text_lengths_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh, stride_lh, scale,
    num_tiles,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """dk and dv of a tile of keys of one head of keys, from all heads of queries that share it, in their order."""
    (
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dkt, stride_dkh,
    ) = (
        stride_qt * UNIT, stride_qh * UNIT, stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT, stride_dot * UNIT,
        stride_doh * UNIT, stride_dkt * UNIT, stride_dkh * UNIT,
    )  # fmt: skip
    tiles_ptr += 3 * (tl.program_id(0) % num_tiles)
    kv_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1), tl.load(tiles_ptr + 2)
    if clip < 0:
        return
    base, step, stop, frame_rows, first = sequence(kv_spans_ptr, clip, site, SITE)
    if text_lengths_ptr is not None:  # what is not there keeps a gradient of zero
        stop = tl.where(site == TEXT, text_length(text_lengths_ptr, clip, stop), stop)
        if row >= stop:
            return
    rows = row + tl.arange(0, BLOCK_N)
    k = _load_parts(k_ptr + kv_head * stride_kh, base, step, rows, stop, stride_kt, False, DIMS)
    k = norm_rope(k, base + rows * step, rows < stop, k_turn, DIMS)
    v = _load_parts(v_ptr + kv_head * stride_vh, base, step, rows, stop, stride_vt, False, DIMS)
    u, known = _keys_of(known_ptr + tl.load(kv_spans_ptr + 7 * clip + 6), rows, tl.where(site == TEXT, 0, stop), first, frame_rows, RULE)
    any_known = False
    if RULE[4]:
        any_known = tl.max(known.to(tl.int32)) > 0
    dk = _zeros(BLOCK_N, DIMS)
    state = dk, dk
    last = tl.minimum(row + BLOCK_N, stop) - 1
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        context = (
            k, v, u, known, site == TEXT, q_ptr + head * stride_qh, do_ptr + head * stride_doh, lse_ptr + head * stride_lh,
            delta_ptr + head * stride_lh, stride_qt, stride_dot, scale * LOG2_E,
        )  # fmt: skip
        state = _visit_queries(
            _push, state, context, first + row // frame_rows, first + last // frame_rows, any_known, clip, site, spans_ptr,
            SITE, BLOCK_M, RULE, DIMS, q_turn,
        )  # fmt: skip
    dk, dv = state
    dk = _times(dk, scale, DIMS)
    if k_turn is not None:
        raw = _load_parts(k_ptr + kv_head * stride_kh, base, step, rows, stop, stride_kt, False, DIMS)
        dk, dw = norm_rope_backward(dk, raw, base + rows * step, rows < stop, k_turn, DIMS)
        store_weight_gradient(dw, k_turn, DIMS)
    _store_parts(dk_ptr + kv_head * stride_dkh, dk, base, step, rows, stop, stride_dkt, DIMS)
    _store_parts(dv_ptr + kv_head * stride_dkh, dv, base, step, rows, stop, stride_dkt, DIMS)


# ------------------------------------------------------------------------------------------------------------------------------ host


class Launch:
    """What the launches of a call share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: VideoLayout,
        mask: Mask,
        kv_layout: VideoLayout,
        text_lengths: torch.Tensor | None = None,
    ):
        kv = Clips.of(kv_layout)
        self.tables = (
            Clips.of(layout).spans,
            kv.spans,
            kv.known,
            kv.runs,
            kv.run_offsets,
            None if text_lengths is None else text_lengths.contiguous(),
        )
        rule = mask.as_rule()
        if not kv_layout.capacity and not any(any(clip.known) for clip in kv_layout.clips):
            rule = rule._replace(sees_known=False)  # nothing is known, and nothing is read to find that out
        dims = (q.shape[2], *split_head_dim(q.shape[2], q.dtype))
        self.constants = {"GROUP": q.shape[1] // k.shape[1], "RULE": rule, "DIMS": dims}

    def __call__(self, kernel, config: Config, table: torch.Tensor, heads: int, *arguments, **constants) -> None:
        """Run `kernel` for each tile of `table` and each head."""
        launch(
            "attention", kernel, len(table) * heads, table, *arguments, len(table),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
            **self.constants | constants,
        )  # fmt: skip
