"""LTX-Video on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import (
    AdapterTests,
    Tiny,
    lengths_of_calls,
    logged,
    look_from_outside,
    noise,
)
from tubelet.engine.adapters import ops

diffusers = pytest.importorskip("diffusers")


OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "num_layers": 1,
}
WORDS = 12
Size = tuple[int, int, int]


def build(**config):
    return lambda: diffusers.LTXVideoTransformer3DModel(**SIZES | config)


def call(batch: int, size: Size, **more) -> dict:
    """As LTXPipeline does."""
    frames, height, width = size
    return {
        "hidden_states": noise(batch, frames * height * width, 4),
        "encoder_hidden_states": noise(batch, WORDS, 16),
        "timestep": torch.arange(1, batch + 1) * 100.0,
        "encoder_attention_mask": torch.ones(batch, WORDS),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        **more,
    }


def coordinates(entries: int, size: Size, marked: int = 0) -> dict:
    """As LTXConditionPipeline gives them: seconds and pixels of tokens, the `marked` first ones of which are of an entry's own."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")).flatten(1)
    grid = grid.expand(entries, -1, -1) * torch.tensor([8 / 25, 32, 32])[:, None]
    before = grid[:, :, :marked] + torch.arange(1.0, entries + 1)[:, None, None]
    return {"video_coords": torch.cat((before, grid), dim=2)} | dict.fromkeys(("num_frames", "height", "width", "rope_interpolation_scale"))


def of_tokens(batch: int, size: Size) -> dict:
    """Timesteps of tokens as for a known first frame: zero there."""
    frames, frame = size[0], size[1] * size[2]
    steps = torch.full((batch, frames * frame), 700.0)
    steps[:, :frame] = 0
    steps[-1, frame : 2 * frame] = 300
    return {"timestep": steps}


def seen(*lengths: int) -> torch.Tensor:
    """Masks of texts of these lengths."""
    return (torch.arange(WORDS) < torch.tensor(lengths)[:, None]).long()


def bias(mask: torch.Tensor) -> torch.Tensor:
    return (1 - mask[:, None].float()) * -10000.0


