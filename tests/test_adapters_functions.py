"""Attention with the signatures of other code bases, and as a back end of diffusers: what SDPA computes of the same."""

import pytest
import torch
import torch.nn.functional as F
from adapter_checks import assert_same
from tubelet.engine.adapters import comfy_attention, flash_attention, hunyuan_attention, register_diffusers_backend, use_diffusers_backend
from tubelet.engine.adapters.functions import masked_attention
from tubelet.kernels import engaged, reset_engaged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qkv(batch: int = 2, queries: int = 9, keys: int = 7, heads: int = 4, kv_heads: int = 4, head_dim: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, tokens, n, head_dim, device=DEVICE) for tokens, n in shapes]


def sdpa(q, k, v, mask=None, **how) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **how).transpose(1, 2)


def there(lengths: list[int], keys: int) -> torch.Tensor:
    return torch.arange(keys, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


@pytest.fixture(autouse=True)
def ran():
    reset_engaged()


class TestFlashAttention:
    @pytest.mark.parametrize("kv_heads", [4, 2])
    @pytest.mark.parametrize("lengths", [None, [7, 3], torch.tensor([1, 7])])
    def test_is_attention_to_the_keys_that_are_there(self, lengths, kv_heads):
        q, k, v = qkv(kv_heads=kv_heads)
        mask = None if lengths is None else there([int(n) for n in lengths], 7)
        expected = sdpa(q, k, v, None if mask is None else mask[:, None, None])
        if mask is not None:
            k, v = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (k, v))
        lens = torch.tensor(lengths) if isinstance(lengths, list) else lengths
        assert_same([flash_attention(q, k, v, k_lens=lens, dtype=torch.float16).float()], [expected], 1e-5 if DEVICE == "cpu" else 2e-3)
        assert "attention" in engaged()

    def test_scales_and_causal(self):
        q, k, v = qkv(keys=9)
        q, k, v = (x.bfloat16() for x in (q, k, v)) if DEVICE == "cuda" else (q, k, v)
        ours = flash_attention(q, k, v, softmax_scale=0.3, q_scale=0.5, causal=True)
        assert_same(
            [ours.float()], [sdpa(q.float() * 0.5, k.float(), v.float(), scale=0.3, is_causal=True)], 1e-5 if DEVICE == "cpu" else 1e-2
        )

    @pytest.mark.parametrize(
        ("how", "name"),
        [({"dropout_p": 0.1}, "dropout_p"), ({"window_size": (3, 0)}, "window_size"), ({"causal": True}, "causal")],
    )
    def test_names_what_it_does_not_do(self, how, name):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            flash_attention(*qkv(), **how)


class TestHunyuanAttention:
    def test_padding_by_sequence_lengths(self):
        q, k, v = qkv(queries=8, keys=8)
        lengths = [5, 8]
        ends = torch.tensor([0, 5, 8, 16, 16], dtype=torch.int32, device=DEVICE)
        out = hunyuan_attention(q, k, v, "flash", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=8, max_seqlen_kv=8, batch_size=2)
        expected = sdpa(q, k, v, there(lengths, 8)[:, None, None]).flatten(2)
        for i, length in enumerate(lengths):
            assert_same([out[i, :length]], [expected[i, :length]])

    @pytest.mark.parametrize("mode", ["torch", "vanilla"])
    def test_masks_of_keys_and_of_pairs(self, mode):
        q, k, v = qkv()
        keys = there([2, 6], 7)
        assert_same([hunyuan_attention(q, k, v, mode, attn_mask=keys)], [sdpa(q, k, v, keys[:, None, None]).flatten(2)])
        assert "attention" in engaged()
        pairs = torch.rand(2, 1, 9, 7, device=DEVICE) > 0.2
        assert_same([hunyuan_attention(q, k, v, mode, attn_mask=pairs)], [sdpa(q, k, v, pairs).flatten(2)])

    def test_names_what_it_does_not_do(self):
        with pytest.raises(ValueError, match=r"^mode: expected"):
            hunyuan_attention(*qkv(), "sage")
        with pytest.raises(ValueError, match=r"^cu_seqlens_kv: expected"):
            hunyuan_attention(*qkv(), "flash", cu_seqlens_kv=torch.zeros(3, dtype=torch.int32))


def comfy(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **more) -> torch.Tensor:
    """What ComfyUI's function for torch computes."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=more.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class TestComfyAttention:
    @pytest.mark.parametrize("skip_reshape", [False, True])
    @pytest.mark.parametrize("skip_output_reshape", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_is_their_function(self, skip_reshape, skip_output_reshape, masked):
        q, k, v = (x.transpose(1, 2).contiguous() if skip_reshape else x.flatten(2) for x in qkv())
        mask = there([3, 7], 7)[:, None, None] if masked else None
        how = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "scale": 0.2}

        def never(*args, **kwargs):
            raise AssertionError("this is served")

        ours = comfy_attention(never, q, k, v, 4, mask=mask, transformer_options={}, **how)
        assert_same([ours], [comfy(q, k, v, 4, mask=mask, **how)])

    @pytest.mark.parametrize("masked", ["pairs", "bias"])
    def test_what_is_not_served_goes_to_their_function(self, masked):
        q, k, v = (x.flatten(2) for x in qkv())
        mask = torch.randn(2, 9, 7, device=DEVICE)
        mask = mask > 0 if masked == "pairs" else mask
        assert torch.equal(comfy_attention(comfy, q, k, v, 4, mask=mask), comfy(q, k, v, 4, mask=mask))
        assert not engaged()


class TestMaskedAttention:
    def test_a_bias_is_not_taken_for_a_mask(self):
        q, k, v = qkv()
        bias = torch.randn(2, 1, 1, 7, device=DEVICE)
        assert_same([masked_attention(q, k, v, bias)], [sdpa(q, k, v, bias)])

    def test_padding_anywhere(self):
        q, k, v = qkv()
        mask = torch.rand(2, 1, 1, 7, device=DEVICE) > 0.4
        assert_same([masked_attention(q, k, v, mask)], [sdpa(q, k, v, mask)])
        assert "attention" in engaged()


class TestBackend:
    diffusers = pytest.importorskip("diffusers")

    def model(self):
        from test_adapters_wan import build

        torch.manual_seed(0)
        return build(num_layers=2)().eval().to(DEVICE)

    def test_serves_one_model_and_is_no_default(self):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry
        from test_adapters_wan import call

        default = _AttentionBackendRegistry.get_active_backend()
        ours, theirs = self.model(), self.model()
        inputs = {name: x.to(DEVICE) for name, x in call(2, (2, 4, 6), 5).items()}
        with torch.no_grad():
            names = use_diffusers_backend(ours)
            assert sorted(names) == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
            out = ours(**inputs).sample
            assert engaged()["attention"]
            reset_engaged()
            assert_same([out], [theirs(**inputs).sample])
            assert not engaged()
        assert _AttentionBackendRegistry.get_active_backend() == default

    def test_by_context_and_by_name(self):
        from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

        assert register_diffusers_backend() == register_diffusers_backend() == AttentionBackendName("tubelet").value
        q, k, v = qkv()
        with attention_backend("tubelet"):
            assert_same([dispatch_attention_fn(q, k, v)], [sdpa(q, k, v)])
        mask = there([3, 5], 7)
        assert_same([dispatch_attention_fn(q, k, v, mask, backend="tubelet")], [sdpa(q, k, v, mask[:, None, None])])
        assert engaged()["attention"]
        with pytest.raises(ValueError, match=r"^dropout_p: expected none"):
            dispatch_attention_fn(q, k, v, dropout_p=0.5, backend="tubelet")
