"""Attention over packs for Hopper in Triton, forwards alone: the block kernel's sums, with loads by TMA and warps that specialise.

One warp group loads blocks of keys and values into a ring in shared memory (TMA), two compute, half a tile of queries each: while one is at
its softmax, the other keeps the tensor cores busy. Triton's compiler makes this of `tl.range(..., warp_specialize=True)`, and of little
else: one loop without branches, in a function that does not return early, over operands that device-side tensor descriptors bring, in 4
warps and 128 rows. So what the block kernel finds out on its way, and does in several loops, is a table here (`schedule.key_blocks`), and
the mask is always on. It is two bounds for each query, counted from the block on, so that the columns which they are compared with are
constants to the compiler: were both counted from the pack's first token on, the loop would have a fifth to two fifths more instructions.

A descriptor ends where the clip ends, and TMA gives zeros past its end: not even a NaN of the next clip is read.

FLOPs and bytes are the block kernel's; the descriptors of a program take 384 bytes more.
"""

import contextvars

import torch
import triton
import triton.language as tl

from ..dispatch import launched
from ..layout import VideoLayout
from ..masks import Mask
from . import schedule
from .configs import Config
from .ranges import LEAST_SCALE, LN_2, LOG2_E, VIDEO, clamped, sequence, strides, window
from .schedule import Clips, key_blocks, tiles

HEAD_DIMS = (64, 128)
ALIGNMENT = 16
"""Bytes that TMA asks addresses and strides to be multiples of."""

EXTRA_SHARED_MEMORY = 17 * 1024
"""Bytes that the compiler takes beside the tiles."""

BROKEN = "compiled by Triton 3.6 it gave NaN on an H100: with three stages always, with one or two in some runs"
"""Why no call is served by it on a GPU."""

OPEN, RULED = tl.constexpr(schedule.OPEN), tl.constexpr(schedule.RULED)


def default_config(head_dim: int) -> Config:
    """As many stages as compile without spills and fit 227 KiB."""
    return Config(block_m=128, block_n=128, num_warps=4, num_stages=2 if head_dim > 64 else 3)


