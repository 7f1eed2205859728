"""What a model can do, measured on clips and prompts that it was not trained on, read by the fixed oracle.

- VAE: PSNR of held-out clips; what it costs to swap the time latents between clips; PSNR at four times the trained length.
- prompts: whether the sampled clip shows the colour, the shape, the background and the direction that its prompt says, (colour, shape)
pairs that were held out of training among them. The
  control scores the same clips against the prompts of others.
- image to video: PSNR of the decoded first frame against the image given, and whether the rest still shows that thing.
- drift: a video four times the trained length; what its last quarter still shows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..engine import Engine
from ..packing import Request
from ..vae import VideoVAE
from ..video import Clip, to_float
from .data import BACKGROUNDS, COLOURS, DIRECTIONS, HELD_OUT, SHAPES, Scene, ShapesWorld, Thing
from .oracle import read, score

Track = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class EvalConfig:
    """How much to measure. Every clip comes from the test split, whose seeds training never draws."""

    prompts: int = 100
    clips: int = 40
    streams: int = 6
    frames: int = 16
    height: int = 64
    width: int = 64
    batch: int = 5
    seed: int = 0

    def __post_init__(self):
        for name in ("prompts", "clips", "streams", "frames", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def evaluate(engine: Engine, config: EvalConfig, track: Track = lambda items, name: items) -> tuple[dict, list[Clip]]:
    """All measurements, as a dict of dicts of numbers, and the clips sampled from the prompts. `track(items, name)` may show progress."""
    results = {"vae": vae_quality(engine.vae, config, track)}
    results["prompts"], clips = prompt_faithfulness(engine, config, track)
    results["image_to_video"] = image_to_video(engine, config, track)
    results["drift"] = drift(engine, config, track)
    return results, clips


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of uint8 frames."""
    error = (a.double() - b.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@torch.inference_mode()
def vae_quality(vae: VideoVAE, config: EvalConfig, track: Track) -> dict[str, float]:
    """Mean PSNR over clips of several sizes, decoded from both latents; with the time latents of another clip; and at four times the
    length.
    """
    world = ShapesWorld(seed=config.seed, split="test")
    sizes = ((config.height, config.width), (32, 48), (96, 64), (64, 96), (48, 48))
    plain, swapped, long = [], [], []
    for i in track(range(config.clips), "VAE"):
        height, width = sizes[i % len(sizes)]
        frames, other = (_video(vae, world.draw(i + k * config.clips, config.frames, height, width).frames) for k in (0, 1))
        latents, stranger = vae.encode(frames), vae.encode(other)
        plain.append(_psnr(vae.decode(latents.space, latents.time), frames))
        swapped.append(_psnr(vae.decode(latents.space, stranger.time), frames))
        if i < config.streams:
            frames = _video(vae, world.draw(i, 4 * config.frames, height, width).frames)
            latents = vae.encode(frames)
            last = slice(3 * config.frames, None)
            long.append(_psnr(vae.decode(latents.space, latents.time)[:, :, last], frames[:, :, last]))
    means = {"psnr": plain, "psnr_time_latents_swapped": swapped, "psnr_last_quarter_of_four_times_the_length": long}
    return {name: round(float(np.mean(values)), 2) for name, values in means.items()}


def prompt_faithfulness(engine: Engine, config: EvalConfig, track: Track) -> tuple[dict[str, float], list[Clip]]:
    """The share of prompts whose clip shows what they say, of all and of held-out (colour, shape) pairs, and of the shuffled control."""
    scenes = list(_scenes(config.prompts, config.seed))
    clips, readings = [], []
    for start in track(range(0, len(scenes), config.batch), "prompts"):
        batch = scenes[start : start + config.batch]
        requests = [Request(scene.caption(), config.frames, config.height, config.width, seed=start + i) for i, scene in enumerate(batch)]
        made = engine.sample(requests)
        clips += made
        readings += [read(clip.frames) for clip in made]
    scores = [score(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    shuffled = [score(reading, scene) for reading, scene in zip(readings, scenes[1:] + scenes[:1], strict=True)]
    held_out = [s for s, scene in zip(scores, scenes, strict=True) if (scene.things[0].colour, scene.things[0].shape) in HELD_OUT]
    results = {name: value for name, value in _shares(scores).items()}
    results |= {f"held_out_{name}": value for name, value in _shares(held_out).items()}
    results |= {f"shuffled_{name}": value for name, value in _shares(shuffled).items()}
    return {"prompts": len(scenes), "held_out_prompts": len(held_out), **results}, clips


def image_to_video(engine: Engine, config: EvalConfig, track: Track) -> dict[str, float]:
    """Sampled from the first frame of held-out clips and their captions: how the first frame comes out before the given one is put in
    its place, and what follows.
    """
    world = ShapesWorld(seed=config.seed, split="test")
    scenes = list(_scenes(config.clips // 2, config.seed + 1))
    decoded, next_frame, scores = [], [], []
    for i, scene in enumerate(track(scenes, "image to video")):
        sample = world.draw(i, config.frames, config.height, config.width, scene=scene)
        image = sample.frames[0]
        clip = engine.sample(scene.caption(), frames=config.frames, height=config.height, width=config.width, known={0: image}, seed=i)
        alone = engine.vae.encode_images(_video(engine.vae, image[None]))
        decoded.append(psnr(Clip.from_float(engine.vae.decode(alone.space, alone.time)[0].detach()).frames[0], image))
        next_frame.append(psnr(clip[1], image))
        scores.append(score(read(clip[1:].frames), scene))
    return {
        "first_frame_psnr": round(float(np.mean(decoded)), 2),
        "second_frame_psnr_to_first": round(float(np.mean(next_frame)), 2),
        **_shares(scores),
    }


def drift(engine: Engine, config: EvalConfig, track: Track) -> dict[str, float]:
    """Streams of four times the trained length of bouncing things: the share whose last quarter still shows the colour, shape and
    background.
    """
    frames = 4 * engine.config.trained_frames
    first, last = [], []
    for i, scene in enumerate(track(list(_scenes(config.streams, config.seed + 2, motion="bounce")), "drift")):
        video = torch.cat(
            [clip.frames for clip in engine.stream(scene.caption(), frames, height=config.height, width=config.width, seed=1000 * i)]
        )
        quarter = frames // 4
        first.append(score(read(video[:quarter]), scene))
        last.append(score(read(video[-quarter:]), scene))
    return {
        "frames": frames,
        **{f"first_quarter_{k}": v for k, v in _shares(first).items()},
        **{f"last_quarter_{k}": v for k, v in _shares(last).items()},
    }


def _scenes(count: int, seed: int, motion: str | None = None) -> Iterator[Scene]:
    """Scenes of one thing; every fourth is a held-out pair, two of three move straight."""
    rng = np.random.default_rng([seed, 77])
    held_out = sorted(HELD_OUT)
    for i in range(count):
        colour, shape = held_out[i // 4 % len(held_out)] if i % 4 == 0 else (str(rng.choice(COLOURS)), str(rng.choice(SHAPES)))
        kind = motion or ("move" if i % 3 else str(rng.choice(["still", "bounce", "circle"])))
        direction = str(rng.choice(list(DIRECTIONS))) if kind == "move" else None
        background = str(rng.choice([name for name in BACKGROUNDS if name != colour]))
        yield Scene((Thing(colour, shape, "medium", kind, direction),), background)


def _shares(scores: list[dict[str, bool]]) -> dict[str, float]:
    names = ("colour", "shape", "background", "direction")
    columns = {name: [s[name] for s in scores if name in s] for name in names}
    return {name: round(float(np.mean(column)), 3) for name, column in columns.items() if column}


def _video(vae: VideoVAE, frames: torch.Tensor) -> torch.Tensor:
    return to_float(frames)[None].to(vae.device, vae.dtype)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return psnr((a.float().clamp(-1, 1) + 1) * 127.5, (b.float() + 1) * 127.5)
