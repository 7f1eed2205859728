"""The model that comes with the package: small, whole, and good enough that a person sees what the prompt says.

The figures of its card are measured by `tubelet eval` over many clips; these tests read a few, with room for chance.
"""

import re

import pytest
import torch
from tubelet.engine import Engine
from tubelet.engine.engine import BUNDLED
from tubelet.engine.training.data import ShapesWorld, vocabulary_captions
from tubelet.engine.training.evaluate import EvalConfig, prompt_faithfulness, psnr
from tubelet.engine.video import Clip, to_float


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(device="cpu")


def test_it_is_small_and_holds_safetensors_only():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}


def test_its_card_gives_commands_and_figures():
    card = (BUNDLED / "README.md").read_text()
    assert "tubelet train vae" in card and "tubelet train dit" in card and "tubelet eval" in card
    assert re.search(r"PSNR.*\d\d\.\d", card)


def test_its_tokenizer_knows_the_words_of_its_world(engine):
    for caption in vocabulary_captions(200, seed=5):
        pieces = engine.text.tokenizer.tokenize(caption)
        assert all(piece.endswith("</w>") for piece in pieces), f"{caption!r} falls into {pieces}"


@torch.inference_mode()
def test_its_vae_shows_clips_that_it_never_saw(engine):
    world, values = ShapesWorld(split="test"), []
    for i, (height, width) in enumerate([(64, 64), (32, 96), (96, 64), (48, 80)]):
        frames = world.draw(500 + i, 9, height, width).frames
        latents = engine.vae.encode(to_float(frames)[None])
        values.append(psnr(Clip.from_float(engine.vae.decode(latents.space, latents.time)[0]).frames, frames))
    assert sum(values) / len(values) >= 28, values


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 64, 64), (5, 32, 96), (16, 96, 48), (20, 64, 64)])
def test_it_samples_every_size(engine, frames, height, width):
    clip = engine.sample("a red circle moves right on a white background", frames=frames, height=height, width=width, steps=4)
    assert clip.frames.shape == (frames, height, width, 3)


def test_it_shows_what_prompts_say(engine):
    config = EvalConfig(prompts=12, frames=12, batch=12, seed=3)
    figures, _ = prompt_faithfulness(engine, config, lambda items, name: items)
    assert min(figures["colour"], figures["background"]) >= 0.9
    assert min(figures["shape"], figures["direction"]) >= 0.5 > max(figures["shuffled_shape"], figures["shuffled_direction"])


@torch.inference_mode()
def test_a_loop_closes(engine):
    """From its last frame to its first it moves no further than it does elsewhere, within twice the mean step and a half."""
    clip = engine.sample("a red square moves up on a black background", frames=12, height=48, width=48, loop=True, seed=1)
    steps = [float((a.float() - b.float()).abs().mean()) for a, b in zip(clip.frames, clip.frames.roll(-1, 0), strict=True)]
    assert steps[-1] <= 2.5 * sum(steps[:-1]) / len(steps[:-1])
