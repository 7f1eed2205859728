"""Stage one: the VAE learns to code images and video by itself, without captions.

    loss = log(sd) + kl_weight * KL(q(S|x) || p(S|H)) / values,   sd^2 = mean squared error of the step + that of enough_psnr

The first term is a Gaussian likelihood at its optimal variance (sigma-VAE, Rybkin et al. 2021): a nat of rate keeps its price as the
pictures get better, until they are good enough. An error below that of enough_psnr is worth no rate, so that S, which can always tell
more, need not. The rate must cost something, else H is ignored. DropLoss (TECO): each step decodes a random share of the
frames, while the time transformer sees all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vae import VideoVAE, rate
from ..video import to_float
from .data import SizeSampler, World


@dataclass(frozen=True)
class StageOneConfig:
    """frame_tokens: the size of a step in frames of 16 x 16 pixels. kl_weight is reached linearly over the first kl_warmup steps.
    enough_psnr: in dB, where finer pictures stop to count. decoder_only: the latents stay as they are, so that a transformer that knows
    them stays valid.
    """

    frame_tokens: int = 1536
    longest_clip: int = 16
    kl_weight: float = 1.0
    kl_warmup: int = 400
    enough_psnr: float = 45.0
    decoded_share: float = 0.5
    decoder_only: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, least in (("longest_clip", 1), ("kl_warmup", 1), ("seed", 0), ("kl_weight", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number, not below {least}, got {getattr(self, name)}")


class StageOne:
    """The loss of a step on clips of one size, drawn from a world."""

    def __init__(self, vae: VideoVAE, world: World, config: StageOneConfig):
        self.vae, self.world, self.config = vae, world, config
        if config.decoder_only:
            vae.requires_grad_(False).decoder.requires_grad_(True)
        self.sizes = SizeSampler(config.frame_tokens // 2, seed=config.seed, longest_clip=config.longest_clip, images=0.1)

    def batch(self, step: int) -> Tensor:
        """Clips of one size, (batch, 3, T, H, W) in [-1, 1]."""
        frames, height, width = self.sizes.draw(step)
        count = max(1, self.config.frame_tokens * 256 // (frames * height * width))
        clips = [self.world.draw(step * 4096 + i, frames, height, width).frames for i in range(count)]
        return torch.stack([to_float(clip) for clip in clips]).to(self.vae.device)

    def loss(self, step: int) -> dict[str, Tensor]:
        video = self.batch(step)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        mean, logvar = self.vae.encode_space(video)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        space = mean + (0.5 * logvar).exp() * noise
        time = self.vae.time(space)
        nats = rate(mean, logvar, *self.vae.prior_of(time)).sum() / video.numel()

        frames = video.shape[2]
        kept = torch.randperm(frames, generator=generator)[: max(1, round(frames * self.config.decoded_share))].sort().values
        decoded = self.vae.decode(space[:, :, kept], time[:, :, kept])
        error = (decoded.float() - video[:, :, kept]).square().mean()
        weight = self.config.kl_weight * min(1.0, (step + 1) / self.config.kl_warmup)
        # An L2 error in [-1, 1] is four times the one in [0, 1] that PSNR is said in.
        counted = error + 4 * 10 ** (-self.config.enough_psnr / 10)
        return {"loss": 0.5 * counted.log() + weight * nats, "psnr": -10 * torch.log10(error.detach() / 4), "nats": nats}
