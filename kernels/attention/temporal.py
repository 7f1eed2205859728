"""Attention along time at single sites in Triton, for short clips: thousands to millions of sequences of at most 128 frames (64 backwards).

A tile holds as many whole sites of a clip as fit: row i of it is frame i % T of its site i // T. One product of queries and keys, in which
pairs of different sites are hidden, one softmax, one product with the values; backwards all three gradients from one visit, since nobody
but the tile's own queries sees its keys. Only the text of a joint layout is visited besides. Everything is read and written once, in place,
through strides: neither a transpose nor a copy exists. Neighbouring programs take neighbouring heads, which are neighbours in memory.

FLOPs: 4 d times the rows of a tile for each row, of which T / rows are of use; backwards 10 d. Bytes: q, k, v read and out written once;
backwards out, do besides, and dq, dk, dv written. At 64 rows of bfloat16 that is 16 FLOPs a byte for each way, far below what a GPU's
tensor cores need to be the limit: the floor is that of a copy.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..layout import VideoLayout
from .block import (
    Launch,
    _add_product,
    _attend,
    _inner,
    _load_lse,
    _load_parts,
    _product,
    _pull,
    _push,
    _store_parts,
    _times,
    _zeros,
)
from .configs import SHARED_MEMORY, Config, limits, split_head_dim
from .norm_rope import Turns, add_weight_gradient, no_weight_gradient, norm_rope, norm_rope_backward, store_weight_gradient
from .ranges import LN_2, LOG2_E, TEXT, clamped, sequence, strides, unit_of, window
from .schedule import site_tiles

END = tl.constexpr(1 << 30)
"""A row past every pack's end."""
EXACT = tl.constexpr(1 << 22)
"""i // n is i * ceil(EXACT / n) >> 22 for all i < 128 and n <= 128: what is added to i is below 128^2 / EXACT < 1 / n."""
SITE = tl.constexpr(256)
"""From the number of a key to that of the same frame at the next site."""


@triton.jit
def _rows(base, frames, frame_rows, site, sites, BLOCK: tl.constexpr):
    """Of the rows of a tile, of which there are so many sites: the token, END where there is none, the frame and the site within the tile,
    and whether there is one.
    """
    i = tl.arange(0, BLOCK)
    nth = (i * tl.cdiv(EXACT, frames)) >> 22  # i // frames, in two instructions
    t = i - nth * frames
    there = nth < sites
    return tl.where(there, base + t * frame_rows + site + nth, END), t, nth, there


