"""SANA-Video on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, assert_same, lengths_of_calls, logged, make, noise, run
from tubelet.engine.adapters import accelerate, ops

diffusers = pytest.importorskip("diffusers")


OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 12,
    "mlp_ratio": 1.5,
    "rope_max_seq_len": 32,
}


def words(*rows: str) -> torch.Tensor:
    """Which of the words are there, as a tokenizer tells it."""
    return torch.tensor([[int(word == "x") for word in row] for row in rows])


def call(size: tuple[int, int, int], mask: torch.Tensor | None, batch: int = 1, **more) -> dict:
    batch = batch if mask is None else len(mask)
    return {
        "hidden_states": noise(batch, 4, *size),
        "encoder_hidden_states": noise(batch, 7, 12),
        "encoder_attention_mask": mask,
        "timestep": torch.arange(1.0, batch + 1) * 100,
        **more,
    }


def known(batch: int, size: tuple[int, int, int], patch: tuple[int, int, int] = (1, 2, 2)) -> torch.Tensor:
    """Timesteps of tokens, zero for those of the first frame, as the pipeline makes them."""
    steps = torch.full((batch, 1, *(side // p for side, p in zip(size, patch, strict=True))), 700.0)
    steps[:, :, 0] = 0
    return steps


def build(**config):
    return lambda: diffusers.SanaVideoTransformer3DModel(**SIZES | config)


ONE, TWO, MASK = (2, 6, 4), (3, 10, 6), words("xxxxxxx", "xxx....")
MODELS = {
    "SANA-Video": Tiny(
        build(),
        {
            "one clip": call(ONE, words("xxxxx..")),
            "two clips, odd sizes": call(TWO, MASK),
            "holes in the texts": call(ONE, words("x.xx..x", ".x.....").float()),
            "without a mask": call(ONE, None, 2, controlnet_block_samples=(noise(2, 12, 32),)),
        },
        OPS,
    ),
    "SANA-Video, a timestep for each token": Tiny(
        build(num_layers=1),
        {"a known frame": call(TWO, MASK, timestep=known(2, TWO)), "one clip": call(ONE, MASK[:1], timestep=known(1, ONE))},
        OPS,
    ),
    "SANA-Video, guidance, other heads, other norms": Tiny(
        build(
            num_layers=1,
            guidance_embeds=True,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            qk_norm="layer_norm_across_heads",
            norm_elementwise_affine=True,
            attention_bias=True,
            patch_size=(1, 1, 1),
        ),
        {
            "two clips": call((2, 3, 5), MASK, guidance=torch.tensor([4.0, 5.0])),
            "a known frame": call((2, 3, 5), MASK[:1], guidance=torch.tensor([4.0]), timestep=known(1, (2, 3, 5), (1, 1, 1))),
        },
        OPS,
    ),
    "SANA-Video, no norms of queries and keys": Tiny(build(num_layers=1, qk_norm=None), {"two clips": call(TWO, MASK)}, OPS),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""

    def test_a_text_without_words_is_seen(self):
        tiny, inputs = MODELS["SANA-Video"], call(ONE, words("xx.....", "......."))
        model = make(tiny)
        with torch.no_grad():
            before = run(model, tiny, inputs)
            accelerate(model)
            assert_same(run(model, tiny, inputs), before, 2e-4)  # there -10,000 is added to all scores, which rounds them


class TestLean:
    """What is not made, and what the host does not wait for."""

    def test_padding_is_told_by_lengths(self, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        for case, expected in {"two clips, odd sizes": [7, 3], "holes in the texts": [4, 1]}.items():
            lengths.clear()
            log = logged(MODELS["SANA-Video"], case)
            assert lengths == [expected] * 4
            assert [op for op, _ in log.found].count("sort") == 1  # of the texts' tokens, for all blocks
            assert not [shape for shape in log.shapes() if shape[-2:] in ((45, 7), (45, 45), (12, 12), (7, 7))]

    def test_rows_of_modulation_are_of_timesteps(self, monkeypatch):
        monkeypatch.setattr(ops, "MOST_TIMESTEPS", 2)
        log = logged(MODELS["SANA-Video, a timestep for each token"], "a known frame")  # two clips of three frames of 15 tokens
        shapes = [shape for shape in log.shapes() if shape[-1:] == (192,) or shape[-2:] == (6, 32)]
        assert not [shape for shape in shapes if shape[0] == 90 or shape[:2] == (2, 45)]
        assert (6, 192) in shapes
