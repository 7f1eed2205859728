"""The Triton kernels of patch embedding and its inverse against their equations in float64, forwards and backwards; interpreted on a CPU,
compiled on a GPU (-m gpu).
"""

import contextlib
import gc
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import test_patch_embed as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patch_embed import FIRST, PATCHES, ROOM, SIZES, TEXT, compare, embedded_by_hand, joined, leaves, norm_by_hand
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from tubelet.kernels import (
    Capacity,
    Modulation,
    VideoLayout,
    engaged,
    final_layer,
    grid_of,
    patch_embed,
    patchify,
    reset_engaged,
    unpatchify,
)

clips_module = pytest.importorskip("tubelet.kernels.patch_embed.clips", reason="triton is not installed")
embed_module, project_module, gradients = (
    pytest.importorskip(f"tubelet.kernels.patch_embed.{name}") for name in ("embed", "project", "gradients")
)
operator = pytest.importorskip("tubelet.kernels.patch_embed.operator")
norms = pytest.importorskip("tubelet.kernels.norms.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter's products of bfloat16 are wrong
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_patch = pytest.mark.parametrize("patch", [*PATCHES, (4, 2, 2), (1, 3, 3), (1, 1, 8)], ids=str)
EVEN = [(3, 4, 16)] * 3
EACH_KERNEL = {
    clips_module: ("describe_clips",),
    embed_module: ("clips_to_tokens",),
    project_module: ("fold_norm", "tokens_to_clips"),
    gradients: ("token_products", "sum_parts", "folded_gradient", "sum_rows"),
}

check_embed = partial(plain.check_embed, "triton", device=DEVICE)
check_projection = partial(plain.check_projection, "triton", device=DEVICE)


@pytest.fixture(autouse=True, scope="module")
def little_for_the_interpreter():
    """Which runs one program after the other, and one store after the other."""
    if DEVICE == "cuda":
        yield
        return
    with mock.patch.object(gradients, "SPLITS", 2), mock.patch.object(clips_module, "AT_ONCE", 5):
        yield


def randn(*shape, **options):
    return plain.randn(*shape, **options).to(DEVICE)


def pack(clips, patch=(1, 2, 2), **options):
    return VideoLayout.pack([grid_of(clip, patch) for clip in clips], device=DEVICE, **options)


def kernels_of(op):
    return engaged()[op]["triton"].kernels


@every_patch
def test_patches(patch):
    """Of clips of several sizes, whose ends are missing, and of clips of one size, which are evenly spaced or are not."""
    check_embed(patch=patch)
    check_embed(patch=patch, sizes=EVEN[1:], channels=5)
    check_projection(patch=patch)
    check_projection(patch=patch, sizes=EVEN[1:], channels=5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype):
    check_embed(dtype=dtype)
    check_embed(dtype=dtype, patch=(2, 1, 4), sizes=EVEN, channels=5)
    check_projection(dtype=dtype)
    check_projection(dtype=dtype, patch=(2, 1, 4), sizes=EVEN, channels=5)


@every_dtype
@pytest.mark.parametrize("tokens", [False, True], ids=["clips", "tokens"])
@pytest.mark.parametrize("positions", ["tables", "each", None])
def test_positions_and_known_tokens(positions, tokens, dtype):
    for options in (TEXT, ROOM | FIRST) if positions == "tables" else (None, ROOM | TEXT):
        check_embed(dtype=dtype, positions=positions, pack=options, known=True, tokens=tokens)


@pytest.mark.parametrize(
    ("channels", "dim", "dtype"),
    [(4, 72, torch.float16), (33, 200, torch.float16), (48, 129, torch.float16), (70, 24, torch.float16), (33, 40, torch.float32)],
    ids=str,
)
def test_widths(channels, dim, dtype):
    """Of several blocks of patch elements, held and not, and of channels, with and without a rest."""
    sizes = [(1, 7, 3), (1, 4, 4)]
    check_embed(channels=channels, dim=dim, sizes=sizes, dtype=dtype, positions="tables", pack={"text": [0, 1]})
    check_embed(channels=channels, dim=dim, sizes=sizes, dtype=dtype)
    check_projection(channels=channels, dim=dim, sizes=sizes, dtype=dtype, table=DEVICE == "cuda")


@pytest.mark.parametrize("kind", ["layer", "rms", None])
@every_dtype
def test_norms(dtype, kind):
    check_projection(dtype=dtype, kind=kind, affine=True, pack={"text": [2, 1]}, sizes=SIZES[1:3])
    check_projection(dtype=dtype, kind=kind, affine=True, table=False, pack=ROOM | {"text": [0, 1]}, sizes=SIZES[1:3])
    check_projection(dtype=dtype, kind=kind, dim=200, mean=3.0, sizes=[(1, 6, 4)])


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_a_folded_norm(dtype, kind):
    """However few tokens share a row of the tables."""
    with mock.patch.object(gradients, "FOLDED", 0), mock.patch.object(gradients, "CHUNK", 64):
        reset_engaged()
        check_projection(dtype=dtype, kind=kind, affine=True, pack={"text": [2, 1]}, sizes=SIZES[1:3])
        check_projection(dtype=dtype, kind=kind, affine=True, table=False, pack=ROOM | {"text": [0, 1]}, sizes=SIZES[1:3])
        check_projection(dtype=dtype, kind=kind, dim=200, mean=3.0, sizes=[(1, 12, 14)])
        check_projection(dtype=dtype, kind=kind, dim=72, channels=17, sizes=[(1, 7, 3), (1, 4, 4)], table=False)  # two blocks of elements
    assert "norm_backward" not in kernels_of("unpatchify") and kernels_of("unpatchify")["folded_gradient"] == 4


@every_dtype
def test_the_mean_does_not_cancel(dtype):
    """Where it is thirty times the deviation, and where a channel is three hundred times that."""
    x, weight = (randn(70, 320) + 30).to(dtype), randn(12, 320, seed=1).to(dtype)
    x[::3, 2] = 300
    wanted = norm_by_hand(x.double(), Modulation(None, None), None) @ weight.double().T
    assert_close(final_layer(x, weight, norm=Modulation(None, None), implementation="triton"), wanted, dtype)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_folded_into_the_weight_ahead_or_on_the_way(kind):
    """To the same numbers, for one row of the tables in a tile of tokens or for several, of which a NaN stays in its own tokens."""
    dtype = DTYPES[-1]
    x, weight, bias = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((300, 136), (12, 136), (12,))))
    shift, scale = randn(2, 4, 136, dtype=dtype, seed=5)
    norm = Modulation(shift, scale, kind, randn(136, dtype=dtype, seed=7), randn(136, dtype=dtype, seed=8) if kind == "layer" else None)
    rows = (torch.arange(300, dtype=torch.int32, device=DEVICE) // 64).clamp(max=3)

    def project(rows, ahead):
        with mock.patch.object(project_module, "FOLDED", 0 if ahead else 300):
            return final_layer(x, weight, bias, norm=norm, rows=rows, implementation="triton")

    out = project(rows, True)
    exact = Modulation(*(each.double() if isinstance(each, torch.Tensor) else each for each in norm))
    assert_close(out, norm_by_hand(x.double(), exact, rows) @ weight.double().T + bias.double(), dtype)
    assert torch.equal(project(rows, False), out)
    for row in range(4):
        assert torch.equal(project(torch.full_like(rows, row), True)[rows == row], out[rows == row])
    scale[2, 5] = torch.nan
    for ahead in (True, False):
        spoiled = project(rows, ahead)
        assert spoiled[rows == 2].isnan().all() and torch.equal(spoiled[rows != 2], out[rows != 2])


def test_many_tokens():
    """Several tiles of a clip, and several parts of the sums of gradients."""
    check_embed(
        sizes=[(2, 11, 13), (1, 12, 26)],
        patch=(1, 2, 1),
        channels=2,
        dim=16,
        tables=(2, 6, 26),
        positions="tables",
        pack={"text": [0, 0]},
        known=True,
    )
    with mock.patch.object(gradients, "CHUNK", 128), mock.patch.object(embed_module, "PROGRAMS", 1):
        check_embed(sizes=[(2, 21, 13), (1, 24, 26)], channels=2, dim=200)
    with mock.patch.object(gradients, "CHUNK", 128):
        check_projection(sizes=[(2, 21, 13), (1, 24, 26)], channels=2)


@pytest.mark.parametrize("name", ["source", "weight", "bias", "table", "known_weight"])
def test_each_gradient_alone(name):
    clips, patch = plain.clips_of(SIZES[1:3]), (1, 2, 2)
    layout = pack(clips)
    known = (torch.arange(layout.tokens) % 2 == 0).to(DEVICE)
    inputs = {"source": clips, "weight": randn(8, 12, seed=3), "bias": randn(8, seed=4), "known_weight": randn(8, seed=5)}
    inputs |= {"table": [randn(n, 8, seed=n) for n in (5, 4, 3)]}
    fixed = {key: leaves(value, device=DEVICE) for key, value in inputs.items()}
    for each in fixed.values():
        for x in plain.tensors_of(each):
            x.requires_grad_(False)

    def run(x, double):
        given = {key: leaves(value, torch.float64) if double else value for key, value in fixed.items()} | {name: x}
        arguments = given["source"], given["weight"], given["bias"]
        if double:
            return embedded_by_hand(*arguments, patch, given["table"], layout, known, given["known_weight"])
        added = {"positions": given["table"], "layout": layout, "known": known, "known_weight": given["known_weight"]}
        return patch_embed(*arguments, **added, implementation="triton")

    compare(partial(run, double=False), partial(run, double=True), (leaves(inputs[name], device=DEVICE),), torch.float32)


def views_of(sizes, channels=3, dtype=torch.float32):
    """Clips in other orders of their axes, rows apart and in steps, NaN between them."""
    found = []
    for i, (t, h, w) in enumerate(sizes):
        wide = torch.full((h + 3, t, 2 * w + 5, channels + 1), torch.nan, dtype=dtype, device=DEVICE)
        clip = wide[1 : h + 1, :, 2 : 2 * w + 2 : 2, :channels].permute(3, 1, 0, 2)
        found.append(clip.copy_(randn(channels, t, h, w, dtype=dtype, seed=i)))
    return found


@every_dtype
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1)], ids=str)
def test_strides(patch, dtype):
    """Bit for bit what contiguous tensors give, and memory that nothing was written to is NaN."""
    views = views_of(SIZES, dtype=dtype)
    width = 3 * patch[0] * patch[1] * patch[2]
    wide = torch.full((10, width + 20), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 8 : 8 + width] = randn(10, width, dtype=dtype, seed=1)
    weight = wide[:, 8 : 8 + width]
    layout = pack(views, patch, text=[0, 3, 0, 1], capacity=Capacity(5, 40, 320))
    positions = torch.full((320, 30), torch.nan, dtype=dtype, device=DEVICE)[:, 8:18].copy_(randn(320, 10, dtype=dtype, seed=2))
    results = []
    torch.use_deterministic_algorithms(True)
    for form in (lambda x: x, torch.Tensor.contiguous):
        mine = [form(x).detach().requires_grad_() for x in (*views, weight, positions)]
        out = patch_embed(mine[:-2], mine[-2], patch=patch, positions=mine[-1], layout=layout, implementation="triton")
        results.append([out, *torch.autograd.grad(out, mine, form(randn(10, 320, dtype=dtype, seed=3).T))])
    torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("side", [16, 12, 10, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_aligned_or_not(dtype, side):
    """For 16, 8 and 4 bytes at once, and for one number; also where a clip starts off the alignment of its rows."""
    store = randn(3 * 2 * 4 * side + 1, dtype=dtype)
    for offset in (0, 1):
        clip = store[offset : offset + 3 * 2 * 4 * side].view(3, 2, 4, side)
        wanted = clips_module._vector([clip], (1, 2, 2))[1]
        aligned = max(n for n in (1, 2, 4, 8) if side % n == 0 and n * dtype.itemsize <= 16) if offset == 0 else 1
        assert wanted == aligned
        compare(
            partial(patch_embed, implementation="triton"),
            lambda clips, weight: embedded_by_hand(clips, weight, None, (1, 2, 2)),
            ([clip], randn(7, 12, dtype=dtype, seed=2)),
            dtype,
        )


def test_clips_of_one_tensor_are_one_launch():
    """A batch; and many clips of their own memory are a few for the table of them, and one."""
    reset_engaged()
    patch_embed(list(randn(100, 3, 1, 4, 8).unbind(0)), randn(8, 12), implementation="triton")
    assert kernels_of("patch_embed") == {"clips_to_tokens": 1}
    reset_engaged()
    clips = [randn(3, 1, 2 + i % 5, 4 + i % 3, seed=i) for i in range(130)]  # more than a program looks through at once
    out = patch_embed(clips, randn(8, 12), implementation="triton")
    assert_close(out, patchify(clips).double() @ randn(8, 12).double().T, torch.float32)
    assert kernels_of("patch_embed") == {"describe_clips": -(-130 // clips_module.AT_ONCE), "clips_to_tokens": 1}


@pytest.mark.parametrize("products", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_than_the_products(products):
    """Clips and tokens of float32, tables of float16: as in training with autocast."""
    clips, layout = leaves(plain.clips_of(SIZES), device=DEVICE), pack(plain.clips_of(SIZES))
    weight, bias, back = (randn(*shape, dtype=products, seed=i) for i, shape in enumerate(((16, 12), (16,), (12, 16))))
    tables = [randn(20, 16, dtype=torch.float16, seed=9 + i) for i in range(3)]
    out = patch_embed(clips, weight, bias, positions=tables, layout=layout, dtype=torch.float32, implementation="triton")
    exact = embedded_by_hand(
        *leaves(([x.detach() for x in clips], weight, bias), torch.float64), (1, 2, 2), leaves(tables, torch.float64), layout
    )
    assert out.dtype == torch.float32
    assert_close(out.detach().to(products), exact, products)
    norm = Modulation(None, None)
    codes = unpatchify(out, layout, 3, sizes=SIZES, weight=back, norm=norm, implementation="triton")
    wanted = unpatchify(norm_by_hand(out.double(), norm, None) @ back.double().T, layout, 3, sizes=SIZES)
    assert_close(joined(codes), joined(wanted).detach(), products)
    (joined(codes).float().square().sum() + out.square().sum()).backward()
    assert all(clip.grad.dtype == torch.float32 and clip.grad.isfinite().all() for clip in clips)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 10)), min_size=1, max_size=3),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 2, 3, 4])),
    channels=st.integers(1, 3),
    text=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    spare=st.integers(0, 70),
)
def test_there_and_back_for_any_sizes(sizes, patch, channels, text, spare):
    """With weights that are permutations; also where text lies between the clips and a capacity leaves tokens unused. Exactly, but for a
    GPU, whose product of float32 is three of TF32.
    """
    same = partial(torch.testing.assert_close, rtol=2e-6 if DEVICE == "cuda" else 0, atol=0)
    clips = [randn(channels, *size, seed=i) for i, size in enumerate(sizes)]
    tokens = sum(len(patchify([clip], patch)) for clip in clips) + sum(text[: len(clips)]) + spare
    layout = pack(clips, patch, text=text[: len(clips)], capacity=Capacity(4, 24, tokens))
    width = channels * patch[0] * patch[1] * patch[2]
    weight = torch.eye(width, device=DEVICE)[torch.randperm(width, generator=torch.Generator().manual_seed(0))]
    embedded = patch_embed(clips, weight, patch=patch, layout=layout, implementation="triton")
    back = unpatchify(embedded, layout, channels, patch, sizes=sizes, weight=weight.T.contiguous(), implementation="triton")
    for clip, again in zip(clips, back, strict=True):
        same(again, clip)
    video = (layout.coordinates.clip >= 0) & ~layout.coordinates.text
    same(embedded[video], patchify(clips, patch)[:, weight.argmax(1)])
    assert not embedded[~video].any()


