"""The block kernel against the float64 definition: interpreted on a CPU, compiled on a GPU (-m gpu, with bfloat16 and real sizes).

Tiles are as small as they can be where the interpreter runs them, so that small clips have whole tiles, edges and several of each.
"""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import test_attention as attention_tests
import torch
from hypothesis import given, settings
from test_attention import (
    EVERY_THIRD,
    FEW_LAYOUTS,
    FEW_MASKS,
    LAYOUTS,
    MASKS,
    alone,
    definition,
    fused_by_head,
    fused_by_part,
    heads_first,
    leaves,
    masks,
    packs,
    randn,
    wider_heads,
)
from tolerance import TOLERANCE, assert_close
from tubelet.kernels import Capacity, FrameCausal, Full, Spatial, Temporal, VideoLayout, attention, engaged, reset_engaged

block = pytest.importorskip("tubelet.kernels.attention.block", reason="triton is not installed")
fused = pytest.importorskip("tubelet.kernels.attention.fused")
temporal = pytest.importorskip("tubelet.kernels.attention.temporal")
attention_configs = pytest.importorskip("tubelet.kernels.attention.configs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

SMALL = attention_configs.Configs(*[attention_configs.Config(16, 16, 4, 1)] * 3)
UNEVEN = attention_configs.Configs(
    attention_configs.Config(32, 16, 4, 1), attention_configs.Config(16, 32, 4, 1), attention_configs.Config(32, 16, 4, 1)
)


def pack(grids, **options):
    return VideoLayout.pack(grids, device=DEVICE, **options)


def segments(lengths, **options):
    return VideoLayout.segments(lengths, device=DEVICE, **options)


def qkv_of(*args, **options):
    return tuple(x.to(DEVICE) for x in attention_tests.qkv_of(*args, **options))


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with tiles_of(SMALL):
        yield


def tiles_of(configs):
    return mock.patch.object(fused, "configs_for", lambda q, mask: configs)


def run(q, k, v, layout, mask, kv_layout=None):
    return attention(q, k, v, layout, mask, kv_layout=kv_layout, return_lse=True, implementation="triton")


def check(layout, mask, kv_layout=None, backward=False, dtype=torch.float32, views=lambda *qkv: qkv, **shape):
    plain = leaves(*qkv_of(layout, kv_layout, dtype=dtype, **{"heads": 2, "kv_heads": 1} | shape))
    out, _ = run(*views(*plain), layout, mask, kv_layout)
    assert_close(out, definition(*plain, layout, mask, kv_layout).detach(), dtype)
    if not backward:
        return
    direction = randn(*out.shape, dtype=dtype, seed=9).to(DEVICE)
    out.backward(direction)
    exact = leaves(*plain, dtype=torch.float64)
    definition(*exact, layout, mask, kv_layout).backward(direction.double())
    for ours, theirs in zip(plain, exact, strict=True):
        # A query that sees one key has a gradient of zero, of which a product in lower precision leaves its rounding.
        if theirs.grad.abs().max() > 1e-6:
            assert_close(ours.grad, theirs.grad, dtype)
        else:
            assert ours.grad.abs().max() < (2e-6 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name in LAYOUTS for mask in (FEW_MASKS if name == "image beside video" else MASKS)],  # the largest
    ids=str,
)
def test_every_mask_and_layout(name, mask):
    check(pack(**LAYOUTS[name]), mask)


BACKWARD_MASKS = [*FEW_MASKS, FrameCausal(chunk=2, window=2, sink=1), Temporal(window=2)]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name in (*FEW_LAYOUTS[1:], "known first", "later frames")
        for mask in (FEW_MASKS[::2] if name == "text first" and DEVICE == "cpu" else BACKWARD_MASKS)  # the largest
    ],
    ids=str,
)
def test_backward(name, mask):
    check(pack(**LAYOUTS[name]), mask, backward=True)


@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_uneven_tiles(mask):
    """Frames of 21 tokens fall on no boundary of a tile; some tiles hold several frames, some frames several tiles."""
    with tiles_of(UNEVEN):
        check(pack([(4, 3, 7), (1, 6, 7), (9, 1, 2)]), mask, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 80, 88, 96, 112, 128, 160, 256])
