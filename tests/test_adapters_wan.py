"""Wan and what shares its blocks, on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny

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
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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
    "Wan 2.1": Tiny(build(), {"one clip": call(1, (2, 6, 4)), "two clips, odd sizes": call(2, (3, 10, 6), 7)}, OPS),
    "Wan 2.1, image to video": Tiny(
        build(image_dim=8, added_kv_proj_dim=32),
        {"with an image": call(2, (2, 4, 4), 512, encoder_hidden_states_image=noise(2, 5, 8))},
        OPS,
    ),
    "Wan 2.2, a timestep for each token": Tiny(
        build(),
        {"a known frame": call(2, (3, 4, 4)) | {"timestep": per_token(2, (3, 4, 4))}, "one timestep": call(1, (2, 4, 4))},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""
