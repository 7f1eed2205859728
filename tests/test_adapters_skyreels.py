"""SkyReels-V2 on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, noise

diffusers = pytest.importorskip("diffusers")

from test_adapters_wan import OPS, SIZES, call  # noqa: E402 (it needs diffusers)


def build(**config):
    return lambda: diffusers.SkyReelsV2Transformer3DModel(**SIZES | config)


def forcing(batch: int, frames: int) -> dict:
    """A timestep for each frame, those of the first ones zero."""
    steps = torch.randint(1, 1000, (batch, frames), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    steps[:, 0] = 0
    return {"timestep": steps, "enable_diffusion_forcing": True}


MODELS = {
    "SkyReels-V2": Tiny(build(), {"one clip": call(1, (2, 6, 4)), "two clips, odd sizes": call(2, (3, 10, 6), 7)}, OPS),
    "SkyReels-V2, image to video": Tiny(
        build(image_dim=8, added_kv_proj_dim=32),
        {"with an image": call(1, (1, 4, 4), 512, encoder_hidden_states_image=noise(1, 5, 8))},
        OPS,
    ),
    "SkyReels-V2, diffusion forcing": Tiny(build(), {"timesteps of frames": call(2, (3, 4, 6)) | forcing(2, 3)}, OPS),
    "SkyReels-V2, causal blocks": Tiny(
        build(num_frame_per_block=2, inject_sample_info=True),
        {"timesteps of frames": call(2, (4, 4, 6)) | forcing(2, 4) | {"fps": [1]}, "one timestep": call(1, (4, 4, 4)) | {"fps": [0]}},
        OPS,
    ),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


def test_no_mask_of_pairs_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode
    from tubelet.engine.adapters import accelerate

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                self.numel = max(self.numel, out.numel())
            return out

    model, inputs = build(num_frame_per_block=2)().eval(), call(1, (8, 8, 8)) | forcing(1, 8)
    found = {}
    with torch.no_grad():
        for name in ("untouched", "ours"):
            if name == "ours":
                accelerate(model)
                model(**inputs)  # tables of the layout are made once
            with Largest() as largest:
                model(**inputs)
            found[name] = largest.numel
    assert found["untouched"] >= 128**2 > 1000 > found["ours"]
