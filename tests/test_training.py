"""Both training stages: a stopped run goes on as if it had not been, known frames carry no loss, a few steps teach something."""

import json
import signal

import numpy as np
import pytest
import torch
from tubelet.engine import DiTConfig, VAEConfig, VideoDiT, VideoVAE
from tubelet.engine.pretrained import load_tensors
from tubelet.engine.text import build_clip
from tubelet.engine.training.data import Mixture, PanWorld, ShapesWorld, vocabulary_captions
from tubelet.engine.training.stage_one import StageOne, StageOneConfig
from tubelet.engine.training.stage_two import StageTwo, StageTwoConfig
from tubelet.engine.training.trainer import Trainer, TrainerConfig
from tubelet.engine.video import to_float

TINY_VAE = VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def stage_one(seed=0) -> tuple[VideoVAE, StageOne]:
    torch.manual_seed(seed)
    vae = VideoVAE(TINY_VAE)
    return vae, StageOne(vae, Mixture([(ShapesWorld(), 0.7), (PanWorld(), 0.3)]), StageOneConfig(frame_tokens=64, longest_clip=4))


def stage_two(folder, channels=4, train_text=True, **options) -> StageTwo:
    torch.manual_seed(0)
    text = build_clip(vocabulary_captions(400), folder, dim=32, layers=1, heads=2, max_length=48)
    dit = VideoDiT(DiTConfig(channels=channels, width=32, heads=2, blocks=("factorised",), text_width=32))
    options = {"tokens": 128, "groups": 2, "pool": 8, "longest_clip": 4, "usual": 0.0, "beginnings": 0.0} | options
    return StageTwo(dit, text, VideoVAE(TINY_VAE), ShapesWorld(), StageTwoConfig(**options), train_text=train_text)


def hidden(stage: StageTwo):
    return [layer.weight for layer in stage.dit.blocks.modules() if isinstance(layer, torch.nn.Linear)]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder, tmp_path):
    def train(where, steps, until):
        stage = stage_two(folder)
        trainer = Trainer(stage, where, TrainerConfig(steps=until, warmup=2, log_every=1), hidden(stage))
        if trainer.step == 0:
            stage.measure(2)

        def loss(step):
            if step == steps - 1:
                signal.raise_signal(signal.SIGINT)  # the step is finished, and saved
            return stage.loss(step)

        if steps < until:
            with pytest.raises(KeyboardInterrupt):
                trainer.run(loss, "test")
        else:
            trainer.run(stage.loss, "test")
        return load_tensors(where / "checkpoint.safetensors")

    whole = train(tmp_path / "whole", 6, 6)
    train(tmp_path / "parts", 3, 6)
    parts = train(tmp_path / "parts", 6, 6)
    assert int(whole["step"]) == int(parts["step"]) == 6 and set(whole) == set(parts)
    assert any(name.startswith("momentum_buffer.") for name in whole) and any(name.startswith("exp_avg_sq.") for name in whole)
    for name in set(whole) - {"seconds"}:
        assert torch.allclose(whole[name].double(), parts[name].double(), rtol=1e-4, atol=1e-6), name
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_one_learns(tmp_path, precision):
    vae, stage = stage_one()
    Trainer(vae, tmp_path, TrainerConfig(steps=60, warmup=5, learning_rate=4e-3, log_every=10, precision=precision)).run(stage.loss, "vae")
    first, *_, last = log(tmp_path)
    assert last["loss"] < first["loss"] - 0.1 and last["psnr"] > first["psnr"] + 2
    assert all(np.isfinite(value) for line in log(tmp_path) for value in line.values())


def test_the_decoder_alone(tmp_path):
    vae, _ = stage_one()
    before = {name: p.clone() for name, p in vae.named_parameters()}
    stage = StageOne(vae, ShapesWorld(), StageOneConfig(frame_tokens=64, longest_clip=4, decoder_only=True))
    Trainer(vae, tmp_path, TrainerConfig(steps=2, warmup=1)).run(stage.loss, "vae")
    moved = {name.split(".")[0] for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"decoder"}


