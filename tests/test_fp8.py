"""E4M3: rows against float64, and attention on them against its float64 definition on the numbers that they stand for."""

import pytest
import test_attention as attention_tests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import FEW_MASKS, LAYOUTS, definition, randn
from tolerance import FP8_SUMS, FP8_WEIGHTS, assert_close
from tubelet.kernels import FrameCausal, Full, Spatial, VideoLayout, attention, quantize_rows
from tubelet.kernels.fp8 import FP8, dequantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

try:
    import triton  # noqa: F401

    IMPLEMENTATIONS = ["torch", "triton"]
except ModuleNotFoundError:
    IMPLEMENTATIONS = ["torch"]

ALLOWED = {"torch": None, "triton": FP8_WEIGHTS}


ROWS = st.tuples(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 8, 24]), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), st.integers(0, 99)
)


@settings(max_examples=40, deadline=None)
@given(drawn=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows(dtype, drawn):
    *shape, size, seed = drawn
    x = (randn(*shape, dtype=torch.float64, seed=seed) * size).to(dtype)
    x8, scale = quantize_rows(x)
    assert x8.dtype == FP8 and x8.shape == x.shape and scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    back = dequantize_rows(x8, scale, torch.float64)
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    # half a step: 2^-4 of an element, or of the smallest normal number, 2^-6 of a scale
    assert ((back - x.double()).abs() <= torch.maximum(x.double().abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-6)).all()
    assert (x8.float().abs().amax(dim=-1)[largest[..., 0] > 0] == 448).all()
    reference8, reference_scale = quantize_rows(x, implementation="reference")
    assert_close(scale, reference_scale.double(), torch.float32)
    assert (x8.view(torch.uint8) != reference8.view(torch.uint8)).float().mean() <= 0.1  # at most ties that float32 decides otherwise


def test_rows_that_are_special():
    x = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0], [-448.0, 448.0]])
    x8, scale = quantize_rows(x)
    back = dequantize_rows(x8, scale)
    assert back[0].tolist() == [0, 0] and scale[0] == 1 and not back[1:3].isfinite().any() and back[3].tolist() == [-448, 448]
    assert quantize_rows(torch.zeros(0, 3, 8))[1].shape == (0, 3)


def test_scales_lie_head_by_head():
    assert quantize_rows(torch.randn(5, 3, 8))[1].stride() == (1, 5)


@pytest.mark.parametrize("x", [[1.0], torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=FP8)])
def test_rows_refused(x):
    with pytest.raises(TypeError, match="x: expected a tensor of float16, bfloat16, float32 or float64, got"):
        quantize_rows(x)


def quantised(layout, kv_layout=None, **shape):
    """(x8, scales, what they stand for)."""
    qkv = [x.to(DEVICE) for x in attention_tests.qkv_of(layout, kv_layout, **shape)]
    # Rows and clips of very different size, as keys and values of models have them.
    qkv = [x * torch.linspace(-3, 3, len(x), device=DEVICE).exp()[:, None, None] for x in qkv[:1]] + qkv[1:]
    qkv[2] = qkv[2] * torch.linspace(2, -6, len(qkv[2]), device=DEVICE).exp()[:, None, None]
    x8, scales = zip(*(quantize_rows(x) for x in qkv), strict=True)
    return x8, scales, [dequantize_rows(*each, torch.float64) for each in zip(x8, scales, strict=True)]


