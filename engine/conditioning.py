"""Known frames: the frames of a video that are given before the others are sampled.

Image to video, extension forwards and backwards, interpolation, loops and the filling of gaps are one task: some frames are known and the
model, trained with random masks of known frames, makes the others (MCVD, Voleti et al. 2022; FDM, Harvey et al. 2022). In users' words:

    image_to_video(image)       the image comes first
    extend_forward(clip)        its frames come first
    extend_backward(clip)       its frames come last
    interpolate(first, last)    an image or clip at either end
    loop(image)                 the image at both ends

Each returns a mapping from frame indices to images, negative ones counting from the end, which `resolve` checks against a video's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from .video import Clip

Pixels: TypeAlias = "torch.Tensor | np.ndarray | Clip"  # uint8 (H, W, 3), an image, or (k, H, W, 3)


@dataclass(frozen=True, eq=False)
class KnownFrames:
    """The known frames of one video: their indices, rising, and their images, uint8 (k, H, W, 3) on the CPU. k may be 0."""

    indices: tuple[int, ...]
    images: torch.Tensor

    def mask(self, frames: int) -> torch.Tensor:
        """bool (frames,): which frames of the video are known."""
        mask = torch.zeros(frames, dtype=torch.bool)
        mask[list(self.indices)] = True
        return mask

    def paste(self, video: torch.Tensor) -> torch.Tensor:
        """A copy of the video, uint8 (T, H, W, 3), whose known frames are the pixels that were given. Raises ValueError."""
        if video.dtype != torch.uint8 or video.shape[1:] != self.images.shape[1:]:
            expected = tuple(self.images.shape[1:])
            raise ValueError(f"video: expected uint8 frames of shape {expected}, got {video.dtype} {tuple(video.shape[1:])}")
        video = video.clone()
        video[list(self.indices)] = self.images.to(video.device)
        return video


def resolve(known: Mapping[int, Pixels] | Pixels | None, frames: int, height: int, width: int, extend: str = "forward") -> KnownFrames:
    """What a user gives as known, checked against the video of frames x height x width pixels that is to be made.

    known: None; a mapping from frame indices (negative: from the end) to images, uint8 (height, width, 3), NumPy arrays or tensors; or a
    Clip or uint8 (k, height, width, 3): the first k frames or, with extend="backward", the last k. At least one frame must be left to make.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong size and for an index outside of the video or given twice.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height, width: expected integers >= 1, got {frames}, {height}, {width}")
    if extend not in ("forward", "backward"):
        raise ValueError(f"extend: expected 'forward' or 'backward', got {extend!r}")
    if known is None:
        known = {}
    elif not isinstance(known, Mapping):
        known = extend_forward(known) if extend == "forward" else extend_backward(known)

    images: dict[int, torch.Tensor] = {}
    for given, pixels in known.items():
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise TypeError(f"known: expected integers as frame indices, got {given!r}")
        if not -frames <= given < frames:
            raise ValueError(f"known[{given}]: expected an index from {-frames} to {frames - 1} in a video of {frames} frames")
        index = int(given) % frames
        if index in images:
            raise ValueError(f"known[{given}]: frame {index} of the {frames} is given twice")
        image = _image(f"known[{given}]", pixels)
        if image.shape != (height, width, 3):
            raise ValueError(f"known[{given}]: expected shape {(height, width, 3)} as the video has, got {tuple(image.shape)}")
        images[index] = image
    if len(images) == frames:
        raise ValueError(f"known: expected at least one frame left to make, got all {frames}")
    indices = tuple(sorted(images))
    empty = torch.empty(0, height, width, 3, dtype=torch.uint8)
    return KnownFrames(indices, torch.stack([images[index] for index in indices]) if indices else empty)


def image_to_video(image: Pixels) -> dict[int, torch.Tensor]:
    """The video starts with the image."""
    return {0: _image("image", image)}


def extend_forward(clip: Pixels) -> dict[int, torch.Tensor]:
    """The video starts with the clip."""
    return dict(enumerate(_frames("clip", clip)))


def extend_backward(clip: Pixels) -> dict[int, torch.Tensor]:
    """The video ends with the clip, however many frames come before it."""
    frames = _frames("clip", clip)
    return {i - len(frames): frame for i, frame in enumerate(frames)}


def interpolate(first: Pixels, last: Pixels) -> dict[int, torch.Tensor]:
    """The video starts with one image or clip and ends with another."""
    return extend_forward(first) | extend_backward(last)


def loop(image: Pixels) -> dict[int, torch.Tensor]:
    """The image at both ends. For a loop of T frames sample T + 1 and drop the last: frame T - 1 then leads on to frame 0."""
    image = _image("image", image)
    return {0: image, -1: image}


def random_known_mask(frames: int, generator: torch.Generator) -> torch.Tensor:
    """Which frames of a training clip are known, bool (frames,): none in half of the draws and for a clip of one frame, never all.

    Otherwise the first k, the last k, both ends, every n-th, or a random subset, equally often. generator: on the CPU. Raises ValueError.
    """
    if frames < 1:
        raise ValueError(f"frames: expected an integer >= 1, got {frames}")
    mask = torch.zeros(frames, dtype=torch.bool)
    if frames == 1 or _uniform(2, generator) == 0:
        return mask
    kinds = ["first", "last", "every", "subset"] + ["ends"] * (frames > 2)  # two ends of two frames would be all of them
    kind = kinds[_uniform(len(kinds), generator)]
    if kind == "first":
        mask[: _few(frames - 1, generator)] = True
    elif kind == "last":
        mask[-_few(frames - 1, generator) :] = True
    elif kind == "ends":
        first = _few(frames - 2, generator)
        mask[:first] = True
        mask[-_few(frames - 1 - first, generator) :] = True
    elif kind == "every":
        n = 1 + _few(frames - 1, generator)
        mask[_uniform(n, generator) :: n] = True
    else:
        mask[torch.randperm(frames, generator=generator)[: 1 + _uniform(frames - 1, generator)]] = True
    return mask


def _uniform(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _few(most: int, generator: torch.Generator) -> int:
    """From 1 to most, log-uniform: one or a few known frames are what users have, whatever the length of the video."""
    return min(int(math.exp(float(torch.rand((), generator=generator)) * math.log(most + 1))), most)


def _image(name: str, value: Pixels) -> torch.Tensor:
    frames = _frames(name, value)
    if len(frames) != 1:
        raise ValueError(f"{name}: expected one image, got {len(frames)} frames")
    return frames[0]


def _frames(name: str, value: Pixels) -> torch.Tensor:
    """uint8 (k, H, W, 3) on the CPU, k >= 1; an image is a clip of one frame."""
    value = getattr(value, "frames", value)  # of a Clip
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())  # tensors share no memory with arrays that are read-only or run backwards
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a Clip, or a tensor or NumPy array of uint8, got {type(value).__name__}")
    if value.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8 pixels from 0 to 255, got {value.dtype}")
    if value.dim() not in (3, 4) or value.shape[-1] != 3 or value.numel() == 0:
        raise ValueError(f"{name}: expected RGB pixels of shape (H, W, 3) or (frames, H, W, 3), got {tuple(value.shape)}")
    return value.cpu().reshape(-1, *value.shape[-3:])
