"""UNets with temporal transformers, AnimateDiff's above all, on tubelet's kernels: the same numbers."""

import copy
from dataclasses import replace

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, assert_same, logged, look_from_outside, make, noise, run
from tubelet.engine.adapters import accelerate, ops

diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin, SplitInferenceModule  # noqa: E402
from tubelet.engine.adapters import animatediff  # noqa: E402

OPS = frozenset({"attention", "modulated_norm", "gated_residual", "group_norm_silu"})
SIZES = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion",),
    "up_block_types": ("CrossAttnUpBlockMotion",),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 4,
}
TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
BLOCKS = {"down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",)}


def call(batch: int, size: tuple[int, int, int], texts: int = 0, **more) -> dict:
    """texts: how many there are; AnimateDiff's pipelines give one for each frame."""
    return {
        "sample": noise(batch, 4, *size),
        "timestep": torch.arange(1, batch + 1) * 100,
        "encoder_hidden_states": noise(texts or batch * size[0], 5, 16),
        **more,
    }


def residuals(size: tuple[int, int], frames: int) -> tuple[torch.Tensor, ...]:
    """As a control net gives them."""
    (h, w), sides = size, ((16, 1), (16, 1), (16, 2), (32, 2))
    return tuple(noise(frames, channels, h // by, w // by) for channels, by in sides)


MODELS = {
    "AnimateDiff": Tiny(
        lambda: diffusers.UNetMotionModel(**SIZES | MOTION),
        {"one clip": call(1, (3, 8, 4)), "two clips, odd sizes": call(2, (2, 6, 10)), "images": call(2, (1, 4, 4))},
        OPS,
    ),
    "a temporal transformer": Tiny(
        lambda: diffusers.TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=8, attention_bias=True, dropout=0.0,
            activation_fn="gelu", double_self_attention=False, positional_embeddings="sinusoidal", num_positional_embeddings=4,
        ),
        {"two clips": {"hidden_states": noise(6, 32, 3, 5), "num_frames": 3}},
        OPS,
    ),
    "AnimateDiff XL": Tiny(
        lambda: diffusers.UNetMotionModel(
            **SIZES | MOTION | TWO_LEVELS, use_linear_projection=True, use_motion_mid_block=False, temporal_transformer_layers_per_block=2,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56,
        ),
        {
            "two clips": call(2, (4, 8, 4), added_cond_kwargs={"text_embeds": noise(2, 8), "time_ids": noise(2, 6)})
            | {"down_block_additional_residuals": residuals((8, 4), 8), "mid_block_additional_residual": noise(8, 32, 4, 2)}
        },
        OPS,
    ),
    "ModelScope": Tiny(
        lambda: diffusers.UNet3DConditionModel(**SIZES | BLOCKS, attention_head_dim=4),
        {"two clips": call(2, (3, 8, 4), texts=2)},
        OPS,
    ),
    "I2VGen-XL": Tiny(
        lambda: diffusers.I2VGenXLUNet(**SIZES | BLOCKS, attention_head_dim=4),
        {
            "two clips": call(2, (3, 8, 4), texts=2)
            | {"fps": torch.tensor([8, 16]), "image_latents": noise(2, 4, 3, 8, 4), "image_embeddings": noise(2, 16)}
        },
        OPS,
    ),
    "a temporal transformer with texts": Tiny(
        lambda: diffusers.TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=8, cross_attention_dim=32,
            double_self_attention=False,
        ),
        {
            "of its own": {"hidden_states": noise(6, 32, 3, 5), "num_frames": 3},
            "of each site": {"hidden_states": noise(6, 32, 3, 5), "num_frames": 3, "encoder_hidden_states": noise(30, 4, 32)},
        },
        OPS,
    ),
}  # fmt: skip


class TestModels(AdapterTests):
    """Of this file's MODELS."""


def seen(model: torch.nn.Module, name: str = "AnimateDiff") -> list[torch.Tensor]:
    with torch.no_grad():
        return [each for inputs in list(MODELS[name].inputs.values())[:2] for each in run(model, MODELS[name], inputs)]


class TestLayout:
    """Tokens of temporal transformers are never brought into another order, besides where they come from images."""

    @pytest.mark.parametrize(("last", "copies"), [(False, 1), (True, 0)])
    def test_nothing_is_transposed(self, last, copies, monkeypatch):
        tiny = MODELS["a temporal transformer"]
        inputs = dict(tiny.inputs["two clips"])
        if last:
            inputs["hidden_states"] = inputs["hidden_states"].contiguous(memory_format=torch.channels_last)
        look_from_outside(monkeypatch, ops, animatediff)
        log = logged(replace(tiny, inputs={"two clips": inputs}), "two clips")
        assert len(log.copies(6 * 15 * 32)) == copies


class TestOthers:
    """What others put in the way of `accelerate`."""

    motion = "down_blocks.0.motion_modules.0.transformer_blocks.0"

    def test_fused_projections(self):
        model = make(MODELS["AnimateDiff"])
        before = seen(model)
        model.fuse_qkv_projections()
        accelerate(model)
        assert_same(seen(model), before)

    def test_blocks_that_come_later(self):
        model = make(MODELS["AnimateDiff"])
        before, block = seen(model), copy.deepcopy(model.get_submodule(self.motion))
        accelerate(model)
        model.set_submodule(self.motion, block)
        assert_same(seen(model), before)

    def test_feed_forwards_in_chunks(self):
        model = make(MODELS["AnimateDiff"])
        before = seen(model)
        accelerate(model)
        model.get_submodule(self.motion).set_chunk_feed_forward(4, dim=0)  # of sites
        model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0").set_chunk_feed_forward(2, dim=1)
        assert_same(seen(model), before)

    @pytest.mark.parametrize("precision", [None, "fp8"])
    def test_inference_in_parts(self, precision):
        model = make(MODELS["AnimateDiff"])
        accelerate(model, precision=precision)
        before = seen(model)
        AnimateDiffFreeNoiseMixin._enable_split_inference_motion_modules_(None, [model.down_blocks[0].motion_modules[0]], 2)
        assert any(isinstance(module, SplitInferenceModule) for module in model.modules())
        assert_same(seen(model), before, 1e-5 if precision is None else 0.02)
