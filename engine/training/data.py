"""Captioned clips to learn from: two procedural worlds, a folder of real videos, and the sampling of their sizes.

Every source has `draw(index, frames, height, width) -> Sample` and is deterministic in (seed, split, index, frames, height, width), so a
data set has no files, no order and no end. `ShapesWorld` draws coloured shapes that move, with a short and a long caption (a short prompt
and a detailed re-caption, as in Betker et al. 2023, "Improving Image Generation with Better Captions"). `PanWorld` moves a camera away from
coloured landmarks and back: what a model paints on the way back shows what it remembers (after the memory tests of Yan et al. 2022,
"Temporally Consistent Transformers for Video Generation").
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = (*COLOURS, "black", "white", "gray")
PALETTE = {
    "red": (230, 30, 30),
    "green": (30, 170, 40),
    "blue": (30, 60, 230),
    "yellow": (245, 225, 40),
    "purple": (170, 30, 200),
    "cyan": (40, 215, 230),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
}
SIZES = {"small": 0.16, "medium": 0.22, "large": 0.28}
"""Radius over min(height, width)."""
SPEEDS = {"slow": 0.02, "normal": 0.035, "fast": 0.06}
"""Distance per frame over min(height, width)."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y) in pixels; y points down."""
MOTIONS = {"still": 0.07, "move": 0.50, "bounce": 0.18, "circle": 0.07, "grow": 0.04, "shrink": 0.04, "behind": 0.10}
"""How often each is drawn. `move` and `behind` (behind a wall) have a direction; `move`, `bounce` and `circle` have a speed."""
HELD_OUT = frozenset({("purple", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")})
"""(colour, shape) pairs that the train split never draws, to see whether a model composes what it knows."""

SPLITS = ("train", "test")
WALL = {False: "gray", True: "black"}  # is the background gray?
MARGIN = 1.0  # pixels between a shape and the border, so that its soft edge is whole


@dataclass(frozen=True)
class Thing:
    """One shape and what it does. The order of a scene's things is their order in captions; the first is drawn on top."""

    colour: str
    shape: str
    size: str = "medium"
    motion: str = "still"
    direction: str | None = None
    speed: str = "normal"

    def __post_init__(self) -> None:
        for name, choices in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("motion", MOTIONS), ("speed", SPEEDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        directions = {"move": tuple(DIRECTIONS), "behind": ("left", "right")}.get(self.motion, (None,))
        if self.direction not in directions:
            raise ValueError(f"direction is {self.direction!r}; motion {self.motion!r} takes one of {directions}")


@dataclass(frozen=True)
class Scene:
    """What a clip shows, without places: one or more things of different colours on a plain background."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background is {self.background!r}; expected one of {', '.join(BACKGROUNDS)}")
        colours = [thing.colour for thing in self.things] + [self.background]
        if not self.things or len(set(colours)) < len(colours):
            raise ValueError(f"things and background have the colours {colours}; expected at least one thing, and no colour twice")

    def caption(self, *, long: bool = False, image: bool = False, rng: np.random.Generator | None = None) -> str:
        """Says the scene in words; `image` leaves motion out. With `rng` the wording is drawn, without it is always the same."""
        subjects = [_subject(thing, long, moving=not image) for thing in self.things]
        if image:
            clauses = " and ".join(subjects)
        else:
            verbs = [_verb(thing, long, rng) for thing in self.things]
            that = " that" if long else ""
            if len(verbs) > 1 and len({(thing.motion, thing.direction, thing.speed) for thing in self.things}) == 1:
                clauses = f"{' and '.join(subjects)}{that} {verbs[0]}"
            else:
                clauses = " and ".join(f"{subject}{that} {_singular(verb)}" for subject, verb in zip(subjects, verbs, strict=True))
        if long:
            opening = _choose(rng, LONG_OPENINGS["image" if image else "video"])
            return f"{opening} {clauses} {_choose(rng, LONG_PLACES).format(self.background)}."
        text = f"{clauses} {_choose(rng, SHORT_PLACES).format(self.background)}"
        return _choose(rng, (text, text, text[0].upper() + text[1:]))


@dataclass(frozen=True)
class PanTrack:
    """Where the landmarks of a `PanWorld` clip lie on its strip, and which part of the strip each frame sees; all x in pixels.

    colours: (N,) int, indices into COLOURS; spans: (N, 2) float, left and right edge of each landmark on the strip, in order;
    tops: (N,) float, the upper edge of each in the frame; views: (T, 2) float, the [left, right) interval of the strip seen by each frame.
    """

    colours: np.ndarray
    spans: np.ndarray
    tops: np.ndarray
    views: np.ndarray

    def visible(self) -> np.ndarray:
        """(T, N) float: the share of each landmark's width that each frame sees; 0 is out of sight."""
        left = np.maximum(self.spans[:, 0], self.views[:, :1])
        right = np.minimum(self.spans[:, 1], self.views[:, 1:])
        return np.maximum(right - left, 0) / (self.spans[:, 1] - self.spans[:, 0])


@dataclass(frozen=True)
class Sample:
    """One clip: frames uint8 (T, H, W, 3) RGB on the CPU, a short and a long caption, and what is known of its content."""

    frames: torch.Tensor
    caption: str
    long_caption: str
    scene: Scene | None = None
    landmarks: PanTrack | None = None


class World(Protocol):
    def draw(self, index: int, frames: int, height: int, width: int) -> Sample: ...


# ------------------------------------------------------------------------------------------------------------------------------ words

LONG_OPENINGS = {
    "video": ("The video shows", "In this video we see", "This is a short video of", "The clip shows"),
    "image": ("The image shows", "In this image we see", "This is a picture of", "The picture shows"),
}
SHORT_PLACES = ("on a {} background", "on a {} background", "in front of a {} background", "on {}")
LONG_PLACES = ("in front of a plain {} background", "on a plain {} background", "against a uniform {} background")
# Verbs are plural here; `_singular` conjugates the first word. The first of each list is the canonical wording.
SHORT_VERBS = {
    "still": ("stand still", "stay still", "do not move"),
    "left": ("move left", "move to the left", "go left"),
    "right": ("move right", "move to the right", "go right"),
    "up": ("move up", "go up", "rise"),
    "down": ("move down", "go down", "fall"),
    "bounce": ("bounce", "bounce around", "bounce off the edges"),
    "circle": ("move in a circle", "go round in a circle"),
    "grow": ("grow", "get bigger"),
    "shrink": ("shrink", "get smaller"),
    "behind left": ("pass behind a wall to the left", "move left behind a wall"),
    "behind right": ("pass behind a wall to the right", "move right behind a wall"),
}
LONG_VERBS = {
    "still": ("stand still", "do not move at all"),
    "left": ("move {}from right to left", "move {}to the left", "go {}left"),
    "right": ("move {}from left to right", "move {}to the right", "go {}right"),
    "up": ("move {}upwards", "move {}from the bottom to the top", "go {}up"),
    "down": ("move {}downwards", "move {}from the top to the bottom", "go {}down"),
    "bounce": ("bounce {}off the edges of the frame", "bounce {}around"),
    "circle": ("move {}in a circle", "go {}round in a circle"),
    "grow": ("grow bigger and bigger", "grow over time"),
    "shrink": ("shrink smaller and smaller", "shrink over time"),
    "behind left": ("pass behind a wall from right to left", "move to the left and pass behind a wall"),
    "behind right": ("pass behind a wall from left to right", "move to the right and pass behind a wall"),
}
SINGULAR = {"do": "does", "go": "goes", "pass": "passes"}
ADVERBS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast")}


def _choose(rng: np.random.Generator | None, options: Sequence):
    return options[0] if rng is None or len(options) == 1 else options[int(rng.integers(len(options)))]


def _subject(thing: Thing, long: bool, moving: bool) -> str:
    size = {"small": "small ", "medium": "medium sized " if long else "", "large": "large "}[thing.size]
    if moving and thing.motion in ("grow", "shrink"):
        size = ""
    return f"a {size}{thing.colour} {thing.shape}"


def _verb(thing: Thing, long: bool, rng: np.random.Generator | None) -> str:
    key = {"move": thing.direction, "behind": f"behind {thing.direction}"}.get(thing.motion, thing.motion)
    adverb = _choose(rng, ADVERBS[thing.speed]) if thing.motion in ("move", "bounce", "circle") else ""
    if long:
        return _choose(rng, LONG_VERBS[key]).format(adverb and adverb + " ")
    return f"{_choose(rng, SHORT_VERBS[key])} {adverb}".rstrip()


def _singular(verb: str) -> str:
    """Conjugates the first word, and the verb after an "and": "move to the left and pass ..." -> "moves ... and passes ..."."""
    first, *rest = verb.split()
    words = [SINGULAR.get(first, first + "s"), *rest]
    for i in range(2, len(words)):
        if words[i - 1 : i + 1] == ["and", "pass"]:
            words[i] = "passes"
    return " ".join(words)


def vocabulary_captions(n: int, seed: int = 0) -> Iterator[str]:
    """Yields `n` captions of both worlds, long and short, of clips and images; two thousand hold every word (fewer than 200)."""
    rng = np.random.default_rng([seed, len(SPLITS), 0])
    deeds = [("still", None), ("bounce", None), ("circle", None), ("grow", None), ("shrink", None)]
    deeds += [("move", way) for way in DIRECTIONS] + [("behind", "left"), ("behind", "right")]
    for i in range(n):
        turn, kind = divmod(i, 4)
        if kind == 0:
            ground, way = _choose(rng, ("black", "gray")), _choose(rng, ("left", "right"))
            yield _pan_captions(rng, way, ground, image=turn % 4 == 0)[turn // 4 % 2]
        elif kind == 1:  # both do the same, each deed in turn: the plural verbs, rare otherwise
            motion, direction = deeds[turn % len(deeds)]
            red, blue = (Thing(colour, "circle", motion=motion, direction=direction) for colour in ("red", "blue"))
            yield Scene((red, blue), "white").caption(long=turn // len(deeds) % 2 == 1, rng=rng)
        else:
            yield _draw_scene(rng, "test", 8, 64, 64).caption(long=turn % 2 == 1, image=turn % 8 > 5, rng=rng)


# ----------------------------------------------------------------------------------------------------------------------------- shapes


class ShapesWorld:
    """Coloured shapes on a plain background: one (70 %) or two (30 %), each with its own motion."""

    def __init__(self, seed: int = 0, split: str = "train"):
        _check_split(split)
        self.seed, self.split = seed, split

    def draw(self, index: int, frames: int, height: int, width: int, *, scene: Scene | None = None) -> Sample:
        """Draws clip `index`, (frames, height, width) pixels. A given `scene` fixes what is shown; places and words are still drawn."""
        _check_size(index, frames, height, width)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), 1, index])
        drawn = _draw_scene(rng, self.split, frames, height, width)
        scene = scene or drawn
        planes = np.empty((3, frames, height, width), np.float32)
        planes[:] = np.array(PALETTE[scene.background], np.float32)[:, None, None, None]
        paths = _place(scene.things, rng, frames, height, width)
        for thing, path in zip(reversed(scene.things), reversed(paths), strict=True):
            _paint(planes, coverage(thing.shape, path.centres, path.radii, height, width), PALETTE[thing.colour])
        for path in paths:
            if path.wall is not None:
                x = np.arange(width, dtype=np.float32) + 0.5
                bar = _soft(np.abs(x - path.wall[0]) - path.wall[1])
                _paint(planes, bar, PALETTE[WALL[scene.background == "gray"]])
        image = frames == 1
        return Sample(_pixels(planes), scene.caption(image=image, rng=rng), scene.caption(long=True, image=image, rng=rng), scene)


@dataclass(frozen=True)
class _Path:
    """centres (T, 2) as (x, y) and radii (T,), in pixels; wall: (centre, half width) of the bar that hides the thing."""

    centres: np.ndarray
    radii: np.ndarray
    wall: tuple[float, float] | None = None


def _draw_scene(rng: np.random.Generator, split: str, frames: int, height: int, width: int) -> Scene:
    count = 1 if rng.random() < 0.7 else 2
    motions, weights = list(MOTIONS), np.cumsum(list(MOTIONS.values()))
    things: list[Thing] = []
    while len(things) < count:
        colour, shape = _choose(rng, COLOURS), _choose(rng, SHAPES)
        if (split == "train" and (colour, shape) in HELD_OUT) or colour in [thing.colour for thing in things]:
            continue
        size, motion = _choose(rng, list(SIZES)), motions[min(int(np.searchsorted(weights, rng.random())), len(motions) - 1)]
        if frames == 1:
            motion = "still"
        elif count == 2 and motion == "behind":  # the wall would hide the other thing as well
            motion = "move"
        if size == "large" and (count == 2 or motion == "behind"):  # two large things, or one and its wall, leave no room
            size = "small"
        if motion in ("grow", "shrink"):
            size = "medium"
        direction = {"move": _choose(rng, list(DIRECTIONS)), "behind": _choose(rng, ("left", "right"))}.get(motion)
        things.append(Thing(colour, shape, size, motion, direction, _draw_speed(rng, size, motion, direction, frames, height, width)))
    backgrounds = [name for name in BACKGROUNDS if name not in [thing.colour for thing in things]]
    return Scene(tuple(things), _choose(rng, backgrounds))


def _draw_speed(rng: np.random.Generator, size: str, motion: str, direction: str | None, frames: int, height: int, width: int) -> str:
    """Any speed; for `move` one at which the travel fits into the frame, so that the caption's "quickly" is true."""
    if motion not in ("move", "bounce", "circle"):
        return "normal"
    options = list(SPEEDS)
    if motion == "move":
        unit = min(height, width)
        room = (width if direction in ("left", "right") else height) - 2 * (SIZES[size] * unit + MARGIN)
        options = [name for name in SPEEDS if SPEEDS[name] * unit * (frames - 1) <= room] or ["slow"]
    return _choose(rng, options)


def _place(things: Sequence[Thing], rng: np.random.Generator, frames: int, height: int, width: int) -> list[_Path]:
    """A path for each thing; later ones are drawn again, a few times, until they start clear of the earlier ones."""
    paths: list[_Path] = []
    for thing in things:
        best, best_gap = None, -math.inf
        for _ in range(8):
            path = _draw_path(thing, rng, frames, height, width)
            gap = min((math.dist(path.centres[0], other.centres[0]) - path.radii[0] - other.radii[0] for other in paths), default=0.0)
            if gap > best_gap:
                best, best_gap = path, gap
            if gap >= 0:
                break
        paths.append(best)
    return paths


def _draw_path(thing: Thing, rng: np.random.Generator, frames: int, height: int, width: int) -> _Path:
    unit, time = min(height, width), np.arange(frames)
    radii = np.full(frames, SIZES[thing.size] * unit)
    if thing.motion in ("grow", "shrink"):
        scale = np.linspace(0.6, 1.4, frames) if frames > 1 else np.ones(1)
        radii = radii * (scale if thing.motion == "grow" else scale[::-1])
    low = np.full(2, radii.max() + MARGIN)
    high = np.maximum(np.array([width, height]) - low, low)
    room = high - low
    start = low + room * rng.random(2)
    step = SPEEDS[thing.speed] * unit
    if thing.motion == "move":
        way = np.array(DIRECTIONS[thing.direction])
        travel = way * np.minimum(step * (frames - 1), room)
        start = np.where(way == 0, start, low + np.maximum(-travel, 0) + (room - np.abs(travel)) * rng.random(2))
        centres = start + travel * (time / max(frames - 1, 1))[:, None]
    elif thing.motion == "bounce":
        centres = _bounce(rng, step, low, room, time)
    elif thing.motion == "circle":
        orbit = min(rng.uniform(0.12, 0.2) * unit, room.min() / 2)
        angle = rng.uniform(0, 2 * np.pi) + _choose(rng, (-1, 1)) * step / orbit * time
        centres = low + orbit + (room - 2 * orbit) * rng.random(2) + orbit * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif thing.motion == "behind":
        return _behind(thing, rng, start, low, room, radii, unit)
    else:
        centres = np.broadcast_to(start, (frames, 2))
    return _Path(centres, radii)


def _bounce(rng: np.random.Generator, step: float, low: np.ndarray, room: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Straight travel folded at the walls. It starts near enough to a wall to reach it within the clip."""
    way = np.array(_choose(rng, ((1, 0), (0, 1), (1, 1), (1, 1))), dtype=float)
    velocity = step * way / np.linalg.norm(way)
    start = room * rng.random(2)
    axis = int(np.flatnonzero(way)[int(rng.integers(int(way.sum())))])
    start[axis] = room[axis] - min(0.7 * velocity[axis] * time[-1], room[axis]) * rng.random()
    period = np.maximum(2 * room, 1e-6)
    folded = room - np.abs((start + velocity * time[:, None]) % period - room)
    return low + np.where(rng.random(2) < 0.5, folded, room - folded)


def _behind(
    thing: Thing, rng: np.random.Generator, start: np.ndarray, low: np.ndarray, room: np.ndarray, radii: np.ndarray, unit: int
) -> _Path:
    """Travel from one side of a wall to the other; the wall hides the whole thing where the frame is wide enough for that."""
    frames, radius, width = len(radii), radii[0], room[0] + 2 * low[0]
    half = float(np.clip(width / 2 - 2 * radius - MARGIN, 0.1 * unit, 1.1 * radius))
    travel = min(max(0.1 * unit * (frames - 1), 2 * (half + radius)), room[0])
    left = low[0] + (room[0] - travel) * rng.random()
    x = left + travel * (np.arange(frames) / max(frames - 1, 1))
    if thing.direction == "left":
        x = 2 * left + travel - x
    return _Path(np.stack([x, np.full(frames, start[1])], axis=1), radii, (left + travel / 2, half))


def coverage(shape: str, centres: np.ndarray, radii: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share (T, H, W) of each pixel that the shape covers; centres (T, 2) as (x, y) and radii (T,) in pixels."""
    r = radii.astype(np.float32)[:, None, None]
    x = np.abs(np.arange(width, dtype=np.float32) + 0.5 - centres[:, :1].astype(np.float32))[:, None, :]
    y = (np.arange(height, dtype=np.float32) + 0.5 - centres[:, 1:].astype(np.float32))[:, :, None]
    if shape == "circle":
        return _soft(np.sqrt(x * x + y * y) - r)
    if shape == "square":
        return _soft(x - 0.85 * r) * _soft(np.abs(y) - 0.85 * r)
    if shape == "triangle":  # tip (0, -r), base corners (+-.95 r, .8 r)
        sides = (1.8 * x - 0.95 * (y + r)) / math.hypot(1.8, 0.95)
        return _soft(np.maximum(sides, np.maximum(y - 0.8 * r, -y - r)))  # the last term cuts the soft edge off at the tip
    across, along = _soft(x - r) * _soft(np.abs(y) - 0.36 * r), _soft(x - 0.36 * r) * _soft(np.abs(y) - r)
    return np.maximum(across, along)


def _soft(distance: np.ndarray) -> np.ndarray:
    """Signed distance in pixels -> coverage, with an edge one pixel wide."""
    return np.clip(0.5 - distance, 0, 1)


def _paint(planes: np.ndarray, coverage: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lays a colour over planes (3, T, H, W) in place. A plane per channel: numpy's inner loop would be 3 long otherwise."""
    for plane, value in zip(planes, colour, strict=True):
        plane += coverage * (np.float32(value) - plane)


def _pixels(planes: np.ndarray) -> torch.Tensor:
    frames = np.empty((*planes.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(planes):
        frames[..., channel] = plane + np.float32(0.5)
    return torch.from_numpy(frames)


# -------------------------------------------------------------------------------------------------------------------------------- pan


class PanWorld:
    """A camera pans once over a strip of coloured pillars and back, so that the first ones leave the view for most of the clip.

    With 16 frames or more the far end lies one to two view widths away; shorter clips go less far, at the same highest speed.
    """

    def __init__(self, seed: int = 0, split: str = "train"):
        _check_split(split)
        self.seed, self.split = seed, split

    def draw(self, index: int, frames: int, height: int, width: int) -> Sample:
        _check_size(index, frames, height, width)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), 2, index])
        direction, ground = _choose(rng, ("left", "right")), _choose(rng, ("black", "gray"))
        reach = min(rng.uniform(1, 2), (frames - 1) // 2 * 2 / 7) * width
        pitch = width / rng.uniform(2.5, 3.5)
        count = math.ceil((reach + width) / pitch)
        left = (np.arange(count) + rng.uniform(0.05, 0.3, count)) * pitch
        spans = np.stack([left, left + rng.uniform(0.5, 0.65, count) * pitch], axis=1)
        away = np.minimum(np.arange(frames), np.arange(frames)[::-1])
        away = reach * away / max(away.max(), 1)  # an even number of frames has two at the far end
        offsets = away if direction == "right" else reach - away
        views = np.stack([offsets, offsets + width], axis=1)
        track = PanTrack(rng.integers(len(COLOURS), size=count), spans, rng.uniform(0, 0.4, count) * height, views)

        planes = np.empty((3, frames, height, width), np.float32)
        planes[:] = np.array(PALETTE[ground], np.float32)[:, None, None, None]
        x = (np.arange(width) + 0.5 + offsets[:, None]).astype(np.float32)[:, None, :]
        y = (np.arange(height) + 0.5).astype(np.float32)[:, None]
        for colour, (start, end), top in zip(track.colours, spans.astype(np.float32), track.tops, strict=True):
            bar = _soft(np.abs(x - (start + end) / 2) - (end - start) / 2) * _soft(np.float32(top) - y)
            _paint(planes, bar, PALETTE[COLOURS[colour]])
        caption, long_caption = _pan_captions(rng, direction, ground, image=frames == 1)
        return Sample(_pixels(planes), caption, long_caption, landmarks=track)


def _pan_captions(rng: np.random.Generator, direction: str, ground: str, image: bool) -> tuple[str, str]:
    pillars = _choose(rng, ("coloured pillars", "a row of coloured pillars"))
    if image:
        return f"{pillars} on a {ground} background", f"The image shows {pillars} in front of a plain {ground} background."
    back = _choose(rng, ("comes back", "returns"))
    return (
        f"the camera {_choose(rng, ('pans', 'moves'))} {direction} over {pillars} and {back}",
        f"In this video the camera pans to the {direction} over {pillars} in front of a plain {ground} background, and {back}.",
    )


# ------------------------------------------------------------------------------------------------------------------------ real videos


class VideoFolder:
    """Videos with captions: NAME.mp4 beside NAME.txt, or all named in `captions.jsonl`, one {"file", "caption", "long_caption"?} a line.

    Raises FileNotFoundError for a folder, a video or a caption that is missing, ValueError for a bad line of `captions.jsonl`.
    """

    SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")

    def __init__(self, folder: str | Path, seed: int = 0):
        self.folder, self.seed = Path(folder), seed
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder {self.folder} does not exist or is not a folder")
        self.broken: set[Path] = set()
        table = self.folder / "captions.jsonl"
        self.entries = self._read_table(table) if table.is_file() else self._read_neighbours()

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self) -> list[str]:
        """All of them, the long ones too."""
        return list(dict.fromkeys(text for _, *texts in self.entries for text in texts))

    def draw(self, index: int, frames: int, height: int, width: int) -> Sample:
        """Video `index` (modulo their number): consecutive frames from a random place, scaled to cover the size, cropped in the middle.

        A video shorter than `frames` is played forwards and backwards until it is long enough. One that cannot be decoded is told of once
        in a RuntimeWarning, and the next one stands for it; ValueError if none can.
        """
        from ..video import fit

        _check_size(index, frames, height, width)
        video, caption, long_caption = self._load(index)
        rng = np.random.default_rng([self.seed, 0, 3, index])
        start = int(rng.integers(max(len(video) - frames, 0) + 1))
        last = len(video) - 1
        times = [last - abs(last - t % (2 * last)) if last else 0 for t in range(start, start + frames)]
        return Sample(fit(video[times], height, width), caption, long_caption)

    def _load(self, index: int) -> tuple[torch.Tensor, str, str]:
        from ..video import Clip

        for i in range(len(self.entries)):
            path, *captions = self.entries[(index + i) % len(self.entries)]
            if path in self.broken:
                continue
            try:
                return Clip.load(path).frames, *captions
            except ValueError as error:
                self.broken.add(path)
                warnings.warn(f"{error}; it is left out", RuntimeWarning, stacklevel=3)
        raise ValueError(f"folder {self.folder}: none of its videos can be decoded")

    def _read_table(self, table: Path) -> list[tuple[Path, str, str]]:
        entries = []
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path, caption = self.folder / row["file"], row["caption"]
                long_caption = row.get("long_caption", caption)
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{table}, line {number}: expected {{"file": ..., "caption": ...}}, got {line!r}') from error
            if not isinstance(caption, str) or not isinstance(long_caption, str):
                raise ValueError(f"{table}, line {number}: captions are strings, got {line!r}")
            if not path.is_file():
                raise FileNotFoundError(f"{table}, line {number}: video {path} does not exist")
            entries.append((path, caption, long_caption))
        if not entries:
            raise FileNotFoundError(f"{table} names no video")
        return entries

    def _read_neighbours(self) -> list[tuple[Path, str, str]]:
        videos = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in self.SUFFIXES)
        if not videos:
            raise FileNotFoundError(f"folder {self.folder} holds no video ({', '.join(self.SUFFIXES)}) and no captions.jsonl")
        entries = []
        for path in videos:
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise FileNotFoundError(f"video {path} has no caption: expected it in {text}, or in {self.folder / 'captions.jsonl'}")
            caption = text.read_text(encoding="utf-8").strip()
            entries.append((path, caption, caption))
        return entries


# ---------------------------------------------------------------------------------------------------------------- mixtures and sizes


class Mixture:
    """Several worlds as one: clip `index` comes from one of them, drawn with the given weights. Takes (world, weight) pairs."""

    def __init__(self, worlds_and_weights: Sequence[tuple[World, float]], seed: int = 0):
        weights = np.array([weight for _, weight in worlds_and_weights], dtype=float)
        if not len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
            raise ValueError(f"weights are {weights.tolist()}; expected one or more, none negative, not all zero")
        self.worlds, self.seed = [world for world, _ in worlds_and_weights], seed
        self.weights = weights / weights.sum()

    def draw(self, index: int, frames: int, height: int, width: int) -> Sample:
        _check_size(index, frames, height, width)
        rng = np.random.default_rng([self.seed, 0, 4, index])
        return self.worlds[int(rng.choice(len(self.worlds), p=self.weights))].draw(index, frames, height, width)


@dataclass(frozen=True)
class SizeSampler:
    """Draws clip sizes (frames, height, width) of at most `tokens` tokens, where a token is one frame of `stride` x `stride` pixels.

    Sides are multiples of `stride` from `shortest` to `longest`, aspect ratios up to `aspect`; a share `images` of the sizes has one frame,
    the others 2 up to `longest_clip`, uniformly. Of the sizes that are no images a share `usual` is that of (usual_frames, 64, 64), or of
    `longest_clip` frames where that is less.
    """

    tokens: int
    seed: int = 0
    stride: int = 16
    shortest: int = 32
    longest: int = 96
    aspect: float = 3.0
    longest_clip: int = 32
    images: float = 0.2
    usual: float = 0.0
    usual_frames: int = 16

    def __post_init__(self) -> None:
        if not self._canvases():
            raise ValueError(
                f"tokens is {self.tokens}, shortest {self.shortest}, longest {self.longest}, stride {self.stride}: no canvas fits; "
                f"a {self.shortest} x {self.shortest} image has {(self.shortest // self.stride) ** 2} tokens"
            )

    def draw(self, index: int) -> tuple[int, int, int]:
        """The size of clip `index`, in frames and pixels."""
        _check_size(index, 1, 1, 1)
        rng = np.random.default_rng([self.seed, 0, 5, index])
        image = self.longest_clip == 1 or rng.random() < self.images
        frames = 1 if image else int(rng.integers(2, self.longest_clip + 1))
        usual = min(self.usual_frames, self.longest_clip)
        if not image and rng.random() < self.usual and usual * 64**2 <= self.tokens * self.stride**2:
            return usual, 64, 64
        # Long clips take the canvases that still fit; if none does, the clip is cut to what the smallest canvas allows.
        canvases = self._canvases()
        frames = min(frames, max(self.tokens * self.stride**2 // (h * w) for h, w in canvases))
        height, width = _choose(rng, [(h, w) for h, w in canvases if frames * h * w <= self.tokens * self.stride**2])
        return frames, height, width

    def _canvases(self) -> list[tuple[int, int]]:
        sides = range(math.ceil(self.shortest / self.stride) * self.stride, self.longest + 1, self.stride)
        pairs = [(h, w) for h in sides for w in sides if max(h, w) <= self.aspect * min(h, w)]
        return [(h, w) for h, w in pairs if h * w <= self.tokens * self.stride**2]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


def _check_size(index: int, frames: int, height: int, width: int) -> None:
    for name, value, least in (("index", index, 0), ("frames", frames, 1), ("height", height, 1), ("width", width, 1)):
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
