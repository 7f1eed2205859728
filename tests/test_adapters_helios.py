"""Helios on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, noise

diffusers = pytest.importorskip("diffusers")

from test_adapters_wan import OPS, SIZES, call  # noqa: E402 (it needs diffusers)


def build(**config):
    sizes = {name: value for name, value in SIZES.items() if name != "rope_max_seq_len"}
    return lambda: diffusers.HeliosTransformer3DModel(**sizes | {"rope_dim": (8, 4, 4)} | config)


def history(batch: int, size: tuple[int, int], rows: int = 1) -> dict:
    """Two frames of the finest, two of the middle and four of the coarsest history, numbered from the coarsest on."""
    short, middle, long = (noise(batch, 4, frames, *size) for frames in (2, 2, 4))
    numbers = torch.arange(11)[None].expand(rows, -1)
    return {
        "latents_history_short": short,
        "latents_history_mid": middle,
        "latents_history_long": long,
        "indices_latents_history_long": numbers[:, :4],
        "indices_latents_history_mid": numbers[:, 4:6],
        "indices_latents_history_short": numbers[:, 6:8],
        "indices_hidden_states": numbers[:, 8:],
    }


INPUTS = {
    "with history": call(1, (3, 8, 8)) | history(1, (8, 8)),
    "two clips, odd sizes": call(2, (3, 12, 8), 7) | history(2, (12, 8)),
    "two clips, numbers of each": call(2, (3, 8, 8), 7) | history(2, (8, 8), rows=2),
    "without history": call(2, (2, 4, 6)),
}
FIRST = {"with history": INPUTS["with history"]}
MODELS = {
    "Helios": Tiny(build(), INPUTS, OPS),
    "Helios, text for the history too": Tiny(build(guidance_cross_attn=False, zero_history_timestep=False), FIRST, OPS),
    "Helios, amplified history": Tiny(build(is_amplify_history=True), FIRST, OPS),
    "Helios, amplified by one number": Tiny(build(is_amplify_history=True, history_scale_mode="scalar"), FIRST, OPS),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""