@pytest.mark.parametrize("channels", [4, 8])
def test_stage_two_learns(folder, tmp_path, channels):
    """Steps that it never saw, the same ones before and after: the losses of single steps differ too much to compare one with another."""
    stage = stage_two(folder, channels)
    stage.measure(4)

    def unseen():
        return np.mean([float(stage.loss(100_000 + i)["loss"].detach()) for i in range(16)])

    before = unseen()
    Trainer(stage, tmp_path, TrainerConfig(steps=120, warmup=5, learning_rate=4e-3), hidden(stage)).run(stage.loss, "dit")
    assert unseen() < 0.88 * before


@pytest.mark.parametrize("channels", [4, 8])
def test_stage_two_learns_one_step_by_heart(folder, tmp_path, channels):
    stage = stage_two(folder, channels)
    stage.measure(4)
    trainer = Trainer(stage, tmp_path, TrainerConfig(steps=100, warmup=5, learning_rate=4e-3, log_every=10), hidden(stage))
    trainer.run(lambda _: stage.loss(3), "dit")
    first, *_, last = log(tmp_path)
    assert last["loss"] < 0.25 * first["loss"]


def test_what_is_fixed_stays_and_what_is_trained_moves(folder, tmp_path):
    stage = stage_two(folder, train_text=False)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    trainer = Trainer(stage, tmp_path, TrainerConfig(steps=3, warmup=1), hidden(stage))
    trainer.run(stage.loss, "dit")
    moved = {name.split(".")[0] for name, tensor in stage.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"dit"}
    with trainer.averaged():
        assert all(torch.equal(p, trainer.average[name]) for name, p in trainer.parameters.items())
    assert not all(torch.equal(p, trainer.average[name]) for name, p in trainer.parameters.items())


def test_slow_parameters_take_a_tenth_of_the_rate(folder, tmp_path):
    stage = stage_two(folder)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    Trainer(stage, tmp_path, TrainerConfig(steps=1, warmup=1, learning_rate=1e-3), hidden(stage), slow=stage.text.parameters()).run(
        lambda step: {"loss": sum(p.sum() for p in stage.parameters() if p.requires_grad)}, "dit"
    )
    moved = {name: float((p.detach() - before[name]).abs().median()) for name, p in stage.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in moved} == {"dit", "text"}
    for name, distance in moved.items():  # AdamW's first step has the length of its rate in every coordinate
        if id(stage.get_parameter(name)) not in {id(p) for p in hidden(stage)} and not before[name].any():
            assert distance == pytest.approx(1e-4 if name.startswith("text.") else 1e-3, rel=0.05), name


@pytest.mark.parametrize("frame_times", [0.0, 1.0])
def test_noise_levels_of_frames(folder, frame_times):
    stage, generator = stage_two(folder, frame_times=frame_times), torch.Generator().manual_seed(0)
    drawn = torch.stack([stage._times(8, generator) for _ in range(400)])
    assert ((drawn > 0) & (drawn < 1)).all() and (drawn.std(dim=1) > 0).all() == bool(frame_times)
    rising = (drawn.diff(dim=1) > 0).all(dim=1).float().mean()
    assert rising == pytest.approx(0.25 * frame_times, abs=0.08)
    if frame_times:  # a noisy frame after a clear one, where motion is learned
        assert ((drawn[:, :-1] < 0.3) & (drawn[:, 1:] > 0.6)).float().mean() > 0.1
    assert stage._times(1, generator).shape == (1,)


def test_beginnings_are_the_first_frames_of_whole_clips(folder):
    stage = stage_two(folder, images=0.0, beginnings=1.0, longest_clip=8)
    group = stage.group(0)
    assert group.beginning and group.codes.shape[2] in (2, 3)
    _, height, width = stage.sizes.draw(0)
    whole = to_float(stage.world.draw(0, 8, height, width).frames)[None]
    with torch.inference_mode():
        codes = stage.vae.encode(whole).space[:, :, : group.codes.shape[2]]
    torch.testing.assert_close(group.codes[:1], codes)

    seen = {}
    stage.dit.forward = lambda tokens, times, *rest: seen.update(times=times) or tokens
    stage.loss(0)
    times = seen["times"].view(-1, group.codes.shape[2])  # the first step has no other group
    assert (times[:, :-1] < 0.3).all() and (times[:, -1] >= 0.9).all()
    assert not stage_two(folder, images=0.0, longest_clip=8).group(0).beginning


