"""The Hopper kernel against the float64 definition: interpreted on a CPU, compiled on a Hopper GPU (-m gpu, with bfloat16 and real sizes).

Tiles are as small as they can be where the interpreter runs them, so that small clips have whole blocks, edges and several of each.
"""

import pytest
import test_attention as attention_tests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    EVERY_THIRD,
    FEW_MASKS,
    LAYOUTS,
    MASKS,
    alone,
    definition,
    fused_by_head,
    fused_by_part,
    heads_first,
    masks,
    packs,
    wider_heads,
)
from tolerance import assert_close
from tubelet.kernels import Capacity, FrameCausal, Full, Spatial, Temporal, VideoLayout, attention
from tubelet.kernels.masks import visible

hopper = pytest.importorskip("tubelet.kernels.attention.hopper", reason="triton is not installed")
from tubelet.kernels.attention import fused, schedule  # noqa: E402  needs triton
from tubelet.kernels.attention.configs import Configs  # noqa: E402

COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu, pytest.mark.xfail(reason=hopper.BROKEN, raises=AssertionError, strict=False)] if COMPILED else []),
    pytest.mark.skipif(COMPILED and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"),
]

MASKS = [mask for mask in MASKS if not mask.same_site]
FEW_MASKS = [mask for mask in FEW_MASKS if not mask.same_site]
DTYPES = [torch.float16, torch.bfloat16] if COMPILED else [torch.float16, torch.float32]
DTYPE = DTYPES[-1]
DIM = 64 if COMPILED else 16
SMALL = hopper.default_config(DIM) if COMPILED else hopper.Config(16, 16, 4, 2)
UNEVEN = [SMALL] if COMPILED else [hopper.Config(32, 16, 4, 2), hopper.Config(16, 32, 4, 2)]


def pack(grids, **options):
    return VideoLayout.pack(grids, device=DEVICE, **options)


def segments(lengths, **options):
    return VideoLayout.segments(lengths, device=DEVICE, **options)


def qkv_of(layout, kv_layout=None, heads=2, kv_heads=1, dim=DIM, dtype=DTYPE):
    return tuple(x.to(DEVICE) for x in attention_tests.qkv_of(layout, kv_layout, heads, kv_heads, dim, dtype))


def run(q, k, v, layout, mask, kv_layout=None, config=SMALL, scale=None):
    out = torch.full(q.shape, 0.0 if layout.capacity else torch.nan, dtype=q.dtype, device=DEVICE)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf if layout.capacity else torch.nan, device=DEVICE)
    hopper.forward_hopper(q, k, v, out, lse, layout, mask, kv_layout or layout, q.shape[2] ** -0.5 if scale is None else scale, config)
    return out, lse


def log_sum_exp(q, k, layout, mask, kv_layout, scale=None):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) * (q.shape[2] ** -0.5 if scale is None else scale)
    allowed = mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])
    return logits.masked_fill(~allowed, -torch.inf).logsumexp(dim=-1)


def check(layout, mask, kv_layout=None, config=SMALL, views=lambda *qkv: qkv, scale=None, **shape):
    kv_layout = kv_layout or layout
    plain = qkv_of(layout, kv_layout, **shape)
    out, lse = run(*views(*plain), layout, mask, kv_layout, config, scale)
    assert_close(out, definition(*plain, layout, mask, kv_layout, scale), out.dtype)
    wanted = log_sum_exp(*plain[:2], layout, mask, kv_layout, scale)
    assert torch.equal(wanted.isneginf(), lse.isneginf())
    assert_close(lse[lse.isfinite()], wanted[lse.isfinite()], torch.float32)


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name in LAYOUTS for mask in (FEW_MASKS if name == "image beside video" else MASKS)],  # the largest
    ids=str,
)
def test_every_mask_and_layout(name, mask):
    check(pack(**LAYOUTS[name]), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_dtypes_and_head_dims(dim, dtype):
    config = hopper.default_config(dim) if COMPILED else SMALL
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), FrameCausal(), dtype=dtype, dim=dim, config=config)


@pytest.mark.parametrize("config", UNEVEN, ids=str)
@pytest.mark.parametrize("mask", [*FEW_MASKS, FrameCausal(chunk=1, window=2, sink=3)], ids=str)
def test_uneven_tiles(mask, config):
    """Frames of 21 tokens fall on no boundary of a tile; some tiles hold several frames, some frames several tiles."""
    check(pack([(4, 3, 7), (9, 1, 2), (40, 1, 1)], known=[None, None, EVERY_THIRD[:18] + [False] * 22]), mask, config=config)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_grouped_heads(heads, kv_heads):
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), FrameCausal(), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("views", [fused_by_part, fused_by_head, heads_first, wider_heads])
def test_strides(views):
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), Spatial(), views=views, heads=2, kv_heads=2)


