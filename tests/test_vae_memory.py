"""What the time latent is for: a small VAE trained here, with the project's own objective, remembers what has long been out of sight.

The world is a camera that turns in a room with six coloured walls and sees two of them at a time: a wall that comes into view was last seen
five frames before, and only memory can tell its colour. It comes back after the same number of frames each time, which is easier to learn
than a pan that returns the way it came: that was not remembered by models of this size in 2000 steps.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tubelet.engine import VAEConfig, VideoVAE
from tubelet.engine.training.data import COLOURS, PALETTE
from tubelet.engine.training.stage_one import StageOne, StageOneConfig
from tubelet.engine.training.trainer import Trainer, TrainerConfig
from tubelet.engine.video import to_float

FRAMES, HEIGHT, WIDTH, WALLS = 14, 16, 32, 6
WALL = WIDTH // 2


class Room:
    """Clip `index` of a camera that turns by one wall a frame, from wall 0 on."""

    def colours(self, index: int) -> torch.Tensor:
        return torch.randint(len(COLOURS), (WALLS,), generator=torch.Generator().manual_seed(index))

    def draw(self, index: int, frames: int, height: int, width: int):
        walls = torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.uint8)[self.colours(index)]
        views = torch.stack([walls[[t % WALLS, (t + 1) % WALLS]] for t in range(frames)])  # (T, 2, 3)
        return SimpleNamespace(frames=views.repeat_interleave(WALL, dim=1)[:, None].expand(-1, height, -1, -1).contiguous())


def trained(folder, window: int | None) -> VideoVAE:
    torch.manual_seed(0)
    sizes = VAEConfig(latent_channels=4, width=16, encoder_blocks=1, decoder_blocks=1, time_width=64, time_layers=2, time_heads=2)
    vae = VideoVAE(VAEConfig(**vars(sizes) | {"time_window": window}))
    stage = StageOne(vae, Room(), StageOneConfig(frame_tokens=8 * FRAMES * 2, kl_weight=100.0, kl_warmup=700, enough_psnr=35.0))
    stage.sizes = SimpleNamespace(draw=lambda step: (FRAMES, HEIGHT, WIDTH))
    trainer = Trainer(vae, folder, TrainerConfig(steps=1000, warmup=50, learning_rate=4e-3, precision="fp32"))
    trainer.run(stage.loss, "room")
    with trainer.averaged():
        return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), None)


def unseen(clips: int, frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos that training never drew, and the colours of their walls."""
    indices = range(10**9, 10**9 + clips)
    videos = [to_float(Room().draw(i, frames, HEIGHT, WIDTH).frames) for i in indices]
    return torch.stack(videos), torch.stack([Room().colours(i) for i in indices])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean() / 4))


def test_swapped_time_latents_cost_ten_decibels(vae):
    video, _ = unseen(64)
    latents = vae.encode(video)
    plain = psnr(vae.decode(latents.space, latents.time), video)
    swapped = psnr(vae.decode(latents.space, latents.time.roll(1, dims=0)), video)
    assert plain >= 30 and plain - swapped >= 10


def test_it_holds_at_four_times_the_trained_length(vae):
    video, _ = unseen(16, 4 * FRAMES)
    latents = vae.encode(video)
    assert psnr(vae.decode(latents.space, latents.time)[:, :, 3 * FRAMES :], video[:, :, 3 * FRAMES :]) >= 30


def accuracy(vae: VideoVAE) -> float:
    """How often a linear probe reads from H_i the colour of the wall that comes into view in frame i, after a lap; chance is 1/6."""
    video, colours = unseen(1200)
    time = torch.cat([vae.encode(part).time for part in video.split(200)])
    right = []
    for i in range(WALLS - 1, FRAMES):
        wall = colours[:, (i + 1) % WALLS]
        features = F.pad(time[:, :, i].flatten(1), (0, 1), value=1.0).double()
        weights = torch.linalg.lstsq(features[:900], F.one_hot(wall[:900], len(COLOURS)).double()).solution
        right.append(((features[900:] @ weights).argmax(dim=1) == wall[900:]).double().mean())
    return float(torch.stack(right).mean())


def test_a_probe_reads_what_has_long_been_out_of_sight(vae):
    assert accuracy(vae) >= 0.95


def test_a_transformer_of_two_frames_cannot_remember_it(tmp_path):
    """The control: two layers of two frames reach three frames back, the wall was last seen five before."""
    assert accuracy(trained(tmp_path, window=2)) < 0.35
