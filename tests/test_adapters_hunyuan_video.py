"""HunyuanVideo, FramePack and HunyuanVideo-1.5 on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import (
    AdapterTests,
    Ops,
    Tiny,
    lengths_of_calls,
    logged,
    noise,
)

diffusers = pytest.importorskip("diffusers")


OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.5,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
TEXT = 6


def words(*lengths: int, tokens: int = TEXT) -> torch.Tensor:
    """The mask of texts that are padded at their ends; the pipelines give it in the model's dtype."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float()


def call(size: tuple[int, int, int], mask: torch.Tensor, **more) -> dict:
    batch, tokens = mask.shape
    return {
        "hidden_states": noise(batch, more.pop("channels", 4), *size),
        "timestep": torch.arange(1, batch + 1) * 100,
        "encoder_hidden_states": noise(batch, tokens, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(batch, 8),
        "guidance": torch.arange(1, batch + 1) * 1000.0,
        **more,
    }


def history(size: tuple[int, int, int], mask: torch.Tensor) -> dict:
    """As FramePack's pipeline gives it, of fewer frames: 4 tokens of an image in front of the text, and a history of three scales."""
    batch, (frames, height, width) = len(mask), size
    return call(size, mask) | {
        "image_embeds": noise(batch, 4, 8),
        "indices_latents": torch.arange(9, 9 + frames),
        "latents_clean": noise(batch, 4, 2, height, width),
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": noise(batch, 4, 3, height, width),
        "indices_latents_history_2x": torch.arange(5, 8),
        "latents_history_4x": noise(batch, 4, 4, height, width),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def call15(size: tuple[int, int, int], mask: torch.Tensor, mask2: torch.Tensor, image: bool, **more) -> dict:
    batch = len(mask)
    inputs = call(size, mask) | {
        "timestep": torch.arange(1.0, batch + 1) * 100,
        "encoder_hidden_states_2": noise(batch, mask2.shape[1], 12),
        "encoder_attention_mask_2": mask2,
        "image_embeds": noise(batch, 3, 8) * image,
    }
    return {name: value for name, value in inputs.items() if name not in ("pooled_projections", "guidance")} | more


def build(**config):
    sizes = SIZES | {"num_single_layers": 2, "pooled_projection_dim": 8} | config
    return lambda: diffusers.HunyuanVideoTransformer3DModel(**sizes)


def build_framepack():
    config = {"num_single_layers": 1, "pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True}
    return diffusers.HunyuanVideoFramepackTransformer3DModel(**SIZES | config)


def build15(**config):
    sizes = SIZES | {"text_embed_2_dim": 12, "image_embed_dim": 8, "patch_size": 1, "num_layers": 2} | config
    return lambda: diffusers.HunyuanVideo15Transformer3DModel(**sizes)


ONE, TWO = (2, 6, 4), (3, 10, 6)
HOLES = torch.tensor([[1.0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
MODELS = {
    "HunyuanVideo": Tiny(
        build(),
        {
            "one clip": call(ONE, words(4)),
            "two clips, odd sizes": call(TWO, words(6, 2)),
            "holes in the texts": call(ONE, HOLES.long()),
        },
        OPS,
    ),
    "HunyuanVideo, an image as channels, no norms, no guidance": Tiny(
        build(in_channels=9, image_condition_type="latent_concat", qk_norm=None, guidance_embeds=False, num_single_layers=1),
        {"two clips": call(TWO, words(3, 6), channels=9, guidance=None)},
        OPS,
    ),
    "HunyuanVideo, an image as first frame, other norms": Tiny(
        build(image_condition_type="token_replace", qk_norm="layer_norm"),
        {"two clips": call(TWO, words(3, 6)), "a clip of one frame": call((1, 4, 6), words(5))},
        OPS,
    ),
    "HunyuanVideo, patches of two frames": Tiny(build(patch_size_t=2, num_single_layers=1), {"two": call((4, 4, 6), words(6, 2))}, OPS),
    "FramePack": Tiny(
        build_framepack,
        {"one clip": history((3, 10, 6), words(4)), "two clips, odd sizes": history((3, 10, 6), words(6, 2))},
        OPS,
    ),
    "HunyuanVideo-1.5": Tiny(
        build15(),
        {
            "with an image": call15((2, 3, 4), words(4, 6), words(5, 2, tokens=5), image=True),
            "without one": call15((2, 3, 4), words(4), words(0, tokens=5), image=False),
            "holes in the texts": call15((3, 5, 3), HOLES.long(), words(0, 3, tokens=5), image=True),
            "no words": call15((2, 3, 4), words(0, 3), words(5, 0, tokens=5), image=True),
        },
        OPS,
    ),
    "HunyuanVideo-1.5, two timesteps": Tiny(
        build15(use_meanflow=True, num_layers=1, patch_size=2),
        {"two clips": call15(TWO, words(4, 6), words(5, 2, tokens=5), image=True, timestep_r=torch.tensor([30.0, 500.0]))},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestPadding:
    """Of texts, told by numbers of tokens on the device."""

    @pytest.fixture
    def lengths(self, monkeypatch) -> list[list[int] | None]:
        return lengths_of_calls(monkeypatch)

    def log(self, name: str, case: str) -> Ops:
        return logged(MODELS[name], case)

    def test_no_sync_and_no_mask_of_pairs(self, lengths):
        log = self.log("HunyuanVideo", "two clips, odd sizes")
        assert lengths == [[6, 2]] * 8
        assert not [shape for shape in log.shapes() if shape[-2:] in ((TEXT, TEXT), (51, 51))]
        assert log.found.count(("cat", [(2, 51, 32)])) == 1  # single blocks do not join anew what they gave on

    def test_of_an_image_and_its_text(self, lengths):
        self.log("FramePack", "two clips, odd sizes")
        assert lengths[3:] == [[6, 2], [10, 6], [10, 6]]

    @pytest.mark.parametrize(
        ("case", "text", "joint"), [("with an image", [4, 6], [12, 11]), ("without one", [4], [4]), ("holes in the texts", [4, 2], [7, 8])]
    )
    def test_of_several_texts(self, lengths, case, text, joint):
        log = self.log("HunyuanVideo-1.5", case)
        assert lengths[3:] == [text, joint, joint]
        assert not [shape for shape in log.shapes() if shape[-2:] in ((TEXT, TEXT), (38, 38), (59, 59))]
