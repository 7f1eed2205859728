"""Requests to one pack: every clip keeps its own size and length, and a request gives the same video alone and in any pack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tubelet.kernels import VideoLayout, patchify

from .conditioning import KnownFrames, resolve
from .dit import VideoDiT
from .text import PackedText, TextEncoder
from .vae import VideoVAE
from .video import to_float


@dataclass(frozen=True, eq=False)
class Request:
    """One video to sample.

    prompt: what it shows. frames, height, width: its size in pixels. seed: of its noise. guidance: how strongly the prompt steers (1: no
    guidance; None: as the model was tuned). negative_prompt: what it is steered away from. known: frames that are given, as
    `conditioning.resolve` takes them: {0: image}, {0: a, -1: b}, or a clip, which it extends forward or, with extend="backward", backward.
    """

    prompt: str
    frames: int = 16
    height: int = 64
    width: int = 64
    seed: int = 0
    guidance: float | None = None
    negative_prompt: str = ""
    known: Mapping[int, Any] | Any | None = field(default=None, repr=False)
    extend: str = "forward"

    def check(self, multiple: int) -> None:
        """Raise ValueError or TypeError for a request that cannot be sampled; sides must be multiples of `multiple`."""
        if not isinstance(self.prompt, str) or not isinstance(self.negative_prompt, str):
            raise TypeError(f"prompt: expected text, got {type(self.prompt).__name__}")
        if not self.prompt.strip():
            raise ValueError("prompt: expected a description of the video, got an empty one")
        for name in ("frames", "height", "width", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        if self.frames < 1:
            raise ValueError(f"frames: expected at least 1, got {self.frames}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed}")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < multiple or side % multiple:
                below = max(multiple, side // multiple * multiple)
                raise ValueError(
                    f"{name}: expected a multiple of {multiple} pixels, got {side}; the nearest are {below} and {below + multiple}"
                )
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance: expected a number >= 0, got {self.guidance}")


@dataclass(frozen=True)
class Pack:
    """Requests ready to sample: their known frames, starting tokens (noise, and the given frames where known), layouts and texts.

    `layout` holds the clips once; `text` and `text_layout` hold them twice if any is guided: with their prompts, then with their negative
    prompts.
    """

    known: tuple[KnownFrames, ...]
    start: Tensor
    guidance: Tensor | None
    layout: VideoLayout
    text: PackedText
    text_layout: VideoLayout

    @classmethod
    def build(cls, requests: list[Request], dit: VideoDiT, vae: VideoVAE, text: TextEncoder) -> "Pack":
        """Resolve, encode and lay out the requests. Raises ValueError or TypeError for bad ones, naming which."""
        multiple = vae.stride * dit.config.patch[1]
        known = []
        for i, request in enumerate(requests):
            try:
                request.check(multiple)
                known.append(resolve(request.known, request.frames, request.height, request.width, request.extend))
            except (ValueError, TypeError) as error:
                raise type(error)(f"request {i}: {error}" if len(requests) > 1 else str(error)) from error

        codes = [_start(request, frames, dit, vae) for request, frames in zip(requests, known, strict=True)]
        start = patchify(codes, dit.config.patch)
        grids = [(code.shape[1], code.shape[2] // dit.config.patch[1], code.shape[3] // dit.config.patch[2]) for code in codes]
        marks = [frames.mask(request.frames).tolist() for request, frames in zip(requests, known, strict=True)]
        guided = any(request.guidance != 1 for request in requests)
        prompts = [request.prompt for request in requests] + [request.negative_prompt for request in requests if guided]
        encoded = text.encode(prompts)
        encoded = encoded.to(dit.device, dit.dtype)
        return cls(
            known=tuple(known),
            start=start,
            guidance=torch.tensor([request.guidance for request in requests], device=dit.device) if guided else None,
            layout=VideoLayout.pack(grids, known=marks, device=dit.device),
            text=encoded,
            text_layout=VideoLayout.segments(encoded.lengths, device=dit.device),
        )

    def part(self, counts: Sequence[int]) -> "Part":
        """The first counts[i] frames of each clip i, at least one of each."""
        clips, where, device = self.layout.clips, self.layout.coordinates, self.layout.device
        grids = [(count, *clip.grid[1:]) for count, clip in zip(counts, clips, strict=True)]
        known = [clip.known[:count] for count, clip in zip(counts, clips, strict=True)]
        times = 1 + (self.guidance is not None)
        kept = [t < count for count, clip in zip(counts, clips, strict=True) for t in range(clip.frames)]
        return Part(
            counts=tuple(counts),
            tokens=(where.t < torch.tensor(counts, device=device)[where.clip.long()]).nonzero()[:, 0],
            frames=torch.tensor(kept, device=device).nonzero()[:, 0],
            layout=VideoLayout.pack(grids, known=known, device=device),
            model_layout=VideoLayout.pack(grids * times, known=known * times, device=device),
        )


@dataclass(frozen=True)
class Part:
    """The first frames of each clip of a pack: how many, their places among its tokens and its frames, and where they lie by themselves;
    in `model_layout` twice if any request is guided.
    """

    counts: tuple[int, ...]
    tokens: Tensor
    frames: Tensor
    layout: VideoLayout
    model_layout: VideoLayout


def _start(request: Request, known: KnownFrames, dit: VideoDiT, vae: VideoVAE) -> Tensor:
    """Noise of the request's own seed, (channels, T, h, w), with each known frame encoded alone in its place."""
    sides = (request.height // vae.stride, request.width // vae.stride)
    generator = torch.Generator().manual_seed(request.seed)
    code = torch.randn(dit.config.channels, request.frames, *sides, generator=generator)
    # Noise is drawn on the CPU: a seed means the same on every device. The sampler adds up in the dtype of the latents' statistics.
    code = code.to(dit.latent_mean)
    if known.indices:
        video = to_float(known.images)[None].to(vae.device, vae.dtype)
        alone = vae.encode_images(video)
        both = dit.config.channels == 2 * vae.config.latent_channels
        code[:, list(known.indices)] = dit.normalise((alone.stacked if both else alone.space)[0].to(code))
    return code
