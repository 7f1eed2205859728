"""Where "auto" leaves attention to the library: on Hopper, in long calls on views. What is a long call needs no GPU to be seen."""

import sys

import pytest
import torch
from tolerance import assert_close
from tubelet.kernels import Capacity, FrameCausal, Full, Spatial, Temporal, VideoLayout, attention, dispatch, engaged, reset_engaged
from tubelet.kernels.attention import choice

WAN, PAIR = (21, 30, 52), 4 * 12 * 128
"""A clip, and the FLOPs of a pair of its tokens."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def library(layout, mask, kv_layout=None):
    """Of each stretch, whether the library serves it, and its tokens."""
    found = choice.plan(PAIR, layout, mask, kv_layout or layout)
    assert not found or sum(each.queries for each in found) == layout.tokens
    return [(each.library, each.queries) for each in found]


@pytest.mark.parametrize("mask", [Full(), Spatial(), FrameCausal(chunk=3), FrameCausal(chunk=3, window=7)], ids=str)
def test_a_long_clip_is_left_to_the_library(mask):
    assert library(VideoLayout.pack([WAN]), mask) == [(True, 32760)]
    assert library(VideoLayout.pack([WAN] * 2), mask) == [(True, 32760)] * 2
    assert library(VideoLayout.pack([(5, 8, 8)] * 3), mask) == []


def test_short_clips_between_long_ones():
    small = (1, 16, 16)
    layout = VideoLayout.pack([small, WAN, small, (2, 4, 4), WAN, WAN])
    assert library(layout, Full()) == [(False, 256), (True, 32760), (False, 288), (True, 32760), (True, 32760)]


def test_text():
    layout = VideoLayout.pack([WAN])
    assert library(VideoLayout.pack([WAN], text=[226]), Full()) == [(True, 32986)]
    assert library(layout, Full(), VideoLayout.segments([512])) == [(True, 32760)]
    assert library(layout, Full(), VideoLayout.segments([500])) == []  # filled up to a multiple of 16, of which not all is seen
    assert library(VideoLayout.pack([WAN], text=[226]), Spatial()) == []  # each frame sees the text too: keys are gathered
    assert library(layout, Full(), VideoLayout.segments([0])) == []


@pytest.mark.parametrize("mask", [Full(), Spatial(), FrameCausal(chunk=2)], ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_stretches_are_the_whole(monkeypatch, mask, cross):
    """Forwards and backwards, and a clip is the same in any pack, bit for bit."""
    monkeypatch.setattr(choice, "LEAST_FLOPS", 4 * 2 * 16 * 20**2)
    monkeypatch.setattr(dispatch, "triton_first", lambda x: True)  # as on a GPU
    monkeypatch.setattr(sys.modules[attention.__module__], "stretches", lambda q, *rest: choice.plan(4 * 2 * 16, *rest))
    grids, lengths = [(1, 2, 2), (4, 5, 6), (2, 2, 2), (1, 1, 3), (3, 6, 5)], [3, 32, 0, 7, 16]
    layout = VideoLayout.pack(grids, device=DEVICE)
    kv_layout = VideoLayout.segments(lengths, device=DEVICE) if cross else layout
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(each.tokens, 2, 16, generator=draw).to(DEVICE).requires_grad_() for each in (layout, kv_layout, kv_layout))
    direction = torch.randn(q.shape, generator=draw).to(DEVICE)
    results = []
    for implementation in ("auto", "reference"):
        reset_engaged()
        out = attention(q, k, v, layout, mask, kv_layout=kv_layout, implementation=implementation)
        results.append((out, *torch.autograd.grad(out, (q, k, v), direction)))
        assert engaged()["attention"].keys() == ({"torch", "triton"} if implementation == "auto" else {"reference"})
    for a, b in zip(*results, strict=True):
        assert_close(a, b.double(), torch.float32)
    for i, (clip, other) in enumerate(zip(layout.clips, kv_layout.clips, strict=True)):
        mine, keys = slice(clip.start, clip.stop), slice(other.start, other.stop)
        alone = VideoLayout.pack(grids[i : i + 1], device=DEVICE)
        kv_alone = VideoLayout.segments(lengths[i : i + 1], device=DEVICE) if cross else alone
        assert torch.equal(attention(q[mine], k[keys], v[keys], alone, mask, kv_layout=kv_alone), results[0][0][mine])


def test_a_cpu_and_other_gpus_have_the_kernels():
    layout = VideoLayout.pack([WAN])
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16).expand(layout.tokens, -1, -1)
    assert choice.stretches(q, layout, Full(), layout) == []


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper")
@pytest.mark.parametrize("mask", [Full(), Spatial(), FrameCausal(chunk=3)], ids=str)
def test_on_hopper(mask):
    """It is taken, forwards and backwards, is as the kernels are, and a clip's result is the same in a pack, bit for bit."""
    alone, pack = VideoLayout.pack([(9, 30, 52)], device="cuda"), VideoLayout.pack([(9, 30, 52)] * 2, device="cuda")
    qkv = torch.randn(pack.tokens, 3, 8, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    direction = torch.randn(pack.tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    results = []
    for layout, implementation in ((pack, "auto"), (pack, "triton"), (alone, "auto")):
        reset_engaged()
        out = attention(*qkv[: layout.tokens].unbind(1), layout, mask, implementation=implementation)
        results.append((out.detach(), *torch.autograd.grad(out, qkv, direction[: layout.tokens])))
        assert list(engaged()["attention"]) == ["triton" if implementation == "triton" else "torch"]
    for a, b in zip(*results[:2], strict=True):
        assert_close(a, b.double(), torch.bfloat16)
    assert torch.equal(results[2][0], results[0][0][: alone.tokens])


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper")
def test_what_hopper_keeps_for_the_kernels():
    """Along time, other dtypes, layouts that are refilled, log-sum-exps, and where results are to be the same each time."""

    def took(layout, mask, dtype=torch.bfloat16, **options):
        q = torch.zeros(layout.tokens, 8, 64, device="cuda", dtype=dtype)
        reset_engaged()
        attention(q, q, q, layout, mask, **options)
        return list(engaged()["attention"])

    layout = VideoLayout.pack([(9, 30, 52)], device="cuda")
    assert took(layout, Full()) == ["torch"]
    assert took(layout, Temporal()) == took(layout, Full(), torch.float32) == took(layout, Full(), return_lse=True) == ["triton"]
    assert took(VideoLayout.pack([(9, 30, 52)], capacity=Capacity(1, 9, 15000), device="cuda"), Full()) == ["triton"]
    torch.use_deterministic_algorithms(True)
    try:
        assert took(layout, Full()) == ["triton"]
    finally:
        torch.use_deterministic_algorithms(False)
