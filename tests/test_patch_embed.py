"""Clips to tokens and back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close
from tubelet.kernels import Capacity, VideoLayout, grid_of, patch_embed, patchify, unpatchify

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


CLIPS = [torch.zeros(3, 2, 4, 4), torch.zeros(3, 1, 3, 5)]
LAYOUT = layout_of(CLIPS, (1, 2, 2))
TOKENS = torch.zeros(LAYOUT.tokens, 12)


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
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
