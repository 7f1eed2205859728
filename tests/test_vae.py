"""The properties that a TECO-style VAE must have, whatever its weights."""

import pytest
import torch
from tubelet.engine import VAEConfig, VideoVAE
from tubelet.engine.vae import ResBlock, StreamCache, rate


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=2)).eval()
    for module in vae.modules():
        if isinstance(module, ResBlock):  # starts at zero
            torch.nn.init.normal_(module.conv2.weight, std=0.1)
    return vae.requires_grad_(False)


@pytest.fixture
def video():
    return torch.rand(2, 3, 6, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("j", [0, 2, 5])
def test_a_frame_reaches_what_it_may_reach(vae, video, j):
    """Changing frame j leaves S_i to the bit for i not in {j, j + 1}, and H_i for i <= j; and changes the others."""
    changed = video.clone()
    changed[:, :, j] = -changed[:, :, j]
    before, after = vae.encode(video), vae.encode(changed)
    for i in range(6):
        assert torch.equal(before.space[:, :, i], after.space[:, :, i]) == (i not in (j, j + 1))
        assert torch.equal(before.time[:, :, i], after.time[:, :, i]) == (i <= j)


def test_an_image_is_a_clip_of_one_frame(vae, video):
    whole, first = vae.encode(video), vae.encode(video[:, :, :1])
    assert torch.equal(whole.space[:, :, :1], first.space) and torch.equal(whole.time[:, :, :1], first.time)
    assert torch.equal(vae.encode_images(video).space[:, :, :1], first.space)


@pytest.mark.parametrize("chunks", [[1] * 6, [2, 3, 1], [5, 1]])
def test_chunks_equal_the_whole(vae, video, chunks):
    whole, cache, back = vae.encode(video), StreamCache(), StreamCache()
    parts = [vae.encode(part, cache) for part in video.split(chunks, dim=2)]
    for name in ("space", "time"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], dim=2), getattr(whole, name), atol=1e-5, rtol=1e-5)
    decoded = [vae.decode_space(part, back) for part in whole.space.split(chunks, dim=2)]
    torch.testing.assert_close(torch.cat(decoded, dim=2), vae.decode(whole.space, whole.time), atol=1e-5, rtol=1e-5)


def test_given_frames_are_decoded_as_given(vae, video):
    space = vae.encode(video).space
    decoded = vae.decode_space(space, given={2: video[:, :, 2]})
    assert torch.equal(decoded[:, :, 2], video[:, :, 2])
    torch.testing.assert_close(decoded[:, :, :2], vae.decode_space(space)[:, :, :2], atol=1e-5, rtol=1e-5)


def test_the_rate_is_the_divergence_of_gaussians():
    values = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    q, p = (torch.distributions.Normal(mean, (logvar / 2).exp()) for mean, logvar in (values[:2], values[2:]))
    torch.testing.assert_close(rate(*values), torch.distributions.kl_divergence(q, p))


@pytest.mark.parametrize("shape", [(2, 3, 4, 30, 32), (3, 4, 32, 32), (1, 4, 2, 32, 32)])
def test_bad_shapes_are_named(vae, shape):
    with pytest.raises(ValueError, match="video: expected"):
        vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="space, time"):
        vae.decode(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4))
