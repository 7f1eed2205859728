"""Attention over packs against its float64 definition; what a clip gives whatever it is packed with; what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close, relative_error
from tubelet.kernels import Capacity, FrameCausal, Full, Spatial, Temporal, VideoLayout, attention

IMPLEMENTATIONS = ["torch"]

MASKS = [
    Full(),
    Spatial(),
    Temporal(),
    Temporal(causal=False),
    Temporal(window=2),
    Temporal(causal=False, window=3),
    FrameCausal(),
    FrameCausal(chunk=3),
    FrameCausal(chunk=2, window=1),
    FrameCausal(chunk=2, window=2, sink=1),
    FrameCausal(chunk=1, window=2, sink=3),
]

EVERY_THIRD = [True, False, False] * 6
LAYOUTS = {
    "one token": {"grids": [(1, 1, 1)]},
    "one frame": {"grids": [(1, 5, 7)]},
    "one site": {"grids": [(9, 1, 1)]},
    "image beside video": {"grids": [(17, 3, 5), (1, 5, 7), (1, 1, 1)]},
    "odd sides": {"grids": [(3, 7, 1), (2, 1, 5), (5, 3, 3)]},
    "equal clips": {"grids": [(4, 3, 3)] * 3},
    "text last": {"grids": [(5, 2, 3), (1, 3, 3), (2, 2, 2)], "text": [3, 0, 17]},
    "text first": {"grids": [(5, 2, 3), (1, 3, 3), (2, 2, 2)], "text": [3, 0, 17], "text_first": True},
    "known": {"grids": [(17, 1, 3), (6, 2, 2), (1, 2, 2)], "known": [EVERY_THIRD[:17], [False] * 5 + [True], [True]]},
    # Frames of the second clip share keys in the order 1, 2, 3 of their number; those of the first meet 3 before 2.
    "known first": {"grids": [(3, 1, 1), (3, 1, 1), (1, 1, 1)], "known": [[False, False, True], None, None]},
    "known and text": {"grids": [(6, 2, 2), (4, 2, 2)], "known": [[True] * 6, [False, True, False, True]], "text": [2, 5]},
    "later frames": {"grids": [(5, 2, 2), (3, 2, 1)], "first_frames": [3, 40]},
    "capacity": {"grids": [(5, 2, 3), (2, 2, 2)], "text": [1, 4], "capacity": Capacity(clips=4, frames=9, tokens=60)},
}
# For what needs a pass backwards through the definition, or one call for each clip.
FEW_LAYOUTS = ["image beside video", "text first", "known and text", "capacity"]
FEW_MASKS = [Full(), Spatial(), Temporal(), Temporal(causal=False, window=3), FrameCausal(chunk=2, window=1, sink=1)]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv_of(layout, kv_layout=None, heads=2, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    kv_tokens = (kv_layout or layout).tokens
    q = randn(layout.tokens, heads, dim, dtype=dtype, seed=3 * seed)
    return q, *(randn(kv_tokens, kv_heads, dim, dtype=dtype, seed=3 * seed + i) for i in (1, 2))


def leaves(*tensors, dtype=None):
    return tuple(x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors)


def definition(q, k, v, layout, mask, kv_layout=None, scale=None):
    """softmax(scale q k^T) v with a dense matrix, in float64."""
    kv_layout = kv_layout or layout
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    allowed = mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])
    logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1).masked_fill(~allowed, 0)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_mask_and_layout(name, mask):
    layout = VideoLayout.pack(**LAYOUTS[name])
    q, k, v = qkv_of(layout)
    wanted = definition(q, k, v, layout, mask)
    assert_close(attention(q.double(), k.double(), v.double(), layout, mask, implementation="reference"), wanted, torch.float64)
    for implementation in IMPLEMENTATIONS:
        assert_close(attention(q, k, v, layout, mask, implementation=implementation), wanted, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_dtypes(mask, dtype, grad, implementation):
    """A CPU takes another path for half types that need gradients."""
    for name in FEW_LAYOUTS:
        layout = VideoLayout.pack(**LAYOUTS[name])
        q, k, v = qkv_of(layout, heads=4, kv_heads=2, dim=32, dtype=dtype)
        wanted = definition(q, k, v, layout, mask)
        q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
        assert_close(attention(q, k, v, layout, mask, implementation=implementation), wanted, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dim", [16, 32, 64, 72, 80, 88, 96, 112, 128])
def test_head_dims_and_grouped_heads(dim, heads, kv_heads, implementation):
    layout = VideoLayout.pack([(5, 3, 3), (1, 2, 5)], text=[3, 0])
    for mask in FEW_MASKS:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = qkv_of(layout, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
            assert_close(attention(q, k, v, layout, mask, implementation=implementation), definition(q, k, v, layout, mask), dtype)


def fused_by_part(q, k, v):
    """Views of one (tokens, 3, heads, dim) tensor."""
    return torch.stack((q, k, v), dim=1).unbind(1)


def fused_by_head(q, k, v):
    """Views of one (tokens, heads + 2 kv heads, dim) tensor."""
    return torch.cat((q, k, v), dim=1).split([q.shape[1], k.shape[1], v.shape[1]], dim=1)


def heads_first(q, k, v):
    """Transposed from (heads, tokens, dim)."""
    return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))


def wider_heads(q, k, v):
    """The first channels of wider heads: head stride over head_dim."""
    return tuple(torch.cat((x, x.new_full((*x.shape[:2], 8), torch.nan)), dim=2)[..., : x.shape[2]] for x in (q, k, v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("views", [fused_by_part, fused_by_head, heads_first, wider_heads])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(views, dtype, implementation):
    for name in ("equal clips", "image beside video", "text last"):
        layout = VideoLayout.pack(**LAYOUTS[name])
        for mask in FEW_MASKS:
            for grad in (False, True):
                plain = qkv_of(layout, heads=4, kv_heads=4 if views is fused_by_part else 2, dim=24, dtype=dtype)
                q, k, v = views(*(x.requires_grad_(grad) for x in plain))
                assert not q.is_contiguous()
                out = attention(q, k, v, layout, mask, implementation=implementation)
                assert_close(out, definition(*plain, layout, mask).detach(), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_frame_of_1560_tokens(implementation):
    layout = VideoLayout.pack([(2, 30, 52), (1, 1, 1)])
    for mask in (Spatial(), Temporal()):
        q, k, v = qkv_of(layout, heads=1, kv_heads=1)
        assert_close(attention(q, k, v, layout, mask, implementation=implementation), definition(q, k, v, layout, mask), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale(implementation):
    layout = VideoLayout.pack([(3, 2, 2)])
    q, k, v = qkv_of(layout)
    for scale in (1.0, 0.3, 0.0):
        out = attention(q, k, v, layout, Full(), scale=scale, implementation=implementation)
        assert_close(out, definition(q, k, v, layout, Full(), scale=scale), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_chunk_attends_to_a_cache(mask, implementation):
    """Frames 5 and 6 of one clip and frame 2 of another, all earlier frames being keys; some of them are known, some later."""
    layout = VideoLayout.pack([(2, 2, 3), (1, 3, 1)], first_frames=[5, 2])
    kv_layout = VideoLayout.pack([(9, 2, 3), (3, 3, 1)], known=[EVERY_THIRD[:9], None])
    q, k, v = qkv_of(layout, kv_layout)
    out = attention(q, k, v, layout, mask, kv_layout=kv_layout, implementation=implementation)
    assert_close(out, definition(q, k, v, layout, mask, kv_layout), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", [Spatial(), Temporal(), Temporal(causal=False), FrameCausal(chunk=2, window=2)], ids=str)
def test_frame_by_frame_gives_what_all_at_once_gives(mask, implementation):
    whole = VideoLayout.pack([(6, 2, 3)])
    q, k, v = qkv_of(whole)
    wanted = definition(q, k, v, whole, mask)
    for frame in range(6):
        part = VideoLayout.pack([(1, 2, 3)], first_frames=[frame])
        rows = slice(6 * frame, 6 * frame + 6)
        out = attention(q[rows], k, v, part, mask, kv_layout=whole, implementation=implementation)
        assert_close(out, wanted[rows], torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cross_attention(dtype, grad, mask, implementation):
    """Every mask lets every token see the text of its clip; a clip without text gets zeros."""
    layout = VideoLayout.pack([(5, 2, 3), (1, 3, 3), (2, 2, 2), (1, 1, 1), (5, 2, 3)], capacity=Capacity(6, 20, 100))
    text = VideoLayout.segments([5, 0, 16, 17, 7], capacity=Capacity(5, 0, 50))
    q, k, v = qkv_of(layout, text, dtype=dtype)
    wanted = definition(q, k, v, layout, mask, text)
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    out = attention(q, k, v, layout, mask, kv_layout=text, implementation=implementation)
    assert_close(out, wanted, dtype)
    empty = layout.clips[1]
    assert not out[empty.start : empty.stop].any() and not out[layout.used_tokens :].any()
    assert out[: empty.start].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_text_alone_attends_to_text_and_to_video(implementation):
    text, video = VideoLayout.segments([3, 0, 18]), VideoLayout.pack([(2, 2, 2), (1, 1, 1), (3, 1, 2)])
    for kv_layout in (text, video):
        q, k, v = qkv_of(text, kv_layout)
        for mask in FEW_MASKS:
            out = attention(q, k, v, text, mask, kv_layout=kv_layout, implementation=implementation)
            assert_close(out, definition(q, k, v, text, mask, kv_layout), torch.float32)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("mask", [Spatial(), Temporal(), FrameCausal()], ids=str)
def test_a_query_that_sees_nothing_gets_zeros(mask, implementation):
    """Frames 0, 1 and 2 ask; only frames 2 and 3 can answer."""
    layout, kv_layout = VideoLayout.pack([(3, 2, 2)]), VideoLayout.pack([(2, 2, 2)], first_frames=[2])
    q, k, v = leaves(*qkv_of(layout, kv_layout))
    out = attention(q, k, v, layout, mask, kv_layout=kv_layout, implementation=implementation)
    assert not out[:8].any() and out[8:].all()
    out.sum().backward()
    assert not q.grad[:8].any() and not k.grad[4:].any() and v.grad[:4].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim", [(2, 2, 16), (4, 2, 24)])
def test_gradients(mask, dtype, heads, kv_heads, dim, implementation):
    for name in FEW_LAYOUTS:
        layout = VideoLayout.pack(**LAYOUTS[name])
        check_gradients(qkv_of(layout, None, heads, kv_heads, dim, dtype), layout, mask, None, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_cross_attention_and_of_a_cache(dtype, implementation):
    layout, text = VideoLayout.pack([(5, 2, 3), (1, 3, 3), (2, 2, 2)]), VideoLayout.segments([5, 0, 18])
    check_gradients(qkv_of(layout, text, dtype=dtype), layout, Full(), text, implementation)
    layout, cache = VideoLayout.pack([(2, 2, 2)], first_frames=[4]), VideoLayout.pack([(6, 2, 2)])
    for mask in FEW_MASKS:
        check_gradients(qkv_of(layout, cache, dtype=dtype), layout, mask, cache, implementation)


def check_gradients(qkv, layout, mask, kv_layout, implementation):
    """Against autograd through the reference, for one random direction of the output."""
    dtype = qkv[0].dtype
    mine, wanted = leaves(*qkv), leaves(*qkv, dtype=torch.float64)
    # Views of one tensor, as a fused projection gives them, where the shapes allow it.
    inputs = fused_by_head(*mine) if kv_layout is None else mine
    direction = randn(*qkv[0].shape, dtype=dtype, seed=9)
    attention(*inputs, layout, mask, kv_layout=kv_layout, implementation=implementation).backward(direction)
    definition(*wanted, layout, mask, kv_layout).backward(direction.double())
    for actual, reference in zip(mine, wanted, strict=True):
        assert_close(actual.grad, reference.grad, dtype)


def test_gradients_of_the_reference():
    """The reference is an implementation that users can ask for; autograd through it is exact too."""
    layout = VideoLayout.pack([(3, 2, 1), (1, 1, 1)], text=[1, 0], known=[[False, False, True], None])
    for mask in FEW_MASKS:
        check_gradients(qkv_of(layout, heads=2, kv_heads=1, dtype=torch.float64), layout, mask, None, "reference")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_expression(mask, grad, implementation):
    layout = VideoLayout.pack([(9, 3, 5), (1, 5, 7)])
    q, k, v = qkv_of(layout, dim=64, dtype=torch.bfloat16)
    wanted = definition(q, k, v, layout, mask)
    allowed = mask.allowed(layout.coordinates[:, None], layout.coordinates[None, :])
    logits = torch.einsum("qhd,khd->hqk", q, k) * 64**-0.5
    plain = torch.einsum("hqk,khd->qhd", logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1), v)
    out = attention(*(x.requires_grad_(grad) for x in (q, k, v)), layout, mask, implementation=implementation)
    error, allowed = relative_error(out, wanted), relative_error(plain, wanted)
    assert error.norm <= 2 * allowed.norm and error.largest <= 2 * allowed.largest


# Layouts and masks as they come.


@st.composite
def packs(draw, min_clips=1):
    """The arguments of `VideoLayout.pack`."""
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)), min_size=min_clips, max_size=4))
    known = [draw(st.none() | st.lists(st.booleans(), min_size=grid[0], max_size=grid[0])) for grid in grids]
    return {
        "grids": grids,
        "text": draw(st.none() | st.lists(st.integers(0, 5), min_size=len(grids), max_size=len(grids))),
        "text_first": draw(st.booleans()),
        "known": draw(st.none() | st.just(known)),
        "first_frames": draw(st.none() | st.lists(st.integers(0, 4), min_size=len(grids), max_size=len(grids))),
    }


def masks():
    return st.one_of(
        st.just(Full()),
        st.just(Spatial()),
        st.builds(Temporal, causal=st.booleans(), window=st.none() | st.integers(1, 4)),
        st.builds(FrameCausal, chunk=st.integers(1, 4), window=st.none() | st.integers(1, 3), sink=st.integers(0, 3)),
    )


HEADS = st.sampled_from([(1, 1, 16), (2, 2, 8), (4, 2, 24), (3, 1, 40)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=80, deadline=None)
@given(pack=packs(), mask=masks(), heads=HEADS, dtype=st.sampled_from(list(TOLERANCE)), grad=st.booleans(), spare=st.integers(0, 5))
def test_drawn_packs(implementation, pack, mask, heads, dtype, grad, spare):
    tokens = VideoLayout.pack(**pack).tokens
    layout = VideoLayout.pack(**pack, capacity=Capacity(clips=4, frames=24, tokens=tokens + spare) if spare else None)
    q, k, v = qkv_of(layout, None, *heads, dtype=dtype)
    wanted = definition(q, k, v, layout, mask)
    out = attention(*(x.requires_grad_(grad) for x in (q, k, v)), layout, mask, implementation=implementation)
    assert_close(out, wanted, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    pack=packs(),
    mask=masks(),
    frames=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    lengths=st.lists(st.integers(0, 20), min_size=4, max_size=4),
)
def test_drawn_keys(implementation, pack, mask, frames, lengths):
    """Other frames of the same sites, and text alone."""
    layout = VideoLayout.pack(**pack)
    grids = [(more, *grid[1:]) for more, grid in zip(frames, pack["grids"], strict=False)]
    for kv_layout in (VideoLayout.pack(grids, text=[n // 4 for n in lengths[: len(grids)]]), VideoLayout.segments(lengths[: len(grids)])):
        q, k, v = qkv_of(layout, kv_layout)
        out = attention(q, k, v, layout, mask, kv_layout=kv_layout, implementation=implementation)
        assert_close(out, definition(q, k, v, layout, mask, kv_layout), torch.float32)


# Batch invariance: bit for bit.


def alone(pack, i):
    """The arguments of a pack of clip i alone."""
    return {name: values if isinstance(values, bool) or values is None else values[i : i + 1] for name, values in pack.items()}


def check_alone(implementation, pack, mask, qkv, lengths=None, backwards=True):
    """Each clip gives alone what it gives in the pack, within the last bits of rounding; backwards too."""
    layout = VideoLayout.pack(**pack)
    text = None if lengths is None else VideoLayout.segments(lengths)
    direction = randn(*qkv[0].shape, seed=9)
    whole = leaves(*qkv)
    out = attention(*whole, layout, mask, kv_layout=text, implementation=implementation)
    out.backward(direction)
    with torch.no_grad():
        assert torch.equal(attention(*qkv, layout, mask, kv_layout=text, implementation=implementation), out)
    for i, clip in enumerate(layout.clips):
        rows = slice(clip.start, clip.stop)
        kv_clip = clip if text is None else text.clips[i]
        kv_rows = slice(kv_clip.start, kv_clip.stop)
        one = leaves(qkv[0][rows], qkv[1][kv_rows], qkv[2][kv_rows])
        single = attention(
            *one,
            VideoLayout.pack(**alone(pack, i)),
            mask,
            kv_layout=None if text is None else VideoLayout.segments(lengths[i : i + 1]),
            implementation=implementation,
        )
        # The library's matrix products may round by where in memory their operands lie: the last bit, now and then.
        torch.testing.assert_close(single, out[rows], atol=1e-6, rtol=1e-6, msg=f"clip {i} of {layout!r}")
        if not backwards:
            continue
        if single.requires_grad:  # it depends on nothing where there is nothing to see
            single.backward(direction[rows])
        for part, all_of_it, here in zip(one, whole, (rows, kv_rows, kv_rows), strict=True):
            grad = torch.zeros_like(part) if part.grad is None else part.grad
            # Within rounding: with several threads the library adds the gradients of a shared key in no fixed order.
            torch.testing.assert_close(grad, all_of_it.grad[here], atol=1e-5, rtol=1e-5, msg=f"a gradient of clip {i} of {layout!r}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "capacity"])
def test_a_clip_alone_and_in_a_pack(name, mask, implementation):
    pack = LAYOUTS[name]
    check_alone(implementation, pack, mask, qkv_of(VideoLayout.pack(**pack), heads=4, kv_heads=2, dim=24))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_a_clip_alone_and_in_a_pack_of_larger_clips(mask, implementation):
    """Long enough that the library splits queries and keys into several tiles.

    Forwards alone: the library's sum of the gradients of a shared key has no fixed order where several threads do it.
    """
    pack = {"grids": [(3, 16, 14), (1, 16, 14), (8, 5, 5), (3, 16, 14)]}
    check_alone(implementation, pack, mask, qkv_of(VideoLayout.pack(**pack), dim=64), backwards=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(pack=packs(min_clips=2), mask=masks(), heads=HEADS)
def test_a_clip_alone_and_in_a_drawn_pack(implementation, pack, mask, heads):
    check_alone(implementation, pack, mask, qkv_of(VideoLayout.pack(**pack), None, *heads))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_alone_and_in_a_pack(implementation):
    pack, lengths = {"grids": [(5, 2, 3), (1, 3, 3), (5, 2, 3), (1, 1, 1), (5, 2, 3)]}, [5, 0, 16, 17, 7]
    layout, text = VideoLayout.pack(**pack), VideoLayout.segments(lengths)
    check_alone(implementation, pack, Full(), qkv_of(layout, text, heads=4, kv_heads=2, dim=24), lengths)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_a_poisoned_clip_leaves_its_neighbours_untouched(mask, poison, implementation):
    """Also where it shares a batch with them, as clips of equal size do; forwards and backwards."""
    layout = VideoLayout.pack([(3, 2, 3), (3, 2, 3), (1, 2, 3), (3, 2, 3)], text=[2, 2, 0, 2])
    text = VideoLayout.segments([4, 6, 2, 5])
    for kv_layout in (layout, text):
        clean, bad = qkv_of(layout, kv_layout), qkv_of(layout, kv_layout)
        for x, clips in zip(bad, (layout.clips, kv_layout.clips, kv_layout.clips), strict=True):
            x[clips[1].start : clips[1].stop] = poison
        clean, bad = leaves(*clean), leaves(*bad)
        outs = [attention(*qkv, layout, mask, kv_layout=kv_layout, implementation=implementation) for qkv in (clean, bad)]
        for out in outs:
            out.backward(randn(*out.shape, seed=9))
        for good, spoiled in zip((outs[0], *(x.grad for x in clean)), (outs[1], *(x.grad for x in bad)), strict=True):
            others = torch.ones(len(good), dtype=torch.bool)
            where = layout if len(good) == layout.tokens else text
            others[where.clips[1].start : where.clips[1].stop] = False
            assert torch.equal(good[others], spoiled[others])
        assert outs[1][layout.clips[1].start : layout.clips[1].stop].isnan().all()


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_past_the_end_of_a_capacity(mask, implementation):
    """NaN there reaches nothing, and zeros come out."""
    pack = {"grids": [(3, 2, 3), (1, 2, 2)], "text": [2, 0]}
    exact, roomy = VideoLayout.pack(**pack), VideoLayout.pack(**pack, capacity=Capacity(clips=5, frames=9, tokens=40))
    used = exact.tokens
    qkv = qkv_of(exact)
    padded = [torch.cat((x, x.new_full((40 - used, *x.shape[1:]), torch.nan))) for x in qkv]
    mine, padded = leaves(*qkv), leaves(*padded)
    wanted = attention(*mine, exact, mask, implementation=implementation)
    out = attention(*padded, roomy, mask, implementation=implementation)
    assert torch.equal(out[:used], wanted) and out.shape[0] == 40 and not out[used:].any()
    wanted.backward(randn(*wanted.shape, seed=9))
    out.backward(randn(*out.shape, seed=9).index_copy(0, torch.arange(used), randn(*wanted.shape, seed=9)))
    for x, y in zip(mine, padded, strict=True):
        assert torch.equal(x.grad, y.grad[:used]) and not y.grad[used:].any()


def test_the_reference_keeps_what_is_invisible_out():
    """A NaN in a later frame does not reach an earlier one, not even as 0 * NaN."""
    layout = VideoLayout.pack([(3, 1, 2)])
    q, k, v = qkv_of(layout)
    wanted = attention(q, k, v, layout, FrameCausal(), implementation="reference")
    k[4:], v[4:] = torch.nan, torch.nan
    assert torch.equal(attention(q, k, v, layout, FrameCausal(), implementation="reference")[:4], wanted[:4])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_an_empty_pack(implementation):
    layout, nothing = VideoLayout.pack([]), torch.empty(0, 2, 8)
    assert attention(nothing, nothing, nothing, layout, Full(), implementation=implementation).shape == (0, 2, 8)


# What is refused.


def test_refused():
    layout = VideoLayout.pack([(2, 2, 2)])
    q, k, v = qkv_of(layout, heads=4, kv_heads=2)
    text = VideoLayout.segments([1, 2])
    other = VideoLayout.pack([(2, 4, 1)])
    cases = [
        ((q, k, v, layout, "full"), {}, TypeError, "mask: expected Full, Spatial, Temporal or FrameCausal, got str"),
        ((q, k, v, layout, Full), {}, TypeError, "mask: expected Full, Spatial, Temporal or FrameCausal, got type"),
        ((q, k, v, None, Full()), {}, TypeError, "layout: expected a VideoLayout, got NoneType"),
        ((q, k, v, layout, Full()), {"kv_layout": [8]}, TypeError, "kv_layout: expected a VideoLayout, got list"),
        ((q.numpy(), k, v, layout, Full()), {}, TypeError, "q: expected a tensor, got ndarray"),
        ((q[0], k, v, layout, Full()), {}, ValueError, r"q: expected \(tokens, heads, head_dim\), got shape \(4, 16\)"),
        ((q[:7], k, v, layout, Full()), {}, ValueError, r"q: expected 8 tokens as in its layout, got shape \(7, 4, 16\)"),
        ((q, k, v[:3], layout, Full()), {}, ValueError, r"v: expected 8 tokens as in its layout, got shape \(3, 2, 16\)"),
        (
            (q, k.double(), v, layout, Full()),
            {},
            TypeError,
            r"k: expected .* the same for q, k and v, got torch.float64 \(q is torch.float32\)",
        ),
        (
            (q.int(), k, v, layout, Full()),
            {},
            TypeError,
            r"q: expected float16, .* or float64 \(float8_e4m3fn needs scales\), .* got torch.int32",
        ),
        ((q, k, v.to("meta"), layout, Full()), {}, ValueError, "v: expected q, k, v and their layouts on one device, got meta"),
        ((q, k, v, layout.to("meta"), Full()), {}, ValueError, "q: expected .* on one device, got cpu .*layout on meta"),
        (
            (q[..., ::2], k[..., ::2], v[..., ::2], layout, Full()),
            {},
            ValueError,
            r"q: expected a unit stride in head_dim, got strides \(64, 16, 2\)",
        ),
        ((q, k[..., :8], v, layout, Full()), {}, ValueError, "head_dim: expected one for q, k and v, got 16, 8, 16"),
        ((q, k, v[:, :1], layout, Full()), {}, ValueError, "k, v: expected equal numbers of heads that divide q's 4, got 2 and 1"),
        ((q[:, :3], k, v, layout, Full()), {}, ValueError, "k, v: expected equal numbers of heads that divide q's 3, got 2 and 2"),
        ((q, k[:3], v[:3], layout, Full()), {"kv_layout": text}, ValueError, "kv_layout: expected 1 clips as in layout, got 2"),
        (
            (q, k, v, layout, Temporal()),
            {"kv_layout": other},
            ValueError,
            r"kv_layout: Temporal needs clip 0 on one \(H, W\) grid, got \(2, 2\) and \(4, 1\)",
        ),
        ((q, k, v, layout, Full()), {"scale": float("inf")}, ValueError, "scale: expected a finite number, not below zero, got inf"),
        ((q, k, v, layout, Full()), {"scale": -1.0}, ValueError, "scale: expected a finite number, not below zero, got -1.0"),
    ]
    for arguments, options, error, words in cases:
        with pytest.raises(error, match=words):
            attention(*arguments, **options)


def test_grids_may_differ_where_sites_do_not_matter():
    layout, other = VideoLayout.pack([(2, 2, 2)]), VideoLayout.pack([(2, 4, 1)])
    q, k, v = qkv_of(layout, other)
    for mask in (Full(), Spatial(), FrameCausal()):
        assert_close(attention(q, k, v, layout, mask, kv_layout=other), definition(q, k, v, layout, mask, other), torch.float32)


# The yardstick itself.


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_spoiled_result_never_passes(dtype, spoil):
    right = randn(50, 50, dtype=torch.float64)
    wrong = right.to(dtype, copy=True)
    assert_close(wrong, right.to(dtype).double(), dtype)
    wrong[7, 7] += spoil
    with pytest.raises(AssertionError):
        assert_close(wrong, right, dtype)
    with pytest.raises(AssertionError):
        assert_close(right.to(dtype), wrong.double(), dtype)


def test_zeros_are_met_by_zeros_alone():
    assert_close(torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0, 1e-30]), torch.zeros(2, dtype=torch.float64), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.float32)
