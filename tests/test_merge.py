"""The log-sum-exp of attention, and results over parts of the keys joined by it."""

import pytest
import torch
from test_attention import FEW_MASKS, definition, qkv_of
from tolerance import assert_close
from tubelet.kernels import Capacity, FrameCausal, Full, VideoLayout, attention, merge_attention

IMPLEMENTATIONS = ["torch", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
def test_log_sum_exp(mask, dtype, implementation):
    layout = VideoLayout.pack([(3, 2, 2), (1, 3, 1)], text=[2, 0], capacity=Capacity(3, 5, 20))
    q, k, v = qkv_of(layout, heads=4, kv_heads=2, dtype=dtype)
    out, lse = attention(q, k, v, layout, mask, return_lse=True, implementation=implementation)
    allowed = mask.allowed(layout.coordinates[:, None], layout.coordinates[None, :])
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, dim=1)) * q.shape[2] ** -0.5
    wanted = logits.masked_fill(~allowed, -torch.inf).logsumexp(dim=2)
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse[:, layout.used_tokens :].isneginf().all()
    assert (lse[:, : layout.used_tokens] - wanted[:, : layout.used_tokens]).abs().max() < {torch.bfloat16: 0.05}.get(dtype, 1e-5)
    assert_close(out, definition(q, k, v, layout, mask), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_text_and_video_apart_and_together(dtype, implementation):
    layout = VideoLayout.pack([(3, 2, 2), (2, 3, 1)])
    text = VideoLayout.segments([5, 0])
    both = VideoLayout.pack([(3, 2, 2), (2, 3, 1)], text=[5, 0])
    q, k, v = qkv_of(layout, both, dtype=dtype)
    is_text = both.coordinates.text
    parts = [
        attention(q, k[rows], v[rows], layout, FrameCausal(), kv_layout=where, return_lse=True, implementation=implementation)
        for rows, where in ((~is_text, layout), (is_text, text))
    ]
    out, lse = merge_attention(*zip(*parts, strict=True))
    _, wanted_lse = attention(q, k, v, layout, FrameCausal(), kv_layout=both, return_lse=True, implementation="reference")
    assert_close(out, definition(q, k, v, layout, FrameCausal(), both), dtype)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_parts_that_no_query_sees():
    layout = VideoLayout.pack([(1, 2, 2)])
    text = VideoLayout.segments([0])
    q, k, v = qkv_of(layout)
    nothing = attention(q, k[:0], v[:0], layout, Full(), kv_layout=text, return_lse=True)
    everything = attention(q, k, v, layout, Full(), return_lse=True)
    out, lse = merge_attention(*zip(nothing, everything, strict=True))
    torch.testing.assert_close((out, lse), everything)
    out, lse = merge_attention(*zip(nothing, nothing, strict=True))
    assert not out.any() and lse.isneginf().all()


def test_what_does_not_fit_is_named():
    out, lse = torch.zeros(4, 2, 8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="outs, lses: expected equally many"):
        merge_attention([out], [])
    with pytest.raises(ValueError, match=r"outs\[1\], lses\[1\]: expected \(4, 2, 8\) and \(heads, tokens\), got \(4, 2, 8\) and \(4, 2\)"):
        merge_attention([out, out], [lse, lse.T])
