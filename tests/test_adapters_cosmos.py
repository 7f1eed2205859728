"""Cosmos on tubelet's kernels: the same numbers."""

from types import SimpleNamespace

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, assert_same, lengths_of_calls, logged, make, noise, run
from tubelet.engine.adapters import accelerate

diffusers = pytest.importorskip("diffusers")

from diffusers.models.controlnets import controlnet_cosmos as controlnet  # noqa: E402 (it may be missing)
from diffusers.models.transformers import transformer_cosmos as cosmos  # noqa: E402

OPS = frozenset({"attention", "qk_norm_rope", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 1.5,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (6, 12, 12),
}
OF_MODEL = SIZES | {"out_channels": 4, "num_layers": 1}


def nearest(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    """What the models take from torchvision, where that is missing."""
    return torch.nn.functional.interpolate(image, size, mode=interpolation)


if not hasattr(cosmos, "transforms"):
    stand_in = SimpleNamespace(functional=SimpleNamespace(resize=nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    cosmos.transforms = controlnet.transforms = stand_in


def padding(height: int, width: int) -> torch.Tensor:
    """As large as the pixels."""
    return (noise(1, 1, 2 * height, 2 * width) > 0).float()


def call(batch: int, size: tuple[int, int, int], words: int = 7, **more) -> dict:
    return {
        "hidden_states": noise(batch, 4, *size),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "encoder_hidden_states": noise(batch, words, 16),
        "padding_mask": padding(*size[1:]),
        **more,
    }


def known(batch: int, size: tuple[int, int, int]) -> dict:
    """A known first frame, as the pipelines of Cosmos 2 tell it: a channel, and a timestep for each frame."""
    mask = torch.zeros(batch, 1, *size)
    mask[:, :, 0] = 1
    timestep = torch.linspace(0.2, 0.8, batch)[:, None, None, None, None].repeat(1, 1, size[0], 1, 1)
    timestep[:, :, 0] = 0.1
    return {"condition_mask": mask, "timestep": timestep}


def there(*rows: str) -> torch.Tensor:
    """Which words are there."""
    return torch.tensor([[word == "x" for word in row] for row in rows])


def with_image(batch: int, tokens: int = 3, words: int = 7) -> dict:
    return {"encoder_hidden_states": (noise(batch, words, 12), noise(batch, tokens, 8))}


def build(**config):
    return lambda: diffusers.CosmosTransformer3DModel(**OF_MODEL | config)


def build_control(**config):
    sizes = {"in_channels": 8, "latent_channels": 6, "model_channels": 32, "n_controlnet_blocks": 2, "text_embed_dim": 16}
    return lambda: diffusers.CosmosControlNetModel(**SIZES | sizes | config)


def control(batch: int, size: tuple[int, int, int], **more) -> dict:
    inputs = call(batch, size, **more)
    return {"controls_latents": noise(batch, 5, *size), "latents": inputs.pop("hidden_states"), "condition_mask": None} | inputs


ONE, TWO = (2, 6, 4), (3, 10, 6)
IMAGE = {"img_context_dim_in": 8, "img_context_dim_out": 32, "use_crossattn_projection": True, "crossattn_proj_in_channels": 12}
IMAGE |= {"encoder_hidden_states_channels": 16}
MODELS = {
    "Cosmos Predict 1": Tiny(
        build(num_layers=2),
        {
            "one clip": call(1, ONE, fps=30),
            "two clips, odd sizes": call(2, TWO, fps=16, attention_mask=there("xxxxxxx", "xxx....")),
            "holes in the texts": call(2, ONE, attention_mask=there("x.xx..x", ".x.....")),
            "one timestep for two clips": call(2, ONE) | {"timestep": torch.tensor([0.3])},
            "numbers added to scores": call(2, ONE, attention_mask=noise(2, 7)),
        },
        OPS,
    ),
    "Cosmos Predict 2, a timestep for each frame": Tiny(
        build(in_channels=5, extra_pos_embed_type=None),
        {"one clip": call(1, ONE, **known(1, ONE)), "two clips, odd sizes": call(2, TWO, **known(2, TWO), fps=16)},
        OPS | {"modulated_norm"},
    ),
    "Cosmos Predict 1, a known frame, no mask of padding": Tiny(
        build(in_channels=5, concat_padding_mask=False, rope_scale=(1.0, 2.0, 3.0)),
        {"two clips": call(2, TWO, **known(2, TWO))},
        OPS,
    ),
    "Cosmos Predict 2.5, with an image": Tiny(
        build(num_layers=2, extra_pos_embed_type=None, controlnet_block_every_n=2, **IMAGE),
        {
            "two clips, odd sizes": call(2, TWO, **with_image(2)),
            "no image": call(1, ONE, encoder_hidden_states=(noise(1, 7, 12), None)),
            "control": call(2, ONE, **with_image(2), block_controlnet_hidden_states=[noise(2, 12, 32)]),
        },
        OPS | {"modulated_norm"},
    ),
    "Cosmos Transfer 2.5": Tiny(
        build_control(extra_pos_embed_type="learnable", **IMAGE),
        {
            "a known frame": control(2, TWO, **known(2, TWO), **with_image(2), conditioning_scale=[0.5, 2.0]),
            "one timestep": control(1, ONE, **known(1, ONE) | {"timestep": torch.tensor([0.3])}, **with_image(1)),
        },
        OPS - {"final_layer"},
    ),
    "Cosmos Transfer 2.5, without an image": Tiny(
        build_control(latent_channels=5, n_controlnet_blocks=1),
        {"two clips": control(2, ONE, attention_mask=there("xxxxxxx", "xxx...."), fps=16, conditioning_scale=0.5)},
        OPS - {"final_layer"},
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestLean:
    """What is not made, and what the host does not wait for."""

    @pytest.mark.parametrize("name", ["Cosmos Predict 2, a timestep for each frame", "Cosmos Transfer 2.5"])
    def test_rows_of_modulation_are_of_frames(self, name):
        log = logged(MODELS[name], list(MODELS[name].inputs)[name.endswith("frame")])  # of three frames of 15 tokens
        assert not [shape for shape in log.shapes() if shape[-2:] in ((45, 4), (45, 64), (45, 96), (45, 45))]
        assert [shape for shape in log.shapes() if shape == (2, 3, 96)]

    def test_masks_are_lengths(self, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        logged(MODELS["Cosmos Predict 1"], "holes in the texts")
        assert lengths[4:] == [None, [4, 1]] * 2


class TestOthers:
    """What others put in the way of `accelerate`."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_patch_embedding_with_another_linear(self, when):
        tiny = MODELS["Cosmos Predict 1"]
        model, inputs = make(tiny), tiny.inputs["one clip"]
        with torch.no_grad():
            before = run(model, tiny, inputs)
            report = accelerate(model) if when == "after" else None
            model.patch_embed.proj = torch.nn.Sequential(model.patch_embed.proj)  # as an adapter of weights would
            report = report or accelerate(model)
            assert (when == "before") == any(site.reason == "it is a Sequential" for site in report.left)
            assert_same(run(model, tiny, inputs), before)