ONE, TWO, THREE = (2, 3, 2), (3, 5, 3), (3, 3, 2)
FLAT = call(2, THREE, **of_tokens(2, THREE))
MODELS = {
    "LTX-Video": Tiny(
        build(num_layers=2),
        {
            "two clips, texts of different length": call(2, TWO, encoder_attention_mask=seen(7, 12)),
            "one clip": call(1, ONE),
            "a known frame": FLAT | {"encoder_attention_mask": seen(5, 9)},
            "a known frame, a step for each number": FLAT | {"timestep": FLAT["timestep"][..., None]},
            "known frames of their own": call(2, THREE, **of_tokens(2, (4, 3, 2)), **coordinates(2, THREE, 6))
            | {"hidden_states": noise(2, 24, 4)},
            "coordinates, one step": call(2, THREE) | coordinates(2, THREE) | {"timestep": torch.full((2, 1), 500.0)},
            "coordinates for both": call(2, THREE) | coordinates(1, THREE) | {"num_frames": 1, "height": 1, "width": 1},
            "scales of each clip": call(2, THREE, rope_interpolation_scale=(torch.tensor([0.3, 0.4]).view(2, 1, 1, 1, 1), 32, 32)),
            "a tensor of scales": call(2, THREE, rope_interpolation_scale=torch.tensor([0.3, 32, 16])),
            "as many tokens, heads and clips": call(2, (2, 1, 1)),
            "no scales": call(2, THREE, rope_interpolation_scale=None),
            "padding anywhere": call(2, TWO, encoder_attention_mask=seen(5, 9).flip(1).bool()),
            "a text that is empty": call(2, TWO, encoder_attention_mask=seen(0, 9)),
            "no mask": call(2, TWO, encoder_attention_mask=None),
            "scores": call(2, TWO, encoder_attention_mask=bias(seen(7, 12).flip(1))),
            "scores of four dimensions": call(2, TWO, encoder_attention_mask=bias(seen(7, 12))[:, None]),
            "scores of pairs": call(2, TWO, encoder_attention_mask=noise(2, 45, WORDS)),
            "scores of heads": call(2, TWO, encoder_attention_mask=noise(4, 1, WORDS)),
            "seen pairs": call(2, TWO, encoder_attention_mask=(noise(2, 45, WORDS) > -1)),
            "whole steps": call(2, TWO, timestep=torch.tensor([3, 900])),
        },
        OPS,
    ),
    "LTX-Video, affine norms": Tiny(
        build(norm_elementwise_affine=True, norm_eps=1e-5, attention_bias=False, attention_out_bias=False, out_channels=None),
        {"a known frame": FLAT, "two clips, odd sizes": call(2, TWO)},
        OPS,
    ),
    "LTX-Video, all channels turn": Tiny(
        build(num_attention_heads=3, cross_attention_dim=48, activation_fn="geglu", patch_size=2, patch_size_t=2),
        {"two clips, odd sizes": call(2, TWO), "a known frame": FLAT},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestLean:
    """What is not made, and what the host does not wait for."""

    @pytest.fixture(autouse=True)
    def _outside(self, monkeypatch):
        look_from_outside(monkeypatch, ops)

    @pytest.mark.parametrize(
        ("case", "of_texts"),
        [("two clips, texts of different length", [7, 12]), ("padding anywhere", [5, 9]), ("scores", [7, 12]), ("no mask", None)],
    )
    def test_padding_is_told_by_lengths(self, case, of_texts, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        log = logged(MODELS["LTX-Video"], case)
        assert lengths == [None, of_texts] * 4
        assert [op for op, _ in log.found].count("sort") == (of_texts is not None)
        assert not [shape for shape in log.shapes() if shape[-2:] in ((45, 45), (45, WORDS))]

    @pytest.mark.parametrize("case", ["a known frame", "known frames of their own"])
    def test_rows_of_modulation_are_of_timesteps(self, case, monkeypatch):
        monkeypatch.setattr(ops, "MOST_TIMESTEPS", 5)
        log, tokens = logged(MODELS["LTX-Video"], case), MODELS["LTX-Video"].inputs[case]["hidden_states"].shape[1]
        rows = {"a known frame": 6, "known frames of their own": 5}[case]  # two clips of three frames; frames that nobody counts
        shapes = [shape for shape in log.shapes() if shape[-1:] == (192,) or shape[-2:] in ((6, 32), (2, 32), (1, 32))]
        assert {(rows, 192), (rows, 6, 32), (rows, 2, 32)} <= set(shapes)
        assert not [shape for shape in shapes if shape[0] == 2 * tokens or shape[:2] == (2, tokens)]

    @pytest.mark.parametrize(
        ("case", "entries", "tokens"),
        [
            ("two clips, texts of different length", 1, 45),
            ("coordinates for both", 1, 18),
            ("a tensor of scales", 1, 18),
            ("known frames of their own", 2, 24),
        ],
    )
    def test_angles_are_made_once(self, case, entries, tokens):
        log = logged(MODELS["LTX-Video"], case)
        assert log.shapes("clone").count((entries, tokens, 2, 8)) == 2
        assert [shape for shape in log.shapes("cos", "sin") if len(shape) == 3] == [(entries, tokens, 15)] * 2

    @pytest.mark.parametrize("case", ["two clips, texts of different length", "a known frame"])
    def test_hidden_states_are_not_copied(self, case):
        tokens = MODELS["LTX-Video"].inputs[case]["hidden_states"].shape[1]
        copies = logged(MODELS["LTX-Video"], case).copies(2 * tokens * 32)
        assert not [shape for shape in copies if shape[1:] != (256,)]  # sines of timesteps
