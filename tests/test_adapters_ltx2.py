"""LTX-2 and what came after it, on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import (
    AdapterTests,
    Tiny,
    assert_same,
    lengths_of_calls,
    logged,
    look_from_outside,
    make,
    noise,
)
from tubelet.engine.adapters import accelerate, ops

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
            "four dimensions": TWO
            | {
                "encoder_attention_mask": noise(2, 1, 45, 12),
                "audio_encoder_attention_mask": (padded(3, 12)["encoder_attention_mask"][:, None, None] - 1) * 1e4,
            },
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
    "LTX-2.3 of the sound alone": Tiny(
        build(audio_cross_attn_mod=True, norm_elementwise_affine=True, attention_bias=False, attention_out_bias=False),
        {"two clips": TWO | {"sigma": torch.tensor([300.0, 500.0])}},
        OPS,
        both,
    ),
    "LTX-2.3 of the video alone": Tiny(
        build(cross_attn_mod=True, gated_attn=True, activation_fn="geglu"),
        {"two clips": TWO | {"sigma": torch.tensor([300.0, 500.0]), "audio_sigma": torch.tensor([200.0, 100.0])}},
        OPS,
        both,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestLean:
    """What is not made, and what the host does not wait for."""

    @pytest.fixture(autouse=True)
    def _outside(self, monkeypatch):
        look_from_outside(monkeypatch, ops)

    def test_padding_is_told_by_lengths(self, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        log = logged(MODELS["LTX-2"], "two clips, odd sizes")
        assert lengths == [None, [7, 12], None, [7, 12], None, None] * 2
        assert [op for op, _ in log.found].count("sort") == 2
        tokens = (45, 7, 12)
        assert not [shape for shape in log.shapes() if shape[-2:] in [(queries, keys) for queries in tokens for keys in tokens]]

    def test_rows_of_modulation_are_of_timesteps(self, monkeypatch):
        monkeypatch.setattr(ops, "MOST_TIMESTEPS", 2)
        log = logged(MODELS["LTX-2"], "a known frame")  # two clips of three frames of six tokens
        shapes = [shape for shape in log.shapes() if shape[-1:] == (192,) or shape[-2:] in ((6, 32), (4, 32), (1, 32))]
        assert (6, 192) in shapes and (6, 4, 32) in shapes and (6, 1, 32) in shapes
        assert not [shape for shape in shapes if shape[0] == 36 or shape[:2] == (2, 18)]

    @pytest.mark.parametrize("kind", ["interleaved", "split"])
    def test_angles_are_made_once(self, kind):
        tiny = Tiny(build(rope_type=kind, num_layers=2), MODELS["LTX-2"].inputs, OPS)
        log = logged(tiny, "two clips, odd sizes")
        tables = [(2, tokens, 2, pairs) for tokens, pairs in ((45, 8), (7, 4), (45, 4), (7, 4))]
        made = [shape for shape in log.shapes("clone") if shape in tables]
        assert sorted(made) == sorted(2 * tables if kind == "interleaved" else [])

    @pytest.mark.parametrize(("case", "calls"), [("perturbed", 4), ("one of two perturbed", 6), ("perturbed by a mask", 6)])
    def test_no_wait_for_what_is_perturbed(self, case, calls, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        logged(MODELS["LTX-2.3"], case)
        assert len(lengths) == 2 * calls

    @pytest.mark.parametrize("case", ["one clip", "a known frame"])
    def test_queries_and_keys_turn_once(self, case, monkeypatch):
        found = []
        monkeypatch.setattr(ops, "qk_norm_rope", lambda q, k, *args, **how: found.append((len(q), len(k))) or (q.clone(), k.clone()))
        inputs = MODELS["LTX-2.3"].inputs[case]
        make_and_call(MODELS["LTX-2.3"], inputs)
        batch, (video, audio) = len(inputs["hidden_states"]), (inputs[name].shape[1] for name in ("hidden_states", "audio_hidden_states"))
        pairs = [(video, video), (video, 12), (audio, audio), (audio, 12), (video, video), (audio, audio)]
        assert found == [(batch * q, batch * k) for q, k in pairs]


def make_and_call(tiny: Tiny, inputs: dict) -> None:
    """A forward pass of an accelerated model."""
    model = make(tiny)
    accelerate(model)
    with torch.no_grad():
        model(**inputs)


class TestOthers:
    """What others put in the way of `accelerate`."""

    @pytest.mark.parametrize(("a2v", "v2a"), [(True, False), (False, True)])
    def test_one_way_alone(self, a2v, v2a):
        """As a block can be called, and the model does not."""
        model, results = make(MODELS["LTX-2"]), []
        block = model.transformer_blocks[0]
        steps = [noise(2, 1, parts * width) for parts in (6, 4, 1) for width in (32, 16)]
        inputs = noise(2, 9, 32), noise(2, 5, 16), noise(2, 4, 32), noise(2, 4, 16), *steps
        how = {"use_a2v_cross_attention": a2v, "use_v2a_cross_attention": v2a}
        how |= {"ca_video_rotary_emb": (noise(2, 9, 8).repeat_interleave(2, -1),) * 2}
        how |= {"ca_audio_rotary_emb": (noise(2, 5, 8).repeat_interleave(2, -1),) * 2}
        with torch.no_grad():
            results.append(block(*inputs, **how))
            accelerate(model)
            results.append(block(*inputs, **how))
        assert_same(list(results[1]), list(results[0]))
