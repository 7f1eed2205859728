"""The video transformer: what may influence what, and that every input does."""

import copy

import pytest
import torch
from tubelet.engine import DiTConfig, VideoDiT
from tubelet.engine.engine import BUNDLED
from tubelet.kernels import VideoLayout, engaged, reset_engaged

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


@torch.no_grad()
def error(dit: VideoDiT, precision: str, *given) -> float:
    """Of the velocity, relative to that in float32."""
    other = copy.deepcopy(dit).set_precision(precision)
    tokens, times, text, *layouts = given
    wanted, found = dit(*given), other(tokens, times, text.to(other.dtype), *layouts)
    assert found.dtype == other.dtype
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_precisions(kind):
    dit, given = make((kind, kind)), inputs()
    reset_engaged()
    assert error(dit, "fp32", *given) == 0 and "fp8_linear" not in engaged()
    assert 1e-3 < error(dit, "bf16", *given) < 0.03 and "fp8_linear" not in engaged()  # measured: 0.8 to 1.4 %
    assert 0.02 < error(dit, "fp8", *given) < 0.12  # 3.0 to 6.3 %
    linears = 9 if kind == "factorised" else 7  # of a block: two of each self-attention, three of the other, two of the MLP
    assert engaged()["fp8_linear"]["torch"].calls == 2 * linears


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_a_pack_do_not_touch_in_fp8(kind):
    dit, given = make((kind, kind)).set_precision("fp8"), list(inputs())
    given[2] = given[2].to(dit.dtype)
    first, *others = spans(given[3])
    reached = changed(dit, given, 0, first)
    assert reached[first].any() and not any(reached[other].any() for other in others)


def test_fp8_moves_the_bundled_model_little():
    dit = VideoDiT.from_pretrained(BUNDLED / "dit")
    layout, text_layout = VideoLayout.pack([(8, 4, 4), (3, 4, 6)], known=[[True] + [False] * 7, [False] * 3]), VideoLayout.segments([9, 4])
    torch.manual_seed(0)
    times = 0.5 * ~layout.frame_known
    given = torch.randn(layout.tokens, 64), times, torch.randn(text_layout.tokens, 128), layout, text_layout
    half, eighth = (error(dit, precision, *given) for precision in ("bf16", "fp8"))
    assert 1e-3 < half < 0.015 and half < eighth < 0.04, (half, eighth)


def test_fp8_is_not_trained_nor_saved_nor_undone(tmp_path):
    dit = make().set_precision("fp8")
    assert not any(parameter.requires_grad for parameter in dit.parameters()) and dit.latent_std.dtype == torch.float32
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16 to train in, got fp8"):
        dit.train()
    with pytest.raises(ValueError, match="precision: expected a model in fp32 or bf16 to save, got fp8"):
        dit.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="precision: expected no other one for a model in fp8, whose weights are rounded, got 'fp32'"):
        dit.set_precision("fp32")
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, fp8, got 'int4'"):
        make().set_precision("int4")


def test_weights_in_fp8_outlast_a_cast():
    tokens, times, text, *layouts = inputs()
    dit = make().set_precision("fp8")
    before = dit(tokens, times, text.bfloat16(), *layouts)
    assert torch.equal(dit.float().bfloat16()(tokens, times, text.bfloat16(), *layouts), before)


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
