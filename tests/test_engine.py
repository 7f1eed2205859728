"""The whole way with a tiny random model: requests of any size in one pack, known frames, loops and streams."""

import copy
from dataclasses import replace

import pytest
import torch
from tubelet.engine import Clip, DiTConfig, Engine, EngineConfig, Request, VAEConfig, VideoDiT, VideoVAE
from tubelet.engine.engine import _order
from tubelet.engine.text import build_clip
from tubelet.engine.training.data import vocabulary_captions

SIZE = {"height": 32, "width": 48, "steps": 2}


@pytest.fixture(scope="module", params=["space", "both"])
def engine(request, tmp_path_factory):
    torch.manual_seed(0)
    text = build_clip(vocabulary_captions(400), tmp_path_factory.mktemp("text"), dim=32, layers=1, heads=2, max_length=32)
    vae = VideoVAE(VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=1))
    channels = 4 if request.param == "space" else 8
    dit = VideoDiT(DiTConfig(channels=channels, width=32, heads=2, blocks=("factorised", "full"), text_width=32))
    return Engine(text, randomised(dit), vae, EngineConfig(trained_frames=4))


def randomised(dit: VideoDiT) -> VideoDiT:
    """Outputs and gates start at zero: with random ones no test holds for a model that does nothing."""
    with torch.no_grad():
        for module in dit.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=0.1)
    return dit


def psnr(a: Clip, b: Clip) -> float:
    error = (a.frames.double() - b.frames.double()).square().mean()
    return float(10 * torch.log10(255**2 / error)) if error else float("inf")


def test_a_mixed_pack_gives_what_single_runs_give(engine):
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    requests = [
        Request("a red circle", 5, 32, 48, seed=1, guidance=3.0),
        Request("a blue square moves left", 3, 48, 32, seed=2, guidance=1.0, known={-1: torch.zeros(48, 32, 3, dtype=torch.uint8)}),
        Request("one frame", 1, 64, 32, seed=3, guidance=2.0),
        Request("a green cross", 4, 32, 32, seed=4, guidance=5.0, known={0: image}),
    ]
    for request, packed in zip(requests, engine.sample(requests, steps=3), strict=True):
        alone = engine.sample(request, steps=3)
        assert packed.frames.shape == (request.frames, request.height, request.width, 3)
        assert psnr(packed, alone) >= 50  # not to the bit: the library's matrix products choose by size


@pytest.mark.parametrize("stagger", [1, 3, 8])
def test_frames_may_lag_behind_those_before(engine, stagger):
    tuned = Engine(engine.text, engine.dit, engine.vae, EngineConfig(steps=3, solver="euler", stagger=stagger))
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    requests = [Request("a red circle", 4, 32, 48, seed=1), Request("a cross", 3, 32, 32), Request("x", 3, 32, 48, known={1: image})]
    clips = tuned.sample(requests)
    for request, packed in zip(requests, clips, strict=True):
        assert psnr(packed, tuned.sample(request)) >= 50
        assert not torch.equal(packed.frames, tuned.sample([request], stagger=0)[0].frames)
    assert torch.equal(clips[2].frames[1], image)
    seen = []
    tuned.sample(requests[2], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, 3 + stagger) for i in range(3 + stagger)]  # the known frame waits for nothing and nobody for it


def test_frames_that_wait_need_not_be_evaluated(engine, monkeypatch):
    config = replace(engine.dit.config, blocks=("factorised", "frame_causal"), local_blocks=(1, 1), local_width=16)
    causal = Engine(engine.text, randomised(VideoDiT(config)), engine.vae, EngineConfig(steps=3, stagger=2))
    requests = [Request("a cross", 4, 32, 48), Request("a red circle", 5, 32, 32, known={2: torch.zeros(32, 32, 3, dtype=torch.uint8)})]
    seen, whole = [], VideoDiT.forward
    monkeypatch.setattr(VideoDiT, "forward", lambda self, x, *rest: (seen.append(len(x)), whole(self, x, *rest))[1])
    clips = causal.sample(requests)
    few, _ = sum(seen), seen.clear()
    monkeypatch.setattr(VideoDiT, "causal", False)
    for clip, waited in zip(clips, causal.sample(requests), strict=True):
        assert psnr(clip, waited) >= 50
    assert few < sum(seen)