def both(clips, layout, parameters, rows, direction=None):
    """Embedding and projection, and the gradients of what is of a clip alone."""
    weight, back, norm, tables = parameters
    clips = leaves(clips)
    tokens = patch_embed(clips, weight, positions=tables, layout=layout, implementation="triton")
    sizes = [clip.shape[1:] for clip in clips]
    codes = unpatchify(tokens, layout, 3, sizes=sizes, weight=back, norm=norm, rows=rows, implementation="triton")
    directions = [randn(*code.shape, dtype=code.dtype, seed=len(code[0])) for code in codes]
    return tokens, codes, torch.autograd.grad(codes, clips, directions)


@pytest.mark.parametrize(("dtype", "poison"), [(DTYPES[-1], float("nan")), (torch.float32, float("inf"))], ids=str)
def test_a_clip_alone_and_beside_others(dtype, poison):
    """Bit for bit, forwards and backwards, beside clips that are not finite, with text between them, in a capacity."""
    clips = [clip.to(DEVICE) for clip in plain.clips_of([*SIZES, (2, 24, 16)], dtype=dtype)]
    weight, back = randn(24, 12, dtype=dtype), randn(12, 24, dtype=dtype, seed=1)
    tables, (shift, scale) = [randn(20, 24, dtype=dtype, seed=i) for i in range(3)], randn(2, 3, 24, dtype=dtype, seed=5)
    parameters = weight, back, Modulation(shift, scale), tables
    whole = pack(clips, text=[0, 3, 0, 1, 2], capacity=Capacity(6, 60, 500))
    for nth in (2, 4):
        others = [clip if i == nth else torch.full_like(clip, poison) for i, clip in enumerate(clips)]
        rows = torch.full((500,), 2, dtype=torch.int32, device=DEVICE)
        alone = both([clips[nth].clone()], pack(clips[nth : nth + 1]), parameters, rows[: len(patchify(clips[nth : nth + 1]))])
        among = both(others, whole, parameters, rows)
        span = whole.clips[nth]
        assert torch.equal(alone[0], among[0][span.video_start : span.video_stop]) and alone[0].isfinite().all()
        assert torch.equal(alone[1][0], among[1][nth]) and torch.equal(alone[2][0], among[2][nth])
        assert not among[1][3 if nth != 3 else 0].isfinite().any()


