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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .video import Clip

Image = torch.Tensor | np.ndarray  # uint8 (H, W, 3)
Frames = "Clip | torch.Tensor | np.ndarray"  # uint8 (k, H, W, 3)


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


def resolve(
    known: "Mapping[int, Image] | Clip | torch.Tensor | np.ndarray | None",
    frames: int,
    height: int,
    width: int,
    extend: str = "forward",
) -> KnownFrames:
    """What a user gives as known, checked against the video of frames x height x width pixels that is to be made.

    known: None; a mapping from frame indices (negative: from the end) to images, uint8 (height, width, 3); or a Clip or uint8
    (k, height, width, 3), which are the first k frames or, with extend="backward", the last k. At least one frame must be left to make.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong size, an index outside of the video or given twice.
    """
    if extend not in ("forward", "backward"):
        raise ValueError(f"extend: expected 'forward' or 'backward', got {extend!r}")
    if known is None:
        known = {}
    if not isinstance(known, Mapping):
        known = extend_forward(known) if extend == "forward" else extend_backward(known)
    elif extend == "backward":
        raise ValueError("extend: 'backward' is for a known clip, got a mapping, whose indices say where its images go")

    images = {}
    for given, image in known.items():
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise TypeError(f"known: expected integers as frame indices, got {given!r}")
        if not -frames <= given < frames:
            raise ValueError(f"known[{given}]: expected a frame index from {-frames} to {frames - 1} in a video of {frames} frames")
        index = int(given) % frames
        if index in images:
            raise ValueError(f"known[{given}]: frame {index} of {frames} is given twice")
        image = _pixels(f"known[{given}]", image)
        if image.shape != (height, width, 3):
            raise ValueError(f"known[{given}]: expected an image of shape {(height, width, 3)}, got {tuple(image.shape)}")
        images[index] = image
    if images and len(images) == frames:
        raise ValueError(f"known: expected at least one frame left to make, got all {frames} frames")
    indices = tuple(sorted(images))
    empty = torch.empty(0, height, width, 3, dtype=torch.uint8)
    return KnownFrames(indices, torch.stack([images[index] for index in indices]) if indices else empty)


def image_to_video(image: Image) -> dict[int, torch.Tensor]:
    """The video starts with the image."""
    return {0: _image("image", image)}


def extend_forward(clip: Frames) -> dict[int, torch.Tensor]:
    """The video starts with the clip."""
    return dict(enumerate(_frames("clip", clip)))


def extend_backward(clip: Frames) -> dict[int, torch.Tensor]:
    """The video ends with the clip, however long it will be."""
    frames = _frames("clip", clip)
    return {i - len(frames): frame for i, frame in enumerate(frames)}


def interpolate(first: Image | Frames, last: Image | Frames) -> dict[int, torch.Tensor]:
    """The video starts with one image or clip and ends with another."""
    return extend_forward(first) | extend_backward(last)


def loop(image: Image) -> dict[int, torch.Tensor]:
    """The image at both ends: for a loop of T frames sample T + 1 and drop the last, then frame T - 1 leads on to frame 0."""
    return interpolate(image, image)
