"""Wan and what shares its blocks, on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, noise

diffusers = pytest.importorskip("diffusers")

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def call(batch: int, size: tuple[int, int, int], words: int = 12, **more) -> dict:
    return {
        "hidden_states": noise(batch, more.pop("channels", 4), *size),
        "timestep": torch.arange(1, batch + 1) * 100,
        "encoder_hidden_states": noise(batch, words, 16),
        **more,
    }


def per_token(batch: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Timesteps of tokens as for a known first frame: zero there."""
    frame = (size[1] // 2) * (size[2] // 2)
    steps = torch.full((batch, size[0] * frame), 700)
    steps[:, :frame] = 0
    steps[-1, frame : 2 * frame] = 300
    return steps


def build(**config):
    return lambda: diffusers.WanTransformer3DModel(**SIZES | config)


MODELS = {
    "Wan 2.1": Tiny(build(num_layers=2), {"one clip": call(1, (2, 6, 4)), "two clips, odd sizes": call(2, (3, 10, 6), 7)}, OPS),
    "Wan 2.1, image to video": Tiny(
        build(image_dim=8, added_kv_proj_dim=32),
        {"with an image": call(1, (1, 4, 4), 512, encoder_hidden_states_image=noise(1, 5, 8))},
        OPS,
    ),
    "Wan 2.2, a timestep for each token": Tiny(
        build(),
        {"a known frame": call(2, (3, 4, 4)) | {"timestep": per_token(2, (3, 4, 4))}, "one timestep": call(1, (2, 4, 4))},
        OPS,
    ),
}

VACE = {"control_hidden_states": noise(2, 6, 2, 6, 4)}
ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 8,
    "added_kv_proj_dim": 32,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}
MODELS |= {
    "Wan VACE": Tiny(
        lambda: diffusers.WanVACETransformer3DModel(**SIZES | {"num_layers": 2}, vace_layers=[0, 1], vace_in_channels=6),
        {
            "with control": call(2, (2, 6, 4)) | VACE,
            "with weights of control": call(2, (2, 6, 4)) | VACE | {"control_hidden_states_scale": torch.tensor([0.5, 2.0])},
        },
        OPS - {"final_layer"},
    ),
    "Wan Animate": Tiny(
        lambda: diffusers.WanAnimateTransformer3DModel(**SIZES | ANIMATE),
        {
            "one clip": call(1, (3, 2, 4), 512, channels=12, encoder_hidden_states_image=noise(1, 5, 8))
            | {"pose_hidden_states": noise(1, 4, 2, 2, 4), "face_pixel_values": noise(1, 3, 5, 16, 16)},
        },
        OPS - {"final_layer"},
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""
