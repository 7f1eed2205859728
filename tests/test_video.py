"""Clips, and their files: what is written comes back, whole or not at all."""

import errno
import os

import numpy as np
import pytest
import torch
from tubelet.engine import Clip
from tubelet.engine.pretrained import write_whole
from tubelet.engine.video import contact_sheet, fit, load_image


def make_clip(frames=6, height=32, width=48, fps=8.0) -> Clip:
    """Smooth colours that change with time: what H.264 keeps well."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    planes = [40 + 20 * t, 255 * y // height, 255 * x // width]
    return Clip(torch.stack([plane.clamp(0, 255).byte() for plane in planes], dim=-1), fps)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(255**2 / error)) if error else float("inf")


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (2, 2), (96, 32)])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_an_mp4_comes_back(tmp_path, size, frames):
    clip = make_clip(frames, *size, fps=12.5)
    clip.save(tmp_path / "a.mp4")
    back = Clip.load(tmp_path / "a.mp4")
    assert back.frames.shape == clip.frames.shape and back.fps == pytest.approx(12.5)
    assert min(size) < 32 or psnr(back.frames, clip.frames) > 30


def test_a_gif_comes_back(tmp_path):
    clip = make_clip(5, fps=10)
    clip.save(tmp_path / "a.gif")
    back = Clip.load(tmp_path / "a.gif")
    assert back.frames.shape == clip.frames.shape and back.fps == pytest.approx(10, rel=0.01)
    assert psnr(back.frames, clip.frames) > 20


@pytest.mark.parametrize("name", ["a.npy", "folder/"])
def test_lossless_forms_come_back_to_the_bit(tmp_path, name):
    clip = make_clip(11, 17, 19)
    clip.save(f"{tmp_path}/{name}")
    assert torch.equal(Clip.load(tmp_path / name).frames, clip.frames)


def test_png_of_an_image_and_of_a_clip(tmp_path):
    clip = make_clip()
    clip[:1].save(tmp_path / "image.png")
    assert torch.equal(load_image(tmp_path / "image.png"), clip[0])
    clip.save(tmp_path / "sheet.png")
    sheet = load_image(tmp_path / "sheet.png")
    assert sheet.shape[0] >= 2 * clip.height and sheet.shape[1] >= 2 * clip.width * len(clip)


def test_a_contact_sheet_shows_the_frames_under_their_captions():
    a, b = make_clip(4), make_clip(20, 64, 32)
    sheet = contact_sheet([a, b], ["first", "second"], columns=4, scale=1)
    found = [(y, x) for y in range(30) for x in range(2) if torch.equal(sheet[y : y + 32, x : x + 48], a[0])]
    assert found, "the first frame is not in the sheet"
    (top, left) = found[0]
    assert (sheet[:top] == 0).any(), "no caption above it"
    assert torch.equal(sheet[top : top + 32, left + 52 : left + 100], a[1])
    with pytest.raises(ValueError, match=r"captions: .* 2 clips, got 1"):
        contact_sheet([a, b], ["one"])


def test_floats_come_back_to_the_bit():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    assert torch.equal(Clip.from_float(Clip(frames).to_float()).frames, frames)
    assert torch.equal(
        Clip.from_float(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1, 1)).frames.flatten(), torch.tensor([0, 255, 128]).byte()
    )


def test_slices_and_sums():
    clip = make_clip(6)
    assert torch.equal((clip[:2] + clip[2:]).frames, clip.frames)
    assert len(clip[-4:]) == 4 and clip[0].shape == (32, 48, 3) and clip.duration == 6 / 8
    with pytest.raises(ValueError, match=r"48x32.*48x64"):
        clip + make_clip(6, 64)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 64), (16, 96)])
def test_fit_covers_and_crops_the_middle(size):
    frames = torch.zeros(2, 40, 60, 3, dtype=torch.uint8)
    frames[:, 18:22, 28:32] = 255  # the middle stays the middle
    fitted = fit(frames, *size)
    assert fitted.shape == (2, *size, 3)
    weight = fitted[0, :, :, 0].double()
    centre = (
        weight.sum(1) @ (torch.arange(size[0]) + 0.5).double() / weight.sum(),
        weight.sum(0) @ (torch.arange(size[1]) + 0.5).double() / weight.sum(),
    )
    assert centre[0] == pytest.approx(size[0] / 2, abs=1) and centre[1] == pytest.approx(size[1] / 2, abs=1)


@pytest.mark.parametrize(
    ("frames", "error", "words"),
    [
        (torch.zeros(2, 4, 4, 3), TypeError, "frames: expected a uint8 tensor, got torch.float32"),
        (np.zeros((2, 4, 4, 3), np.uint8), TypeError, "frames: .* ndarray"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, r"frames: expected \(T, H, W, 3\)"),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), ValueError, r"none of them 0"),
    ],
)
def test_bad_frames_are_named(frames, error, words):
    with pytest.raises(error, match=words):
        Clip(frames)


@pytest.mark.parametrize("content", [b"", b"not a video", "cut"])
def test_unreadable_videos_are_named(tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content == "cut":
        make_clip(30, 64, 64).save(path)
        content = path.read_bytes()
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mp4: cannot be decoded as video"):
        Clip.load(path)


def test_a_video_whose_end_is_missing_is_not_a_short_video(tmp_path):
    """The index says 30 frames; the data of the last ones is overwritten."""
    path = tmp_path / "bad.mp4"
    torch.manual_seed(0)
    Clip(torch.randint(0, 256, (30, 64, 64, 3), dtype=torch.uint8)).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat")
    data[at + (len(data) - at) // 2 : len(data) - 2000] = bytes(len(data) - 2000 - at - (len(data) - at) // 2)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"bad\.mp4: cannot be decoded"):
        Clip.load(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such file"):
        Clip.load(tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without PNG frames"):
        Clip.load(tmp_path / "empty")
    for name in ("no/a.mp4", "no/folder/"):
        with pytest.raises(FileNotFoundError, match=r"cannot be written: there is no folder .*no"):
            make_clip().save(f"{tmp_path}/{name}")
    with pytest.raises(ValueError, match=r"a\.avi: expected a name that ends in \.mp4"):
        make_clip().save(tmp_path / "a.avi")


def full_disk(monkeypatch, after: int):
    """The `after`-th flush to disk and all later ones fail as on a full disk."""
    count = iter(range(10**6))

    def fsync(handle):
        if next(count) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "a.png"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"before")
    full_disk(monkeypatch, 0)
    with pytest.raises(OSError, match=rf"{name}: cannot be written: No space left") as caught:
        make_clip().save(path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == [name]


def test_a_full_disk_halfway_through_a_folder_leaves_none_of_it(tmp_path, monkeypatch):
    full_disk(monkeypatch, 3)
    with pytest.raises(OSError, match="cannot be written"):
        make_clip(6).save_frames(tmp_path / "frames")
    assert os.listdir(tmp_path) == []


def test_files_can_be_read_by_others(tmp_path):
    write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_an_image_that_was_taken_upright_is_upright(tmp_path):
    """By the orientation that cameras write."""
    image = pytest.importorskip("PIL.Image", reason="it writes EXIF")
    pixels = torch.zeros(32, 64, 3, dtype=torch.uint8)
    pixels[:, :16] = 255  # the left edge, which is the upper one when turned clockwise
    exif = image.Exif()
    exif[0x0112] = 6
    image.fromarray(pixels.numpy()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = load_image(tmp_path / "a.jpg")
    assert found.shape == (64, 32, 3) and found[:12].min() > 200 and found[20:].max() < 50


@pytest.mark.parametrize("content", [b"", b"not numpy"])
def test_a_broken_array_is_named(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy: not the frames of a clip"):
        Clip.load(tmp_path / "a.npy")