def test_seeds(engine):
    first, again, other = (engine.sample("x", frames=3, seed=seed, **SIZE) for seed in (0, 0, 1))
    assert torch.equal(first.frames, again.frames) and not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("time_latents", ["sampled", "recomputed"])
def test_known_frames_come_out_as_they_went_in(engine, time_latents):
    tuned = Engine(engine.text, engine.dit, engine.vae, EngineConfig(time_latents=time_latents))
    clip = Clip(torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8))
    first = tuned.sample("x", frames=5, known={0: clip[0]}, **SIZE)
    assert torch.equal(first.frames[0], clip[0])
    forward = tuned.sample("x", frames=5, known=clip, **SIZE)
    assert torch.equal(forward.frames[:3], clip.frames)
    backward = tuned.sample("x", frames=5, known=clip, extend="backward", **SIZE)
    assert torch.equal(backward.frames[2:], clip.frames)
    between = tuned.sample("x", frames=5, known={0: clip[0], -1: clip[1]}, **SIZE)
    assert torch.equal(between.frames[0], clip[0]) and torch.equal(between.frames[-1], clip[1])
    # What is known matters to what is made, before it and after it.
    assert not torch.equal(backward.frames[0], tuned.sample("x", frames=5, **SIZE).frames[0])


def test_loop_and_stream(engine):
    loop = engine.sample("x", frames=4, loop=True, **SIZE)
    assert len(loop) == 4
    chunks = list(engine.stream("x", 9, chunk=4, overlap=2, **SIZE))
    assert [len(chunk) for chunk in chunks] == [4, 2, 2, 1]


def test_a_stream_refuses_at_once_what_it_cannot_do(engine):
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    for given, error, words in (
        (([Request("x", 2, 32, 32)], 9), TypeError, "prompt: expected text, got list"),
        ((Request("x", 2, 32, 32), 9), TypeError, "prompt: expected text, got Request"),
    ):
        with pytest.raises(error, match=words):
            engine.stream(*given)
    for options, error, words in (
        ({"extend": "backward"}, ValueError, "extend: expected none for a stream, which goes on forwards, got 'backward'"),
        ({"loop": True}, ValueError, "loop: expected none for a stream"),
        ({"known": {0: image}}, TypeError, "known: expected a clip or an image to go on from, got frames by number"),
    ):
        with pytest.raises(error, match=words):
            engine.stream("x", 9, **options, **SIZE)
    chunks = list(engine.stream("x", 5, chunk=4, overlap=2, known=image, **SIZE))
    assert [len(chunk) for chunk in chunks] == [3, 2]


def test_requests_have_their_own_settings(engine):
    for name, value in (("frames", 9), ("seed", 4), ("guidance", 2.0), ("known", torch.zeros(2)), ("negative_prompt", "y")):
        with pytest.raises(ValueError, match=f"{name}: expected in the requests, which each have their own"):
            engine.sample([Request("x", 2, 32, 32)], **{name: value})


def test_a_model_of_nan_makes_no_video(engine):
    broken = Engine(engine.text, copy.deepcopy(engine.dit), engine.vae, engine.config)
    with torch.no_grad():
        next(broken.dit.blocks.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="model: expected finite numbers from the transformer"):
        broken.sample("x", frames=2, **SIZE)


