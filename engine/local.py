"""Convolutions over the latents of each frame, at their full resolution, before and after a transformer over patches (Hoogeboom et al.
2023, "simple diffusion", whose U-ViT has such levels around it).

Where an edge lies within a patch, and how it moves from frame to frame, is local: convolutions learn it from far fewer clips than
attention over patches does. A quarter of the channels come from the frame before (the causal temporal shift of Lin et al. 2019, TSM); what
is further away in time, or comes later and is known, is left to the attention.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tubelet.kernels import VideoLayout, gated_residual, modulated_norm


@dataclass(frozen=True)
class Run:
    """Neighbouring clips of a pack whose frames have one size. tokens: their span in it; pixels: in the pack of latents. frames: their
    number; first: bool (frames,), the first frame of each clip. grid: of a frame's tokens.
    """

    tokens: slice
    pixels: slice
    frames: int
    first: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class PixelLayout:
    """Where the latents ("pixels") of a pack of patches lie: frame by frame as its tokens, a frame row by row. rows: the frame of each."""

    runs: tuple[Run, ...]
    rows: Tensor
    patch: tuple[int, int]
    tokens: int

    @classmethod
    def of(cls, layout: VideoLayout, patch: tuple[int, int, int]) -> "PixelLayout":
        """Built once for a layout and a patch (1, ph, pw)."""
        key = ("pixels", patch)
        if key not in layout.cache:
            _, ph, pw = patch
            runs, start = [], 0
            for grid, clips in groupby(layout.clips, key=lambda clip: clip.grid[1:]):
                clips = list(clips)
                first = torch.tensor([t == 0 for clip in clips for t in range(clip.frames)], device=layout.device)
                stop = start + len(first) * grid[0] * ph * grid[1] * pw
                span = slice(clips[0].video_start, clips[-1].video_stop)
                runs.append(Run(span, slice(start, stop), len(first), first, grid))
                start = stop
            whole = VideoLayout.pack([(t, h * ph, w * pw) for t, h, w in (clip.grid for clip in layout.clips)], device=layout.device)
            layout.cache[key] = cls(tuple(runs), whole.rows("frame"), (ph, pw), layout.tokens)
        return layout.cache[key]

    def unfold(self, tokens: Tensor) -> Tensor:
        """Tokens (tokens, channels * ph * pw), channels slowest, to pixels (pixels, channels)."""
        ph, pw = self.patch
        parts = [tokens[run.tokens].view(run.frames, *run.grid, -1, ph, pw).permute(0, 1, 4, 2, 5, 3).flatten(0, 4) for run in self.runs]
        return torch.cat(parts)

    def fold(self, pixels: Tensor) -> Tensor:
        """The inverse of `unfold`; zeros past the end of the pack."""
        ph, pw = self.patch
        parts = []
        for run in self.runs:
            x = pixels[run.pixels].view(run.frames, run.grid[0], ph, run.grid[1], pw, -1)
            parts.append(x.permute(0, 1, 3, 5, 2, 4).reshape(run.frames * run.grid[0] * run.grid[1], -1))
        tokens = torch.cat(parts)
        return F.pad(tokens, (0, 0, 0, self.tokens - len(tokens)))

    def frames(self, pixels: Tensor, run: Run) -> Tensor:
        """The frames of a run, (frames, H, W, channels)."""
        return pixels[run.pixels].unflatten(0, (run.frames, run.grid[0] * self.patch[0], run.grid[1] * self.patch[1]))


class Conv(nn.Conv2d):
    """A 3 x 3 convolution of each frame of (pixels, channels), one call for each run."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, pixels: PixelLayout) -> Tensor:
        parts = [super(Conv, self).forward(pixels.frames(x, run).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for run in pixels.runs]
        return torch.cat([part.flatten(0, 2) for part in parts])


class LocalBlock(nn.Module):
    """norm -> modulate -> temporal shift -> convolution -> SiLU -> convolution -> gate -> add."""

    def __init__(self, width: int, condition_width: int):
        super().__init__()
        self.modulation = nn.Linear(condition_width, 3 * width)
        self.expand, self.contract = Conv(width, width), Conv(width, width)
        for layer in (self.modulation, self.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor, pixels: PixelLayout) -> Tensor:
        """x: (pixels, width). condition: (frames, condition_width)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        h = modulated_norm(x, shift, scale, pixels.rows)
        h = self.contract(F.silu(self.expand(temporal_shift(h, pixels), pixels)), pixels)
        return gated_residual(x, h, 1 + gate, pixels.rows)


def temporal_shift(x: Tensor, pixels: PixelLayout) -> Tensor:
    """(pixels, channels) with the first quarter of the channels from the frame before; zeros in a clip's first frame."""
    quarter = x.shape[1] // 4
    moved, kept = x.split((quarter, x.shape[1] - quarter), dim=1)
    parts = []
    for run in pixels.runs:
        frames = pixels.frames(moved, run)
        before = F.pad(frames[:-1], (0, 0, 0, 0, 0, 0, 1, 0))
        parts.append(before.masked_fill(run.first[:, None, None, None], 0).flatten(0, 2))
    return torch.cat((torch.cat(parts), kept), dim=1)
