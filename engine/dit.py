"""The video transformer: a diffusion transformer (DiT, Peebles & Xie 2023) over packs of spacetime latent patches.

A model is a list of blocks. "factorised": attention within each frame -> causal attention along time at each site -> cross-attention
to the text -> MLP (Latte, Ma et al. 2024). "full" and "frame_causal": attention over the whole clip, or over earlier and equal frames,
in place of the first two. The timestep modulates each part (one shared projection with a learned offset per block, PixArt, Chen et al.
2023), one row per frame: known frames are at timestep 0, are marked by a channel of their own, and are seen as keys by every frame.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tubelet.kernels import (
    FrameCausal,
    Full,
    Mask,
    Modulation,
    NormRope,
    Spatial,
    Temporal,
    VideoLayout,
    attention,
    final_layer,
    gated_residual,
    modulated_norm,
    patch_embed,
    qk_norm_rope,
    quantize_rows,
    rotary_table,
)

from .local import Conv, LocalBlock, PixelLayout
from .precision import DTYPES, FP8Linear, Rows, check_precision, quantise
from .pretrained import PretrainedModule

BLOCKS = ("factorised", "full", "frame_causal")
POSITIONS = ("factorised", "rotary", "both")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer.

    channels: of the latents it reads and predicts. positions: learned tables per axis added to the tokens ("factorised"), rotary channels
    in the attention ("rotary"), or both. causal: whether factorised blocks attend along time causally. local_blocks: convolutional blocks
    of `local_width` channels at the resolution of the latents before and after the transformer, (0, 0) for none (see `local`).
    """

    channels: int = 32
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 192
    heads: int = 4
    blocks: tuple[str, ...] = ("factorised",) * 6
    mlp_ratio: float = 4.0
    text_width: int = 128
    positions: str = "both"
    causal: bool = True
    local_blocks: tuple[int, int] = (0, 0)
    local_width: int = 128
    table_size: int = 64

    def __post_init__(self):
        if not self.blocks or any(block not in BLOCKS for block in self.blocks):
            raise ValueError(f"blocks: expected one or more of {', '.join(BLOCKS)}, got {self.blocks}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if len(self.local_blocks) != 2 or any(number < 0 for number in self.local_blocks):
            raise ValueError(f"local_blocks: expected two numbers, before and after the transformer, got {self.local_blocks}")
        if any(self.local_blocks) and self.patch[0] != 1:
            raise ValueError(f"local_blocks: expected (0, 0) with patches of several frames, got {self.local_blocks}")
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
        local = config.local_width if any(config.local_blocks) else 0
        patched = local * math.prod(config.patch) or config.token_width
        if local:
            before, after = config.local_blocks
            self.local_in = Conv(config.channels + 1, local)
            self.local_before = nn.ModuleList(LocalBlock(local, width) for _ in range(before))
            self.local_after = nn.ModuleList(LocalBlock(local, width) for _ in range(after))
            self.local_out = Conv(local, config.channels)
        self.embed = nn.Linear(patched, width)
        self.known = nn.Parameter(torch.zeros(width))
        if config.positions != "rotary":
            self.tables = nn.ParameterList([nn.Parameter(torch.randn(config.table_size, width)) for _ in range(3)])
        self.condition = Condition(width, config.text_width)
        parts = {kind: 3 if kind == "factorised" else 2 for kind in BLOCKS}
        self.modulation = nn.Linear(width, 9 * width)
        self.blocks = nn.ModuleList(Block(config, kind, parts[kind]) for kind in config.blocks)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patched)
        for layer in (self.modulation, self.final_modulation, *([self.local_out] if local else []), self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def causal(self) -> bool:
        """Whether later frames, unless they are known, tell nothing about earlier ones."""
        return self.config.causal and "full" not in self.config.blocks

    @property
    def fp8(self) -> bool:
        """Whether the products of the blocks are in E4M3."""
        return self.blocks[0].fp8

    def set_precision(self, precision: str) -> "VideoDiT":
        """Compute in "fp32", in "bf16", or in "fp8": in bfloat16, with the products of the blocks in E4M3 (see `precision`). In place.

        The statistics of the latents, and with them what a sampler adds up, stay float32. FP8 is for good: such a model has no gradients,
        is not saved and takes no other precision. Raises ValueError.
        """
        check_precision(precision)
        if self.fp8:
            raise ValueError(f"precision: expected no other one for a model in fp8, whose weights are rounded, got {precision!r}")
        if precision == "fp8":
            quantise(self.blocks)
            self.eval().requires_grad_(False)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(DTYPES[precision])
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """As of any module; raises ValueError for one in FP8, whose weights are not what they were."""
        if self.fp8:
            raise ValueError("precision: expected a model in fp32 or bf16 to save, got fp8, which is chosen when a model is loaded")
        super().save_pretrained(folder, dtype)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (channels, T, h, w) to zero mean and unit variance per channel."""
        return (latents - self.latent_mean[:, None, None, None]) / self.latent_std[:, None, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self.latent_std[:, None, None, None] + self.latent_mean[:, None, None, None]

    def forward(self, tokens: Tensor, times: Tensor, text: Tensor, layout: VideoLayout, text_layout: VideoLayout) -> Tensor:
        """The velocity of each token, (tokens, token_width), in the dtype of the parameters, or of autocast.

        tokens: (tokens, token_width), of any floating dtype, noisy, or clean where known. times: (frames of the pack,), the noise level of
        each frame in [0, 1], 0 for known ones. text: (text tokens, text_width), in the dtype of the parameters. layout: where the clips lie
        and which frames are known. text_layout: the text of each clip, `VideoLayout.segments`.
        """
        dtype = self.embed.weight.dtype
        tokens = tokens.to(dtype)
        known = layout.coordinates.known
        rows = layout.rows("frame")
        condition = self.condition(times, layout, text, text_layout)
        local = any(self.config.local_blocks)
        if local:
            pixels = PixelLayout.of(layout, self.config.patch)
            mark = known[:, None].to(dtype).expand(-1, math.prod(self.config.patch))
            fine = self.local_in(pixels.unfold(torch.cat((tokens, mark), dim=1)), pixels)
            for block in self.local_before:
                fine = block(fine, condition, pixels)
            tokens = pixels.fold(fine)
        added = {"known": known, "known_weight": self.known}
        if self.config.positions != "rotary":  # frames past the table share its last entry: the rotary channels tell them apart
            added["positions"] = list(self.tables)
        x = patch_embed(tokens, self.embed.weight, self.embed.bias, layout=layout, dtype=dtype, **added)
        modulation = self.modulation(condition)
        rotary = {}
        if self.config.positions != "factorised":
            head_dim = self.config.width // self.config.heads
            rotary = layout.table(("rotary", head_dim), partial(_rotary, head_dim))
        if self.fp8:  # once for all blocks
            text = quantize_rows(text)
        for block in self.blocks:
            x = block(x, modulation, rows, text, layout, text_layout, rotary)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        x = final_layer(x, self.out.weight, self.out.bias, norm=Modulation(shift, scale), rows=rows)
        if local:
            fine = fine + pixels.unfold(x)
            for block in self.local_after:
                fine = block(fine, condition, pixels)
            x = pixels.fold(self.local_out(modulated_norm(fine), pixels))
        return x


def _rotary(head_dim: int, layout: VideoLayout) -> dict[type[Mask], tuple[Tensor, ...]]:
    """The rotary tables of each kind of attention, and the row of each token where that is not its own.

    Along time half of the channels turn: the others carry content over any distance.
    """
    space, time = head_dim // 4 * 2, head_dim // 4 * 2
    places = layout.positions
    starts = layout.frame_starts.long().clamp(max=layout.tokens - 1)  # those of no frame, of a capacity, are past its end
    whole = rotary_table(places, (head_dim // 4, space // 2, space // 2), theta=100.0)
    return {
        Spatial: rotary_table(places[:, 1:], (space, head_dim - space), theta=100.0),
        Temporal: (*rotary_table(places[starts, :1], (time,), theta=100.0), layout.rows("frame")),
        Full: whole,
        FrameCausal: whole,
    }


class Condition(nn.Module):
    """What modulates a frame: its noise level, the size of the canvas in tokens and the mean of the text (Podell et al. 2023, SDXL, for
    the latter two), and what each word of it says, together with the frame's place in time: what "left" says of a frame depends on which
    it is. The words are read one by one and summed (Zaheer et al. 2017, deep sets), since one alone hardly moves the mean.
    """

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.size = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Linear(64, width, bias=False)
        nn.init.zeros_(self.place.weight)

    def forward(self, times: Tensor, layout: VideoLayout, text: Tensor, text_layout: VideoLayout) -> Tensor:
        """(frames, width), after the activation that precedes the modulation's projection."""
        size = self.size(waves(layout.clip_grids[: layout.num_clips, 1:], 64).flatten(1).to(text.dtype))
        clips = layout.frame_clips.long()
        place = self.place(waves(layout.positions[layout.frame_starts.long(), 0], 64).to(text.dtype))
        read, *rest = self.text
        said = (read(self._mean(text, text_layout)) + _sum(self.words(text), text_layout))[clips] + place
        for layer in rest:
            said = layer(said)
        return F.silu(self.time(waves(1000 * times, 128).to(text.dtype)) + size[clips] + said)

    @staticmethod
    def _mean(text: Tensor, layout: VideoLayout) -> Tensor:
        """The mean of each clip's text, (clips, text_width); zeros for an empty one."""
        lengths = layout.clip_offsets.diff()[: layout.num_clips, None]  # of text alone
        return _sum(text, layout) / lengths.clamp(min=1)


def _sum(text: Tensor, layout: VideoLayout) -> Tensor:
    """The sum over each clip's text, (clips, channels); zeros for an empty one."""
    return text.new_zeros(layout.num_clips, text.shape[1]).index_add(0, layout.rows("clip"), text)


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
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    @property
    def fp8(self) -> bool:
        """Whether its products are in E4M3: then norms give what they take."""
        return isinstance(self.cross.q, FP8Linear)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rows: Tensor,
        text: Rows,
        layout: VideoLayout,
        text_layout: VideoLayout,
        rotary: dict[type[Mask], tuple[Tensor, ...]],
    ) -> Tensor:
        parts = modulation.unflatten(-1, (-1, x.shape[-1]))[:, : len(self.offsets)] + self.offsets
        shifts, scales, gates = (parts[:, i::3].unbind(1) for i in range(3))
        fp8 = self.fp8
        h = modulated_norm(x, shifts[0], scales[0], rows, fp8=fp8)
        for i, part in enumerate(self.attentions):
            y = part(h, layout, rotary)
            if i + 1 < len(self.attentions):
                x, h = gated_residual(x, y, gates[i], rows, norm=Modulation(shifts[i + 1], scales[i + 1]), fp8=fp8)
        x, h = gated_residual(x, y, gates[len(self.attentions) - 1], rows, norm=Modulation(None, None), fp8=fp8)
        y = self.cross(h, text, layout, text_layout)
        x, h = gated_residual(x, y, norm=Modulation(shifts[-1], scales[-1]), rows=rows, fp8=fp8)
        return gated_residual(x, self.mlp(h), gates[-1], rows)


class SelfAttention(nn.Module):
    """Attention under one mask, with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, width: int, heads: int, mask: Mask):
        super().__init__()
        self.heads, self.mask = heads, mask
        self.qkv = nn.Linear(width, 3 * width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Rows, layout: VideoLayout, rotary: dict[type[Mask], tuple[Tensor, ...]]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cos, sin, *rows = rotary.get(type(self.mask), (None, None))
        norm_rope = NormRope(self.q_weight, self.k_weight, cos, sin, rows=rows[0] if rows else None)
        return self.out(attention(q, k, v, layout, self.mask, norm_rope=norm_rope).flatten(1))


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

    def forward(self, x: Rows, text: Rows, layout: VideoLayout, text_layout: VideoLayout) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(1)
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight)
        return self.out(attention(q, k, v, layout, Full(), kv_layout=text_layout).flatten(1))