def test_known_frames_carry_no_loss(folder, monkeypatch):
    """With all frames but one known, the loss is the error of that frame alone, and the noise of known frames changes nothing."""
    from tubelet.engine.training import stage_two as module

    stage = stage_two(folder, images=0.0, empty_captions=0.0)
    with torch.no_grad():
        stage.dit.out.weight.normal_()
    monkeypatch.setattr(module, "random_known_mask", lambda frames, _: torch.arange(frames) != 1)
    seen = {}
    whole = stage.dit.forward
    stage.dit.forward = lambda tokens, times, *rest: (
        seen.setdefault("out", whole(tokens, times, *rest)) if not seen.update(tokens=tokens, times=times, layout=rest[1]) else None
    )
    loss = stage.loss(0)["loss"]
    known = seen["layout"].coordinates.known
    assert known.any() and not known.all()
    assert not seen["times"][seen["layout"].frame_known].any() and seen["times"][~seen["layout"].frame_known].all()
    given = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, seen["out"])]).view_as(seen["out"])
    assert not given[known].any() and given[~known].abs().amin(dim=1).gt(0).all()


def test_steps_do_not_repeat_and_are_fixed_by_the_seed(folder):
    a, b = (stage_two(folder) for _ in range(2))
    losses = [float(a.loss(step)["loss"].detach()) for step in range(3)]
    assert losses == [float(b.loss(step)["loss"].detach()) for step in range(3)] and len(set(losses)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: expected a number above 0, got 0"),
        ({"minutes": -1.0}, "minutes: expected a number above 0, got -1"),
        ({"precision": "fp8"}, "precision: expected 'bf16' or 'fp32', got 'fp8'"),
        ({"minutes": float("nan")}, "minutes: expected a number above 0, got nan"),
        ({"seed": -1}, "seed: expected a whole number, not below 0, got -1"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        TrainerConfig(**options)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (StageOneConfig, {"kl_warmup": 0}, "kl_warmup: expected a number, not below 1, got 0"),
        (StageOneConfig, {"kl_weight": float("nan")}, "kl_weight: expected a number, not below 0, got nan"),
        (StageOneConfig, {"longest_clip": 0}, "longest_clip: expected a number, not below 1, got 0"),
        (StageTwoConfig, {"images": float("nan")}, "images: expected a share from 0 to 1, got nan"),
        (StageTwoConfig, {"usual": -3.0}, "usual: expected a share from 0 to 1, got -3"),
        (StageTwoConfig, {"shift": 0.0}, "shift: expected a number above 0, got 0"),
    ],
)
def test_bad_settings_of_a_stage_are_named(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_a_run_of_another_model_is_named(folder, tmp_path):
    vae, stage = stage_one()
    Trainer(vae, tmp_path, TrainerConfig(steps=1)).run(stage.loss, "vae")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: '.*' does not fit the model that is to be trained"):
        Trainer(stage_two(folder), tmp_path, TrainerConfig(steps=2))


def test_parts_that_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match=r"dit: expected channels 4 .* or 8 .*, got 6"):
        stage_two(folder, channels=6)


def test_a_run_that_diverges_ends_with_an_error(folder, tmp_path):
    """And leaves the last checkpoint as it was."""
    stage = stage_two(folder)
    trainer = Trainer(stage, tmp_path, TrainerConfig(steps=5, warmup=2), hidden(stage))
    stage.measure(2)
    trainer.run(stage.loss, "dit")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    again = Trainer(stage, tmp_path, TrainerConfig(steps=50, warmup=2), hidden(stage))
    with pytest.raises(ValueError, match=r"training: gradients were not finite for 20 steps, up to 25: it diverged"):
        again.run(lambda step: {"loss": stage.loss(step)["loss"] * float("nan")}, "dit")
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
