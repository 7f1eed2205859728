"""CogVideoX and ConsisID on tubelet's kernels: the same numbers."""

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
    outputs,
    run,
)
from tubelet.engine.adapters import accelerate, ops

diffusers = pytest.importorskip("diffusers")

from diffusers.hooks.hooks import HookRegistry, ModelHook  # noqa: E402 (it may be missing)
from diffusers.models.embeddings import get_3d_rotary_pos_embed  # noqa: E402
from tubelet.engine.adapters import cogvideox  # noqa: E402

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
TEXT = 6
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 1,
    "sample_width": 4,
    "sample_height": 6,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True,
}
FACES = {
    "is_train_face": True,
    "num_layers": 3,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 1,
    "LFE_id_dim": 8,
    "LFE_vit_dim": 16,
    "LFE_depth": 2,
    "LFE_dim_head": 16,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 3,
    "LFE_output_dim": 21,
    "LFE_ff_mult": 2,
    "LFE_num_scale": 2,
    "local_face_scale": 0.7,
}


def rotary(frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a grid of patches."""
    return get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)


def call(batch: int, size: tuple[int, int, int], frames: int = 1, **more) -> dict:
    """frames: of a patch."""
    return {
        "hidden_states": noise(batch, size[0], more.pop("channels", 4), *size[1:]),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "timestep": torch.arange(1, batch + 1) * 100,
        "image_rotary_emb": rotary(size[0] // frames, size[1] // 2, size[2] // 2),
        **more,
    }


def faces(batch: int) -> dict:
    return {"id_cond": noise(batch, 8), "id_vit_hidden": [noise(batch, 5, 16), noise(batch, 7, 16)]}


def build(kind: str = "CogVideoXTransformer3DModel", **config):
    return lambda: getattr(diffusers, kind)(**SIZES | config)


def fused():
    model = build(num_layers=2)()
    model.fuse_qkv_projections()
    return model


ONE, TWO = (2, 6, 4), (3, 10, 6)
FLAT = {"image_rotary_emb": None}
SEEN = (noise(2, 18) > 0).index_fill(1, torch.tensor(7), True)
MODELS = {
    "CogVideoX 5B": Tiny(
        build(num_layers=2),
        {
            "two clips, odd sizes": call(2, TWO),
            "one clip": call(1, ONE),
            "one timestep": call(2, TWO, timestep=torch.tensor([300])),
            "keys that are masked": call(2, ONE, attention_kwargs={"attention_mask": SEEN}),
            "scores with a bias": call(2, ONE, attention_kwargs={"attention_mask": noise(2, 1, 18)}),
        },
        OPS,
    ),
    "ConsisID": Tiny(
        build("ConsisIDTransformer3DModel", **FACES),
        {
            "two clips, odd sizes": call(2, TWO) | faces(2),
            "one clip": call(1, ONE) | faces(1),
            "one face for two clips": call(2, TWO) | faces(1),  # as where guidance doubles the clips alone
        },
        OPS,
    ),
    "CogVideoX 2B": Tiny(
        build(use_rotary_positional_embeddings=False, attention_bias=False, patch_bias=False),
        {"one clip": call(1, ONE) | FLAT, "two clips, other sizes than its own": call(2, TWO) | FLAT},
        OPS,
    ),
    "CogVideoX 5B, image to video": Tiny(
        build(in_channels=8, use_learned_positional_embeddings=True),
        {"one clip": call(1, ONE, channels=8), "two clips, more frames than its own": call(2, (3, 6, 4), channels=8)},
        OPS,
    ),
    "CogVideoX 1.5, image to video": Tiny(
        build(in_channels=8, patch_size_t=2, ofs_embed_dim=8),
        {
            "two clips, odd sizes": call(2, (6, 10, 6), frames=2, channels=8, ofs=torch.full((1,), 2.0)),
            "one clip": call(1, (2, 4, 6), frames=2, channels=8, ofs=torch.full((1,), 2.0)),
        },
        OPS,
    ),
    "CogVideoX, a linear of patches with positions": Tiny(
        build(patch_size_t=1, use_rotary_positional_embeddings=False, norm_elementwise_affine=False, timestep_activation_fn="gelu"),
        {"two clips": call(2, ONE) | FLAT},
        OPS - {"patch_embed"},
    ),
    "CogVideoX, fused projections": Tiny(fused, {"two clips, odd sizes": call(2, TWO)}, OPS),
    "ConsisID, a face in each second layer": Tiny(
        build("ConsisIDTransformer3DModel", **FACES | {"cross_attn_interval": 2, "num_layers": 2}),
        {"two clips": call(2, ONE) | faces(2)},
        OPS,
    ),
    "ConsisID, without a face": Tiny(
        build("ConsisIDTransformer3DModel", use_rotary_positional_embeddings=False), {"two clips, odd sizes": call(2, TWO) | FLAT}, OPS
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


class TestLean:
    """What is not made, and what the host does not wait for."""

    @pytest.fixture(autouse=True)
    def _outside(self, monkeypatch):
        look_from_outside(monkeypatch, ops, cogvideox)

    @pytest.mark.parametrize("name", ["CogVideoX 5B", "ConsisID", "CogVideoX 1.5, image to video", "CogVideoX, fused projections"])
    def test_text_and_video_are_put_together_once(self, name):
        log = logged(MODELS[name], "two clips, odd sizes")
        tokens = TEXT + 3 * 5 * 3
        assert log.copies(2 * tokens * 32) == [(2, tokens, 32)]
        assert not [shape for shape in log.shapes() if shape[-2:] == (tokens, tokens)]

    def test_nor_in_a_model_whose_own_forward_has_hooks(self):
        model = make(MODELS["CogVideoX 5B"])
        model.forward = model.forward
        accelerate(model)
        log = logged(MODELS["CogVideoX 5B"], "two clips, odd sizes", model)
        assert [shape for shape in log.copies(2 * 51 * 32) if shape == (2, 51, 32)] == [(2, 51, 32)]

    def test_padding_is_told_by_lengths(self, monkeypatch):
        lengths = lengths_of_calls(monkeypatch)
        logged(MODELS["CogVideoX 5B"], "keys that are masked")
        assert lengths == [SEEN.sum(dim=1).tolist()] * 4


class OwnLinear(torch.nn.Linear):
    """Of somebody who changed it."""


@pytest.mark.parametrize("name", ["CogVideoX 5B", "ConsisID"])
def test_hooks_that_are_added_later_see_video_and_text(name):
    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            found.append([each.shape[1] for each in args[:2]])
            return args, kwargs

    model, found = make(MODELS[name]), []
    before = outputs(model, MODELS[name])
    accelerate(model)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0]).register_hook(Hook(), "mine")
    assert_same(outputs(model, MODELS[name]), before)
    assert found[:2] == [[45, TEXT], [12, TEXT]]


def test_projections_that_are_fused_later():
    tiny = MODELS["CogVideoX 5B"]
    model, inputs = make(tiny), tiny.inputs["two clips, odd sizes"]
    with torch.no_grad():
        before = run(model, tiny, inputs)
        accelerate(model)
        model.fuse_qkv_projections()
        assert_same(run(model, tiny, inputs), before)
        model.unfuse_qkv_projections()
        assert_same(run(model, tiny, inputs), before)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["patch_embed.proj", "proj_out"])
def test_linears_of_others(where, when):
    tiny = MODELS["CogVideoX 1.5, image to video"]
    model = make(tiny)
    inputs = tiny.inputs["two clips, odd sizes"]
    with torch.no_grad():
        before = run(model, tiny, inputs)
        report = accelerate(model) if when == "after" else None
        linear = model.get_submodule(where)
        own = OwnLinear(linear.in_features, linear.out_features)
        own.load_state_dict(linear.state_dict())
        model.set_submodule(where, own)
        report = report or accelerate(model)
        assert_same(run(model, tiny, inputs), before)
    assert bool([site for site in report.left if site.reason == "it is a OwnLinear"]) == (when == "before")
