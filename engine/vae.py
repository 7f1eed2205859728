"""The video VAE: TECO (Yan et al. 2022) with continuous latents. No compression in time.

Frame i is encoded together with frame i-1 to its space latent S_i. A frame-block-causal transformer over the earlier space latents
gives its time latent H_i, of the same shape, which knows S_1 .. S_{i-1} and not S_i. The decoder reads both: x_i = D(S_i, H_i). The
rate is KL(q(S_i | x_i, x_{i-1}) || p(S_i | H_i)) with a learned prior p, so whatever H_i already knows is free and S_i pays for the
rest alone: that is what makes H carry long history.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tubelet.kernels import FrameCausal, Modulation, VideoLayout, attention, gated_residual, modulated_norm, qk_norm_rope, rotary_table

from .pretrained import PretrainedModule


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE. A latent covers 8 x 8 pixels; `width` channels at a quarter of the resolution, twice as many at an eighth."""

    latent_channels: int = 16
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    time_width: int = 128
    time_layers: int = 3
    time_heads: int = 4
    time_window: int | None = None


class Latents(NamedTuple):
    """Of clips of one size: space and time latents, (batch, channels, T, h, w), and the log variance of the space latent's posterior."""

    space: Tensor
    time: Tensor
    space_logvar: Tensor

    @property
    def stacked(self) -> Tensor:
        """Both side by side on the channels, the code of a frame: (batch, 2 * channels, T, h, w)."""
        return torch.cat((self.space, self.time), dim=1)


