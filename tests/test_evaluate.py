"""The evaluation: rendered clips in place of sampled ones score full marks, their captions shuffled they do not."""

import pytest
import torch
from tubelet.engine import Clip, EngineConfig, VAEConfig, VideoVAE
from tubelet.engine.training.data import HELD_OUT, ShapesWorld
from tubelet.engine.training.evaluate import EvalConfig, _scenes, drift, image_to_video, prompt_faithfulness, psnr, vae_quality


def plain(items, _):
    return items


class Renderer:
    """An engine that draws what the prompt says, by the rules of the world; or what some other prompt says."""

    config = EngineConfig()

    def __init__(self, config: EvalConfig, seed_shift: int = 0, motion: str | None = None, wrong: bool = False):
        count = max(config.prompts, config.clips, config.streams)
        scenes = list(_scenes(count, config.seed + seed_shift, motion))
        shown = scenes[1:] + scenes[:1] if wrong else scenes
        self.shown = {scene.caption(): other for scene, other in zip(scenes, shown, strict=True)}
        torch.manual_seed(0)
        self.vae = VideoVAE(VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=1))

    def draw(self, prompt, frames, height, width) -> Clip:
        return Clip(ShapesWorld(split="test").draw(0, frames, height, width, scene=self.shown[prompt]).frames)

    def sample(self, prompt, *, frames=0, height=0, width=0, **_):
        if isinstance(prompt, str):
            return self.draw(prompt, frames, height, width)
        return [self.draw(request.prompt, request.frames, request.height, request.width) for request in prompt]

    def stream(self, prompt, frames, *, height, width, seed):
        clip = self.draw(prompt, frames, height, width)
        yield clip[:10]
        yield clip[10:]


CONFIG = EvalConfig(prompts=24, clips=8, streams=2)


def test_what_is_drawn_as_told_scores_full_marks():
    figures, clips = prompt_faithfulness(Renderer(CONFIG), CONFIG, plain)
    assert len(clips) == figures["prompts"] == 24 and figures["held_out_prompts"] >= 6
    for name in ("colour", "shape", "background", "direction"):
        assert figures[name] >= 0.95 and figures[f"held_out_{name}"] >= 0.95, name
        assert figures[f"shuffled_{name}"] < 0.6, name


def test_what_is_drawn_otherwise_does_not():
    figures, _ = prompt_faithfulness(Renderer(CONFIG, wrong=True), CONFIG, plain)
    assert max(figures[name] for name in ("colour", "shape", "background", "direction")) < 0.6


def test_image_to_video_and_drift_of_drawn_clips():
    figures = image_to_video(Renderer(CONFIG, 1), CONFIG, plain)
    assert figures["colour"] == figures["background"] == 1 and figures["first_frame_psnr"] < 25  # the VAE is untrained
    figures = drift(Renderer(CONFIG, 2, "bounce"), CONFIG, plain)
    assert figures["frames"] == 64 and figures["last_quarter_colour"] == figures["last_quarter_background"] == 1


def test_a_perfect_vae_and_an_untrained_one():
    config = EvalConfig(prompts=1, clips=3, streams=1, frames=3)
    engine = Renderer(config)
    figures = vae_quality(engine.vae, config, plain)
    assert set(figures) == {"psnr", "psnr_time_latents_swapped", "psnr_last_quarter_of_four_times_the_length"}
    assert all(0 < value < 25 for value in figures.values())


def test_psnr():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_prompts_hold_pairs_that_training_never_draws():
    scenes = list(_scenes(100, 0))
    held_out = [scene for scene in scenes if (scene.things[0].colour, scene.things[0].shape) in HELD_OUT]
    assert len(held_out) >= 25 and len({scene.caption() for scene in scenes}) > 80
    train = [ShapesWorld().draw(i, 1, 16, 16).scene for i in range(400)]
    assert not any((thing.colour, thing.shape) in HELD_OUT for scene in train for thing in scene.things)


@pytest.mark.parametrize("name", ["prompts", "clips", "streams", "frames", "batch"])
def test_bad_settings_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        EvalConfig(**{name: 0})
