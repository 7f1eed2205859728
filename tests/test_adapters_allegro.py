"""Allegro on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import (
    AdapterTests,
    Tiny,
    lengths_of_calls,
    logged,
    look_from_outside,
    make,
    noise,
)
from tubelet.engine.adapters import accelerate, ops

diffusers = pytest.importorskip("diffusers")

from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro  # noqa: E402

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "caption_channels": 16,
}
WORDS = 6
ONE, TWO = (2, 6, 4), (3, 10, 6)


def angles(frames: int, height: int, width: int, entries: int = 1) -> tuple:
    """As the pipeline makes them, the same for all entries, or for each of the entries other places."""
    height, width = height // 2, width // 2
    *axes, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0))
    places = torch.cartesian_prod(*(at.long() for at in (t, h, w))).T
    return tuple(axes), tuple(torch.stack([places.roll(7 * i, dims=1) for i in range(entries)], dim=1))


def call(batch: int, size: tuple[int, int, int], **more) -> dict:
    return {
        "hidden_states": noise(batch, 4, *size),
        "encoder_hidden_states": noise(batch, 1, WORDS, 16),
        "timestep": torch.arange(1, batch + 1) * 100,
        "image_rotary_emb": angles(*size),
        **more,
    }


def build(**config):
    return lambda: diffusers.AllegroTransformer3DModel(**SIZES | config)


SEEN = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]])
NONE = SEEN * torch.tensor([[1], [0]])
BIAS = (1 - SEEN[:, None].float()) * -10000.0
PIXELS = (noise(2, *TWO) > 0.5).long()
PIXELS[:, 0, :2, :2] = 1
MODELS = {
    "Allegro": Tiny(
        build(),
        {
            "texts with masks": call(2, TWO, encoder_attention_mask=SEEN),
            "one clip": call(1, ONE),
            "two clips, odd sizes": call(2, TWO),
            "a text that is empty": call(2, TWO, encoder_attention_mask=NONE),
            "texts with masks to add": call(2, TWO, encoder_attention_mask=BIAS),
            "a mask of pairs": call(2, TWO, encoder_attention_mask=BIAS.expand(-1, 45, -1)),
            "a mask of pixels": call(2, TWO, encoder_attention_mask=SEEN.bool(), attention_mask=PIXELS),
            "a mask of no pixels": call(1, ONE, attention_mask=PIXELS[:1, :0]),
            "a mask of tokens": call(2, TWO, attention_mask=noise(2, 1, 45) > 0),
            "places of each entry": call(2, TWO, image_rotary_emb=angles(*TWO, entries=2)),
            "no places": call(2, TWO, image_rotary_emb=None),
        },
        OPS,
    ),
    "Allegro, affine norms": Tiny(
        build(norm_elementwise_affine=True, activation_fn="geglu", attention_bias=False, num_layers=1, norm_eps=1e-5),
        {"two clips, odd sizes": call(2, TWO), "an image": call(1, (1, 6, 4), encoder_attention_mask=SEEN[1:])},
        OPS,
    ),
    "Allegro, patches of two frames": Tiny(build(patch_size_t=2, num_layers=1), {"one clip": call(1, ONE)}, OPS),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestMasks:
    """A mask of a text's tokens is a number of them, made once."""

    def test_lengths(self, monkeypatch):
        model = make(MODELS["Allegro"])
        accelerate(model)
        found = lengths_of_calls(monkeypatch)
        with torch.no_grad():
            model(**call(2, TWO, encoder_attention_mask=SEEN))
        assert found == [None, [4, 3]] * 2

    @pytest.mark.parametrize("case", ["texts with masks", "a mask of pixels", "places of each entry"])
    def test_nothing_is_made_for_each_pair_or_layer(self, case, monkeypatch):
        look_from_outside(monkeypatch, ops)
        log = logged(MODELS["Allegro"], case)
        assert not [shape for shape in log.shapes() if {45, WORDS} <= set(shape) or shape.count(45) > 1]
        assert len(log.shapes("embedding")) == 6  # cos and sin of three axes
        assert len(log.shapes("argsort", "sort")) // 2 == {"texts with masks": 1, "a mask of pixels": 3}.get(case, 0)

    def test_nothing_is_copied(self, monkeypatch):
        look_from_outside(monkeypatch, ops)
        assert not logged(MODELS["Allegro"], "texts with masks").copies(2 * 45 * 48)