def test_nan_stays_in_its_token():
    """Of tokens and of positions; and of tokens that are no clip's it reaches nothing at all, nor a gradient."""
    layout = VideoLayout.pack([(2, 5, 7), (1, 3, 3)], text=[2, 0], capacity=Capacity(3, 9, 200), device=DEVICE)
    video = (layout.coordinates.clip >= 0) & ~layout.coordinates.text
    tokens, positions, weight, back = (randn(*shape, seed=i) for i, shape in enumerate(((200, 12), (200, 24), (24, 12), (12, 24))))
    shift, scale = randn(2, 3, 24, seed=9)
    rows = torch.zeros(200, dtype=torch.int32, device=DEVICE)
    clean = patch_embed(tokens, weight, positions=positions, layout=layout, implementation="triton")
    tokens[17, 3], positions[30, 2] = torch.nan, torch.nan
    tokens[~video], positions[~video] = torch.nan, torch.nan
    spoiled = patch_embed(tokens, weight, positions=positions, layout=layout, implementation="triton")
    others = torch.ones(200, dtype=torch.bool, device=DEVICE)
    others[17] = False
    others[30] = False
    assert torch.equal(spoiled[others], clean[others]) and spoiled[17].isnan().all() and spoiled[30].isnan().sum() == 1
    assert final_layer(spoiled, back, norm=Modulation(shift, scale), rows=rows, implementation="triton")[others].isfinite().all()
    x = torch.where(video[:, None], clean, torch.nan)
    inputs = leaves((x, back, shift, scale))
    codes = unpatchify(inputs[0], layout, 3, weight=inputs[1], norm=Modulation(*inputs[2:]), rows=rows, implementation="triton")
    grads = torch.autograd.grad(joined(codes).sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][~video].any()
    inputs = leaves((torch.where(video[:, None], clean[:, :12], torch.nan), weight))
    out = patch_embed(*inputs, layout=layout, implementation="triton")
    direction = torch.where(video[:, None], randn(200, 24), torch.nan)
    grads = torch.autograd.grad(out, inputs, direction)
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][~video].any()


