"""Clips to tokens and back."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close
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

IMPLEMENTATIONS = ["torch"]
PATCHES = [(1, 2, 2), (2, 2, 2), (1, 1, 1), (3, 1, 4)]
# (T, H, W): one pixel; one frame; no side that any patch divides; a longer clip.
SIZES = [(1, 1, 1), (1, 6, 4), (5, 7, 3), (17, 2, 5)]

everywhere = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
every_patch = pytest.mark.parametrize("patch", PATCHES, ids=str)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clips_of(sizes, channels=3, dtype=torch.float32):
    return [randn(channels, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def layout_of(clips, patch, **options):
    return VideoLayout.pack([grid_of(clip, patch) for clip in clips], **options)


def by_hand(clips, weight, bias, patch):
    """One token at a time: the sum over its patch, as far as the clip reaches."""
    tokens = []
    for clip in clips:
        kernel = weight.view(len(weight), len(clip), *patch)
        for corner in itertools.product(*(range(0, side, p) for side, p in zip(clip.shape[1:], patch, strict=True))):
            block = clip[:, *(slice(start, start + p) for start, p in zip(corner, patch, strict=True))]
            reach = kernel[:, :, : block.shape[1], : block.shape[2], : block.shape[3]]
            tokens.append((reach * block).sum(dim=(1, 2, 3, 4)) + (0 if bias is None else bias))
    return torch.stack(tokens)


def embedded_by_hand(source, weight, bias, patch, positions=None, layout=None, known=None, known_weight=None):
    """What is added, and where tokens lie, token by token."""
    packed = source @ weight.T + (0 if bias is None else bias) if isinstance(source, torch.Tensor) else by_hand(source, weight, bias, patch)
    if layout is None:
        rows = list(range(len(packed)))
    else:
        rows = [row for clip in layout.clips for row in range(clip.video_start, clip.video_stop)]
        packed = packed[rows] if isinstance(source, torch.Tensor) else packed
    tokens = [torch.zeros_like(packed[0])] * (len(rows) if layout is None else layout.tokens)
    for row, token in zip(rows, packed, strict=True):
        if isinstance(positions, torch.Tensor):
            token = token + positions[row]
        elif positions is not None:
            for axis, table in enumerate(positions):
                token = token + table[min(max(int(layout.positions[row, axis]), 0), len(table) - 1)]
        if known is not None and known[row]:
            token = token + known_weight
        tokens[row] = token
    return torch.stack(tokens)


def norm_by_hand(x, norm, rows):
    if norm is None:
        return x
    x = F.layer_norm(x, x.shape[1:], None, None, norm.eps) if norm.kind == "layer" else F.rms_norm(x, x.shape[1:], None, norm.eps)
    x = x if norm.weight is None else x * norm.weight
    x = x if norm.bias is None else x + norm.bias
    x = x if norm.scale is None else x * (1 + norm.scale[rows.long()])
    return x if norm.shift is None else x + norm.shift[rows.long()]


def leaves(tree, dtype=None, device=None):
    """The tensors of a tree of tuples, lists and None, those of floating point as leaves; in their own dtype with their own strides."""
    if isinstance(tree, torch.Tensor):
        tree = tree.detach().to(device or tree.device)
        return tree.to(dtype or tree.dtype).requires_grad_() if tree.is_floating_point() else tree
    if isinstance(tree, list | tuple):
        parts = [leaves(x, dtype, device) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    return [x for each in tree for x in tensors_of(each)] if isinstance(tree, list | tuple) else []


def joined(tensors):
    """The elements of all: of a clip of three pixels alone, a bound on the relative error is a matter of luck."""
    return torch.cat([x.flatten() for x in tensors])


def compare(op, by_hand, inputs, dtype):
    """Results and gradients of op(*inputs) against `by_hand` on the same numbers in float64."""
    mine, exact = leaves(inputs), leaves(inputs, torch.float64)
    out, wanted = op(*mine), by_hand(*exact)
    out, wanted = (list(x) if isinstance(x, list | tuple) else [x] for x in (out, wanted))
    assert [x.shape for x in out] == [x.shape for x in wanted]
    assert_close(joined(out), joined(wanted), dtype)
    directions = [randn(*x.shape, dtype=x.dtype, seed=90 + i).to(x.device) for i, x in enumerate(out)]
    torch.autograd.backward(out, directions)
    torch.autograd.backward(wanted, [direction.double() for direction in directions])
    for x, x64 in zip(mine, exact, strict=True):
        pairs = [(a, b) for a, b in zip(tensors_of(x), tensors_of(x64), strict=True) if b.grad is not None]
        assert all(a.grad.dtype == a.dtype for a, _ in pairs)
        if pairs:
            assert_close(joined(a.grad for a, _ in pairs), joined(b.grad for _, b in pairs), pairs[0][0].dtype)


def check_embed(implementation, patch=(1, 2, 2), sizes=SIZES, dtype=torch.float32, dim=10, positions=None, pack=None, known=False,
                tokens=False, channels=3, tables=(4, 6, 7), device="cpu"):  # fmt: skip
    """patch_embed, with `positions` "tables" or "each", in the layout that options of VideoLayout.pack make, of clips or of `tokens`."""
    clips = [clip.to(device) for clip in clips_of(sizes, channels, dtype)]
    layout = None if pack is None else layout_of(clips, patch, device=device, **pack)
    width, count = channels * patch[0] * patch[1] * patch[2], len(patchify(clips, patch)) if layout is None else layout.tokens
    made = iter(range(50, 99))

    def draw(*shape):
        return randn(*shape, dtype=dtype, seed=next(made)).to(device)

    source = draw(count, width) if tokens else clips
    tables = [draw(n, dim) for n in tables] if positions == "tables" else draw(count, dim) if positions else None
    marks = (torch.arange(count) % 3 == 0).to(device) if known else None
    inputs = (source, draw(dim, width), draw(dim), tables, draw(dim) if known else None)

    def run(source, weight, bias, tables, known_weight):
        added = {"positions": tables, "layout": layout, "known": marks, "known_weight": known_weight}
        return patch_embed(source, weight, bias, patch=patch, implementation=implementation, **added)

    compare(run, lambda s, w, b, p, k: embedded_by_hand(s, w, b, patch, p, layout, marks, k), inputs, dtype)


TEXT = {"text": [3, 0, 2, 1]}
ROOM = {"capacity": Capacity(6, 60, 400), "text": [0, 0, 0, 0]}
FIRST = {"text": [2, 0, 1, 4], "text_first": True, "positions": [[2.7], [-3.0], [0, 1, 9, 3, 4], None]}


def check_projection(implementation, patch=(1, 2, 2), sizes=SIZES, dtype=torch.float32, dim=24, kind="layer", pack=None, affine=False,
                     table=True, channels=3, device="cpu", mean=0.0):  # fmt: skip
    """unpatchify with a weight, and final_layer; no norm if kind is None."""
    grids = [tuple(-(-side // p) for side, p in zip(size, patch, strict=True)) for size in sizes]
    layout = VideoLayout.pack(grids, device=device, **pack or {})
    width = channels * patch[0] * patch[1] * patch[2]
    made = iter(range(50, 99))

    def draw(*shape):
        return randn(*shape, dtype=dtype, seed=next(made)).to(device)

    rows = (torch.arange(layout.tokens, dtype=torch.int32) % 5 // 2 + 1).to(device) if kind and table else None
    norm = None
    if kind:
        shift, scale = (draw(5, dim) if table else None for _ in range(2))
        norm = Modulation(shift, scale, kind, draw(dim) if affine else None, draw(dim) if affine and kind == "layer" else None, 1e-5)
    inputs = draw(layout.tokens, dim) + mean, draw(width, dim), draw(width), norm

    def to_clips(x, weight, bias, norm):
        given = {"weight": weight, "bias": bias, "norm": norm, "rows": rows, "implementation": implementation}
        return unpatchify(x, layout, channels, patch, sizes=sizes, **given)

    def by_hand(x, weight, bias, norm):
        return unpatchify(norm_by_hand(x, norm, rows) @ weight.T + bias, layout, channels, patch, sizes=sizes)

    compare(to_clips, by_hand, inputs, dtype)
    compare(
        lambda x, weight, bias, norm: final_layer(x, weight, bias, norm=norm, rows=rows, implementation=implementation),
        lambda x, weight, bias, norm: norm_by_hand(x, norm, rows) @ weight.T + bias,
        inputs,
        dtype,
    )


@pytest.mark.parametrize(
    "size, patch, grid",
    [
        ((1, 1, 1), (1, 2, 2), (1, 1, 1)),
        ((5, 7, 3), (2, 2, 2), (3, 4, 2)),
        ((4, 6, 8), (1, 2, 2), (4, 3, 4)),
        ((1, 480, 832), (1, 16, 16), (1, 30, 52)),
    ],
)
def test_grid(size, patch, grid):
    assert grid_of(torch.empty(3, *size, device="meta"), patch) == grid


def test_order_of_tokens_and_channels():
    """Tokens in (t, h, w) order; in a token, channels slowest, then the patch's own (t, h, w)."""
    clip = torch.arange(2 * 2 * 2 * 4).view(2, 2, 2, 4)
    tokens = patchify([clip], (2, 1, 2))
    assert tokens.tolist() == [
        [0, 1, 8, 9, 16, 17, 24, 25],
        [2, 3, 10, 11, 18, 19, 26, 27],
        [4, 5, 12, 13, 20, 21, 28, 29],
        [6, 7, 14, 15, 22, 23, 30, 31],
    ]


