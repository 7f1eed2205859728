"""The video transformer: a diffusion transformer (DiT, Peebles & Xie 2023) over packs of spacetime latent patches.

A model is a list of blocks. "factorised": attention within each frame -> causal attention along time at each site -> cross-attention
to the text -> MLP (Latte, Ma et al. 2024). "full" and "frame_causal": attention over the whole clip, or over earlier and equal frames,
in place of the first two. The timestep modulates each part (one shared projection with a learned offset per block, PixArt, Chen et al.
2023), one row per frame: known frames are at timestep 0, are marked by a channel of their own, and are seen as keys by every frame.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tubelet.kernels import (
    FrameCausal,
    Full,
    Mask,
    Modulation,
    Spatial,
    Temporal,
    VideoLayout,
    attention,
    gated_residual,
    modulated_norm,
    qk_norm_rope,
    rotary_table,
)

from .pretrained import PretrainedModule

BLOCKS = ("factorised", "full", "frame_causal")
POSITIONS = ("factorised", "rotary", "both")
MLPS = ("plain", "conv")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer.

    channels: of the latents it reads and predicts. positions: learned tables per axis added to the tokens ("factorised"), rotary channels
    in the attention ("rotary"), or both. causal: whether factorised blocks attend along time causally. mlp: "plain", or "conv" with a
    3 x 3 depthwise convolution over each frame's tokens between its two layers (Mix-FFN, Xie et al. 2021, SegFormer; Xie et al. 2024,
    SANA): what is next to what then need not be learned by attention, which a small model trained for a short time does not manage.
    """

    channels: int = 32
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 192
    heads: int = 4
    blocks: tuple[str, ...] = ("factorised",) * 6
    mlp: str = "plain"
    mlp_ratio: float = 4.0
    text_width: int = 128
    positions: str = "both"
    causal: bool = True
    table_size: int = 64

    def __post_init__(self):
        if not self.blocks or any(block not in BLOCKS for block in self.blocks):
            raise ValueError(f"blocks: expected one or more of {', '.join(BLOCKS)}, got {self.blocks}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if self.mlp not in MLPS:
            raise ValueError(f"mlp: expected one of {', '.join(MLPS)}, got {self.mlp!r}")
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(f"width: expected a multiple of 8 for each of {self.heads} heads, got {self.width}")

    @property
    def token_width(self) -> int:
        """Numbers in a token: the channels of a patch."""
        return self.channels * math.prod(self.patch)


class VideoDiT(PretrainedModule):
    """Predicts the velocity noise - latents of every token of a pack."""

    config_class = DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width = config.width
        # Latents are normalised per channel before they are patched; stage two measures these.
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))
        self.embed = nn.Linear(config.token_width, width)
        self.known = nn.Parameter(torch.zeros(width))
        if config.positions != "rotary":
            self.tables = nn.ParameterList([nn.Parameter(0.02 * torch.randn(config.table_size, width)) for _ in range(3)])
        self.condition = Condition(width, config.text_width)
        parts = {kind: 3 if kind == "factorised" else 2 for kind in BLOCKS}
        self.modulation = nn.Linear(width, 9 * width)
        self.blocks = nn.ModuleList(Block(config, kind, parts[kind]) for kind in config.blocks)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.token_width)
        for layer in (self.modulation, self.final_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (channels, T, h, w) to zero mean and unit variance per channel."""
        return (latents - self.latent_mean[:, None, None, None]) / self.latent_std[:, None, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self.latent_std[:, None, None, None] + self.latent_mean[:, None, None, None]

    def forward(self, tokens: Tensor, times: Tensor, text: Tensor, layout: VideoLayout, text_layout: VideoLayout) -> Tensor:
        """The velocity of each token, (tokens, token_width).

        tokens: (tokens, token_width), noisy, or clean where known. times: (frames of the pack,), the noise level of each frame in [0,
        1], 0 for known ones. text: (text tokens, text_width). layout: where the clips lie and which frames are known. text_layout: the
        text of each clip, `VideoLayout.segments`.
        """
        where = layout.coordinates
        x = self.embed(tokens) + where.known[:, None] * self.known
        if self.config.positions != "rotary":
            x = x + self._positions(layout)
        rows = layout.rows("frame")
        condition = self.condition(times, layout, text, text_layout)
        modulation = self.modulation(condition)
        rotary = self._rotary(layout) if self.config.positions != "factorised" else {}
        for block in self.blocks:
            x = block(x, modulation, rows, text, layout, text_layout, rotary)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return self.out(modulated_norm(x, shift, scale, rows))

    def _positions(self, layout: VideoLayout) -> Tensor:
        size = self.config.table_size
        for clip in layout.clips:
            if max(clip.grid[1:]) > size:
                raise ValueError(f"layout: expected sides of at most {size} tokens, got a clip of {clip.grid}")
        places = layout.positions.long()
        # Frames past the table share its last entry: the rotary channels tell them apart.
        return sum(table[places[:, axis].clamp(0, size - 1)] for axis, table in enumerate(self.tables))

    def _rotary(self, layout: VideoLayout) -> dict[type[Mask], tuple[Tensor, Tensor]]:
        """The rotary tables of each kind of attention. Along time only half of the channels turn: the others carry content over any
        distance.
        """
        key = ("rotary", self.config)
        if key not in layout.cache:
            head_dim = self.config.width // self.config.heads
            space, time = head_dim // 4 * 2, head_dim // 4 * 2
            places = layout.positions
            whole = rotary_table(places, (head_dim // 4, space // 2, space // 2), theta=100.0)
            layout.cache[key] = {
                Spatial: rotary_table(places[:, 1:], (space, head_dim - space), theta=100.0),
                Temporal: rotary_table(places[:, :1], (time,), theta=100.0),
                Full: whole,
                FrameCausal: whole,
            }
        return layout.cache[key]


class Condition(nn.Module):
    """What modulates a frame: its noise level, the size of the canvas in tokens, and the mean of the text (Podell et al. 2023, SDXL,
    for the latter two).
    """

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.size = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor, layout: VideoLayout, text: Tensor, text_layout: VideoLayout) -> Tensor:
        """(frames, width), after the activation that precedes the modulation's projection."""
        sides = torch.tensor([clip.grid[1:] for clip in layout.clips], dtype=torch.float32, device=times.device)
        clip = self.size(waves(sides, 64).flatten(1).to(text.dtype)) + self.text(self._mean(text, text_layout))
        frames = torch.tensor([clip.frames for clip in layout.clips], device=times.device)
        clip = clip.repeat_interleave(frames, dim=0, output_size=layout.num_frames)
        return F.silu(self.time(waves(1000 * times, 128).to(text.dtype)) + clip)

    @staticmethod
    def _mean(text: Tensor, layout: VideoLayout) -> Tensor:
        """The mean of each clip's text, (clips, text_width); zeros for an empty one."""
        counts = torch.tensor([max(clip.text_length, 1) for clip in layout.clips], dtype=text.dtype, device=text.device)
        sums = text.new_zeros(layout.num_clips, text.shape[1]).index_add(0, layout.rows("clip"), text)
        return sums / counts[:, None]


def waves(values: Tensor, channels: int) -> Tensor:
    """Sines and cosines of values (...), float32 (..., channels), wavelengths from 2 pi to 20000 pi."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(channels // 2, device=values.device) / (channels // 2))
    angles = values.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Block(nn.Module):
    """Self-attention part(s), text cross-attention, MLP; each part norm -> modulate -> compute -> gate -> add."""

    def __init__(self, config: DiTConfig, kind: str, parts: int):
        super().__init__()
        width = config.width
        masks = {"factorised": (Spatial(), Temporal(causal=config.causal)), "full": (Full(),), "frame_causal": (FrameCausal(),)}[kind]
        self.offsets = nn.Parameter(torch.zeros(3 * parts, width))
        self.attentions = nn.ModuleList(SelfAttention(width, config.heads, mask) for mask in masks)
        self.cross = CrossAttention(width, config.heads, config.text_width)
        hidden = int(width * config.mlp_ratio)
        self.mlp = MLP(width, hidden, conv=config.mlp == "conv")

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rows: Tensor,
        text: Tensor,
        layout: VideoLayout,
        text_layout: VideoLayout,
        rotary: dict[type[Mask], tuple[Tensor, Tensor]],
    ) -> Tensor:
        parts = modulation.unflatten(-1, (-1, x.shape[-1]))[:, : len(self.offsets)] + self.offsets
        shifts, scales, gates = (parts[:, i::3].unbind(1) for i in range(3))
        h = modulated_norm(x, shifts[0], scales[0], rows)
        for i, part in enumerate(self.attentions):
            y = part(h, layout, rotary)
            if i + 1 < len(self.attentions):
                x, h = gated_residual(x, y, gates[i], rows, norm=Modulation(shifts[i + 1], scales[i + 1]))
        x, h = gated_residual(x, y, gates[len(self.attentions) - 1], rows, norm=Modulation(None, None))
        y = self.cross(h, text, layout, text_layout)
        x, h = gated_residual(x, y, norm=Modulation(shifts[-1], scales[-1]), rows=rows)
        return gated_residual(x, self.mlp(h, layout), gates[-1], rows)


class MLP(nn.Module):
    """Two layers with a GELU between them, before which a 3 x 3 depthwise convolution over each frame may add to the hidden features."""

    def __init__(self, width: int, hidden: int, *, conv: bool):
        super().__init__()
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False) if conv else None
        if conv:
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor, layout: VideoLayout) -> Tensor:
        h = self.expand(x)
        if self.conv is not None:
            h = h + self._around(h, layout)
        return self.contract(F.gelu(h, approximate="tanh"))

    def _around(self, h: Tensor, layout: VideoLayout) -> Tensor:
        """The convolution, one call for each run of clips whose frames have one size."""
        parts = []
        for (height, width), run in groupby(layout.clips, key=lambda clip: clip.grid[1:]):
            run = list(run)
            frames = h[run[0].video_start : run[-1].video_stop].unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)
            parts.append(self.conv(frames).permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(parts)


class SelfAttention(nn.Module):
    """Attention under one mask, with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, width: int, heads: int, mask: Mask):
        super().__init__()
        self.heads, self.mask = heads, mask
        self.qkv = nn.Linear(width, 3 * width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: VideoLayout, rotary: dict[type[Mask], tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cos, sin = rotary.get(type(self.mask), (None, None))
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight, cos, sin)
        return self.out(attention(q, k, v, layout, self.mask).flatten(1))


class CrossAttention(nn.Module):
    """Attention of each clip to its text."""

    def __init__(self, width: int, heads: int, text_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, text: Tensor, layout: VideoLayout, text_layout: VideoLayout) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(1)
        q, k = _head_norm(q, self.q_weight), _head_norm(k, self.k_weight)
        return self.out(attention(q, k, v, layout, Full(), kv_layout=text_layout).flatten(1))


def _head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm of each head of (tokens, heads, head_dim)."""
    return modulated_norm(x.flatten(0, 1), kind="rms", weight=weight).view_as(x)