@pytest.mark.parametrize(
    ("known", "order"),
    [
        ([0, 0, 0], [0, 1, 2]),
        ([1, 0, 0], [0, 0, 1]),
        ([0, 0, 1], [0, 1, 2]),  # before what is known: as its start
        ([1, 0, 0, 1], [0, 0, 0, 0]),  # between: all at once
        ([1, 0, 1, 0], [0, 0, 0, 0]),
        ([1, 1], [0, -1]),
    ],
)
def test_when_frames_are_made(known, order):
    found = _order([bool(each) for each in known])
    assert all(a == b for a, b, given in zip(found, order, known, strict=True) if not given)


def test_a_request_is_guided_as_the_model_was_tuned_unless_it_says_otherwise(engine):
    tuned = Engine(engine.text, engine.dit, engine.vae, EngineConfig(steps=2, guidance=3.0))
    plain, other, given = tuned.sample([Request("x", 2, 32, 32, guidance=guidance) for guidance in (None, 1.0, 3.0)])
    assert psnr(plain, given) >= 50 > psnr(plain, other)  # not to the bit: they lie in different places of the pack
    assert torch.equal(tuned.sample("x", frames=2, height=32, width=32).frames, tuned.sample(Request("x", 2, 32, 32)).frames)


def test_progress_and_unguided(engine):
    seen = []
    engine.sample("x", frames=2, guidance=1.0, progress=lambda done, of: seen.append((done, of)), **SIZE)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"frames": 0}, "frames"),
        ({"height": 40}, "height.*multiple of 16.*got 40"),
        ({"width": 0}, "width"),
        ({"guidance": float("nan")}, "guidance"),
        ({"solver": "magic"}, "solver"),
        ({"steps": -1}, "steps"),
        ({"stagger": -1}, "stagger"),
        ({"seed": -1}, "seed"),
        ({"known": {7: torch.zeros(32, 48, 3, dtype=torch.uint8)}}, r"known\[7\]"),
        ({"known": {0: torch.zeros(8, 8, 3, dtype=torch.uint8)}}, r"known\[0\]"),
        ({"loop": True, "frames": 1}, "frames.*loop"),
    ],
)
def test_bad_input_is_named(engine, arguments, words):
    arguments = {"prompt": "x", "frames": 3, **SIZE, **arguments}
    with pytest.raises(ValueError, match=words):
        engine.sample(arguments.pop("prompt"), **arguments)


def test_a_saved_model_samples_the_same(engine, tmp_path):
    engine.save_pretrained(tmp_path / "model")
    loaded = Engine.from_pretrained(tmp_path / "model", device="cpu")
    a, b = (e.sample("a red circle", frames=2, **SIZE) for e in (engine, loaded))
    assert torch.equal(a.frames, b.frames)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_precisions(engine, tmp_path, precision):
    engine.save_pretrained(tmp_path / "model")
    other = Engine.from_pretrained(tmp_path / "model", device="cpu", precision=precision)
    assert other.dit.dtype == torch.bfloat16 and other.vae.dtype == other.text.model.dtype == torch.float32
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    plain, rounded = (e.sample("a red circle", frames=3, known={0: image}, **SIZE) for e in (engine, other))
    assert torch.equal(rounded.frames[0], image)
    assert 40 <= psnr(plain[1:], rounded[1:]) < float("inf")  # measured: 50 dB in FP8, 55 in bfloat16


def test_fp8_is_refused_where_it_is_no_use(engine, tmp_path):
    engine.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, fp8, got 'fp4'"):
        Engine.from_pretrained(tmp_path / "nowhere", precision="fp4")
    with pytest.raises(ValueError, match="precision: expected a model in fp32 or bf16 to save"):
        Engine.from_pretrained(tmp_path / "model", device="cpu", precision="fp8").save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_broken_models_are_named(engine, tmp_path):
    engine.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "dit" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"dit/model\.safetensors"):
        Engine.from_pretrained(tmp_path / "model", device="cpu")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"dit/model\.safetensors"):
        Engine.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Engine.from_pretrained(tmp_path / "nothing")