@triton.jit
def _place(spans_ptr, kv_spans_ptr, known_ptr, clip, site, BLOCK: tl.constexpr, RULE):
    """Where the queries and the keys of a tile lie, END where there is none, and their frames, those of queries counted as masks do; what
    `_see` takes; and whether each site has one query, which sees one key.
    """
    base, _, _, frame_rows, first = sequence(spans_ptr, clip, 0, False)
    kv_base, _, _, _, kv_first = sequence(kv_spans_ptr, clip, 0, False)
    frames, kv_frames = tl.load(spans_ptr + 7 * clip + 1), tl.load(kv_spans_ptr + 7 * clip + 1)
    sites = tl.minimum(BLOCK // tl.maximum(frames, kv_frames), frame_rows - site)
    rows, t, nth, there = _rows(base, frames, frame_rows, site, sites, BLOCK)
    keys, u, key_nth, key_there = _rows(kv_base, kv_frames, frame_rows, site, sites, BLOCK)
    known = key_there
    if RULE[4]:
        known = tl.load(known_ptr + tl.load(kv_spans_ptr + 7 * clip + 6) + u, mask=key_there, other=0) != 0
    # Keys are numbered by site and frame, so that what a query sees is between two numbers. Those that are not there see, and are, none.
    own = tl.where(there, nth * SITE, -2 * SITE)
    number = tl.where(key_there, key_nth * SITE + u, -1)
    start, stop, _, _ = window(first + t, first + t, kv_first, kv_frames, False, RULE)
    start, stop = clamped(own + start, own, own + kv_frames), clamped(own + stop, own, own + kv_frames)
    sink_stop = clamped(own + (RULE[3] - kv_first), own, own + kv_frames)
    if RULE[0]:
        sink_stop = tl.minimum(sink_stop, stop)
    single = (frames == 1) & (kv_frames == 1)
    return rows, first + t, keys, kv_first + u, (own, start, stop, sink_stop), (number, known), single


@triton.jit
def _see(queries, keys, KEYS_FIRST: tl.constexpr, RULE):
    """Which queries see which keys, (queries, keys), or with KEYS_FIRST (keys, queries)."""
    OF_QUERIES: tl.constexpr = 0 if KEYS_FIRST else 1
    OF_KEYS: tl.constexpr = 1 - OF_QUERIES
    own, start, stop = (
        tl.expand_dims(queries[0], OF_QUERIES),
        tl.expand_dims(queries[1], OF_QUERIES),
        tl.expand_dims(queries[2], OF_QUERIES),
    )
    number = tl.expand_dims(keys[0], OF_KEYS)
    seen = (number >= start) & (number < stop)
    if RULE[3] > 0:
        seen |= (number >= own) & (number < tl.expand_dims(queries[3], OF_QUERIES))
    if RULE[4]:
        seen |= (number >= own) & (number < own + SITE) & tl.expand_dims(keys[1], OF_KEYS)
    return seen


@triton.jit
def _copied(acc, v, copies, DIMS):
    """Rows of v in place of those of acc."""
    x = (tl.where(copies[:, None], v[0], acc[0]),)
    if DIMS[2] > 0:
        x += (tl.where(copies[:, None], v[1], acc[1]),)
    if DIMS[3] > 0:
        x += (tl.where(copies[:, None], v[2], acc[2]),)
    return x


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def temporal_forward(
    tiles_ptr, q_turn, k_turn, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans_ptr, kv_spans_ptr, known_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh, scale_log2, heads, num_tiles,
    GROUP: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TEXT: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """BLOCK_M // frames sites of a clip, of one head. A site with a single frame gives its value, bit for bit."""
    (
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    ) = (
        stride_qt * UNIT, stride_qh * UNIT, stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT, stride_ot * UNIT,
        stride_oh * UNIT,
    )  # fmt: skip
    tiles_ptr += 2 * (tl.program_id(0) // heads)
    head = (tl.program_id(0) % heads).to(tl.int64)
    clip, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    if clip < 0:
        return
    rows, t, keys, _u, of_queries, of_keys, single = _place(spans_ptr, kv_spans_ptr, known_ptr, clip, site, BLOCK_M, RULE)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    q = _load_parts(q_ptr + head * stride_qh, 0, 1, rows, END, stride_qt, False, DIMS)
    q = norm_rope(q, rows, rows < END, q_turn, DIMS)
    k = _load_parts(k_ptr, 0, 1, keys, END, stride_kt, False, DIMS)
    k = norm_rope(k, keys, keys < END, k_turn, DIMS)
    v = _load_parts(v_ptr, 0, 1, keys, END, stride_vt, False, DIMS)
    s = tl.where(_see(of_queries, of_keys, False, RULE), _product(q, k, DIMS), -float("inf"))
    peak = tl.max(s, 1) * scale_log2
    level = tl.where(peak == -float("inf"), 0.0, peak)
    p = tl.exp2(tl.fma(s, scale_log2, -level[:, None]))
    total = tl.sum(p, 1)
    acc = _add_product(_zeros(BLOCK_M, DIMS), p.to(v[0].dtype), v, DIMS)
    if v[0].dtype == tl.float32:  # else what is a rounding of float32 away from a value is rounded to it
        copies = single & (total > 0.0)
        acc, total = _copied(acc, v, copies, DIMS), tl.where(copies, 1.0, total)
    if HAS_TEXT:
        text = sequence(kv_spans_ptr, clip, TEXT, False)
        context = q, t, False, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2, None, None, 0, 0
        state = acc, peak, total, 1.0
        acc, peak, total, _unit = _attend(state, context, text, 0, text[2], (0, 0), False, False, BLOCK_N, RULE, DIMS, k_turn)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]  # a query that saw nothing gives zeros, NaN stays NaN
    _store_parts(out_ptr + head * stride_oh, _times(acc, share, DIMS), 0, 1, rows, END, stride_ot, DIMS)
    lse = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head * stride_lh + rows, lse, mask=rows < END)


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def temporal_backward(
    tiles_ptr, q_turn, k_turn, q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, spans_ptr, kv_spans_ptr,
    known_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_dot, stride_doh,
    stride_dqt, stride_dqh, stride_dkt, stride_dkh, stride_lh, scale, kv_heads, num_tiles,
    GROUP: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TEXT: tl.constexpr, RULE, DIMS,
):  # fmt: skip
    """dq, dk and dv of BLOCK_M // frames sites of a clip, of one head of keys and all heads of queries that share it, in their order."""
    (
        stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_dot, stride_doh, stride_dqt,
        stride_dqh, stride_dkt, stride_dkh,
    ) = (
        stride_qt * UNIT, stride_qh * UNIT, stride_kt * UNIT, stride_kh * UNIT, stride_vt * UNIT, stride_vh * UNIT, stride_ot * UNIT,
        stride_oh * UNIT, stride_dot * UNIT, stride_doh * UNIT, stride_dqt * UNIT, stride_dqh * UNIT, stride_dkt * UNIT,
        stride_dkh * UNIT,
    )  # fmt: skip
    tiles_ptr += 2 * (tl.program_id(0) // kv_heads)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    clip, site = tl.load(tiles_ptr), tl.load(tiles_ptr + 1)
    if clip < 0:
        return
    rows, t, keys, u, of_queries, of_keys, _single = _place(spans_ptr, kv_spans_ptr, known_ptr, clip, site, BLOCK_M, RULE)
    scale_log2 = scale * LOG2_E
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    k = _load_parts(k_ptr, 0, 1, keys, END, stride_kt, False, DIMS)
    k = norm_rope(k, keys, keys < END, k_turn, DIMS)
    v = _load_parts(v_ptr, 0, 1, keys, END, stride_vt, False, DIMS)
    dk, dv = _zeros(BLOCK_M, DIMS), _zeros(BLOCK_M, DIMS)
    q_sum = no_weight_gradient(DIMS)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        q = _load_parts(q_ptr + head * stride_qh, 0, 1, rows, END, stride_qt, False, DIMS)
        q = norm_rope(q, rows, rows < END, q_turn, DIMS)
        do = _load_parts(do_ptr + head * stride_doh, 0, 1, rows, END, stride_dot, False, DIMS)
        out = _load_parts(out_ptr + head * stride_oh, 0, 1, rows, END, stride_ot, False, DIMS)
        delta = _inner(do, out, DIMS)
        tl.store(delta_ptr + head * stride_lh + rows, delta, mask=rows < END)
        lse = _load_lse(lse_ptr + head * stride_lh, 0, 1, rows, END)
        # Transposed, (keys, queries), as the products for dk and dv need it.
        s = tl.where(_see(of_queries, of_keys, True, RULE), _product(k, q, DIMS), -float("inf"))
        p = tl.exp2(tl.fma(s, scale_log2, -lse[None, :]))
        dv = _add_product(dv, p.to(do[0].dtype), do, DIMS)
        ds = (p * (_product(v, do, DIMS) - delta[None, :])).to(q[0].dtype)
        dk = _add_product(dk, ds, q, DIMS)
        dq = _add_product(_zeros(BLOCK_M, DIMS), tl.trans(ds), k, DIMS)
        if HAS_TEXT:
            text = sequence(kv_spans_ptr, clip, TEXT, False)
            context = q, do, lse, delta, t, False, k_ptr, v_ptr, known_ptr, stride_kt, stride_vt, scale_log2
            dq = _pull(dq, context, text, 0, text[2], (0, 0), False, False, BLOCK_N, RULE, DIMS, k_turn)
        dq = _times(dq, scale, DIMS)
        if q_turn is not None:
            # Loaded again rather than kept in registers meanwhile.
            raw = _load_parts(q_ptr + head * stride_qh, 0, 1, rows, END, stride_qt, False, DIMS)
            dq, dw = norm_rope_backward(dq, raw, rows, rows < END, q_turn, DIMS)
            q_sum = add_weight_gradient(q_sum, dw, DIMS)
        _store_parts(dq_ptr + head * stride_dqh, dq, 0, 1, rows, END, stride_dqt, DIMS)
        if HAS_TEXT:
            text = sequence(spans_ptr, clip, TEXT, False)
            context = (
                k, v, u, of_keys[1], False, q_ptr + head * stride_qh, do_ptr + head * stride_doh, lse_ptr + head * stride_lh,
                delta_ptr + head * stride_lh, stride_qt, stride_dot, scale_log2,
            )  # fmt: skip
            dk, dv = _push((dk, dv), context, text, 0, text[2], (0, 0), False, False, BLOCK_N, RULE, DIMS, q_turn)
    dk = _times(dk, scale, DIMS)
    if k_turn is not None:
        raw = _load_parts(k_ptr, 0, 1, keys, END, stride_kt, False, DIMS)
        dk, dw = norm_rope_backward(dk, raw, keys, keys < END, k_turn, DIMS)
        store_weight_gradient(dw, k_turn, DIMS)
        store_weight_gradient(q_sum, q_turn, DIMS)
    _store_parts(dk_ptr + kv_head * stride_dkh, dk, 0, 1, keys, END, stride_dkt, DIMS)
    _store_parts(dv_ptr + kv_head * stride_dkh, dv, 0, 1, keys, END, stride_dkt, DIMS)


def forward_temporal(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: VideoLayout,
    kv_layout: VideoLayout,
    scale_log2: float,
    turns: Turns,
) -> None:
    """Writes out (tokens, heads, head_dim) and lse (heads, tokens) of the frames of short clips."""
    unit, heads = unit_of(q, k, v, out), q.shape[1]
    for rows in _sizes(q):
        table = site_tiles(layout, rows, kv_layout)
        if not len(table):
            continue
        launch(
            temporal_forward, config(rows, wide=turns.how is not None and q.shape[2] > 64), table, heads,
            *turns(), q, k, v, out, lse, *launch.tables[:3], *strides(q, k, v, out, unit=unit), lse.stride(0), scale_log2, heads,
            HAS_TEXT=_has_text(kv_layout), UNIT=unit,
        )  # fmt: skip


def backward_temporal(
    launch: Launch,
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    layout: VideoLayout,
    kv_layout: VideoLayout,
    scale: float,
    turns: Turns,
) -> None:
    """Writes dq, dk, dv, and delta, the inner products of do and out (heads, tokens), of the frames of short clips; reads that of text."""
    unit = unit_of(q, k, v, out, do)
    for rows in _sizes(q, backward=True):
        table = site_tiles(layout, rows, kv_layout)
        launch(
            temporal_backward, config(rows, backward=True), table, k.shape[1],
            *turns(len(table) * k.shape[1], queries=True, keys=True), q, k, v, out, do, dq, dk, dv, lse, delta, *launch.tables[:3],
            *strides(q, k, v, out, do, dq, dk, unit=unit), lse.stride(0), scale, k.shape[1],
            HAS_TEXT=_has_text(layout) or _has_text(kv_layout), UNIT=unit,
        )  # fmt: skip


def longest(q: torch.Tensor, backward: bool = False) -> int:
    """The most frames that the kernel takes; 0 if it cannot run."""
    return max(_sizes(q, backward), default=0)


def _sizes(q: torch.Tensor, backward: bool = False) -> tuple[int, ...]:
    room = limits(q.device)
    return sizes(q.shape[2], q.dtype, room["shared_memory"], room["amd"], backward)


@lru_cache
def sizes(head_dim: int, dtype: torch.dtype, shared_memory: int, amd: bool, backward: bool = False) -> tuple[int, ...]:
    """Of the tiles that compile without spills (tests/codegen.json) and fit `shared_memory`, in bytes a block: rows, fewest first."""
    if dtype.itemsize == 1 or (backward and amd):
        return ()
    if backward and split_head_dim(head_dim, dtype)[1] > 16:
        # At 96, with text, Triton 3.6 made it read past the end of shared memory on an H100 and an H200, in the product of the second part
        # with the text's blocks of 32 or 64 rows; with blocks of 16 compute-sanitizer found nothing, in the one pack that was tried.
        return ()
    if dtype.itemsize > 2:
        rows = (64,) if head_dim <= 64 and not backward else ()
    elif head_dim <= 128:
        rows = (64, 128) if shared_memory >= SHARED_MEMORY and not backward else (64,)
    else:
        rows = () if backward else (64,)
    tiles, row = 5 if backward else 3, sum(split_head_dim(head_dim, dtype)) * dtype.itemsize  # q, k, v; do and what is transposed
    return tuple(each for each in rows if tiles * each * row <= shared_memory)


def config(rows: int, backward: bool = False, wide: bool = False) -> Config:
    """How tiles of `rows` rows are launched; block_n is that of text."""
    return Config(rows, 32, 8 if backward or wide else rows // 16, 1)


def _has_text(layout: VideoLayout) -> bool:
    return layout.capacity is not None or any(clip.text_length for clip in layout.clips)