def test_head_dims(dim, dtype):
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), FrameCausal(), backward=True, dtype=dtype, dim=dim)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (3, 1)])
def test_grouped_heads(heads, kv_heads):
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), FrameCausal(), backward=True, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("views", [fused_by_part, fused_by_head, heads_first, wider_heads])
@pytest.mark.parametrize("mask", [Spatial(), Temporal()], ids=str)
def test_strides(views, mask):
    heads = {"heads": 2, "kv_heads": 2}
    check(pack([(3, 3, 3), (1, 2, 5)], text=[3, 0]), mask, backward=True, views=views, dim=24, **heads)


@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_cross_attention(mask):
    layout = pack([(5, 2, 3), (1, 3, 3), (2, 2, 2), (1, 1, 1)], capacity=Capacity(6, 20, 70))
    check(layout, mask, segments([5, 0, 16, 17], capacity=Capacity(4, 0, 50)), backward=True)


@pytest.mark.parametrize("mask", [*MASKS, FrameCausal(chunk=3, window=1)], ids=str)
def test_a_chunk_attends_to_a_cache(mask):
    layout = pack([(2, 2, 3), (1, 3, 1)], first_frames=[5, 2])
    check(layout, mask, pack([(9, 2, 3), (3, 3, 1)], known=[EVERY_THIRD[:9], None]), backward=True)


@pytest.mark.parametrize("mask", [FrameCausal(chunk=3, window=2), FrameCausal(chunk=2, window=1, sink=1)], ids=str)
def test_frames_may_count_from_below_zero(mask):
    check(pack([(7, 2, 3)], first_frames=[-4]), mask, backward=True)


@settings(max_examples=10 if DEVICE == "cuda" else 5, deadline=None)
@given(drawn=packs(), mask=masks())
def test_drawn_packs(drawn, mask):
    check(pack(**drawn), mask, backward=True)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name in ("odd sides", "text first", "known and text")
        for mask in (FEW_MASKS[::2] if name == "text first" and DEVICE == "cpu" else FEW_MASKS)
    ],
    ids=str,
)
def test_a_clip_alone_and_in_a_pack(name, mask):
    """Bit for bit, forwards and backwards."""
    drawn = LAYOUTS[name]
    layout = pack(**drawn)
    qkv = qkv_of(layout, heads=2, kv_heads=1)
    direction = randn(*qkv[0].shape, seed=9).to(DEVICE)
    whole = leaves(*qkv)
    out, lse = run(*whole, layout, mask)
    out.backward(direction)
    for i, clip in enumerate(layout.clips):
        rows = slice(clip.start, clip.stop)
        one = leaves(*(x[rows] for x in qkv))
        single, single_lse = run(*one, pack(**alone(drawn, i)), mask)
        single.backward(direction[rows])
        assert torch.equal(single, out[rows]) and torch.equal(single_lse, lse[:, rows])
        for part, all_of_it in zip(one, whole, strict=True):
            assert torch.equal(part.grad, all_of_it.grad[rows])


@pytest.mark.parametrize(
    ("poison", "mask"),
    [(poison, mask) for poison in (float("nan"), float("inf")) for mask in FEW_MASKS[:: 2 if poison == float("inf") else 1]],
    ids=str,
)
def test_a_poisoned_clip_leaves_its_neighbours_untouched(poison, mask):
    layout = pack([(3, 2, 3), (3, 2, 3), (1, 2, 3)], text=[2, 2, 0])
    clean = leaves(*qkv_of(layout, heads=2, kv_heads=1))
    sick = [x.detach().clone() for x in clean]
    clip = layout.clips[1]
    for x in sick:
        x[clip.start : clip.stop] = poison
    sick = leaves(*sick)
    others = torch.ones(layout.tokens, dtype=torch.bool, device=DEVICE)
    others[clip.start : clip.stop] = False
    outs = []
    for qkv in (clean, sick):
        out, _ = run(*qkv, layout, mask)
        out.backward(torch.ones_like(out))
        outs.append(out)
    assert torch.equal(outs[0][others], outs[1][others]) and outs[1][~others].isnan().all()
    for a, b in zip(clean, sick, strict=True):
        assert torch.equal(a.grad[others], b.grad[others])