@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_cross_attention(mask):
    layout = pack([(5, 2, 3), (1, 3, 3), (2, 2, 2), (1, 1, 1)], capacity=Capacity(6, 20, 70))
    check(layout, mask, segments([5, 0, 16, 17], capacity=Capacity(4, 0, 50)))


def test_text_attends_to_video():
    check(segments([3, 0, 18]), FrameCausal(), pack([(2, 2, 2), (1, 1, 1), (3, 1, 2)]))


@pytest.mark.parametrize("mask", [*MASKS, FrameCausal(chunk=3, window=1)], ids=str)
def test_a_chunk_attends_to_a_cache(mask):
    layout = pack([(2, 2, 3), (1, 3, 1)], first_frames=[5, 2])
    check(layout, mask, pack([(9, 2, 3), (3, 3, 1)], known=[EVERY_THIRD[:9], None]))


@pytest.mark.parametrize("mask", [FrameCausal(chunk=3, window=2), FrameCausal(chunk=2, window=1, sink=1)], ids=str)
def test_frames_may_count_from_below_zero(mask):
    check(pack([(7, 2, 3)], first_frames=[-4]), mask)


def test_rows_that_see_nothing():
    """Frames 0, 1 and 2 ask, only 2 and 3 answer; clip 1 has no keys at all."""
    layout, kv_layout = pack([(3, 2, 2), (1, 3, 3)]), pack([(2, 2, 2), (1, 1, 1)], first_frames=[2, 7])
    out, lse = run(*qkv_of(layout, kv_layout), layout, Spatial(), kv_layout)
    assert not out[:8].any() and not out[12:].any() and out[8:12].all()
    assert lse[:, :8].isneginf().all() and lse[:, 12:].isneginf().all() and lse[:, 8:12].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0])
def test_scale(scale):
    check(pack([(3, 2, 2)]), FrameCausal(), scale=scale)


@settings(max_examples=10, deadline=None)
@given(drawn=packs(), mask=masks().filter(lambda mask: not mask.same_site))
def test_drawn_packs(drawn, mask):
    check(pack(**drawn), mask)


@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
@pytest.mark.parametrize("name", ["odd sides", "text first", "known and text"])
def test_a_clip_alone_and_in_a_pack(name, mask):
    """Bit for bit."""
    layout = pack(**LAYOUTS[name])
    qkv = qkv_of(layout)
    out, lse = run(*qkv, layout, mask)
    for i, clip in enumerate(layout.clips):
        rows = slice(clip.start, clip.stop)
        one = tuple(x[rows].clone() for x in qkv)
        single, single_lse = run(*one, pack(**alone(LAYOUTS[name], i)), mask)
        assert torch.equal(single, out[rows]) and torch.equal(single_lse, lse[:, rows])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_a_poisoned_clip_leaves_its_neighbours_untouched(mask, poison):
    """Nor does what lies past the end of a capacity touch them."""
    layout = pack([(3, 2, 3), (3, 2, 3), (1, 2, 3)], text=[2, 2, 0], capacity=Capacity(4, 8, 60))
    clean = qkv_of(layout)
    sick = [x.clone() for x in clean]
    clip = layout.clips[1]
    for x in sick:
        x[clip.start : clip.stop] = poison
        x[layout.used_tokens :] = poison
    (good, good_lse), (bad, bad_lse) = (run(*qkv, layout, mask) for qkv in (clean, sick))
    others = torch.ones(layout.tokens, dtype=torch.bool, device=DEVICE)
    others[clip.start : clip.stop] = False
    assert torch.equal(good[others], bad[others]) and torch.equal(good_lse[:, others], bad_lse[:, others])
    assert bad[~others].isnan().all() and not bad[layout.used_tokens :].any()


def test_a_layout_refilled():
    """Other clips in the same tables."""
    capacity = Capacity(3, 12, 60)
    layout, other = pack([(5, 2, 3)], text=[4], capacity=capacity), pack(**LAYOUTS["known and text"], capacity=capacity)
    mask = FrameCausal(chunk=2, window=1, sink=1)
    tables = schedule.key_blocks(layout, SMALL.block_m, SMALL.block_n, mask, layout)
    qkv = qkv_of(layout)
    layout.refill(other)
    assert all(a is b for a, b in zip(tables, schedule.key_blocks(layout, SMALL.block_m, SMALL.block_n, mask, layout), strict=True))
    assert torch.equal(run(*qkv, layout, mask)[0], run(*qkv, other, mask)[0])


