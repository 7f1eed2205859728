"""EasyAnimate on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import (
    AdapterTests,
    Tiny,
    assert_same,
    logged,
    look_from_outside,
    make,
    noise,
)
from tubelet.engine.adapters import accelerate, functions, ops

diffusers = pytest.importorskip("diffusers")


OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "time_embed_dim": 16,
    "text_embed_dim": 16,
}
ONE, TWO = (2, 6, 4), (3, 10, 6)


def call(batch: int, size: tuple[int, int, int], words: int = 5, **more) -> dict:
    return {
        "hidden_states": noise(batch, 4, *size),
        "timestep": torch.arange(1, batch + 1) * 100,
        "encoder_hidden_states": noise(batch, words, 16),
        **more,
    }


def build(**config):
    return lambda: diffusers.EasyAnimateTransformer3DModel(**SIZES | config)


PLAIN = {"one clip": call(1, ONE), "two clips, odd sizes": call(2, TWO)}
MODELS = {
    "EasyAnimate": Tiny(build(), PLAIN | {"one timestep": call(2, TWO) | {"timestep": torch.tensor([300])}}, OPS),
    "EasyAnimate, one stream": Tiny(build(mmdit_layers=1, norm_elementwise_affine=False), PLAIN, OPS),
    "EasyAnimate, with inpainting": Tiny(
        build(in_channels=9, num_layers=1), {"a known frame": call(2, TWO, inpaint_latents=noise(2, 5, *TWO))}, OPS
    ),
    "EasyAnimate, with control": Tiny(
        build(in_channels=12, num_layers=1),
        {
            "one clip": call(1, ONE, control_latents=noise(1, 8, *ONE)),
            "and a known frame": call(2, TWO, control_latents=noise(2, 5, *TWO), inpaint_latents=noise(2, 3, *TWO)),
        },
        OPS,
    ),
    "EasyAnimate, two texts": Tiny(
        build(text_embed_dim_t5=16, add_norm_text_encoder=True, after_norm=True),
        {"two clips, odd sizes": call(2, TWO, encoder_hidden_states_t5=noise(2, 3, 16)), "one text": call(1, ONE)},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestWhatIsMade:
    """Neither masks of pairs nor copies of tokens, and one table of angles."""

    @pytest.mark.parametrize("name", MODELS)
    def test_copies(self, name, monkeypatch):
        look_from_outside(monkeypatch, ops, functions)
        tiny = MODELS[name]
        case = next(reversed(tiny.inputs))
        inputs = tiny.inputs[case]
        batch, _, frames, height, width = inputs["hidden_states"].shape
        video = frames * height * width // 4
        text = sum(inputs[each].shape[1] for each in ("encoder_hidden_states", "encoder_hidden_states_t5") if each in inputs)
        model = make(tiny)
        accelerate(model)
        log = logged(tiny, case, model)
        joint, channels = video + text, 32
        kinds = [layer.attn1.add_q_proj is not None for layer in model.transformer_blocks]
        # Queries, keys and values of two streams are put together, or what they are made of in one. The product after attention wants
        # the video without the text.
        expected = [(batch, video, channels)] * (len(kinds) if batch > 1 else 0)
        expected += [(batch, joint, 2, 16)] * 3 * sum(kinds) + [(batch, joint, channels)] * (len(kinds) - sum(kinds))
        assert sorted(shape for shape in log.copies(batch * video * channels) if len(shape) < 5) == sorted(expected)  # 5: of pixels
        assert not [shape for shape in log.shapes() if sum(side in (joint, video) for side in shape) > 1]
        assert len([shape for shape in log.shapes("cat") if shape[:3] == (frames, height // 2, width // 2)]) == 2

    def test_angles_are_made_where_the_clips_are(self):
        model = make(MODELS["EasyAnimate"])
        before = model.rope_embedding(noise(1, 4, *TWO))
        accelerate(model)
        assert_same(list(model.rope_embedding(noise(1, 4, *TWO))), list(before), 0)
        assert all(table.is_meta for table in model.rope_embedding(torch.empty(1, 4, *TWO, device="meta")))


class TestMasks:
    """Of pairs, as a call of an attention module alone can have them."""

    def test_of_pairs(self):
        model = make(MODELS["EasyAnimate"])
        attn = model.transformer_blocks[0].attn1
        inputs = {"hidden_states": noise(2, 6, 32), "encoder_hidden_states": noise(2, 3, 32), "attention_mask": noise(9, 9) > 0}
        with torch.no_grad():
            before = list(attn(**inputs))
            accelerate(model)
            assert_same(list(attn(**inputs)), before)