def test_log_sum_exp_and_rows_that_see_nothing():
    layout = pack([(2, 2, 3), (1, 3, 3)], capacity=Capacity(2, 3, 30))
    text = segments([5, 0])
    q, k, v = qkv_of(layout, text)
    out, lse = run(q, k, v, layout, Full(), text)
    logits = torch.einsum("qhd,khd->hqk", q[:12].double(), k[:5].double()) * q.shape[2] ** -0.5
    assert_close(lse[:, :12], logits.logsumexp(dim=2), torch.float32)
    assert lse[:, 12:].isneginf().all() and not out[12:].any()


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_scale(scale):
    """Zero weighs equally what is seen, and hides the rest still."""
    layout = pack([(3, 2, 3)])
    q, k, v = leaves(*qkv_of(layout))
    out = attention(q, k, v, layout, FrameCausal(), scale=scale, implementation="triton")
    assert_close(out, definition(q, k, v, layout, FrameCausal(), scale=scale).detach(), q.dtype)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


class Recorder:
    """In place of a kernel: keeps its launches instead of making them."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(partial(self.kernel[grid], *arguments, **options))


PACKS = [
    {"grids": [(5, 2, 3), (2, 2, 2)], "text": [1, 4]},
    {"grids": [(1, 2, 2)], "text": [0]},
    {"grids": [(2, 3, 3), (3, 2, 1), (1, 1, 1)], "text": [0, 3, 0], "known": [[True, False], None, None]},
]


@pytest.mark.parametrize("mask", [Temporal(), FrameCausal(chunk=2, window=2), *(FEW_MASKS[:2] if DEVICE == "cuda" else [])], ids=str)
def test_replay_with_other_lengths(mask):
    """The launches of calls, forwards and backwards, made again as they were once the layouts have been refilled: as a CUDA graph does."""
    capacities = Capacity(clips=4, frames=9, tokens=60), Capacity(clips=4, frames=0, tokens=20)
    layout, words = pack(**PACKS[0], capacity=capacities[0]), segments([3, 5], capacity=capacities[1])
    launches = []
    names = ("block_forward", "block_backward_queries", "block_backward_keys"), ("temporal_forward", "temporal_backward")
    kernels, others = (
        {name: Recorder(getattr(module, name), launches) for name in each} for module, each in zip((block, temporal), names, strict=True)
    )
    qkv, across = qkv_of(layout, heads=2, kv_heads=1), qkv_of(layout, words, heads=2, kv_heads=1)
    directions = torch.empty_like(qkv[0]), torch.empty_like(qkv[0])
    graph = torch.cuda.CUDAGraph() if DEVICE == "cuda" else None
    scale = 0.25
    if graph:  # compiled before the capture
        fused.attention_fused_backward(
            directions[0], *qkv, *fused.attention_fused(*qkv, layout, mask, layout, scale), layout, mask, layout, scale
        )
        fused.attention_fused_backward(
            directions[1], *across, *fused.attention_fused(*across, layout, Full(), words, scale), layout, Full(), words, scale
        )
    recording = mock.patch.multiple(block, **kernels), mock.patch.multiple(temporal, **others)
    with torch.cuda.graph(graph) if graph else recording[0], nullcontext() if graph else recording[1]:
        results = []
        for x, direction, rule, where in ((qkv, directions[0], mask, layout), (across, directions[1], Full(), words)):
            out, lse = fused.attention_fused(*x, layout, rule, where, scale)
            results.append((out, lse, *fused.attention_fused_backward(direction, *x, out, lse, layout, rule, where, scale)))
    for i, new in enumerate([*PACKS[1:], PACKS[0]]):
        lengths = [3 + i, 2, 7][: len(new["grids"])]
        layout.refill(pack(**new, capacity=capacities[0]))
        words.refill(segments(lengths, capacity=capacities[1]))
        for x in (*qkv, *across, *directions):
            x.copy_(randn(*x.shape, seed=i))
        if graph:
            graph.replay()
        else:
            for launch in launches:
                launch()
        exact, few = pack(**new), segments(lengths)
        for x, direction, rule, where, found in (
            (qkv, directions[0], mask, exact, results[0]),
            (across, directions[1], Full(), few, results[1]),
        ):
            q, k, v = (each[: lay.tokens] for each, lay in zip(x, (exact, where, where), strict=True))
            out, lse = fused.attention_fused(q, k, v, exact, rule, where, scale)
            grads = fused.attention_fused_backward(direction[: exact.tokens], q, k, v, out, lse, exact, rule, where, scale)
            for a, b in zip(found, (out, lse, *grads), strict=True):
                a = a[:, : exact.tokens] if a is found[1] else a[: len(b)]
                assert torch.equal(a, b)


def test_the_public_op_runs_it_when_asked():
    reset_engaged()
    layout = pack([(3, 2, 3)])
    q, k, v = qkv_of(layout, dim=72)
    assert_close(attention(q, k, v, layout, FrameCausal(), implementation="triton"), definition(q, k, v, layout, FrameCausal()), q.dtype)
    assert engaged()["attention"]["triton"].calls == 1


@pytest.mark.parametrize(("dtype", "dim", "words"), [(torch.float64, 16, "float64"), (torch.float32, 264, "head_dim 264 is above 256")])
def test_what_it_cannot_do_is_said(dtype, dim, words):
    layout = pack([(1, 2, 2)])
    with pytest.raises(ValueError, match=f"cannot run as 'triton': .*{words}"):
        attention(*qkv_of(layout, dim=dim, dtype=dtype), layout, Full(), implementation="triton")


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (8, (16, 0, 0)),
        (40, (32, 16, 0)),
        (64, (64, 0, 0)),
        (72, (64, 16, 0)),
        (88, (64, 32, 0)),
        (112, (64, 32, 16)),
        (120, (128, 0, 0)),
        (256, (256, 0, 0)),
    ],
)
def test_head_dims_are_split(dim, parts):
    assert attention_configs.split_head_dim(dim) == parts


# Without the small tiles: as it is launched.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 96, 128, 256])
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_on_a_gpu(mask, dim, dtype):
    layout = pack([(17, 6, 7), (1, 16, 16), (3, 11, 13)], text=[7, 0, 130])
    q, k, v = (x.requires_grad_() for x in qkv_of(layout, heads=4, kv_heads=2, dim=dim, dtype=dtype))
    direction = randn(*q.shape, dtype=dtype, seed=9).cuda()
    with tiles_of(attention_configs.default_configs(dim, dtype, **attention_configs.limits(q.device))):
        out = attention(q, k, v, layout, mask, implementation="triton")
        out.backward(direction)
    exact = leaves(q, k, v, dtype=torch.float64)
    wanted = definition(*exact, layout, mask)
    wanted.backward(direction.double())
    assert_close(out, wanted.detach(), dtype)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert_close(ours.grad, theirs.grad, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80)], ids=["32760 tokens", "75600 tokens"])
@pytest.mark.parametrize("mask", [FrameCausal(), Full(), Spatial(), FrameCausal(chunk=3, window=4, sink=1)], ids=str)
def test_real_sizes_on_a_gpu(mask, grid):
    """Against SDPA in float32, frame by frame."""
    layout = pack([grid])
    q, k, v = (torch.randn(layout.tokens, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with tiles_of(attention_configs.default_configs(128, torch.bfloat16, **attention_configs.limits(q.device))):
        out = attention(q, k, v, layout, mask, implementation="triton").unflatten(0, (grid[0], -1))
    keys, values = (x.float().unflatten(0, (grid[0], -1)) for x in (k, v))
    for t in range(grid[0]):
        seen = [u for u in range(grid[0]) if mask.rule(t, u, False)]
        query = q.float().unflatten(0, (grid[0], -1))[t].transpose(0, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, *(x[seen].flatten(0, 1).transpose(0, 1) for x in (keys, values))
        ).transpose(0, 1)
        assert_close(out[t], wanted.double(), torch.bfloat16)