@dataclass
class StreamCache:
    """What the next chunk of a stream needs of the earlier ones: the last frame, the last space latent, and the keys and values of the
    time transformer.
    """

    frame: Tensor | None = None
    space: Tensor | None = None
    frames: int = 0
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class VideoVAE(PretrainedModule):
    """encode: (batch, 3, T, H, W) in [-1, 1], H and W multiples of 8, to Latents; decode: back. An image is a clip of one frame."""

    config_class = VAEConfig
    stride = 8

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.time = TimeTransformer(config)
        self.prior = nn.Sequential(
            nn.Conv2d(config.latent_channels, 2 * config.width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * config.width, 2 * config.latent_channels, 1),
        )
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, cache: StreamCache | None = None) -> Latents:
        """With a `cache`, `video` is the next chunk of a stream; chunk by chunk gives what all at once gives."""
        space, logvar = self.encode_space(video, cache)
        return Latents(space, self.time(space, cache), logvar)

    def encode_space(self, video: Tensor, cache: StreamCache | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(S_i | x_i, x_{i-1}), each (batch, channels, T, h, w)."""
        if video.dim() != 5 or video.shape[1] != 3 or video.shape[3] % self.stride or video.shape[4] % self.stride:
            raise ValueError(f"video: expected (batch, 3, T, H, W) with H and W multiples of {self.stride}, got {tuple(video.shape)}")
        mean, logvar = self.encoder(video, cache.frame if cache else None)
        if cache is not None:
            cache.frame = video[:, :, -1]
        return mean, logvar

    def encode_images(self, video: Tensor) -> Latents:
        """Each frame encoded alone, as a clip of one frame."""
        batch = video.shape[0]
        latents = self.encode(rearrange(video, "b c t h w -> (b t) c 1 h w"))
        return Latents(*(rearrange(x, "(b t) c 1 h w -> b c t h w", b=batch) for x in latents))

    def decode(self, space: Tensor, time: Tensor) -> Tensor:
        """Video (batch, 3, T, H, W) from both latents."""
        if space.shape != time.shape or space.dim() != 5 or space.shape[1] != self.config.latent_channels:
            expected = f"(batch, {self.config.latent_channels}, T, h, w)"
            raise ValueError(f"space, time: expected equal shapes {expected}, got {tuple(space.shape)} and {tuple(time.shape)}")
        frames = self.decoder(rearrange(torch.cat((space, time), dim=1), "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=space.shape[0])

    def decode_space(self, space: Tensor, cache: StreamCache | None = None, given: dict[int, Tensor] | None = None) -> Tensor:
        """Video from the space latents alone: the time latents are recomputed from them.

        cache: as in `encode`, for a stream. given: frames (batch, 3, H, W) that are known, by index; what follows them is decoded as
        following the pictures given.
        """
        if not given:
            return self.decode(space, self.time(space, cache))
        cache, frames = StreamCache() if cache is None else cache, []
        for i in range(space.shape[2]):
            code = space[:, :, i : i + 1]
            if i in given:
                code, _ = self.encoder(given[i][:, :, None], frames[-1][:, :, 0] if frames else None)
            time = self.time(code, cache)
            frames.append(given[i][:, :, None] if i in given else self.decode(code, time))
        return torch.cat(frames, dim=2)

    def prior_of(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the learned prior p(S_i | H_i)."""
        out = self.prior(rearrange(time, "b c t h w -> (b t) c h w"))
        mean, logvar = rearrange(out, "(b t) c h w -> b c t h w", b=time.shape[0]).chunk(2, dim=1)
        return mean, logvar.float().clamp(-12, 6)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel: no statistics over space, so a frame's size does not matter."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)


class Grow(nn.Module):
    """Twice the sides: a 1 x 1 convolution, and its channels laid out as 2 x 2 pixels (kept channels-last, which nn.PixelShuffle does
    not).
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x).permute(0, 2, 3, 1), "b h w (c p q) -> b (h p) (w q) c", p=2, q=2).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Encoder(nn.Module):
    """(x_{i-1}, x_i) to mean and log variance of S_i. The first layer is TECO's convolution over space and the two frames of its window."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.width
        self.start = nn.Parameter(torch.zeros(3 * 16, 1, 1))
        self.embed = nn.Conv3d(3 * 16, width, (2, 3, 3), padding=(0, 1, 1))
        self.fine = nn.Sequential(*(ResBlock(width) for _ in range(config.encoder_blocks)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResBlock(2 * width) for _ in range(config.encoder_blocks)), ChannelNorm(2 * width), nn.SiLU())
        self.out = nn.Conv2d(2 * width, 2 * config.latent_channels, 3, padding=1)
        # A linear way around the deep one: pictures come through from the first steps of training (Chen et al. 2024, DC-AE).
        self.around = nn.Linear(3 * 64, config.latent_channels)
        with torch.no_grad():
            self.out.bias[config.latent_channels :] = -3.0

    def forward(self, video: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = video.shape[0]
        x = rearrange(video, "b c t (h p) (w q) -> b (c p q) t h w", p=4, q=4)
        if previous is None:
            first = self.start[None].to(x.dtype).expand(batch, -1, *x.shape[3:])
        else:
            first = rearrange(previous, "b c (h p) (w q) -> b (c p q) h w", p=4, q=4)
        before = torch.cat((first[:, :, None], x[:, :, :-1]), dim=2)
        # The convolution over the window of two frames, as one over space with the frames side by side: faster on a CPU.
        pairs = rearrange([before, x], "k b c t h w -> (b t) (c k) h w")
        x = F.conv2d(pairs.contiguous(memory_format=torch.channels_last), self.embed.weight.flatten(1, 2), self.embed.bias, padding=1)
        x = self.out(self.coarse(self.down(self.fine(x))))
        mean, logvar = rearrange(x, "(b t) c h w -> b c t h w", b=batch).chunk(2, dim=1)
        around = self.around(rearrange(video, "b c t (h p) (w q) -> b t h w (c p q)", p=8, q=8))
        return mean + rearrange(around, "b t h w c -> b c t h w"), logvar.float().clamp(-12, 6)


class Decoder(nn.Module):
    """S_i and H_i, joined on the channels, to the frame."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.width
        self.embed = nn.Conv2d(2 * config.latent_channels, 2 * width, 3, padding=1)
        self.coarse = nn.Sequential(*(ResBlock(2 * width) for _ in range(config.decoder_blocks)))
        self.up = Grow(2 * width, width)
        self.fine = nn.Sequential(*(ResBlock(width) for _ in range(config.decoder_blocks)))
        self.up_fine = Grow(width, width // 2)
        self.finest = nn.Sequential(ResBlock(width // 2), ChannelNorm(width // 2), nn.SiLU())
        self.out = nn.Sequential(nn.Conv2d(width // 2, 12, 3, padding=1), nn.PixelShuffle(2))
        self.around = nn.Linear(2 * config.latent_channels, 3 * 64)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.embed(latents.contiguous(memory_format=torch.channels_last))
        x = self.out(self.finest(self.up_fine(self.fine(self.up(self.coarse(x))))))
        return x + rearrange(self.around(latents.permute(0, 2, 3, 1)), "b h w (c p q) -> b c (h p) (w q)", p=8, q=8)


class TimeTransformer(nn.Module):
    """H_i from S_1 .. S_{i-1}: a convolution shrinks each frame's grid, the sequence is shifted by a frame, attention is frame-causal,
    a transposed convolution brings the grid back.

    Time enters through rotary channels of short wavelength only; the other channels do not turn, so that attention reaches back beyond
    the trained length.
    """

    stride = 2

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.time_width
        self.mask = FrameCausal(window=config.time_window)
        self.start = nn.Parameter(torch.zeros(width))
        self.down = nn.Conv2d(config.latent_channels, width, self.stride + 1, stride=self.stride, padding=1)
        self.position = nn.ParameterList([nn.Parameter(torch.randn(64, width) * 0.02) for _ in range(2)])
        self.blocks = nn.ModuleList(TimeBlock(width, config.time_heads, self.mask) for _ in range(config.time_layers))
        self.norm = nn.LayerNorm(width)
        self.up = nn.ConvTranspose2d(width, 2 * config.latent_channels, self.stride, stride=self.stride)
        self.out = nn.Conv2d(2 * config.latent_channels, config.latent_channels, 3, padding=1)

    def forward(self, space: Tensor, cache: StreamCache | None = None) -> Tensor:
        batch, _, frames, height, width = space.shape
        streaming = cache is not None and cache.space is not None
        first = cache.space if streaming else torch.zeros_like(space[:, :, :1])
        earlier = rearrange(torch.cat((first, space[:, :, :-1]), dim=2), "b c t h w -> (b t) c h w")
        x = rearrange(self.down(earlier), "(b t) c h w -> b t h w c", b=batch)
        if not streaming:
            x = torch.cat((self.start.to(x.dtype).expand(batch, 1, *x.shape[2:]), x[:, 1:]), dim=1)
        grid = x.shape[1:4]
        limit = self.position[0].shape[0]
        if max(grid[1:]) > limit:
            raise ValueError(f"space: expected sides of at most {limit * self.stride} latents, got {height} x {width}")
        x = x + (self.position[0][: grid[1], None] + self.position[1][: grid[2]]).to(x.dtype)
        past = cache.frames if cache is not None else 0
        layout = VideoLayout.pack([grid] * batch, first_frames=[past] * batch, device=x.device)
        kv_layout = VideoLayout.pack([(past + frames, *grid[1:])] * batch, device=x.device) if past else layout
        x = x.reshape(-1, x.shape[-1]).contiguous()  # channels as neighbours, which the convolution did not leave
        for i, block in enumerate(self.blocks):
            x = block(x, layout, kv_layout, batch, i, cache)
        if cache is not None:
            cache.frames, cache.space = past + frames, space[:, :, -1:]
        x = modulated_norm(x, weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)
        x = rearrange(x, "(b t h w) c -> (b t) c h w", b=batch, t=frames, h=grid[1])
        x = self.out(F.silu(self.up(x)))[..., :height, :width]
        return rearrange(x, "(b t) c h w -> b c t h w", b=batch)


class TimeBlock(nn.Module):
    """Pre-norm attention over whole earlier frames, and an MLP."""

    # Of 32 channels a head: 8 turn with time, wavelengths 6 to 18 frames; 8 each with height and width; the rest carry content over
    # any distance.
    thetas = (4.0, 100.0, 100.0)

    def __init__(self, width: int, heads: int, mask: FrameCausal):
        super().__init__()
        self.heads, self.mask = heads, mask
        head_dim = width // heads
        self.rotary_dims = (head_dim // 4, head_dim // 4, head_dim // 4)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(head_dim)) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, layout: VideoLayout, kv_layout: VideoLayout, batch: int, index: int, cache: StreamCache | None) -> Tensor:
        qkv = self.qkv(modulated_norm(x, weight=self.norm1)).unflatten(-1, (3, self.heads, -1))
        cos, sin = rotary_table(layout.positions, self.rotary_dims, theta=self.thetas)
        q, k = qk_norm_rope(qkv[:, 0], qkv[:, 1], self.q_weight, self.k_weight, cos, sin)
        v = qkv[:, 2]
        if cache is not None:
            if len(cache.keys_values) > index:
                past_k, past_v = cache.keys_values[index]
                k, v = (torch.cat((past, new.unflatten(0, (batch, -1))), dim=1).flatten(0, 1) for past, new in ((past_k, k), (past_v, v)))
                cache.keys_values[index] = tuple(x.unflatten(0, (batch, -1)) for x in (k, v))
            else:
                cache.keys_values.append(tuple(x.unflatten(0, (batch, -1)) for x in (k, v)))
        y = self.out(attention(q, k, v, layout, self.mask, kv_layout=kv_layout).flatten(1))
        x, h = gated_residual(x, y, norm=Modulation(None, None, weight=self.norm2))
        return gated_residual(x, self.mlp(h))


def rate(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(q || p) between diagonal Gaussians, elementwise, in nats and float32."""
    gap = (mean.float() - prior_mean.float()).square()
    return 0.5 * (prior_logvar - logvar + (logvar.exp() + gap) / prior_logvar.exp() - 1)