def test_registered_as_it_should_be():
    clips = leaves([clip.to(DEVICE) for clip in plain.clips_of(SIZES[1:3])])
    layout = pack(clips, text=[1, 2])
    weight, bias, marks, *tables = leaves([randn(*shape, seed=i) for i, shape in enumerate(((8, 12), (8,), (8,), (5, 8), (4, 8), (3, 8)))])
    known = (torch.arange(layout.tokens) % 2 == 0).to(DEVICE)
    added = bias, tables, known, marks
    torch.library.opcheck(
        torch.ops.tubelet.patch_embed, (clips, weight, *added, [1, 2, 2], layout.handle, layout.tokens, torch.float32, "triton")
    )
    tokens, count = randn(20, 12).requires_grad_(), 20
    torch.library.opcheck(
        torch.ops.tubelet.patch_embed, ([tokens], weight, None, [randn(20, 8)], None, None, None, None, count, torch.float32, "triton")
    )
    plain_added = bias.detach(), [table.detach() for table in tables], known, marks.detach()
    sources, d = [clip.detach() for clip in clips], randn(layout.tokens, 8)
    torch.library.opcheck(
        torch.ops.tubelet.patch_embed_backward, (d, sources, weight.detach(), *plain_added, d[:0], [1, 2, 2], layout.handle, [True] * 7)
    )
    x, back, shift, scale = leaves([randn(*shape, seed=i) for i, shape in enumerate(((layout.tokens, 8), (12, 8), (3, 8), (3, 8)))])
    rows = torch.ones(layout.tokens, dtype=torch.int32, device=DEVICE)
    norm = shift, scale, rows, bias, None, "layer", 1e-6
    where = [1, 2, 2], [side for clip in clips for side in clip.shape[1:]], [clip.video_start for clip in layout.clips]
    torch.library.opcheck(torch.ops.tubelet.final_layer, (x, back, None, *norm, *where, "unpatchify", "triton"))
    torch.library.opcheck(torch.ops.tubelet.final_layer, (x, back, None, *[None] * 6, 0.0, [], [], [], "final_layer", "triton"))
    wanted = [True, True, False, True, True, True, False]
    for dtype in (torch.float32, DTYPES[-1]):  # whose norm is folded
        given = [each.detach() if isinstance(each, torch.Tensor) else each for each in (x, back, None, *norm)]
        given = [each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in given]
        result = torch.ops.tubelet.final_layer(*given, *where, "unpatchify", "triton")
        for most in (0, 10**6):
            with mock.patch.object(gradients, "FOLDED", most):
                torch.library.opcheck(
                    torch.ops.tubelet.final_layer_backward, (result[0], *result, *given, *where, wanted, "unpatchify"),
                    test_utils=("test_schema", "test_faketensor"),
                )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_a_graph_without_a_break_compiled_once(backend):
    """Forwards and backwards, for clips of other sizes and packs of other lengths; what ran in the graph is recorded."""

    def of_clips(clips, weight, back, tables, rows, layout):
        x = patch_embed(clips, weight, positions=tables, layout=layout, implementation="triton")
        return final_layer(x * 2, back, norm=Modulation(tables[0], tables[1]), rows=rows, implementation="triton")

    def of_tokens(tokens, weight, back, tables, rows, layout):
        return of_clips(tokens[0], weight, back, tables, rows, layout)

    weight, back = leaves((randn(24, 12), randn(12, 24, seed=1)))
    tables = leaves([randn(20, 24, seed=i) for i in range(3)])
    for function in (of_clips, of_tokens):
        torch._dynamo.reset()
        counter, counts = CompileCounterWithBackend(backend), set()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for sizes in ([(2, 6, 8), (5, 4, 10)], [(4, 6, 8), (7, 5, 11)], [(6, 9, 4), (2, 8, 5)]):
            clips = leaves([clip.to(DEVICE) for clip in plain.clips_of(sizes)])
            layout = pack(clips, text=[3, 2])
            source = clips if function is of_clips else leaves([randn(layout.tokens, 12, seed=4)])
            rows = (torch.arange(layout.tokens) % 3).int().to(DEVICE)
            inputs, results = [*source, weight, back, *tables], []
            for each in (function, compiled):
                reset_engaged()
                out = each(source, weight, back, tables, rows, layout)
                results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
                assert engaged()["patch_embed"]["triton"].calls == engaged()["final_layer"]["triton"].calls == 1
            for a, b in zip(*results, strict=True):
                assert_close(a.detach(), b.detach().double(), torch.float32)
            counts.add(counter.frame_count)
        assert len(counts) == 1  # torch starts the first compilation twice, for a float among the arguments


