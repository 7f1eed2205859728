"""A fixed reader of `ShapesWorld` clips: which shapes, of which colours, go where. It learns nothing, so it can judge what a model paints.

Every pixel is named after the nearest palette colour. The background is the commonest name; a thing is a connected blob of one of the six
object colours. Edges that blend two colours can look like a third, but are too thin to have an interior. Inside a blob's surroundings the
pixels are then read as coverage, their place between background and thing colour; from it come area and centroid to a fraction of a pixel,
and the shape whose rendered template overlaps best. Walls, being gray or black, are never things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .data import BACKGROUNDS, COLOURS, DIRECTIONS, PALETTE, SHAPES, SPEEDS, Scene, coverage

PALETTE_TABLE = np.array([PALETTE[name] for name in BACKGROUNDS], np.float32)  # the object colours come first
LEAST_SHARE = 0.05  # a further thing has at least this share of the interior of the largest
MATCHED_FRAMES = 6  # frames on which the shape is matched: those that show most of the thing


@dataclass(frozen=True)
class ThingReading:
    """One blob. track: (T, 2) float, centroid (x, y) in pixels, NaN where it is out of sight; area: (T,) float, in pixels.

    direction: left, right, up, down for steady travel, "still", or None where it is neither (bouncing, circling, a single frame).
    growth: the area of the last frame that shows it over that of the first.
    """

    colour: str
    shape: str
    direction: str | None
    growth: float
    track: np.ndarray
    area: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a clip shows: its background colour, and its things, the largest first (none if no blob is found)."""

    background: str
    things: list[ThingReading]


def read(frames: torch.Tensor | np.ndarray) -> Reading:
    """Reads a clip, uint8 (T, H, W, 3) RGB. Raises TypeError and ValueError for another dtype or shape."""
    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8:
        raise TypeError(f"frames are {pixels.dtype}; expected uint8")
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"frames have shape {tuple(pixels.shape)}; expected (T, H, W, 3)")
    pixels = pixels.astype(np.float32)
    names = np.argmin((PALETTE_TABLE**2).sum(1) - 2 * pixels @ PALETTE_TABLE.T, axis=-1)
    background = int(np.bincount(names.ravel(), minlength=len(BACKGROUNDS)).argmax())
    backdrop = pixels[names == background].mean(0)

    blobs = {}
    for colour in range(len(COLOURS)):
        mask = names == colour
        inside = _erode(mask) if colour != background else np.zeros_like(mask)
        if inside.any():
            blobs[colour] = inside, _component(mask, inside)
    sizes = {colour: int(inside.sum()) for colour, (inside, _) in blobs.items()}
    chosen = [colour for colour in sorted(sizes, key=sizes.get, reverse=True) if sizes[colour] > LEAST_SHARE * max(sizes.values())]
    things = []
    for colour in chosen:
        inside, blob = blobs[colour]
        surroundings = _dilate(_dilate(blob))
        for other in chosen:
            if other != colour:
                surroundings &= ~blobs[other][1]
        axis = pixels[inside].mean(0) - backdrop
        cover = (pixels - backdrop) @ (axis / (axis @ axis)) * surroundings
        things.append(_read_thing(COLOURS[colour], cover, surroundings))
    return Reading(BACKGROUNDS[background], things)


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether the reading shows the scene's background and its first thing: keys background, colour, shape and direction.

    The thing is looked for among the largest of the reading, as many as the scene has. `direction` is left out where the scene or the clip
    defines none: bouncing, circling, growing and shrinking things, and single frames.
    """
    thing = scene.things[0]
    candidates = reading.things[: len(scene.things)]
    found = next((candidate for candidate in candidates if candidate.colour == thing.colour), candidates[0] if candidates else None)
    result = {
        "background": reading.background == scene.background,
        "colour": found is not None and found.colour == thing.colour,
        "shape": found is not None and found.shape == thing.shape,
    }
    if thing.motion in ("still", "move", "behind") and (found is None or len(found.track) > 1):
        result["direction"] = found is not None and found.direction == (thing.direction or "still")
    return result


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Adds the four neighbours in the frame of every pixel of (T, H, W)."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


def _erode(mask: np.ndarray) -> np.ndarray:
    return ~_dilate(~mask)


def _component(mask: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The connected part of each frame's mask (T, H, W) that holds its deepest pixel; nothing in frames without an inside."""
    deepest = inside
    while True:  # erode each frame as long as something is left of it
        eroded = _erode(deepest)
        alive = eroded.any((1, 2))
        if not alive.any():
            break
        deepest = np.where(alive[:, None, None], eroded, deepest)
    part = np.zeros_like(mask)
    shown = np.flatnonzero(deepest.any((1, 2)))
    first = deepest[shown].reshape(len(shown), mask[0].size).argmax(1)
    part.reshape(len(mask), -1)[shown, first] = True
    count = 0
    while part.sum() > count:
        count = part.sum()
        part = _dilate(part) & mask
    return part


