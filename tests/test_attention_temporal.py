"""The kernel for short sequences against the float64 definition, where test_attention_block.py does not take it: mixed lengths, single
frames, the border between its tiles and those of the block kernel; interpreted on a CPU, compiled on a GPU (-m gpu).
"""

import pytest
import test_attention as attention_tests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import EVERY_THIRD, LAYOUTS, definition, fused_by_part, leaves, randn
from tolerance import assert_close
from tubelet.engine import DiTConfig, VideoDiT
from tubelet.kernels import Capacity, NormRope, Temporal, VideoLayout, attention, dispatch, engaged, reset_engaged, rotary_table
from tubelet.kernels.rotary import norm_rope_reference

temporal = pytest.importorskip("tubelet.kernels.attention.temporal", reason="triton is not installed")
schedule = pytest.importorskip("tubelet.kernels.attention.schedule")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


@pytest.fixture(autouse=True, scope="module")
def all_tiles():
    """Compiled, tiles of float32 would spill; interpreted, they are what shows the sums best."""
    sizes = temporal.sizes

    def sizes_of_half(head_dim, dtype, *options):
        return sizes(head_dim, torch.float16, *options)

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(temporal, "sizes", sizes_of_half)
        yield


MASKS = [Temporal(), Temporal(causal=False), Temporal(window=3), Temporal(causal=False, window=2)]


LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 129]))


def pack(grids, **options):
    return VideoLayout.pack(grids, device=DEVICE, **options)


def qkv_of(*args, **options):
    return tuple(x.to(DEVICE) for x in attention_tests.qkv_of(*args, **options))


def check(layout, mask, kv_layout=None, dtype=torch.float32, views=lambda *qkv: qkv, **shape):
    plain = leaves(*qkv_of(layout, kv_layout, dtype=dtype, **{"heads": 2, "kv_heads": 1} | shape))
    out, lse = attention(*views(*plain), layout, mask, kv_layout=kv_layout, return_lse=True, implementation="triton")
    exact = leaves(*plain, dtype=torch.float64)
    wanted = definition(*exact, layout, mask, kv_layout)
    assert_close(out, wanted.detach(), dtype)
    assert lse.isneginf().equal(~mask.allowed(layout.coordinates[:, None], (kv_layout or layout).coordinates).any(dim=1).expand_as(lse))
    direction = randn(*out.shape, dtype=dtype, seed=9).to(DEVICE)
    out.backward(direction)
    wanted.backward(direction.double())
    for ours, theirs in zip(plain, exact, strict=True):
        if theirs.grad.abs().max() > 1e-6:
            assert_close(ours.grad, theirs.grad, dtype)
        else:
            assert ours.grad.abs().max() < 1e-6


@pytest.mark.parametrize("mask", [Temporal(window=30)], ids=str)
def test_lengths_from_1_to_128_and_beyond_in_one_pack(mask):
    lengths = (1, 2, 3, 7, 8, 16, 21, 22, 31, 32, 33, 63, 64, 65, 100, 128, 129)
    check(pack([(t, 1, 2 + t % 2) for t in lengths]), mask)


@pytest.mark.parametrize("known", [None, [[*EVERY_THIRD, *EVERY_THIRD, True], None, [True]]], ids=["nothing known", "known"])
def test_with_text(known):
    """Which every frame sees, and which sees every frame, of clips that are short, that are not and that are between the two kernels."""
    check(pack([(37, 1, 2), (70, 1, 1), (1, 3, 3)], text=[5, 3, 40], known=known), Temporal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 112, 128, 256])
def test_head_dims(dim, dtype):
    check(pack([(5, 3, 5), (70, 1, 1)]), Temporal(), dtype=dtype, dim=dim, heads=1)


def test_grouped_heads_and_strides():
    check(pack([(9, 2, 3), (1, 3, 1)], text=[2, 0]), Temporal(), heads=4, kv_heads=2)
    check(pack([(9, 2, 3), (1, 3, 1)], text=[2, 0]), Temporal(), heads=3, kv_heads=3, views=fused_by_part)


@pytest.mark.parametrize("mask", [Temporal(), Temporal(window=4)], ids=str)
def test_a_chunk_attends_to_a_cache(mask):
    """Of other lengths than its own; one of too many frames for a tile, and one of none."""
    layout = pack([(2, 2, 3), (1, 3, 1), (3, 1, 2)], first_frames=[5, 2, 140])
    check(layout, mask, pack([(9, 2, 3), (3, 3, 1), (143, 1, 2)], known=[EVERY_THIRD[:9], None, None]))


