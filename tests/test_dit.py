"""The video transformer: what may influence what, and that every input does."""

import pytest
import torch
from tubelet.engine import DiTConfig, VideoDiT
from tubelet.kernels import VideoLayout

KINDS = ("factorised", "full", "frame_causal")
GRIDS = [(4, 2, 3), (1, 3, 2), (3, 2, 2)]


def make(blocks=("factorised", "factorised"), **options) -> VideoDiT:
    torch.manual_seed(0)
    dit = VideoDiT(DiTConfig(channels=3, width=32, heads=2, blocks=blocks, text_width=8, local_width=16, **options))
    with torch.no_grad():  # outputs and gates start at zero
        for name, p in dit.named_parameters():
            if p.dim() > 1 or "known" in name:
                p.normal_(std=0.2)
    return dit.eval()


def inputs(grids=GRIDS, known=None, words=(3, 5, 2)):
    layout = VideoLayout.pack(grids, known=known)
    text_layout = VideoLayout.segments(list(words))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(layout.tokens, 12, generator=generator)
    times = torch.rand(layout.num_frames, generator=generator) * ~layout.frame_known
    return tokens, times, torch.randn(text_layout.tokens, 8, generator=generator), layout, text_layout


@torch.no_grad()
def changed(dit, given, which, rows) -> torch.Tensor:
    """bool (tokens,): whose velocity changes when rows of input `which` change."""
    other = list(given)
    other[which] = given[which].clone()
    other[which][rows] += 1.0
    return (dit(*given) - dit(*other)).abs().amax(dim=1) > 1e-6


def spans(layout):
    return [slice(clip.video_start, clip.video_stop) for clip in layout.clips]


@pytest.mark.parametrize("local", [(0, 0), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_a_pack_do_not_touch(kind, local):
    dit, given = make((kind, kind), local_blocks=local), inputs()
    for i, span in enumerate(spans(given[3])):
        reached = changed(dit, given, 0, span)
        assert reached[span].any()
        assert not torch.cat([reached[other] for j, other in enumerate(spans(given[3])) if j != i]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_text_reaches_its_clip_alone(kind):
    dit, given = make((kind,)), inputs()
    for words, span in zip(((0, 3), (3, 8), (8, 10)), spans(given[3]), strict=True):
        reached = changed(dit, given, 2, slice(*words))
        assert reached[span].all() and reached.sum() == span.stop - span.start


@pytest.mark.parametrize("local", [(0, 0), (1, 2)])
@pytest.mark.parametrize("kind", ["factorised", "frame_causal"])
def test_later_frames_do_not_reach_earlier_ones(kind, local):
    dit, given = make((kind, kind), local_blocks=local), inputs([(4, 2, 3)], words=(3,))
    for frame in range(4):
        reached = changed(dit, given, 0, slice(6 * frame, 6 * frame + 6)).view(4, 6).any(dim=1)
        assert reached.tolist() == [t >= frame for t in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_known_frames_reach_every_frame(kind):
    dit, given = make((kind, kind)), inputs([(4, 2, 3)], known=[[False, False, True, False]], words=(3,))
    assert changed(dit, given, 0, slice(12, 18)).view(4, 6).any(dim=1).all()


def test_bidirectional_time():
    dit, given = make(causal=False), inputs([(4, 2, 3)], words=(3,))
    assert changed(dit, given, 0, slice(18, 24)).view(4, 6).any(dim=1).all()


@pytest.mark.parametrize("positions", ["factorised", "rotary", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_place_is_known_on_every_axis(kind, positions):
    """Equal tokens everywhere come out unequal along each axis once position is told, and frame 0 of a causal model excepted, only then."""
    dit, (tokens, _, text, layout, text_layout) = make((kind, kind), positions=positions), inputs([(3, 3, 3)], words=(3,))
    # One clip of equal tokens: attention over equal values returns them wherever it looks, so one random token breaks the tie.
    tokens = tokens[:1].expand(27, -1).clone()
    tokens[13] += 1
    with torch.no_grad():
        out = dit(tokens, torch.full((3,), 0.5), text, layout, text_layout).view(3, 3, 3, -1)
    rest = out[2] if kind != "full" else out[0]
    assert (rest[0, 0] - rest[0, 2]).abs().max() > 1e-6 and (rest[0, 0] - rest[2, 0]).abs().max() > 1e-6
    assert (out[1] - out[2])[0, 0].abs().max() > 1e-6


def test_a_frames_noise_level_moves_it():
    dit, given = make(), inputs([(4, 2, 3)], words=(3,))
    assert changed(dit, given, 1, slice(2, 3)).view(4, 6).any(dim=1).tolist() == [False, False, True, True]


def test_an_untrained_model_predicts_nothing():
    dit = VideoDiT(DiTConfig(channels=3, width=32, heads=2, blocks=("factorised",), text_width=8))
    assert not dit(*inputs()).any()


def test_every_parameter_takes_part():
    dit = make(KINDS).train()
    dit(*inputs(known=[[True, False, False, False], [False], [False] * 3])).square().sum().backward()
    assert [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_normalisation_is_undone():
    dit = make()
    dit.latent_mean.copy_(torch.tensor([1.0, -2.0, 3.0]))
    dit.latent_std.copy_(torch.tensor([0.5, 2.0, 3.0]))
    latents = torch.randn(3, 2, 4, 4)
    assert torch.allclose(dit.denormalise(dit.normalise(latents)), latents, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": ()}, "blocks: expected one or more of factorised, full, frame_causal"),
        ({"blocks": ("circular",)}, "blocks: .* got"),
        ({"positions": "none"}, "positions: expected one of factorised, rotary, both, got 'none'"),
        ({"width": 100, "heads": 3}, "width: expected a multiple of 8 for each of 3 heads, got 100"),
    ],
)
def test_bad_configurations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DiTConfig(**options)


def test_sides_past_the_table_are_named():
    with pytest.raises(ValueError, match=r"layout: expected sides of at most \(2, 2\) tokens, .* got a clip of \(4, 2, 3\)"):
        make(table_size=2)(*inputs())