def test_an_empty_pack():
    layout, nothing = pack([]), torch.empty(0, 2, DIM, dtype=DTYPE, device=DEVICE)
    assert run(nothing, nothing, nothing, layout, Full())[0].shape == nothing.shape


def counted(layout, block_m, block_n, mask, kv_layout):
    """How often the tables count each pair of a query and a key, (tokens, kv tokens)."""
    times = torch.zeros(layout.tokens, kv_layout.tokens, dtype=torch.int32)
    rule, t, u = mask.as_rule(), layout.coordinates.t[:, None], kv_layout.coordinates.t[None, :]
    windows = {
        schedule.OPEN: torch.ones_like(times, dtype=torch.bool),
        schedule.ENDING: visible(t, u, False, *rule._replace(window=0, sink=0, sees_known=False)),
        schedule.RULED: visible(t, u, False, *rule._replace(sink=0, sees_known=False)),
    }
    spans, blocks = (table.tolist() for table in schedule.key_blocks(layout, block_m, block_n, mask, kv_layout))
    for i, (clip, row, site) in enumerate(schedule.tiles(layout, block_m, mask, kv_layout).tolist()):
        mine = blocks[slice(*spans[i])]
        if clip < 0:
            assert not mine
            continue
        span, keys = layout.clips[clip], kv_layout.clips[clip]
        start, stop = (span.text_start, span.text_stop) if site == schedule.TEXT else (span.video_start, span.video_stop)
        queries = slice(start + row, min(start + row + block_m, stop))
        for first, end, kind in mine:
            assert keys.start <= first < end <= keys.stop
            columns = slice(first, min(first + block_n, end))
            times[queries, columns] += windows[kind][queries, columns]
    return times


@settings(max_examples=100, deadline=None)
@given(
    drawn=packs(),
    mask=masks().filter(lambda mask: not mask.same_site),
    first=st.integers(-9, 9),
    frames=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    text=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    capacity=st.booleans(),
    to=st.sampled_from(["self", "video", "text"]),
)
def test_the_tables_count_each_visible_pair_once(drawn, mask, first, frames, text, sizes, capacity, to):
    grids = drawn["grids"]
    drawn["first_frames"] = [first] * len(grids)
    layout = kv_layout = VideoLayout.pack(**drawn, capacity=Capacity(5, 30, 420) if capacity else None)
    if to == "video":
        kv_layout = VideoLayout.pack([(n, *grid[1:]) for n, grid in zip(frames, grids, strict=False)], text=text[: len(grids)])
    elif to == "text":
        kv_layout = VideoLayout.segments(text[: len(grids)], capacity=Capacity(4, 0, 80))
    wanted = mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])
    assert torch.equal(counted(layout, *sizes, mask, kv_layout), wanted.int())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_any_pack_fits_the_tables_of_its_capacity(mask):
    """Tables of a capacity have one size; the hardest packs have many partial blocks."""
    capacity = Capacity(3, 20, 61)
    packs = [
        {"grids": [(20, 1, 3)], "known": [[True, False] * 10], "text": [1]},
        {"grids": [(1, 1, 61)]},
        {"grids": [(1, 1, 1)] * 3, "text": [58, 0, 0], "text_first": True},
        {"grids": [(9, 1, 2), (8, 1, 3), (1, 1, 1)], "known": [EVERY_THIRD[:9], [True] * 8, None], "text": [5, 6, 7]},
    ]
    layouts = [VideoLayout.pack(**drawn, capacity=capacity) for drawn in packs]
    tables = [schedule.key_blocks(layout, 4, 4, mask, layout) for layout in layouts]
    assert len({tuple(table.shape for table in pair) for pair in tables}) == 1


def test_the_middle_of_a_window_is_one_stretch():
    """Frames of 100 tokens: of tile 3 of frame 3, in blocks of 64."""
    layout = VideoLayout.pack([(6, 10, 10)], text=[10])
    table = schedule.tiles(layout, 32, FrameCausal(), layout).tolist()
    spans, blocks = schedule.key_blocks(layout, 32, 64, FrameCausal(), layout)
    i = table.index([0, 384, schedule.VIDEO])  # rows 384 to 415 lie in frames 3 and 4
    open_, ruled = schedule.OPEN, schedule.RULED
    assert blocks[slice(*spans[i])].tolist() == [
        *([first, 400, open_] for first in range(0, 400, 64)),
        [400, 500, ruled],
        [464, 500, ruled],
        [600, 610, open_],
    ]