@settings(max_examples=6, deadline=None)
@given(grids=st.lists(st.tuples(LENGTHS, st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3), mask=st.sampled_from(MASKS))
def test_drawn_packs(grids, mask):
    check(pack(grids), mask, heads=1)


def test_a_single_frame_is_a_copy():
    """Bit for bit, whatever the scores."""
    layout = pack([(1, 5, 7), (3, 2, 2), (1, 16, 16)])
    q, k, v = qkv_of(layout, dim=64)
    out = attention(q * 30, k, v, layout, Temporal(), implementation="triton")
    for clip in (layout.clips[0], layout.clips[2]):
        assert torch.equal(out[clip.start : clip.stop], v[clip.start : clip.stop])


@pytest.mark.parametrize("mask", MASKS[:2], ids=str)
def test_a_clip_alone_and_in_a_pack(mask):
    """Bit for bit, forwards and backwards: beside longer clips, beside text, beside known frames, in a capacity."""
    grids = [(6, 3, 3), (40, 1, 2), (1, 2, 2), (130, 1, 1)]
    pack_of_all = {"grids": grids, "text": [0, 4, 0, 2], "known": [None, [True] * 40, None, None], "capacity": Capacity(5, 200, 300)}
    layout = pack(**pack_of_all)
    qkv, direction = qkv_of(layout, heads=2, kv_heads=1), randn(layout.tokens, 2, 16, seed=9).to(DEVICE)
    whole = leaves(*qkv)
    out, lse = attention(*whole, layout, mask, return_lse=True, implementation="triton")
    out.backward(direction)
    for i in (0, 2):
        clip, one = layout.clips[i], pack(grids[i : i + 1])
        rows = slice(clip.start, clip.stop)
        alone = leaves(*(x[rows] for x in qkv))
        single, single_lse = attention(*alone, one, mask, return_lse=True, implementation="triton")
        single.backward(direction[rows])
        assert torch.equal(single, out[rows]) and torch.equal(single_lse, lse[:, rows])
        assert all(torch.equal(a.grad, b.grad[rows]) for a, b in zip(alone, whole, strict=True))


def test_tiles_hold_whole_sites():
    layout = pack([(21, 2, 4), (1, 10, 10), (65, 1, 2), (129, 1, 1)], capacity=Capacity(6, 300, 1200))
    small, large = (schedule.site_tiles(layout, rows, layout) for rows in schedule.ROWS)
    assert small[:5].tolist() == [[0, 0], [0, 3], [0, 6], [1, 0], [1, 64]] and (small[5:] == -1).all() and len(small) == 1200 // 33 + 6
    assert large[:3].tolist() == [[2, 0], [2, 1], [-1, -1]] and len(large) == 1200 // 65 + 6
    rest = schedule.tiles(layout, 64, Temporal(), layout, longer_than=128)
    assert rest[:4, 0].tolist() == [3, 3, 3, -1] and len(rest) == 1200 // 64 + 1200 // 129 + 7
    rest = schedule.tiles(layout, 64, Temporal(), layout, longer_than=64)
    assert sorted(set(rest[:, 0].tolist())) == [-1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6),
    text=st.integers(0, 40),
    block=st.sampled_from([16, 32, 64]),
    longest=st.sampled_from([64, 128]),
)
def test_no_pack_overflows_a_capacity_that_it_fills(grids, text, block, longest):
    texts = [text] * len(grids)
    tokens = VideoLayout.pack(grids, text=texts).tokens
    layout = VideoLayout.pack(grids, text=texts, capacity=Capacity(len(grids), sum(grid[0] for grid in grids), tokens))
    for rows in schedule.ROWS:
        schedule.site_tiles(layout, rows, layout)
    for of_keys in (False, True):
        schedule.tiles(layout, block, Temporal(), layout, of_keys=of_keys, longer_than=longest)


@pytest.mark.parametrize("mask", [Temporal(), Temporal(causal=False, window=3)], ids=str)
@pytest.mark.parametrize("name", ["text first", "known and text", "later frames", "capacity"])
def test_the_block_kernel_serves_any_length(name, mask, monkeypatch):
    monkeypatch.setattr(temporal, "sizes", lambda *limits, **options: ())
    check(pack(**LAYOUTS[name]), mask)