def test_missing_ends_are_zeros():
    assert patchify([torch.ones(1, 1, 3, 1)], (1, 2, 2)).tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]


@every_patch
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.uint8], ids=str)
def test_there_and_back_is_exact(dtype, patch):
    clips = [(100 * clip).to(dtype) for clip in clips_of(SIZES)]
    back = unpatchify(patchify(clips, patch), layout_of(clips, patch), 3, patch, sizes=SIZES)
    for clip, again in zip(clips, back, strict=True):
        assert again.dtype == dtype and torch.equal(again, clip)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    text=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    text_first=st.booleans(),
    spare=st.integers(0, 3),
)
def test_there_and_back_for_any_sizes(sizes, patch, channels, text, text_first, spare):
    """Also where text lies between the clips and a capacity leaves tokens unused."""
    clips = clips_of(sizes, channels)
    video = patchify(clips, patch)
    assert len(video) == layout_of(clips, patch).tokens
    layout = layout_of(
        clips, patch, text=text[: len(clips)], text_first=text_first, capacity=Capacity(4, 24, len(video) + sum(text[: len(clips)]) + spare)
    )
    tokens = torch.full((layout.tokens, video.shape[1]), torch.nan)
    where = layout.coordinates
    tokens[(where.clip >= 0) & ~where.text] = video
    for clip, again in zip(clips, unpatchify(tokens, layout, channels, patch, sizes=sizes), strict=True):
        assert torch.equal(again, clip)


