"""LTX-2 and what came after it, on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, noise

diffusers = pytest.importorskip("diffusers")

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_cross_attention_dim": 16,
    "caption_channels": 16,
    "num_layers": 1,
}
NEWER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
    "cross_attn_timestep_scale_multiplier": 500,
}
SIXTEEN_HEADS = {
    "num_attention_heads": 16,
    "attention_head_dim": 8,
    "cross_attention_dim": 128,
    "audio_num_attention_heads": 16,
    "audio_cross_attention_dim": 128,
}
"""Of which the linears that make gates of heads can be in E4M3."""


def build(**config):
    return lambda: diffusers.LTX2VideoTransformer3DModel(**SIZES | config)


def call(batch: int, size: tuple[int, int, int], sound: int, words: int = 12, channels: tuple[int, int] = (16, 16), **more) -> dict:
    frames, height, width = size
    return {
        "hidden_states": noise(batch, frames * height * width, 4),
        "audio_hidden_states": noise(batch, sound, 6),
        "encoder_hidden_states": noise(batch, words, channels[0]),
        "audio_encoder_hidden_states": noise(batch, words, channels[1]),
        "timestep": torch.arange(1, batch + 1) * 100.0,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": sound,
        **more,
    }


def newer(*arguments, channels: tuple[int, int] = (128, 128)) -> dict:
    inputs = call(*arguments, channels=channels)
    return inputs | {"sigma": inputs["timestep"], "use_cross_timestep": True}


def padded(*lengths: int, words: int = 12) -> dict:
    """Masks of texts, which are padded at the beginning, and for the sound at the end."""
    left = torch.stack([torch.arange(words) >= words - length for length in lengths]).long()
    return {"encoder_attention_mask": left, "audio_encoder_attention_mask": left.flip(1)}


def of_tokens(batch: int, size: tuple[int, int, int]) -> dict:
    """Timesteps of tokens as for a known first frame: zero there."""
    frames, frame = size[0], size[1] * size[2]
    steps = torch.full((batch, frames * frame), 700.0)
    steps[:, :frame] = 0
    steps[-1, frame : 2 * frame] = 300
    return {"timestep": steps, "audio_timestep": torch.arange(1, batch + 1) * 150.0}


def positions(batch: int, size: tuple[int, int, int], sound: int) -> dict:
    """Coordinates that differ between the entries of a batch."""
    begin, begin_sound = noise(batch, 3, size[0] * size[1] * size[2], 1).abs(), noise(batch, 1, sound, 1).abs()
    return {
        "video_coords": torch.cat((begin, begin + 1), dim=-1),
        "audio_coords": torch.cat((begin_sound, begin_sound + 0.1), dim=-1),
    }


def perturbing(mask: torch.Tensor | None = None, layer: int = 0) -> dict:
    return {"spatio_temporal_guidance_blocks": [layer], "perturbation_mask": mask}


def both(out) -> tuple[torch.Tensor, torch.Tensor]:
    return out[0], out[1]


ONE, TWO = call(1, (2, 3, 2), 5), call(2, (3, 5, 3), 7) | padded(7, 12)
MODELS = {
    "LTX-2": Tiny(
        build(),
        {
            "one clip": ONE,
            "two clips, odd sizes": TWO,
            "a known frame": call(2, (3, 3, 2), 5) | of_tokens(2, (3, 3, 2)),
            "a known frame, steps of the other": call(2, (3, 3, 2), 5)
            | of_tokens(2, (3, 3, 2))
            | {"use_cross_timestep": True, "sigma": torch.tensor([700.0, 600.0]), "audio_sigma": torch.tensor([500.0, 400.0])},
            "a timestep for each token of the sound": call(2, (2, 3, 2), 3) | {"audio_timestep": torch.rand(2, 3) * 900},
            "coordinates of each clip": call(2, (2, 3, 2), 5) | positions(2, (2, 3, 2), 5),
            "isolated": TWO | {"isolate_modalities": True},
            "a mask of pairs": call(2, (2, 3, 2), 5) | {"video_self_attention_mask": (noise(2, 12, 12) > 0).float()},
            "scores of texts": TWO | {"encoder_attention_mask": (padded(7, 12)["encoder_attention_mask"][:, None] - 1) * 1e4},
            "scores of pairs": ONE | {"encoder_attention_mask": noise(1, 12, 12)},
            "no perturbation": ONE | perturbing(),
        },
        OPS,
        both,
    ),
    "LTX-2.3": Tiny(
        build(**NEWER, **SIXTEEN_HEADS),
        {
            "one clip": newer(1, (2, 3, 2), 5),
            "two clips, odd sizes": newer(2, (3, 5, 3), 7) | padded(7, 12),
            "a known frame": newer(2, (3, 3, 2), 5) | of_tokens(2, (3, 3, 2)),
            "a known frame, steps of its own": newer(2, (3, 3, 2), 5) | of_tokens(2, (3, 3, 2)) | {"use_cross_timestep": False},
            "isolated": newer(2, (2, 3, 2), 5) | {"isolate_modalities": True},
            "perturbed": newer(2, (2, 3, 2), 5) | perturbing(),
            "one of two perturbed": newer(2, (2, 3, 2), 5) | perturbing(torch.tensor([0.0, 1.0])),
            "perturbed by a mask": newer(2, (2, 3, 2), 5) | perturbing(torch.zeros(2, 1, 1)),
            "none perturbed": newer(2, (2, 3, 2), 5) | perturbing(torch.ones(2)),
            "a mask of pairs": newer(2, (2, 3, 2), 5) | {"video_self_attention_mask": noise(2, 12, 12).sigmoid()},
        },
        OPS,
        both,
    ),
    "LTX-2, halves": Tiny(
        build(rope_type="split", num_attention_heads=4, attention_head_dim=8, rope_double_precision=False, causal_offset=0),
        {
            "two clips": TWO,
            "a known frame": call(2, (3, 3, 2), 5) | of_tokens(2, (3, 3, 2)),
            "isolated": TWO | {"isolate_modalities": True},
        },
        OPS,
        both,
    ),
    "LTX-2.5": Tiny(
        build(
            **NEWER | {"rope_type": "interleaved"},
            ff_bias=False,
            audio_ff_bias=False,
            use_prompt_adaln_single=False,
            use_keyframes_abs_pos_embedding=True,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
        ),
        {
            "two clips": newer(2, (3, 3, 2), 5, channels=(32, 16)) | padded(5, 9),
            "perturbed in one layer": newer(2, (3, 3, 2), 5, channels=(32, 16)) | perturbing(layer=1),
            "marked frames": newer(2, (3, 3, 2), 5, channels=(32, 16)) | {"video_keyframes_mask": noise(2, 18, 1)},
        },
        OPS,
        both,
    ),
    "the sound modulates alone, norms have weights": Tiny(
        build(audio_cross_attn_mod=True, norm_elementwise_affine=True, attention_bias=False, attention_out_bias=False),
        {"two clips": TWO | {"sigma": torch.tensor([300.0, 500.0])}},
        OPS,
        both,
    ),
    "the video modulates and has gates alone": Tiny(
        build(cross_attn_mod=True, gated_attn=True, activation_fn="geglu"),
        {"two clips": TWO | {"sigma": torch.tensor([300.0, 500.0]), "audio_sigma": torch.tensor([200.0, 100.0])}},
        OPS,
        both,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""
