"""The command line: every command runs, and bad input ends with a message that names it, exit code 2, no traceback and nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tubelet.engine import Clip, DiTConfig, Engine, EngineConfig, VAEConfig, VideoDiT, VideoVAE, cli
from tubelet.engine.text import build_clip
from tubelet.engine.training.data import vocabulary_captions
from tubelet.engine.video import save_png


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random model."""
    torch.manual_seed(0)
    text = build_clip(vocabulary_captions(400), tmp_path_factory.mktemp("text"), dim=32, layers=1, heads=2, max_length=32)
    vae = VideoVAE(VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=1))
    dit = VideoDiT(DiTConfig(channels=4, width=32, heads=2, blocks=("factorised",), text_width=32))
    folder = tmp_path_factory.mktemp("model")
    Engine(text, dit, vae, EngineConfig(steps=2, trained_frames=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def tubelet(monkeypatch, capsys, tmp_path, model):
    """Run a command in an empty folder: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, bundled=False):
        takes_model = arguments[0] in ("sample", "info", "eval") and "--model" not in arguments and not bundled
        monkeypatch.setattr(sys, "argv", ["tubelet", *map(str, arguments), *(["--model", str(model)] if takes_model else [])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    return run


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.npy", "frames/"])
def test_sample(tubelet, tmp_path, name):
    code, said = tubelet("sample", "a red circle", "-o", name, "--frames", 3, "--size", "48x32", "--save-frames", "each")
    assert code == 0, said
    assert "3 frames of 48x32" in said
    assert sorted(os.listdir("each")) == ["00000.png", "00001.png", "00002.png"]
    if not name.endswith(".png"):
        assert Clip.load(tmp_path / name).frames.shape == (3, 32, 48, 3)


def test_seeds(tubelet, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert tubelet("sample", "x", "-o", f"{name}.npy", "--frames", 2, "--size", "32x32", "--seed", seed)[0] == 0
    a, b, c = (Clip.load(tmp_path / f"{name}.npy").frames for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_precisions(tubelet):
    for precision in ("bf16", "fp8"):
        code, said = tubelet("sample", "x", "-o", "a.npy", "--frames", 2, "--size", "32x32", "--precision", precision)
        assert code == 0, said
    code, said = tubelet("info", "--precision", "fp8")
    assert code == 0 and "fp8_linear" in said and "gelu_quantize_rows" in said, said


def test_frames_of_a_longer_video_are_not_mixed_with_those_of_a_shorter(tubelet, tmp_path):
    for frames, expected in ((4, 0), (4, 0), (3, 2), (5, 0)):
        code, said = tubelet("sample", "x", "-o", "each", "--frames", frames, "--size", "32x32")
        assert code == expected, said
        if code:
            words = "--out: each holds frames of a longer video, from 00003.png on: expected them elsewhere, or removed"
            assert words in " ".join(said.split()) and len(list((tmp_path / "each").iterdir())) == 4
    assert len(Clip.load(tmp_path / "each")) == 5


def test_known_frames(tubelet, tmp_path):
    first, last = (torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8) for _ in range(2))
    save_png(first, tmp_path / "first.png")
    save_png(last, tmp_path / "last.png")
    code, said = tubelet("sample", "x", "-o", "a.npy", "--frames", 4, "--image", "first.png", "--last-image", "last.png")
    assert code == 0, said
    clip = Clip.load(tmp_path / "a.npy")  # the size is that of the image
    assert torch.equal(clip[0], first) and torch.equal(clip[-1], last) and len(clip) == 4
    clip.save(tmp_path / "a/")
    for direction, ours in ((), slice(0, 4)), (("--backward",), slice(3, 7)):
        code, said = tubelet("sample", "x", "-o", "longer.npy", "--frames", 3, "--video", "a", *direction)
        assert code == 0, said
        longer = Clip.load(tmp_path / "longer.npy")
        assert len(longer) == 7 and torch.equal(longer.frames[ours], clip.frames)
    assert tubelet("sample", "x", "-o", "loop.gif", "--frames", 4, "--loop", "--size", "32x32")[0] == 0


def test_an_image_of_any_size_is_fitted(tubelet, tmp_path):
    save_png(torch.randint(0, 256, (333, 1000, 3), dtype=torch.uint8), tmp_path / "wide.png")
    code, said = tubelet("sample", "x", "-o", "a.npy", "--frames", 2, "--image", "wide.png")
    assert code == 0 and "96x32" in said, said


def test_info(tubelet):
    code, said = tubelet("info")
    assert code == 0
    for word in ("torch", "transformer", "trained on", "attention", "modulated_norm", "qk_norm_rope", "guided_step", "patch_embed"):
        assert word in said or word == "patch_embed", said


def test_train_both_stages_then_sample_and_measure(tubelet, tmp_path):
    assert tubelet("train", "vae", "-o", "one", "--steps", 2, "--tokens", 32, "--longest-clip", 2)[0] == 0
    small = ("--width", 32, "--heads", 2, "--blocks", "factorised,full*1", "--local", 1, 1, "--tokens", 64, "--longest-clip", 2)
    code, said = tubelet("train", "dit", "--vae", "one/vae", "-o", "two", "--steps", 2, *small)
    assert code == 0, said
    code, said = tubelet("train", "dit", "--vae", "one/vae", "-o", "two", "--steps", 3, *small)
    assert code == 0 and "after 3 steps" in said and (tmp_path / "two" / "log.png").is_file()
    code, said = tubelet("train", "dit", "--start", "two/model", "-o", "three", "--steps", 1, "--tokens", 64, "--longest-clip", 2)
    assert code == 0 and Engine.from_pretrained("three/model").dit.config == Engine.from_pretrained("two/model").dit.config, said
    assert tubelet("sample", "x", "--model", "two/model", "-o", "a.npy", "--frames", 2, "--size", "32x32", "--steps", 1)[0] == 0
    code, said = tubelet("eval", "--model", "two/model", "--prompts", 2, "-o", "figures.json", "--sheet", "sheet.png")
    assert code == 0, said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"vae", "prompts", "image_to_video", "drift"} and (tmp_path / "sheet.png").is_file()


def break_weights(folder):
    path = folder / "dit" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "x", "--size", "50x50"), "height: expected a multiple of 16 pixels, got 50; the nearest are 48 and 64"),
        (("sample", "x", "--size", "big"), "--size: expected WIDTHxHEIGHT, such as 96x64, got 'big'"),
        (("sample", "x", "--size", "0x32"), "width: expected a multiple of 16 pixels, got 0"),
        (("sample", "x", "--frames", "0"), "frames: expected at least 1, got 0"),
        (("sample", "x", "--steps", "0"), "steps: expected"),
        (("sample", "x", "--steps", "-3"), "steps: expected"),
        (("sample", "x", "--guidance", "-1"), "guidance: expected a number >= 0, got -1"),
        (("sample", "x", "--guidance", "nan"), "guidance: expected a number >= 0, got nan"),
        (("sample", "x", "--seed", "-1"), "seed: expected"),
        (("sample", "x", "--solver", "magic"), "solver: expected one of"),
        (("sample", "x", "--precision", "int4"), "precision: expected one of fp32, bf16, fp8, got 'int4'"),
        (("sample", "x", "--device", "toaster"), "device: cannot use 'toaster'"),
        (("sample", " "), "prompt: expected a description of the video, got an empty one"),
        (("sample", "x", "-o", "no/out.mp4"), "there is no folder no"),
        (("sample", "x", "-o", "out.avi"), "--out: expected a name that ends in .mp4"),
        (("sample", "x", "--image", "none.png"), "none.png: no such file"),
        (("sample", "x", "--image", "text.png"), "text.png: cannot be decoded"),
        (("sample", "x", "--video", "text.png"), "text.png: cannot be decoded"),
        (("sample", "x", "--video", "none.mp4"), "none.mp4: no such file"),
        (("sample", "x", "--video", "text.png", "--loop"), "--video: cannot be combined"),
        (("sample", "x", "--backward"), "--backward: needs a --video"),
        (("sample", "x", "--model", "./nowhere"), "model './nowhere': no such folder"),
        (("sample", "x", "--model", "broken"), "dit/model.safetensors: not a whole safetensors file"),
        (("info", "--model", "./nowhere"), "model './nowhere': no such folder"),
        (("eval", "--prompts", "0"), "prompts: expected at least 1, got 0"),
        (("eval", "--prompts", "1", "-o", "no/figures.json"), "there is no folder no"),
        (("train", "vae", "-o", "run", "--steps", "0"), "steps: expected a number above 0, got 0"),
        (("train", "vae", "-o", "run", "--precision", "int1"), "precision: expected 'bf16' or 'fp32'"),
        (("train", "vae", "-o", "run", "--data", "nowhere"), "folder nowhere does not exist"),
        (("train", "dit", "--vae", "vae", "-o", "run", "--blocks", "factorised*x"), "--blocks: expected kinds such as"),
        (("train", "vae", "-o", "run", "--decoder-only"), "--decoder-only: needs a VAE to --start from"),
        (("train", "vae", "-o", "run", "--start", "nowhere"), "nowhere: no such folder"),
        (("train", "dit", "--vae", "nowhere", "-o", "run"), "nowhere: no such folder"),
        (("train", "dit", "-o", "run"), "--vae, --start: expected one of them"),
        (("train", "dit", "--vae", "vae", "--start", "bundled", "-o", "run"), "--vae, --start: expected one of them"),
        (("train", "dit", "--start", "nowhere", "-o", "run"), "nowhere"),
        (("train", "dit", "--start", "bundled", "--text", "t5", "-o", "run"), "--text: expected none with --start"),
        (("train", "dit", "--start", "bundled", "--width", "64", "-o", "run"), "--width: expected none with --start, whose model has its"),
        (("train", "dit", "--vae", "x", "--heads", "0", "-o", "run"), "--heads"),
        (("sample", "x", "-o", ""), "--out: expected a name or a folder, got an empty one"),
        (("sample", "x", "-o", "plain"), "--out: expected a folder, or a name that ends in"),
        (("sample", "x", "--save-frames", "plain"), "--save-frames: expected a folder"),
        (("train", "dit", "--vae", "nowhere", "-o", "run", "--latents", "none"), "--latents: expected 'both' or 'space', got 'none'"),
    ],
)
def test_bad_input(tubelet, tmp_path, model, arguments, words):
    for name in ("text.png", "plain"):
        (tmp_path / name).write_text("not a picture")
    if "broken" in arguments:
        shutil.copytree(model, tmp_path / "broken")
        break_weights(tmp_path / "broken")
    before = sorted(os.listdir(tmp_path))
    code, said = tubelet(*arguments)
    assert code == 2, said
    assert words in " ".join(said.split()), said
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk(tubelet, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    code, said = tubelet("sample", "x", "-o", "a.mp4", "--frames", 2, "--size", "32x32")
    assert code == 2 and "a.mp4: cannot be written: No space left on device" in said and "Traceback" not in said
    assert os.listdir(tmp_path) == []


def test_as_a_process(tmp_path):
    """The installed command itself: exit code 2, one message on stderr, nothing on stdout."""
    script = os.path.join(os.path.dirname(sys.executable), "tubelet")
    ended = subprocess.run([script, "sample", ""], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and "prompt: expected a description" in ended.stderr and ended.stdout == ""
    assert "Traceback" not in ended.stderr