def test_the_callers_allocator_stays(monkeypatch):
    """The kernel's scratch comes from an allocator of its own."""
    from triton.runtime import _allocation

    seen = []

    class Kernel:
        fn = hopper.hopper_forward.fn

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(_allocation._allocator.get()(512, 128, None))

    monkeypatch.setattr(hopper, "hopper_forward", Kernel())
    before = _allocation._allocator.get()
    layout = pack([(1, 2, 2)])
    run(*qkv_of(layout), layout, Full())
    (scratch,) = seen
    assert scratch.nbytes == 512 and scratch.device.type == DEVICE and _allocation._allocator.get() is before


def test_what_it_cannot_do_is_said():
    layout = pack([(2, 2, 2)])
    plain = qkv_of(layout, dim=64, dtype=torch.float16)
    q, k, v = plain
    assert hopper.unavailable(q, k, v, FrameCausal()) is None
    assert hopper.unavailable(*wider_heads(q, k, v), Full()) is None
    odd = torch.cat((k, k[..., :4]), dim=2)[..., :64]
    shifted = torch.cat((v.flatten(), v.flatten()))[4:].as_strided(v.shape, v.stride())
    for arguments, words in [
        ((q, k, v, Temporal()), "single sites"),
        ((q.float(), k.float(), v.float(), Full()), "got torch.float32"),
        ((q[..., :32], k[..., :32], v[..., :32], Full()), "head_dim 32"),
        ((q, odd, v, Full()), r"multiples of 16 bytes, got k with strides \(68, 68\)"),
        ((q, k, shifted, Full()), "multiples of 16 bytes, got v"),
        ((q, k[:1].expand(k.shape), v, Full()), r"got k with strides \(0, 64\)"),
        ((q, k, v, Full(), torch.zeros(1, dtype=torch.int32)), "does not read text_lengths"),
    ]:
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(hopper.unavailable(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_on_a_gpu(mask, dim, dtype):
    layout = pack([(17, 6, 7), (1, 16, 16), (3, 11, 13)], text=[7, 0, 130])
    check(layout, mask, config=hopper.default_config(dim), heads=4, kv_heads=2, dim=dim, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80)], ids=["32760 tokens", "75600 tokens"])
@pytest.mark.parametrize("mask", [FrameCausal(), Full(), Spatial(), FrameCausal(chunk=3, window=4, sink=1)], ids=str)
def test_real_sizes_on_a_gpu(mask, grid, dim):
    """Against the block kernel in float32."""
    layout = pack([grid])
    q, k, v = (torch.randn(layout.tokens, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = run(q, k, v, layout, mask, config=hopper.default_config(dim))
    wanted, wanted_lse = fused.attention_fused(q.float(), k.float(), v.float(), layout, mask, layout, dim**-0.5)
    assert_close(out, wanted.double(), torch.bfloat16)
    assert_close(lse, wanted_lse.double(), torch.float32)


@pytest.mark.gpu
def test_in_a_captured_graph():
    """The scratch of descriptors is the graph's; refilled, it serves another pack."""
    capacity = Capacity(3, 40, 4000)
    layout, other = pack([(9, 10, 20)], text=[77], capacity=capacity), pack([(3, 16, 20), (20, 7, 9)], text=[0, 9], capacity=capacity)
    mask = FrameCausal(chunk=2, window=2, sink=1)
    qkv = qkv_of(layout)
    run(*qkv, layout, mask)  # compiled and built before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(*qkv, layout, mask)
    for now in (None, other):
        if now is not None:
            layout.refill(now)
        graph.replay()
        wanted, wanted_lse = run(*qkv, now or layout, mask)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_the_op_takes_it_where_it_was_tuned(monkeypatch):
    """And the block kernel with the rule's settings where it cannot run, whose tuned ones are not known then."""
    chosen = Configs(SMALL, SMALL, SMALL, specialised=True)
    monkeypatch.setattr(fused, "configs_for", lambda q, mask: chosen)
    calls = []
    monkeypatch.setattr(hopper, "forward_hopper", lambda *arguments, f=hopper.forward_hopper: calls.append(arguments[-1]) or f(*arguments))
    layout = pack([(3, 2, 3)])
    for mask, wanted in ((FrameCausal(), [SMALL]), (Temporal(), [SMALL])):
        q, k, v = qkv_of(layout, dim=64, dtype=torch.float16)
        q.requires_grad_()
        out = attention(q, k, v, layout, mask, implementation="triton")
        assert_close(out.detach(), definition(q, k, v, layout, mask).detach(), torch.float16)
        out.sum().backward()
        assert calls == wanted and q.grad.isfinite().all()