def test_without_sizes_the_filled_up_ends_stay():
    clip = randn(2, 3, 3, 5)
    (back,) = unpatchify(patchify([clip]), layout_of([clip], (1, 2, 2)), 2)
    assert back.shape == (2, 3, 4, 6)
    assert torch.equal(back[:, :, :3, :5], clip) and not back[:, :, 3:].any() and not back[..., 5:].any()


def test_unpatchify_reads_columns_of_a_wider_tensor():
    clips = clips_of(SIZES)
    tokens = patchify(clips)
    wide = torch.cat((torch.full_like(tokens, torch.nan), tokens), dim=1)[:, tokens.shape[1] :]
    for clip, again in zip(clips, unpatchify(wide, layout_of(clips, (1, 2, 2)), 3, sizes=SIZES), strict=True):
        assert torch.equal(again, clip)


def test_gradient_there_and_back_is_the_identity():
    clips = [clip.requires_grad_() for clip in clips_of(SIZES)]
    back = unpatchify(patchify(clips), layout_of(clips, (1, 2, 2)), 3, sizes=SIZES)
    directions = [randn(*clip.shape, seed=90) for clip in clips]
    torch.autograd.backward(back, directions)
    for clip, direction in zip(clips, directions, strict=True):
        assert torch.equal(clip.grad, direction)


@everywhere
@every_dtype
@every_patch
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_patch_embed(with_bias, patch, dtype, implementation):
    """Results and gradients, for clips that are views too."""
    channels, dim = 3, 10
    values = clips_of(SIZES, channels, dtype)
    values.append(randn(4, 9, 6, channels, dtype=dtype, seed=8).permute(3, 0, 1, 2)[:, :, 1::2])  # channels last, every other row
    weight = randn(dim, channels * patch[0] * patch[1] * patch[2], dtype=dtype, seed=20)
    bias = randn(dim, dtype=dtype, seed=21) if with_bias else None
    mine, wanted = (
        [None if x is None else x.detach().to(kind).requires_grad_() for x in (*values, weight, bias)] for kind in (dtype, torch.float64)
    )
    out = patch_embed(mine[:-2], *mine[-2:], patch=patch, implementation=implementation)
    reference = by_hand(wanted[:-2], *wanted[-2:], patch)
    assert_close(out, reference, dtype)
    direction = randn(*out.shape, dtype=dtype, seed=9)
    out.backward(direction)
    reference.backward(direction.double())
    for x, x64 in zip(mine, wanted, strict=True):
        if x is not None:
            assert_close(x.grad, x64.grad, dtype)