@triton.jit(do_not_specialize=["num_tiles", "stride_lh"])
def hopper_forward(
    tiles_ptr, block_spans_ptr, blocks_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans_ptr, kv_spans_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh, scale_log2, num_tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RULE,
):  # fmt: skip
    """A tile of queries of one head, as in `block_forward`, over the blocks of keys that the table names. scale_log2 is above zero."""
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    clip, row, site = tl.load(tiles_ptr + 3 * tile), tl.load(tiles_ptr + 3 * tile + 1), tl.load(tiles_ptr + 3 * tile + 2)
    # A tile past the end of the table has no rows, and no blocks.
    there = clip >= 0
    clip, row = tl.maximum(clip, 0), tl.maximum(row, 0)
    base, _, stop, frame_rows, first = sequence(spans_ptr, clip, site, False)
    stop = tl.where(there, stop, 0)
    rows = row + tl.arange(0, BLOCK_M)

    kv_spans_ptr += 7 * clip
    kv_frames = tl.load(kv_spans_ptr + 1)
    kv_base, _, kv_rows, kv_frame_rows, kv_first = sequence(kv_spans_ptr, 0, VIDEO, False)
    t = first + rows // frame_rows
    window_start, window_stop, _, _ = window(t, t, kv_first, kv_frames, False, RULE)
    window_start = kv_base + clamped(window_start, 0, kv_frames) * kv_frame_rows
    window_stop = kv_base + clamped(window_stop, 0, kv_frames) * kv_frame_rows

    # A descriptor must have a row, also where none is loaded.
    q_stop = tl.maximum(base + stop, 1)
    kv_stop = tl.maximum(tl.maximum(kv_base + kv_rows, tl.load(kv_spans_ptr + 3) + tl.load(kv_spans_ptr + 4)), 1)
    q_desc = tl.make_tensor_descriptor(q_ptr + head * stride_qh, [q_stop, HEAD_DIM], [stride_qt, 1], [BLOCK_M, HEAD_DIM])
    k_desc = tl.make_tensor_descriptor(k_ptr + head // GROUP * stride_kh, [kv_stop, HEAD_DIM], [stride_kt, 1], [BLOCK_N, HEAD_DIM])
    v_desc = tl.make_tensor_descriptor(v_ptr + head // GROUP * stride_vh, [kv_stop, HEAD_DIM], [stride_vt, 1], [BLOCK_N, HEAD_DIM])
    q = q_desc.load([base + row, 0])
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    columns = tl.arange(0, BLOCK_N)
    for i in tl.range(tl.load(block_spans_ptr + 2 * tile), tl.load(block_spans_ptr + 2 * tile + 1), warp_specialize=True):
        n, end, kind = tl.load(blocks_ptr + 3 * i), tl.load(blocks_ptr + 3 * i + 1), tl.load(blocks_ptr + 3 * i + 2)
        s = tl.dot(q, tl.trans(k_desc.load([n, 0])), input_precision="ieee")
        high = end - n
        if RULE[0] or RULE[2] > 0:
            high = tl.where(kind == OPEN, high, tl.minimum(window_stop - n, high))[:, None]
        s = tl.where(columns[None, :] < high, s, -float("inf"))
        if RULE[2] > 0:
            low = tl.where(kind == RULED, window_start - n, 0)
            s = tl.where(columns[None, :] >= low[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        level = new_peak
        if RULE[0] or RULE[2] > 0:  # a query may have seen nothing yet
            level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(tl.fma(s, scale_log2, -level[:, None]))
        fade = tl.exp2(peak - level)
        total = tl.fma(total, fade, tl.sum(p, 1))
        peak = new_peak
        v = v_desc.load([n, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

    share = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]  # a query that saw nothing gives zeros, NaN stays NaN
    pointers = out_ptr + head * stride_oh + (base + rows).to(tl.int64)[:, None] * stride_ot + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, (acc * share).to(out_ptr.dtype.element_ty), mask=(rows < stop)[:, None])
    lse = tl.where(total == 0.0, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head * stride_lh + base + rows, lse, mask=rows < stop)


def forward_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    config: Config,
) -> None:
    """Writes what `block_forward` would write: out (tokens, heads, head_dim) and lse (heads, tokens) of the tokens of clips. The rest of
    them, where there is a capacity, is the caller's to fill.
    """
    spans, kv_spans = Clips.of(layout).spans, Clips.of(kv_layout).spans
    table = tiles(layout, config.block_m, mask, kv_layout)
    if not (q.numel() and len(table) and len(kv_spans)):  # there is no clip, nor room for one
        return
    blocks = key_blocks(layout, config.block_m, config.block_n, mask, kv_layout)
    scale_log2 = max(scale, LEAST_SCALE) * LOG2_E.value
    rule = mask.as_rule()._replace(sink=0, sees_known=False)  # the table has them

    def launch() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        hopper_forward[(len(table) * q.shape[1],)](
            table, *blocks, q, k, v, out, lse, spans, kv_spans, *strides(q, k, v, out), lse.stride(0), scale_log2, len(table),
            GROUP=q.shape[1] // k.shape[1],
            HEAD_DIM=q.shape[2],
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            RULE=tuple(map(tl.constexpr, rule)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,  # what is fused is written so: the compiler's own choice differs between masks and versions
        )  # fmt: skip

    launched("attention", "triton", hopper_forward.fn.__name__)
    with torch.cuda.device_of(q):
        contextvars.copy_context().run(launch)  # the allocator is a context variable: the caller keeps their own


def unavailable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, text_lengths: torch.Tensor | None = None) -> str | None:
    """Why the kernel cannot run on them, if it cannot."""
    if text_lengths is not None:
        return "its table of blocks is made on the host, which does not read text_lengths"
    if mask.same_site:
        return "its blocks are neighbouring tokens, and the mask is one of single sites"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {q.dtype}"
    if q.shape[2] not in HEAD_DIMS:
        return f"head_dim {q.shape[2]} is not among {HEAD_DIMS}"
    if isinstance(hopper_forward, triton.JITFunction):  # it is compiled, not interpreted
        return BROKEN
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % ALIGNMENT or x.stride(0) == 0 or any(stride * x.itemsize % ALIGNMENT for stride in x.stride()[:2]):
            return f"TMA needs addresses and strides that are multiples of {ALIGNMENT} bytes, got {name} with strides {x.stride()[:2]}"
    return None
