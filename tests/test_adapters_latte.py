"""Latte on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, assert_same, logged, look_from_outside, make, noise, run
from tubelet.engine.adapters import accelerate, ops

diffusers = pytest.importorskip("diffusers")


OPS = frozenset({"attention", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 6,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 16,
    "video_length": 3,
}
WORDS = 6


def call(batch: int, size: tuple[int, int, int], **more) -> dict:
    return {
        "hidden_states": noise(batch, 4, *size),
        "timestep": torch.arange(1, batch + 1) * 100,
        "encoder_hidden_states": noise(batch, WORDS, 16),
        **more,
    }


def build(**config):
    return lambda: diffusers.LatteTransformer3DModel(**SIZES | config)


ONE, TWO = (3, 8, 8), (3, 10, 6)
SEEN = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]]).bool().repeat_interleave(3, dim=0)  # of each frame
OF_FRAMES = torch.stack([torch.roll(SEEN[0], i) for i in range(6)])  # each of its own
BIAS = ((~SEEN).float() * -10000.0)[:, None]
MODELS = {
    "Latte": Tiny(
        build(),
        {
            "one clip": call(1, ONE),
            "two clips, odd sizes": call(2, TWO),
            "texts with masks": call(2, TWO, encoder_attention_mask=SEEN),
            "texts with masks to add": call(2, TWO, encoder_attention_mask=BIAS),
            "texts with masks of frames": call(2, TWO, encoder_attention_mask=OF_FRAMES[:, None]),
            "a mask of pairs": call(2, TWO, encoder_attention_mask=BIAS.expand(-1, 15, -1)),
            "within frames": call(2, TWO, enable_temporal_attentions=False),
            "an image": call(2, (1, 8, 8)),
        },
        OPS,
    ),
    "Latte, plain norms": Tiny(
        build(norm_type="layer_norm", norm_elementwise_affine=True, activation_fn="geglu", num_layers=1),
        {"two clips, odd sizes": call(2, TWO), "texts with masks": call(2, TWO, encoder_attention_mask=SEEN)},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestLayout:
    """Tokens are never brought into another order."""

    @pytest.mark.parametrize("case", ["two clips, odd sizes", "texts with masks"])
    def test_nothing_is_transposed_or_repeated(self, case, monkeypatch):
        look_from_outside(monkeypatch, ops)
        log = logged(MODELS["Latte"], case)
        assert not log.copies(2 * 45 * 32)  # nor are there masks of pairs, which are larger
        made = [name for name, shapes in log.found for shape in shapes if shape[:2] == (6, WORDS)]  # for each frame, from its mask alone
        assert ("index" in made) == (case == "texts with masks") and not {"mm", "addmm", "repeat_interleave"} & set(made)

    def test_temporal_positions_are_added_once(self):
        model = make(MODELS["Latte"])
        accelerate(model)
        with torch.no_grad():
            before = run(model, MODELS["Latte"], call(1, ONE))[0]
            model.temp_pos_embed.zero_()
            assert not torch.allclose(run(model, MODELS["Latte"], call(1, ONE))[0], before)


class TestOthers:
    """What others put in the way of `accelerate`."""

    def test_feed_forwards_in_chunks(self):
        tiny = MODELS["Latte"]
        model, inputs = make(tiny), tiny.inputs["two clips, odd sizes"]
        with torch.no_grad():
            before = run(model, tiny, inputs)
            accelerate(model)
            model.transformer_blocks[1].set_chunk_feed_forward(3, dim=0)  # of frames, which clips are no multiple of
            assert_same(run(model, tiny, inputs), before)