@everywhere
@every_patch
def test_patch_embed_is_a_conv3d_whose_stride_is_its_kernel(patch, implementation):
    conv = torch.nn.Conv3d(3, 8, patch, stride=patch, dtype=torch.float64)
    for size in ((3, 4, 8), (6, 2, 4)):
        clip = randn(3, size[0] * patch[0], size[1] * patch[1], size[2] * patch[2], dtype=torch.float64)
        wanted = conv(clip[None])[0].flatten(1).T.detach()
        out = patch_embed([clip], conv.weight.flatten(1), conv.bias, patch=patch, implementation=implementation)
        assert_close(out, wanted, torch.float64)


@everywhere
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_clip_leaves_its_neighbours_untouched(poison, implementation):
    clips, weight = clips_of(SIZES), randn(8, 12)
    layout = layout_of(clips, (1, 2, 2))
    clean = patch_embed(clips, weight, implementation=implementation)
    clips[2].fill_(poison)
    spoiled = patch_embed(clips, weight, implementation=implementation)
    others = layout.coordinates.clip != 2
    assert torch.equal(clean[others], spoiled[others]) and not spoiled[~others].isfinite().any()


@everywhere
@every_dtype
@pytest.mark.parametrize("tokens", [False, True], ids=["clips", "tokens"])
@pytest.mark.parametrize("positions", ["tables", "each", None])
def test_positions_and_known_tokens(positions, tokens, dtype, implementation):
    for pack in (TEXT, ROOM, FIRST) if positions == "tables" else (None, FIRST):
        check_embed(implementation, dtype=dtype, positions=positions, pack=pack, known=True, tokens=tokens)


@everywhere
@every_dtype
@pytest.mark.parametrize("kind", ["layer", "rms", None])
def test_projection(kind, dtype, implementation):
    check_projection(implementation, dtype=dtype, kind=kind)
    check_projection(implementation, dtype=dtype, kind=kind, patch=(2, 1, 4), pack=ROOM | TEXT, affine=True, table=False)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_the_dtype_of_the_product_and_of_the_tokens(implementation):
    """That of the weight, of which autocast decides."""
    tokens, weight, out_weight = randn(5, 12), randn(8, 12), randn(12, 8)
    assert patch_embed(tokens, weight.bfloat16(), implementation=implementation).dtype == torch.bfloat16
    x = patch_embed(tokens, weight.bfloat16(), dtype=torch.float32, implementation=implementation)
    assert x.dtype == torch.float32
    assert final_layer(x, out_weight.bfloat16(), norm=Modulation(None, None), implementation=implementation).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_embed(tokens, weight, implementation=implementation).dtype == torch.bfloat16
        assert patch_embed(tokens, weight, dtype=torch.float32, implementation=implementation).dtype == torch.float32
        assert final_layer(x, out_weight, implementation=implementation).dtype == torch.bfloat16


def test_projections_are_counted():
    reset_engaged()
    layout, tokens, weight = VideoLayout.pack([(1, 2, 2)]), torch.zeros(4, 8), torch.zeros(4, 8)
    unpatchify(tokens[:, :4], layout, 1)  # nothing is computed
    unpatchify(tokens, layout, 1, weight=weight)
    final_layer(tokens, weight, implementation="reference")
    assert {op: list(record) for op, record in engaged().items()} == {"unpatchify": ["torch"], "final_layer": ["reference"]}


CLIPS = [torch.zeros(3, 2, 4, 4), torch.zeros(3, 1, 3, 5)]
LAYOUT = layout_of(CLIPS, (1, 2, 2))
TOKENS = torch.zeros(LAYOUT.tokens, 12)
WEIGHT, KNOWN, BACK = torch.zeros(8, 12), torch.zeros(14, dtype=torch.bool), torch.zeros(12, 8)
TABLES = [torch.zeros(n, 8) for n in (4, 2, 3)]
WIDE, ROWS = torch.zeros(14, 8), torch.zeros(14, dtype=torch.int32)


def embed(**options):
    return patch_embed(CLIPS, WEIGHT, **options)