def on_device(pack):
    return VideoLayout.pack(**pack, device=DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name in ("image beside video", "text first", "known and text", "capacity")
        for mask in (FEW_MASKS[::2] if name == "image beside video" and DEVICE == "cpu" else FEW_MASKS)  # the largest
    ],
    ids=str,
)
def test_attention(name, mask, implementation):
    layout = on_device(LAYOUTS[name])
    x8, scales, exact = quantised(layout, heads=4, kv_heads=2, dim=32)
    out, lse = attention(*x8, layout, mask, scales=scales, return_lse=True, implementation=implementation)
    assert out.dtype == torch.bfloat16
    # Errors of the weights, in E4M3 too, belong to the values that they weigh: clip by clip, since these differ in size.
    wanted = definition(*exact, layout, mask)
    for clip in layout.clips:
        assert_close(out[clip.start : clip.stop], wanted[clip.start : clip.stop], torch.bfloat16, ALLOWED[implementation])
    _, wanted_lse = attention(*exact, layout, mask, return_lse=True, implementation="reference")
    seen = wanted_lse.isfinite()
    assert_close(lse[seen], wanted_lse[seen], torch.float32, FP8_SUMS if DEVICE == "cuda" and implementation == "triton" else None)
    assert torch.equal(lse.isfinite(), seen)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 128])
def test_head_dims(dim, implementation):
    layout = on_device({"grids": [(3, 3, 3), (1, 2, 5)], "text": [3, 0]})
    x8, scales, exact = quantised(layout, dim=dim)
    out = attention(*x8, layout, FrameCausal(), scales=scales, implementation=implementation)
    assert_close(out, definition(*exact, layout, FrameCausal()), torch.bfloat16, ALLOWED[implementation])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_attention_alone_and_in_a_pack(implementation):
    """Bit for bit, on views of a fused tensor."""
    layout, text = on_device({"grids": [(5, 2, 3), (1, 3, 3)]}), VideoLayout.segments([5, 17], device=DEVICE)
    x8, scales, _ = quantised(layout, text)
    k, v = torch.stack((x8[1], x8[2]), dim=1).unbind(1)
    out = attention(x8[0], k, v, layout, Full(), kv_layout=text, scales=scales, implementation=implementation)
    for i, (clip, words) in enumerate(zip(layout.clips, text.clips, strict=True)):
        rows, keys = slice(clip.start, clip.stop), slice(words.start, words.stop)
        one, its_text = on_device({"grids": [clip.grid]}), VideoLayout.segments([words.text_length], device=DEVICE)
        single_scales = scales[0][rows], scales[1][keys], scales[2][keys]
        single = attention(
            x8[0][rows], k[keys], v[keys], one, Full(), kv_layout=its_text, scales=single_scales, implementation=implementation
        )
        assert torch.equal(single, out[rows]), i


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_poisoned_clip_leaves_its_neighbours_untouched(implementation):
    layout = on_device({"grids": [(3, 2, 3)] * 3})
    x8, scales, _ = quantised(layout)
    clean = attention(*x8, layout, Spatial(), scales=scales, implementation=implementation)
    sick = [
        torch.cat((x.view(torch.uint8)[:18], torch.full_like(x.view(torch.uint8)[:18], 127), x.view(torch.uint8)[36:])).view(FP8)
        for x in x8
    ]
    out = attention(*sick, layout, Spatial(), scales=scales, implementation=implementation)
    others = [*range(18), *range(36, 54)]
    assert torch.equal(out[others], clean[others]) and out[18:36].isnan().all()


def test_refused():
    layout = on_device({"grids": [(1, 2, 2)]})
    x8, scales, exact = quantised(layout)
    for tensors, given_scales, error, words in [
        (x8, None, TypeError, r"q: expected .* \(float8_e4m3fn needs scales\), .* got torch.float8_e4m3fn"),
        (exact, scales, TypeError, "q: expected float8_e4m3fn with scales, .* got torch.float64"),
        (x8, scales[:2], ValueError, "scales: expected those of q, k and v, got 2"),
        (x8, (scales[0], scales[1], None), ValueError, r"scales: expected for v float32 \(4, 2\) on c.*, got NoneType"),
        (x8, (scales[0][:3], *scales[1:]), ValueError, r"scales: expected for q float32 \(4, 2\) on c.*, got torch.float32 \(3, 2\)"),
    ]:
        with pytest.raises(error, match=words):
            attention(*tensors, layout, Full(), scales=given_scales)