def test_a_graph_that_ends_in_clips():
    """It knows their sizes; forwards and backwards."""

    def project(x, back, layout):
        return [2 * code for code in unpatchify(x, layout, 3, weight=back, norm=Modulation(None, None), implementation="triton")]

    layout = VideoLayout.pack([(2, 2, 3), (1, 4, 2)], text=[1, 0], device=DEVICE)
    inputs = leaves((randn(layout.tokens, 16), randn(12, 16, seed=1)))
    found, wanted = torch.compile(project, fullgraph=True, dynamic=True, backend="aot_eager")(*inputs, layout), project(*inputs, layout)
    grads = [torch.autograd.grad(joined(codes).square().sum(), inputs) for codes in (found, wanted)]
    for a, b in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert torch.equal(a, b)


class Recorder:
    """Notes the launches of a kernel as they are made, each of which makes it again; the first has been run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(partial(self.kernel[grid], *arguments, **options))
            self.launches[-1]()

        return launch


def replayed(call):
    """What `call` gives, and a function that makes its launches again: a CUDA graph, or a record of them."""
    call()  # compiled before the capture
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return results, graph.replay
    launches = []
    with ExitStack() as stack:
        for module, names in EACH_KERNEL.items():
            recorders = {name: Recorder(getattr(module, name), launches) for name in names}
            stack.enter_context(mock.patch.multiple(module, **recorders))
        results = call()
    return results, lambda: [launch() for launch in launches]


@pytest.mark.parametrize("dtype", [torch.float32, DTYPES[-1]], ids=str)
def test_replay_with_other_contents(dtype):
    """Of clips whose table is a part of the graph: of a record, tensors that the library computes are not made anew."""
    clips = [clip.to(DEVICE) for clip in plain.clips_of(SIZES, dtype=dtype)]
    back = [torch.empty(3, *size, device=DEVICE, dtype=dtype) for size in SIZES]
    layout = pack(clips)
    source, target = clips_module.Source.of(clips, (1, 2, 2)), clips_module.Source.of(back, (1, 2, 2))
    weight, out_weight, shift, scale = (
        randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((24, 12), (12, 24), (3, 24), (3, 24)))
    )
    tables, marks = [randn(20, 24, dtype=dtype, seed=i) for i in range(3)], randn(24, dtype=dtype, seed=9)
    known, rows = (torch.zeros(layout.tokens, dtype=dtype, device=DEVICE) for dtype in (torch.bool, torch.int32))

    def call():
        added = {"positions": tables, "places": layout.positions, "known": known, "known_weight": marks}
        x = embed_module.embed("", source, weight, layout.tokens, dtype, **added)
        project_module.project_tokens("", x, out_weight, target, shift=shift, scale=scale, rows=rows, kind="layer", eps=1e-6)
        return [x, *back]

    results, replay = replayed(call)
    for i in range(3):
        for nth, each in enumerate((*clips, weight, out_weight, shift, scale, *tables, marks)):
            each.copy_(randn(*each.shape, seed=100 * i + nth))
        draw = torch.Generator().manual_seed(i)
        known.copy_(torch.rand(layout.tokens, generator=draw) < 0.5)
        rows.copy_(torch.randint(0, 3, (layout.tokens,), generator=draw))
        replay()
        found = [x.clone() for x in results]
        for a, b in zip(found, call(), strict=True):
            assert torch.equal(a, b)


def test_replay_with_other_clips():
    """In tokens, a graph serves every pack that fits its capacity."""
    room = Capacity(4, 20, 150)
    layout = VideoLayout.pack([(3, 4, 5), (2, 2, 2)], capacity=room, device=DEVICE)
    tokens, weight, tables = randn(150, 12), randn(24, 12, seed=1), [randn(9, 24, seed=i) for i in range(3)]
    results, replay = replayed(lambda: [patch_embed(tokens, weight, positions=tables, layout=layout, implementation="triton")])
    for i, grids in enumerate(([(1, 9, 7)], [(2, 3, 3), (9, 2, 2), (4, 4, 5)], [(10, 3, 5)])):
        layout.refill(VideoLayout.pack(grids, capacity=room, device=DEVICE))
        tokens.copy_(randn(150, 12, seed=i))
        replay()
        fresh = VideoLayout.pack(grids, capacity=room, device=DEVICE)
        assert torch.equal(results[0], patch_embed(tokens, weight, positions=tables, layout=fresh, implementation="triton"))
        assert results[0][: fresh.used_tokens].all() and not results[0][fresh.used_tokens :].any()


def test_the_kernels_that_run():
    reset_engaged()
    clips = leaves([clip.to(DEVICE) for clip in plain.clips_of(EVEN)])
    layout, (weight, back) = pack(clips), leaves((randn(16, 12), randn(12, 16)))
    tables = leaves([randn(9, 16, seed=i) for i in range(3)])
    x = patch_embed(clips, weight, positions=tables, layout=layout, implementation="triton")
    joined(unpatchify(x, layout, 3, weight=back, norm=Modulation(None, None), implementation="triton")).sum().backward()
    separate = {name: n for name, n in kernels_of("patch_embed").items() if name != "describe_clips"}  # as the allocator has it
    assert separate == {"clips_to_tokens": 1, "tokens_to_clips": 1, "token_products": 1, "sum_parts": 1, "sum_rows": 3}
    assert kernels_of("unpatchify") == {
        "tokens_to_clips": 1, "norm_forward": 1, "token_products": 1, "sum_parts": 1, "clips_to_tokens": 1, "norm_backward": 1
    }  # fmt: skip


def test_tokens_whose_channels_are_apart_and_results_that_are_changed_in_place():
    x, weight, back = randn(24, 90).T, randn(16, 12, seed=1), randn(12, 16, dtype=DTYPES[-1], seed=2)
    for tokens in (x[:, :12], x[:, ::2]):
        leaf, exact = (weight.detach().clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
        patch_embed(tokens, leaf, implementation="triton").square().sum().backward()
        (tokens.double() @ exact.T).square().sum().backward()
        assert_close(leaf.grad, exact.grad, torch.float32)
    grads = []
    for changed in (False, True):
        tokens = randn(40, 16, dtype=DTYPES[-1], seed=3).requires_grad_()
        out = final_layer(tokens, back, norm=Modulation(None, None), implementation="triton")
        out = out.add_(1) if changed else out
        grads.append(torch.autograd.grad(out, tokens, randn(40, 12, dtype=DTYPES[-1], seed=4))[0])
    assert torch.equal(*grads)


def test_the_kernels_of_a_norm_in_half_precision():
    reset_engaged()
    x, back = leaves((randn(64, 16, dtype=DTYPES[-1]), randn(12, 16, dtype=DTYPES[-1], seed=1)))
    out = final_layer(x, back, norm=Modulation(None, None), implementation="triton")
    assert kernels_of("final_layer") == {"fold_norm": 1, "tokens_to_clips": 1}
    out.sum().backward()
    assert kernels_of("final_layer") == {
        "fold_norm": 2, "tokens_to_clips": 1, "folded_gradient": 1, "token_products": 1, "sum_parts": 2
    }  # fmt: skip


def test_no_tokens():
    tokens, weight, back = leaves((randn(0, 12), randn(24, 12), randn(12, 24)))
    out = final_layer(patch_embed(tokens, weight, implementation="triton"), back, norm=Modulation(None, None), implementation="triton")
    assert out.shape == (0, 12)
    grads = torch.autograd.grad(out.sum(), (tokens, weight, back))
    assert grads[0].shape == (0, 12) and not grads[1].any() and not grads[2].any()


TOKENS, WEIGHT = torch.zeros(4, 12, device=DEVICE), torch.zeros(8, 12, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(patch_embed, TOKENS.double(), WEIGHT.double()), "float64"),
        (partial(patch_embed, TOKENS, torch.zeros(12, 8, device=DEVICE).T), r"channels of a tensor \(8, 12\) are 8 numbers apart, not one"),
        (partial(patch_embed, TOKENS, WEIGHT, positions=torch.zeros(4, 8, dtype=torch.float64, device=DEVICE)), "it has no torch.float64"),
        (partial(final_layer, TOKENS, WEIGHT, norm=Modulation(None, None, "layer", TOKENS[0].double())), "weight is torch.float64"),
        (partial(final_layer, torch.zeros(12, 4, device=DEVICE).T, WEIGHT), r"channels of a tensor \(4, 12\) are 4 numbers apart, not one"),
    ],
)
def test_what_it_cannot_do_is_said(call, why):
    with pytest.raises(ValueError, match=f"cannot run as 'triton': the Triton kernel: .*{why}"):
        call(implementation="triton")
    reset_engaged()
    call()
    (record,) = (record for op, record in engaged().items() if op != "modulated_norm")
    assert next(iter(record)) == "torch"
    if DEVICE == "cuda":
        assert "triton" in record["torch"].passed_over


def test_a_layout_that_does_not_fit_is_told_when_the_operator_runs():
    clips = [clip.to(DEVICE) for clip in plain.clips_of(SIZES[1:2])]
    with pytest.raises(ValueError, match=r"layout: expected the grids of the clips, \[\(1, 3, 2\)\], got \[\(6, 1, 1\)\]"):
        patch_embed(clips, WEIGHT, layout=VideoLayout.pack([(6, 1, 1)], device=DEVICE), implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [1536, 5120])
def test_sizes_of_models_on_a_gpu(dim, dtype):
    """Wan's, against cuDNN's and cuBLAS's products in float64 on some of the tokens."""
    clips = [torch.randn(16, *size, device="cuda", dtype=dtype) for size in ((21, 60, 104), (1, 128, 128), (5, 45, 80))]
    layout = pack(clips)
    weight, back = torch.randn(dim, 64, device="cuda", dtype=dtype), torch.randn(64, dim, device="cuda", dtype=dtype)
    some = torch.arange(0, layout.tokens, 97, device="cuda")
    out = patch_embed(clips, weight, implementation="triton")
    assert_close(out[some], patchify(clips)[some].double() @ weight.double().T, dtype)
    patches = final_layer(out, back, norm=Modulation(None, None), implementation="triton")
    wanted = norm_by_hand(out[some].double(), Modulation(None, None), None) @ back.double().T
    assert_close(patches[some], wanted, dtype)
    codes = unpatchify(
        out, layout, 16, sizes=[clip.shape[1:] for clip in clips], weight=back, norm=Modulation(None, None), implementation="triton"
    )
    for a, b in zip(codes, unpatchify(patches, layout, 16, sizes=[clip.shape[1:] for clip in clips]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["eager", "saved elsewhere", "compiled"])
def test_a_layout_lives_until_the_backward_pass(way):
    """Of a step that made it, and forgot it."""
    clip, weight = leaves([randn(3, 2, 4, 4), randn(8, 12)])
    embed = lambda clip, weight, layout: patch_embed([clip], weight, layout=layout, implementation="triton").square()  # noqa: E731
    run = torch.compile(embed, backend="aot_eager") if way == "compiled" else embed
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone() if way == "saved elsewhere" else x, lambda x: x)
    with contextlib.nullcontext() if way == "compiled" else hooks:
        loss = run(clip, weight, VideoLayout.pack([(2, 2, 2)], text=[3], device=DEVICE)).sum()
    gc.collect()
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (clip, weight))
