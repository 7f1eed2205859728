"""Stage two: the video transformer learns the velocity of the VAE's latents, given captions and known frames.

Every step is a pack of clips of several sizes and lengths, images among them. About half of the clips have some known frames: these
enter as the frame encoded alone, at timestep 0, and carry no loss. Captions are long or short, and sometimes empty, for
classifier-free guidance.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tubelet.kernels import VideoLayout, patchify

from ..conditioning import random_known_mask
from ..dit import VideoDiT
from ..flow import interpolate, logit_normal_times, velocity_target
from ..text import TextEncoder
from ..vae import Latents, VideoVAE
from ..video import to_float
from .data import SizeSampler, World


@dataclass(frozen=True)
class StageTwoConfig:
    """tokens: of a step's pack, in `groups` groups of clips of one size. Every `reuse` steps a new group is encoded, which these steps
    hold; the others are drawn from the last `pool` groups. images: the share of groups of one frame; usual: of the others, the share of
    clips of `usual_frames` frames of 64 x 64 pixels; beginnings: the share that shows only the first 2 or 3 frames of clips of
    `usual_frames`, all clear but the last, which is nearly pure noise: what moves has yet to choose its way, and nothing but the caption
    tells it. In whole clips few frames are such, and what the caption says of motion is learned hundreds of times slower.

    shift: of the noise levels of an image; what a clip of T frames shows, which all of them tell, is decided nearer to pure noise: there
    it is sqrt(T) times as much (as a picture's grows with its side, Esser et al. 2024). frame_times: the share of clips whose frames have
    noise levels of their own (Chen et al. 2024, Diffusion Forcing), as where sampling is staggered: in most of these every frame is
    either noisy or nearly clear, at random, so that how things move is learned from clear earlier frames; in the others the levels rise
    from the first frame to the last.

    The loss is the error of the velocity, weighted by (t / 0.5)^2 at the levels t below 0.5 (as Hang et al. 2023, min-SNR, caps the weight
    of the cleanest levels): what is still uncertain there is finer than what the decoder shows.
    """

    tokens: int = 2048
    groups: int = 3
    pool: int = 256
    reuse: int = 2
    longest_clip: int = 32
    images: float = 0.1
    usual: float = 0.75
    usual_frames: int = 16
    beginnings: float = 0.3
    long_captions: float = 0.4
    empty_captions: float = 0.1
    shift: float = 2.0
    frame_times: float = 0.9
    seed: int = 0

    def __post_init__(self):
        for name in ("images", "usual", "beginnings", "long_captions", "empty_captions", "frame_times"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        for name, least in (("tokens", 1), ("longest_clip", 1), ("usual_frames", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number, not below {least}, got {getattr(self, name)}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a number above 0, got {self.shift}")


@dataclass(frozen=True)
class Group:
    """Clips of one size, encoded: codes of the video and of each frame alone, both (clips, channels, T, h, w), and their two captions.
    beginning: whether these are the first frames of longer clips.
    """

    codes: Tensor
    alone: Tensor
    captions: list[tuple[str, str]]
    beginning: bool


class StageTwo(nn.Module):
    """The loss of a step. Its trainable modules are the transformer and, if `train_text`, the text encoder; the VAE is fixed."""

    def __init__(self, dit: VideoDiT, text: TextEncoder, vae: VideoVAE, world: World, config: StageTwoConfig, *, train_text: bool):
        super().__init__()
        self.dit, self.text = dit, text.requires_grad_(train_text)
        self.vae = vae.requires_grad_(False).eval()
        if dit.config.channels not in (vae.config.latent_channels, 2 * vae.config.latent_channels):
            one = vae.config.latent_channels
            raise ValueError(f"dit: expected channels {one} (space latents) or {2 * one} (space and time), got {dit.config.channels}")
        if dit.config.text_width != text.dim:
            raise ValueError(f"dit: expected text_width {text.dim} as the text encoder has, got {dit.config.text_width}")
        self.train_text, self.world, self.config = train_text, world, config
        stride = vae.stride * dit.config.patch[1]
        self.sizes = SizeSampler(
            config.tokens // config.groups,
            seed=config.seed,
            stride=stride,
            longest_clip=config.longest_clip,
            images=config.images,
            usual=config.usual,
            usual_frames=config.usual_frames,
        )
        self.groups: dict[int, Group] = {}

    @torch.no_grad()
    def measure(self, groups: int = 24) -> None:
        """Set the transformer's normalisation of latents from the first groups.

        A channel is scaled by the spread of posterior samples, not of means: one that carries little next to its own noise then weighs
        little in the loss.
        """
        means, noise = [], []
        for i in range(groups):
            latents = self.vae.encode(self._video(i)[0])
            means.append(self._code(latents).float().transpose(0, 1).flatten(1))
            noise.append(
                self._code(latents._replace(space=latents.space_logvar.exp(), time=torch.zeros_like(latents.time)))
                .transpose(0, 1)
                .flatten(1)
            )
        means, noise = torch.cat(means, dim=1), torch.cat(noise, dim=1)
        self.dit.latent_mean.copy_(means.mean(dim=1))
        self.dit.latent_std.copy_((means.var(dim=1) + noise.mean(dim=1)).sqrt().clamp(min=1e-3))

    @torch.no_grad()
    def group(self, index: int) -> Group:
        """Encode group `index`."""
        video, captions, beginning = self._video(index)
        codes, alone = (self._code(latents).float() for latents in (self.vae.encode(video), self.vae.encode_images(video)))
        return Group(codes, alone, captions, beginning)

    def _video(self, index: int) -> tuple[Tensor, list[tuple[str, str]], bool]:
        frames, height, width = self.sizes.draw(index)
        rng = np.random.default_rng([self.config.seed, 1, index])
        beginning = frames > 1 and rng.random() < self.config.beginnings
        if beginning:
            frames = min(self.config.usual_frames, self.config.longest_clip)
        seen = min(int(rng.integers(2, 4)), frames) if beginning else frames
        stride = self.vae.stride * self.dit.config.patch[1]
        count = max(1, self.config.tokens // self.config.groups * stride**2 // (seen * height * width))
        samples = [self.world.draw(index * 4096 + i, frames, height, width) for i in range(count)]
        video = torch.stack([to_float(sample.frames[:seen]) for sample in samples]).to(self.vae.device)
        return video, [(sample.caption, sample.long_caption) for sample in samples], beginning

    def _code(self, latents: Latents) -> Tensor:
        return latents.stacked if self.dit.config.channels == 2 * self.vae.config.latent_channels else latents.space

    def draw(self, step: int, rng: np.random.Generator) -> list[Group]:
        """The newest group, and others of the last `pool`, which a resumed run encodes again."""
        newest = step // self.config.reuse
        ages = rng.integers(min(newest + 1, self.config.pool), size=self.config.groups - 1)
        drawn = [newest, *(newest - int(age) for age in ages)]
        self.groups = {index: group for index, group in self.groups.items() if index > newest - self.config.pool}
        for index in drawn:
            if index not in self.groups:
                self.groups[index] = self.group(index)
        return [self.groups[index] for index in drawn]

    def loss(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.config.seed, step])
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        device, patch = self.dit.device, self.dit.config.patch
        clips, alone, known, times, captions = [], [], [], [], []
        for group in self.draw(step, rng):
            clips += [self.dit.normalise(clip) for clip in group.codes]
            alone += [self.dit.normalise(clip) for clip in group.alone]
            frames = group.codes.shape[2]
            if group.beginning:
                known += [torch.zeros(frames, dtype=torch.bool) for _ in group.codes]
                times += [self._beginning_times(frames, generator) for _ in group.codes]
            else:
                known += [random_known_mask(frames, generator) for _ in group.codes]
                times += [self._times(frames, generator) for _ in group.codes]
            captions += [self._caption(pair, rng) for pair in group.captions]
        grids = [(clip.shape[1], clip.shape[2] // patch[1], clip.shape[3] // patch[2]) for clip in clips]
        layout = VideoLayout.pack(grids, known=[mask.tolist() for mask in known], device=device)

        target, given = patchify(clips, patch), patchify(alone, patch)
        noise = torch.randn(target.shape, generator=generator).to(device)
        times = torch.cat(times).to(device) * ~torch.cat(known).to(device)
        marked = layout.coordinates.known[:, None]
        tokens = torch.where(marked, given, interpolate(target, noise, times[layout.rows("frame").long()]))

        with torch.set_grad_enabled(self.train_text):
            text = self.text(captions)
        velocity = self.dit(tokens, times, text.tokens, layout, VideoLayout.segments(text.lengths, device=device))
        error = (velocity.float() - velocity_target(target, noise)).square().mean(dim=1)
        weight = (times[layout.rows("frame").long()] / 0.5).square().clamp(max=1) * ~marked[:, 0]
        return {"loss": (error * weight).sum() / weight.sum()}

    def _times(self, frames: int, generator: torch.Generator) -> Tensor:
        """The noise levels of a clip's frames: the same for all, or for each its own."""
        own, rising = torch.rand(2, generator=generator) < torch.tensor([self.config.frame_times, 0.25])
        if frames == 1 or not own:
            return logit_normal_times(1, generator, shift=self.config.shift * frames**0.5).expand(frames)
        if rising:
            return torch.rand(frames, generator=generator).sort().values
        drawn = torch.rand(4, frames, generator=generator)
        noisy = torch.where(drawn[0] < 0.5, 1 - 0.1 * drawn[1], logit_normal_times(frames, generator, shift=1.5 * self.config.shift))
        return torch.where(drawn[2] < 0.5, noisy, 0.3 * drawn[3])

    @staticmethod
    def _beginning_times(frames: int, generator: torch.Generator) -> Tensor:
        """Nearly clear, and the last frame nearly pure noise."""
        drawn = torch.rand(frames, generator=generator)
        return torch.cat((0.3 * drawn[:-1], 1 - 0.1 * drawn[-1:]))

    def _caption(self, pair: tuple[str, str], rng: np.random.Generator) -> str:
        if rng.random() < self.config.empty_captions:
            return ""
        return pair[int(rng.random() < self.config.long_captions)]