@pytest.mark.parametrize(
    ("dim", "pairs", "interleaved", "norm", "text"),
    [(64, 20, True, "rms", None), (48, 24, True, "layer", None), (72, 36, True, None, [3, 0, 1]), (32, 16, False, "rms", [2, 1, 0])],
)
def test_norm_and_rope_on_load(dim, pairs, interleaved, norm, text):
    """Of short clips, single frames, clips that the block kernels serve, and text; gradients of the weights too."""
    layout = pack([(5, 2, 2), (1, 1, 2), (70, 1, 1)], text=text)
    qkv = leaves(*qkv_of(layout, heads=4, kv_heads=2, dim=dim))
    weights = [(0.5 + torch.rand(dim, device=DEVICE)).requires_grad_() for _ in range(2)] if norm else [None, None]
    cos, sin = rotary_table(layout.positions[:, :1], (2 * pairs,), theta=100.0)
    how = NormRope(*weights, cos, sin, norm, interleaved=interleaved)
    exact = leaves(*qkv, dtype=torch.float64)
    exact_weights = [w if w is None else w.detach().double().requires_grad_() for w in weights]
    rotated = (norm_rope_reference(x, w, cos, sin, norm, False, interleaved, 1e-6) for x, w in zip(exact, exact_weights, strict=False))
    wanted = definition(*rotated, exact[2], layout, Temporal(), None)
    out = attention(*qkv, layout, Temporal(), norm_rope=how, implementation="triton")
    assert_close(out, wanted.detach(), torch.float32)
    direction = randn(*out.shape, dtype=torch.float32, seed=9).to(DEVICE)
    out.backward(direction)
    wanted.backward(direction.double())
    for ours, theirs in zip([*qkv, *weights], [*exact, *exact_weights], strict=True):
        if ours is not None:
            assert_close(ours.grad, theirs.grad, torch.float32)


def test_norm_and_rope_of_tables_and_weights_with_gaps():
    """Wherever they are done: sin in rows of another length than cos, weights that are columns of a tensor."""
    layout = pack([(5, 2, 2), (3, 1, 2)])
    qkv = qkv_of(layout, heads=2, kv_heads=2, dim=32)
    cos, sin = rotary_table(layout.positions[:, :1], (32,), theta=100.0)
    weights = [(0.5 + torch.rand(32, device=DEVICE)) for _ in range(2)]
    wanted = attention(*qkv, layout, Temporal(), norm_rope=NormRope(*weights, cos, sin), implementation="triton")
    apart = [w[:, None].repeat(1, 2)[:, 0] for w in weights]
    found = attention(*qkv, layout, Temporal(), norm_rope=NormRope(*apart, cos, sin), implementation="triton")
    assert torch.equal(found, wanted)
    how = NormRope(*weights, cos, torch.cat((sin, sin + 1), dim=1)[:, :16])
    found = attention(*qkv, layout, Temporal(), norm_rope=how, implementation="triton")
    assert_close(found, wanted.double(), torch.float32)


def kernels_of(call):
    reset_engaged()
    call()
    return engaged()["attention"]["triton"].kernels


def test_the_record_names_the_kernels():
    short, long, both = pack([(5, 2, 2)]), pack([(129, 1, 1)]), pack([(5, 2, 2), (1, 1, 1), (129, 1, 1)])
    for layout, wanted in (
        (short, {"temporal_forward": 1}),
        (long, {"block_forward": 1}),
        (both, {"temporal_forward": 1, "block_forward": 1}),
    ):
        q, k, v = (x.half() for x in qkv_of(layout))
        assert kernels_of(lambda q=q, k=k, v=v, layout=layout: attention(q, k, v, layout, Temporal(), implementation="triton")) == wanted


def test_the_model_takes_it(monkeypatch):
    """As on a GPU, where the Triton kernels come first."""
    torch.manual_seed(0)
    dit = (
        VideoDiT(DiTConfig(channels=3, width=32, heads=2, blocks=("factorised", "factorised"), text_width=8, local_width=16))
        .eval()
        .to(DEVICE)
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # outputs and gates start at zero
    layout, text = pack([(4, 2, 3), (1, 3, 2)]), VideoLayout.segments([3, 5], device=DEVICE)
    given = torch.randn(30, 12), torch.rand(5), torch.randn(8, 8)
    with torch.no_grad():
        wanted = dit(*(x.to(DEVICE) for x in given), layout, text)
        monkeypatch.setattr(dispatch, "triton_first", lambda x: True)
        reset_engaged()
        found = dit(*(x.to(DEVICE) for x in given), layout, text)
    record = engaged()
    assert record["attention"]["triton"].kernels == {"block_forward": 4, "temporal_forward": 2}
    assert {op: list(ran) for op, ran in record.items()} == {
        op: ["triton"] for op in ("patch_embed", "modulated_norm", "gated_residual", "qk_norm_rope", "attention", "final_layer")
    }
    assert_close(found, wanted.double(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [(8, 300, 300), (16, 64, 64), (21, 30, 52), (64, 40, 40), (128, 30, 30)], ids=str)
def test_many_sites_on_a_gpu(grid):
    """Also more of them than a grid's second axis counts (65,535), against SDPA in float32."""
    layout = pack([grid])
    q, k, v = (torch.randn(layout.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = attention(q, k, v, layout, Temporal(), implementation="triton")
    for part in range(0, grid[1] * grid[2], 10_000):
        sites = slice(part, part + 10_000)
        x = (each.float().unflatten(0, (grid[0], -1))[:, sites].permute(1, 2, 0, 3) for each in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).permute(2, 0, 1, 3)
        assert_close(out.unflatten(0, (grid[0], -1))[:, sites], wanted.double(), torch.bfloat16)
