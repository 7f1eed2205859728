"""The convolutions around the transformer: frames of every size, clip by clip."""

import pytest
import torch
import torch.nn.functional as F
from tubelet.engine.local import Conv, PixelLayout, temporal_shift
from tubelet.kernels import VideoLayout, patchify

PATCH = (1, 2, 3)
SIZES = [(2, 4, 6), (1, 4, 6), (3, 2, 3), (2, 4, 6)]
"""Of the latents; the first two clips make one run."""


@pytest.fixture
def pack():
    clips = [torch.randn(8, *size) for size in SIZES]
    layout = VideoLayout.pack([(t, h // PATCH[1], w // PATCH[2]) for t, h, w in SIZES])
    return clips, layout, PixelLayout.of(layout, PATCH)


def flat(clips):
    return torch.cat([clip.permute(1, 2, 3, 0).flatten(0, 2) for clip in clips])


def test_patches_unfold_to_latents_and_back(pack):
    clips, layout, pixels = pack
    tokens = patchify(clips, PATCH)
    assert len(pixels.runs) == 3
    assert torch.equal(pixels.unfold(tokens), flat(clips))
    assert torch.equal(pixels.fold(flat(clips)), tokens)
    frame, rows = 0, []
    for t, h, w in SIZES:
        for _ in range(t):
            rows += [frame] * (h * w)
            frame += 1
    assert pixels.rows.tolist() == rows
    assert PixelLayout.of(layout, PATCH) is pixels


@torch.no_grad()
def test_the_convolution_is_of_each_frame_alone(pack):
    clips, _, pixels = pack
    conv = Conv(8, 5)
    weight, bias = conv.weight.double(), conv.bias.double()
    expected = flat([F.conv2d(clip.transpose(0, 1).double(), weight, bias, padding=1).transpose(0, 1) for clip in clips])
    torch.testing.assert_close(conv(flat(clips), pixels).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_quarter_of_the_channels_comes_from_the_frame_before(pack):
    clips, _, pixels = pack
    moved = []
    for clip in clips:
        clip = clip.clone()
        clip[:2, 1:] = clip[:2, :-1].clone()
        clip[:2, 0] = 0
        moved.append(clip)
    assert torch.equal(temporal_shift(flat(clips), pixels), flat(moved))
