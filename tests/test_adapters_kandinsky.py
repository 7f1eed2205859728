"""Kandinsky 5 on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, logged, noise

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import AttentionBackendName  # noqa: E402 (it may be missing)
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline  # noqa: E402

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 48,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
NABLA = {"attention_type": "nabla", "attention_P": 0.6, "attention_wT": 1, "attention_wH": 1, "attention_wW": 1}


def call(
    batch: int, size: tuple[int, int, int], words: int = 7, channels: int = 4, patch: tuple[int, int, int] = (1, 2, 2), **more
) -> dict:
    return {
        "hidden_states": noise(batch, *size, channels),
        "encoder_hidden_states": noise(batch, words, 12),
        "pooled_projections": noise(batch, 8),
        "timestep": torch.arange(1.0, batch + 1) * 100,
        "visual_rope_pos": [torch.arange(side // p) for side, p in zip(size, patch, strict=True)],
        "text_rope_pos": torch.arange(words),
        **more,
    }


def build(**config):
    return lambda: diffusers.Kandinsky5Transformer3DModel(**SIZES | config)


def build_sparse():
    model = build(num_visual_blocks=1, **NABLA)()
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
    return model


def sparse(frames: int, height: int, width: int) -> dict:
    """As the pipelines make it, of blocks of 8 x 8 tokens."""
    near = Kandinsky5T2VPipeline.fast_sta_nabla(frames, height // 16, width // 16, 1, 1, 1, device="cpu")
    return {"sparse_params": {"sta_mask": near[None, None], "P": NABLA["attention_P"], "to_fractal": True}}


ONE, TWO = (2, 6, 4), (3, 10, 6)
MODELS = {
    "Kandinsky 5": Tiny(
        build(),
        {
            "one clip": call(1, ONE),
            "two clips, odd sizes": call(2, TWO, scale_factor=(1.0, 2.0, 1.5)),
            "one timestep for two clips": call(2, ONE) | {"timestep": torch.tensor([30.0]), "pooled_projections": noise(1, 8)},
            "positions of each text": call(2, ONE) | {"text_rope_pos": torch.stack((torch.arange(7), torch.arange(3, 10)))},
        },
        OPS,
        outputs=lambda out: out,
    ),
    "Kandinsky 5, image to video, patches of two frames": Tiny(
        build(visual_cond=True, patch_size=(2, 2, 2), num_visual_blocks=1),
        {"two clips": call(2, (4, 6, 4), channels=9, patch=(2, 2, 2))},
        OPS,
        outputs=lambda out: out,
    ),
    "Kandinsky 5, block-sparse attention": Tiny(
        build_sparse,
        {"two clips": call(2, (2, 16, 32)) | sparse(2, 16, 32), "all pairs": call(1, ONE)},
        OPS,
        outputs=lambda out: out,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""

    def test_gradients(self, tiny: Tiny):
        if tiny.build is build_sparse and not torch.cuda.is_available():
            pytest.skip("flex attention has no gradient on a CPU")
        super().test_gradients(tiny)


class TestTables:
    """Of rotary positions."""

    def test_are_made_once_for_all_blocks(self):
        log = logged(MODELS["Kandinsky 5"], "two clips, odd sizes")
        copies = [shapes for op, shapes in log.found if op == "clone" and shapes in ([(45, 8)], [(7, 8)])]
        assert copies == [[(7, 8)]] * 2 + [[(45, 8)]] * 2
        assert not [shape for shape in log.shapes() if shape[-2:] in ((45, 45), (45, 7))]
