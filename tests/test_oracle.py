"""The oracle against scenes whose truth is known: clean, noisy, blurred, shuffled and meaningless clips."""

from functools import cache

import numpy as np
import pytest
import torch
from tubelet.engine.training.data import PALETTE, Sample, Scene, ShapesWorld, Thing
from tubelet.engine.training.oracle import read, score

SIZES = [(16, 64, 64), (16, 32, 32), (8, 32, 96), (1, 32, 32), (1, 64, 64), (32, 48, 32), (2, 64, 64), (12, 96, 96)]
COUNT = 160


@cache
def samples() -> list[Sample]:
    world = ShapesWorld(seed=20260, split="test")
    return [world.draw(i, *SIZES[i % len(SIZES)]) for i in range(COUNT)]


def accuracy(distort, scenes: list[Scene] | None = None) -> dict[str, float]:
    marks: dict[str, list[bool]] = {}
    for i, sample in enumerate(samples()):
        frames = distort(sample.frames.numpy(), np.random.default_rng(i))
        for key, value in score(read(frames), scenes[i] if scenes else sample.scene).items():
            marks.setdefault(key, []).append(value)
    assert len(marks["direction"]) > COUNT / 4
    return {key: float(np.mean(values)) for key, values in marks.items()}


def noisy(frames: np.ndarray, rng: np.random.Generator, decibels: float = 25) -> np.ndarray:
    sigma = 255 * 10 ** (-decibels / 20)
    return np.clip(frames + sigma * rng.standard_normal(frames.shape), 0, 255).round().astype(np.uint8)


def smoothed(frames: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(frames.astype(float), ((0, 0), (8, 8), (8, 8), (0, 0)), mode="edge")
    rows = sum(weight * padded[:, i : i + frames.shape[1]] for i, weight in enumerate(kernel))
    return sum(weight * rows[:, :, i : i + frames.shape[2]] for i, weight in enumerate(kernel))


def blurred(frames: np.ndarray, rng: np.random.Generator, decibels: float = 29) -> np.ndarray:
    """Gaussian blur of the width that costs this PSNR."""
    low, high = 0.2, 4.0
    for _ in range(8):
        sigma = (low * high) ** 0.5
        result = smoothed(frames, sigma)
        low, high = (sigma, high) if ((result - frames) ** 2).mean() < 255**2 * 10 ** (-decibels / 10) else (low, sigma)
    return result.round().astype(np.uint8)


def test_clean_clips_are_read_without_a_mistake():
    assert accuracy(lambda frames, rng: frames) == {"background": 1, "colour": 1, "shape": 1, "direction": 1}
    for sample in samples():
        assert {thing.colour for thing in read(sample.frames).things} <= {thing.colour for thing in sample.scene.things}


def test_noise_of_25_decibels():
    assert min(accuracy(noisy).values()) >= 0.98


def test_blur_to_29_decibels():
    result = accuracy(blurred)
    assert result.pop("shape") >= 0.9
    assert min(result.values()) >= 0.98


def test_shuffled_frames_break_direction_and_nothing_else():
    """Things that stand still do so in any order; of those that move, few survive."""
    marks, others = [], []
    for i, sample in enumerate(samples()):
        if sample.scene.things[0].motion in ("move", "behind") and len(sample.frames) >= 8:
            order = np.random.default_rng(i).permutation(len(sample.frames))
            result = score(read(sample.frames[order]), sample.scene)
            marks.append(result.pop("direction"))
            others += result.values()
    assert len(marks) > 25 and np.mean(marks) <= 0.25
    assert all(others)


def test_random_noise_is_no_better_than_chance():
    result = accuracy(lambda frames, rng: rng.integers(0, 256, frames.shape, dtype=np.uint8))
    for key, chance in {"background": 1 / 9, "colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4}.items():
        assert result[key] <= chance + 3 * (chance * (1 - chance) / COUNT) ** 0.5


def test_another_clips_scene_scores_near_chance():
    scenes = [sample.scene for sample in samples()]
    result = accuracy(lambda frames, rng: frames, scenes[7:] + scenes[:7])
    assert result["background"] < 0.22 and result["colour"] < 0.35 and result["shape"] < 0.4 and result["direction"] < 0.45


@pytest.mark.parametrize("size", [(6, 32, 32), (6, 64, 96)])
def test_track_and_area_are_exact_to_a_fraction_of_a_pixel(size):
    """Against the definition: a square's centroid and area on a canvas of our own drawing."""
    frames = np.zeros((*size, 3), np.uint8)
    for t in range(6):
        frames[t, 9:20, 3 + 2 * t : 12 + 2 * t] = PALETTE["yellow"]
    (thing,) = read(frames).things
    assert (thing.colour, thing.shape, thing.direction) == ("yellow", "square", "right")
    np.testing.assert_allclose(thing.track, [[7.5 + 2 * t, 14.5] for t in range(6)], atol=1e-3)
    np.testing.assert_allclose(thing.area, 99, atol=1e-2)


def test_a_thing_behind_a_wall_is_tracked_around_it():
    scene = Scene((Thing("green", "triangle", "small", "behind", "left"),), "gray")
    (thing,) = read(ShapesWorld(0).draw(0, 24, 48, 96, scene=scene).frames).things
    hidden = np.isnan(thing.track[:, 0])
    assert hidden.any() and not hidden[0] and not hidden[-1] and (thing.area[hidden] == 0).all()
    assert (thing.shape, thing.direction) == ("triangle", "left")


@pytest.mark.parametrize(("motion", "low", "high"), [("grow", 3, 9), ("still", 0.99, 1.01), ("shrink", 0.1, 0.33)])
def test_growth(motion, low, high):
    (thing,) = read(ShapesWorld(0).draw(0, 8, 64, 64, scene=Scene((Thing("red", "circle", motion=motion),), "cyan")).frames).things
    assert low < thing.growth < high


def test_two_things_are_both_read_and_the_second_may_be_the_larger():
    scene = Scene((Thing("blue", "cross", "small", "move", "up", "slow"), Thing("yellow", "circle", "large")), "white")
    reading = read(ShapesWorld(0).draw(0, 8, 64, 96, scene=scene).frames)
    assert [(thing.colour, thing.shape, thing.direction) for thing in reading.things] == [
        ("yellow", "circle", "still"),
        ("blue", "cross", "up"),
    ]
    assert all(score(reading, scene).values())
    assert not score(reading, Scene((Thing("yellow", "circle", motion="still"),), "red"))["background"]


def test_only_what_the_scene_defines_is_scored():
    red = Thing("red", "circle")
    image = ShapesWorld(0).draw(0, 1, 32, 32, scene=Scene((red,), "blue"))
    assert set(score(read(image.frames), image.scene)) == {"background", "colour", "shape"}
    bounce = Scene((Thing("red", "circle", motion="bounce"),), "blue")
    assert set(score(read(ShapesWorld(0).draw(0, 8, 32, 32, scene=bounce).frames), bounce)) == {"background", "colour", "shape"}


def test_an_empty_clip_has_a_background_and_no_thing():
    reading = read(torch.full((3, 32, 32, 3), 250, dtype=torch.uint8))
    assert reading.background == "white" and reading.things == []
    assert score(reading, Scene((Thing("red", "circle"),), "white")) == {
        "background": True,
        "colour": False,
        "shape": False,
        "direction": False,
    }


def test_bad_frames_are_named():
    with pytest.raises(TypeError, match="uint8"):
        read(torch.zeros(1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        read(np.zeros((8, 8, 3), np.uint8))