def project(x=WIDE, weight=BACK, bias=None, **options):
    return final_layer(x, weight, bias, **options)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: patchify([]), "clips: expected at least one clip, got none"),
        (lambda: patchify(CLIPS, (2, 2)), r"patch: expected three sides >= 1 \(t, h, w\), got \(2, 2\)"),
        (lambda: patchify(CLIPS, (1, 0, 2)), r"patch: expected three sides >= 1 \(t, h, w\), got \(1, 0, 2\)"),
        (lambda: patchify([CLIPS[0][0]]), r"clips\[0\]: expected .* T, H, W\), none of them 0, got \(2, 4, 4\)"),
        (lambda: patchify([CLIPS[0], CLIPS[1][:2]]), r"clips\[1\]: expected \(3, T, H, W\), none of them 0, got \(2, 1, 3, 5\)"),
        (lambda: patchify([CLIPS[0][:, :0]]), r"clips\[0\]: expected \(3, T, H, W\), none of them 0, got \(3, 0, 4, 4\)"),
        (
            lambda: patch_embed(CLIPS, torch.zeros(8, 11)),
            r"weight: expected \(dim, 12\) for 3 channels in patches of \(1, 2, 2\), got \(8, 11\)",
        ),
        (lambda: patch_embed(CLIPS, torch.zeros(8, 3, 1, 2, 2)), r"weight: expected \(dim, 12\) .* got \(8, 3, 1, 2, 2\)"),
        (lambda: patch_embed(CLIPS, torch.zeros(8, 12), torch.zeros(12)), r"bias: expected \(8,\), got \(12,\)"),
        (lambda: patch_embed([], torch.zeros(8, 12)), "clips: expected at least one clip, got none"),
        (lambda: unpatchify(TOKENS[:5], LAYOUT, 3), r"tokens: expected \(14, 12\) for 3 channels in patches of \(1, 2, 2\), got \(5, 12\)"),
        (lambda: unpatchify(TOKENS, LAYOUT, 2), r"tokens: expected \(14, 8\) for 2 channels .* got \(14, 12\)"),
        (lambda: unpatchify(TOKENS, LAYOUT, 3, sizes=[(2, 4, 4)]), "sizes: expected one for each of 2 clips, got 1"),
        (
            lambda: unpatchify(TOKENS, LAYOUT, 3, sizes=[(2, 4, 4), (1, 5, 5)]),
            r"sizes\[1\]: expected a size whose grid is \(1, 2, 3\), got \(1, 5, 5\)",
        ),
        (
            lambda: unpatchify(TOKENS, LAYOUT, 3, sizes=[(2, 4, 7), (1, 3, 5)]),
            r"sizes\[0\]: expected a size whose grid is \(2, 2, 2\), got \(2, 4, 7\)",
        ),
        (lambda: unpatchify(TOKENS, LAYOUT, 3, sizes=[(2, 4, -1), (1, 3, 5)]), r"sizes\[0\]: expected .* got \(2, 4, -1\)"),
        (lambda: unpatchify(TOKENS, LAYOUT, 3, sizes=[(2, 4), (1, 3, 5)]), r"sizes\[0\]: expected .* got \(2, 4\)"),
        (
            lambda: patchify([CLIPS[0], CLIPS[1].double()]),
            r"clips\[1\]: expected torch.float32 on cpu as the first, got torch.float64 on cpu",
        ),
        (
            lambda: patch_embed(TOKENS[0], WEIGHT),
            r"clips: expected a sequence of clips, or tokens \(tokens, channels\), got a tensor \(12,\)",
        ),
        (lambda: patch_embed(TOKENS, WEIGHT[:, 1:]), r"weight: expected \(dim, 12\) for these tokens, got \(8, 11\)"),
        (lambda: patch_embed(TOKENS[1:], WEIGHT, layout=LAYOUT), "clips: expected 14 tokens as in the layout, got 13"),
        (lambda: embed(layout=3), "layout: expected a VideoLayout, got int"),
        (
            lambda: embed(layout=VideoLayout.pack([(14, 1, 1)])),
            r"layout: expected the grids of the clips, .*\(2, 2, 2\).* got \[\(14, 1, 1\)\]",
        ),
        (lambda: embed(positions=WIDE[1:]), r"positions: expected \(14, 8\) or three tables, got \(13, 8\)"),
        (
            lambda: embed(positions=TABLES[:2], layout=LAYOUT),
            r"positions: expected \(tokens, 8\) or three tables \(n, 8\) .*, got \[\(4, 8\), \(2, 8\)\]",
        ),
        (
            lambda: embed(positions=TABLES),
            "layout: expected a VideoLayout, which says where each token lies in the tables of positions, got None",
        ),
        (
            lambda: embed(positions=[*TABLES[:2], TABLES[1]], layout=LAYOUT),
            r"layout: expected sides of at most \(2, 2\) tokens, as the tables of positions, got a clip of \(1, 2, 3\)",
        ),
        (lambda: embed(known=KNOWN), "known: expected it and known_weight together, got one of them alone"),
        (lambda: embed(known=KNOWN[1:], known_weight=WIDE[0]), r"known: expected bool \(14,\), got torch.bool \(13,\)"),
        (lambda: embed(known=KNOWN.int(), known_weight=WIDE[0]), r"known: expected bool \(14,\), got torch.int32 \(14,\)"),
        (lambda: embed(known=KNOWN, known_weight=TOKENS[0]), r"known_weight: expected \(8,\), got \(12,\)"),
        (lambda: embed(bias=torch.zeros(8, device="meta")), "bias: expected on cpu as the weight is, got on meta"),
        (lambda: embed(dtype=torch.int32), "dtype: expected a floating point dtype of 16 bits or more, got torch.int32"),
        (lambda: unpatchify(TOKENS, LAYOUT, 3, norm=Modulation(None, None)), "norm: expected None without a weight, got Modulation"),
        (lambda: unpatchify(WIDE[1:], LAYOUT, 3, weight=BACK), r"tokens: expected \(14, dim\), got \(13, 8\)"),
        (
            lambda: unpatchify(WIDE, LAYOUT, 2, weight=BACK),
            r"weight: expected \(8, dim\) for 2 channels in patches of \(1, 2, 2\), got \(12, 8\)",
        ),
        (lambda: project(WIDE[0]), r"tokens: expected \(tokens, dim\) of a floating point dtype, got torch.float32 \(8,\)"),
        (lambda: project(weight=WEIGHT), r"weight: expected \(channels, 8\), got \(8, 12\)"),
        (lambda: project(bias=WIDE[0]), r"bias: expected \(12,\), got \(8,\)"),
        (lambda: project(rows=ROWS), r"rows: expected None without a norm, got \(14,\)"),
        (lambda: project(norm=Modulation(None, None, "group")), "norm: expected a kind of 'layer' or 'rms', got 'group'"),
        (lambda: project(norm=Modulation(None, None, "rms", None, WIDE[0])), "norm: expected no bias, since an RMS norm has none"),
        (lambda: project(norm=Modulation(None, None, "rms", TOKENS[0])), r"norm: expected a weight \(8,\), got \(12,\)"),
        (lambda: project(norm=Modulation(TOKENS, None), rows=ROWS), r"norm: expected a shift \(rows, 8\), got \(14, 12\)"),
        (lambda: project(norm=Modulation(WIDE, WIDE)), "rows: expected the table row of each token along with shift and scale, got None"),
        (lambda: project(norm=Modulation(WIDE, WIDE), rows=ROWS[1:]), r"rows: expected int32 or int64 \(14,\), got torch.int32 \(13,\)"),
        (
            lambda: project(norm=Modulation(WIDE, WIDE[1:]), rows=ROWS),
            r"norm: expected as many rows of shift as of scale, got \(14, 8\) and",
        ),
        (lambda: embed(layout=LAYOUT.to("meta")), "layout: expected on cpu as the weight is, got on meta"),
        (lambda: patch_embed([clip.to("meta") for clip in CLIPS], WEIGHT), "clips: expected on cpu as the weight is, got on meta"),
    ],
)
def test_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_a_bias_of_another_dtype(implementation):
    """Half precision beside float32, as under autocast."""
    clips, weight, bias = [randn(3, 2, 4, 4)], randn(8, 12).bfloat16(), randn(8)
    found = patch_embed(clips, weight, bias, implementation=implementation)
    assert found.dtype == torch.bfloat16
    assert_close(found, patch_embed(clips, weight.double(), bias.double(), implementation="reference"), torch.bfloat16)
    found = final_layer(randn(5, 12), weight, bias, implementation=implementation)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_nothing_is_put_back_into_a_pack_without_clips():
    layout = VideoLayout.pack([], capacity=Capacity(1, 4, 16))
    assert unpatchify(torch.zeros(16, 8), layout, 3, weight=BACK) == []


def test_on_meta_tensors():
    found = patch_embed([clip.to("meta") for clip in CLIPS], WEIGHT.to("meta"))
    assert found.shape == (14, 8) and found.is_meta
