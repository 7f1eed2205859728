"""Texts with padding that the host knows nothing of: `attention(..., text_lengths=...)`."""

import pytest
import torch
from test_attention import definition, leaves
from test_attention import qkv_of as on_the_cpu
from tolerance import assert_close
from tubelet.kernels import FrameCausal, Full, Spatial, Temporal, VideoLayout, attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton"]
ROOM = 20
GRIDS = [(3, 2, 3), (1, 4, 4), (2, 3, 2), (4, 1, 2)]
LENGTHS = [0, 20, 7, 1]
MASKS = [Full(), Spatial(), FrameCausal(chunk=2)]


def qkv_of(*args, **options) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(DEVICE) for x in on_the_cpu(*args, **options))


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cross() -> tuple[VideoLayout, VideoLayout, VideoLayout]:
    """Where queries and keys lie, and where the keys that are there would without padding."""
    return (
        VideoLayout.pack(GRIDS, device=DEVICE),
        VideoLayout.segments([ROOM] * 4, device=DEVICE),
        VideoLayout.segments(LENGTHS, device=DEVICE),
    )


def joint(text_first: bool = False) -> tuple[VideoLayout, VideoLayout, VideoLayout]:
    texts = ([ROOM] * 4, [ROOM] * 4, LENGTHS)
    return tuple(VideoLayout.pack(GRIDS, text=text, text_first=text_first, device=DEVICE) for text in texts)


CASES = {"cross": cross(), "text last": joint(), "text first": joint(text_first=True)}


def kept(padded: VideoLayout, short: VideoLayout) -> torch.Tensor:
    """Which tokens of one layout are in the other."""
    there = torch.zeros(padded.tokens, dtype=torch.bool)
    for a, b in zip(padded.clips, short.clips, strict=True):
        there[a.video_start : a.video_stop] = True
        there[a.text_start : a.text_start + b.text_length] = True
    return there.to(DEVICE)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_attention_to_what_is_there(name, mask, implementation, poison):
    layout, kv_layout, short = CASES[name]
    q, k, v = qkv_of(layout, kv_layout)
    there = kept(kv_layout, short)
    expected = definition(q, k[there], v[there], layout, mask, short)
    k, v = (x.masked_fill(~there[:, None, None], poison) for x in (k, v))
    how = {"kv_layout": kv_layout, "text_lengths": int32(LENGTHS), "implementation": implementation}
    assert_close(attention(q, k, v, layout, mask, **how), expected, torch.float32)
    out, lse = attention(q, k, v, layout, mask, return_lse=True, **how)
    assert_close(out, expected, torch.float32)
    _, expected_lse = attention(
        q.double(), k[there].double(), v[there].double(), layout, mask, kv_layout=short, return_lse=True, implementation="reference"
    )
    nothing = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing) and bool(nothing.any()) == (name == "cross")
    assert_close(lse[~nothing], expected_lse[~nothing], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, implementation, dtype):
    layout, kv_layout, short = CASES[name]
    there, do = kept(kv_layout, short), qkv_of(layout, seed=7)[0]
    for mask in MASKS:
        q, k, v = leaves(*qkv_of(layout, kv_layout, dtype=dtype))
        exact = leaves(q.detach(), k.detach()[there], v.detach()[there], dtype=torch.float64)
        attention(q, k, v, layout, mask, kv_layout=kv_layout, text_lengths=int32(LENGTHS), implementation=implementation).backward(
            do.to(dtype)
        )
        attention(*exact, layout, mask, kv_layout=short, implementation="reference").backward(do.to(dtype).double())
        for grad, reference in zip((q.grad, k.grad[there], v.grad[there]), (x.grad for x in exact), strict=True):
            assert_close(grad, reference, dtype)
        assert not k.grad[~there].any() and not v.grad[~there].any()


@pytest.mark.parametrize("name", CASES)
def test_full_lengths_change_no_bit(name):
    layout, kv_layout, _ = CASES[name]
    q, k, v = qkv_of(layout, kv_layout)
    for mask in MASKS:
        how = {"kv_layout": kv_layout, "implementation": "triton"}
        whole = attention(q, k, v, layout, mask, **how)
        for lengths in ([ROOM] * 4, [ROOM + 5] * 4):
            assert torch.equal(attention(q, k, v, layout, mask, text_lengths=int32(lengths), **how), whole)


def test_a_view_of_lengths_and_lengths_below_zero():
    layout, kv_layout, _ = CASES["cross"]
    q, k, v = qkv_of(layout, kv_layout)
    lengths = int32([[-3, 9], [20, 9], [7, 9], [1, 9]])[:, 0]
    for implementation in IMPLEMENTATIONS:
        ours = attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=lengths, implementation=implementation)
        same = attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=int32(LENGTHS), implementation=implementation)
        assert torch.equal(ours, same)


def test_compiled():
    layout, kv_layout, _ = CASES["text last"]
    q, k, v = leaves(*qkv_of(layout, kv_layout))

    def function(q, k, v, lengths):
        return attention(2 * q, k, v, layout, Full(), text_lengths=lengths)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [3, 4, 5, 6]):
        results = []
        for run in (function, compiled):
            for x in (q, k, v):
                x.grad = None
            out = run(q, k, v, int32(lengths))
            out.square().sum().backward()
            results.append([out, q.grad, k.grad, v.grad])
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()


def test_refused():
    layout, kv_layout, _ = CASES["cross"]
    q, k, v = qkv_of(layout, kv_layout)
    with pytest.raises(ValueError, match="^text_lengths: expected None with Temporal"):
        attention(q, k, v, layout, Temporal(), kv_layout=kv_layout, text_lengths=int32(LENGTHS))
    for lengths in (int32(LENGTHS[:3]), int32(LENGTHS).long(), int32([LENGTHS])):
        with pytest.raises(ValueError, match=r"^text_lengths: expected torch.int32 \(4,\)"):
            attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=lengths)