def _read_thing(colour: str, cover: np.ndarray, surroundings: np.ndarray) -> ThingReading:
    height, width = cover.shape[1:]
    area = np.maximum(cover.sum((1, 2), dtype=np.float64), 0)
    shown = surroundings.any((1, 2)) & (area > 0)
    area[~shown] = 0
    track = np.full((len(cover), 2), np.nan)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    track[shown, 0] = (cover[shown].sum(1) * x).sum(1) / area[shown]
    track[shown, 1] = (cover[shown].sum(2) * y).sum(1) / area[shown]
    seen = area[shown]
    growth = float(seen[-1] / seen[0]) if len(seen) else 1.0
    return ThingReading(colour, _shape(cover, track, area), _direction(track, min(height, width)), growth, track, area)


def _direction(track: np.ndarray, unit: int) -> str | None:
    """Steady travel along one axis, from a line fitted to the track; a track that leaves its line has no direction."""
    shown = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(shown) < 2:
        return None
    time, places = shown - shown.mean(), track[shown] - track[shown].mean(0)
    travel = time @ places / (time @ time) * (shown[-1] - shown[0])
    least = min(0.6 * SPEEDS["slow"] * (shown[-1] - shown[0]), 0.1) * unit
    if np.ptp(places, axis=0).max() < least:
        return "still"
    axis = int(np.abs(travel).argmax())
    strays = places - np.outer(time, travel / (shown[-1] - shown[0]))
    if (strays**2).sum() > 0.15 * (places**2).sum() or abs(travel[1 - axis]) > 0.4 * abs(travel[axis]):
        return None
    way = np.zeros(2)
    way[axis] = np.sign(travel[axis])
    return next(name for name, step in DIRECTIONS.items() if step == tuple(way))


def _template_moments(shape: str) -> tuple[float, float]:
    """Area over radius squared, and how far the centroid lies below the centre, over the radius."""
    cover = coverage(shape, np.array([[64.0, 64.0]]), np.array([50.0]), 128, 128)[0]
    return float(cover.sum()) / 50**2, float((cover.sum(1) * (np.arange(128) + 0.5 - 64)).sum() / cover.sum()) / 50


MOMENTS = {shape: _template_moments(shape) for shape in SHAPES}
SHIFTS = np.array([(dx, dy, scale) for dx in (-0.5, 0, 0.5) for dy in (-0.5, 0, 0.5) for scale in (0.93, 1.0, 1.07)])


def _shape(cover: np.ndarray, track: np.ndarray, area: np.ndarray) -> str:
    """The shape whose template overlaps best (intersection over union of coverage) near the centroid and size read off the blob."""
    frames = np.argsort(area)[::-1][:MATCHED_FRAMES]
    frames = frames[area[frames] > 0.85 * area.max()]
    overlaps = dict.fromkeys(SHAPES, 0.0)
    for frame in frames:
        picture = np.clip(cover[frame], 0, 1)
        rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
        top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
        picture = picture[top : rows[-1] + 3, left : columns[-1] + 3]
        for shape, (fill, drop) in MOMENTS.items():
            radius = np.sqrt(area[frame] / fill)
            centres = track[frame] - (left, top + drop * radius) + SHIFTS[:, :2]
            templates = coverage(shape, centres, radius * SHIFTS[:, 2], *picture.shape)
            union = np.maximum(templates, picture).sum((1, 2))
            overlaps[shape] += float((np.minimum(templates, picture).sum((1, 2)) / union).max())
    return max(overlaps, key=overlaps.get)
