"""What users give as known frames, and the masks that training draws."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tubelet.engine.conditioning import (
    extend_backward,
    extend_forward,
    image_to_video,
    interpolate,
    loop,
    random_known_mask,
    resolve,
)

H, W = 4, 6


def picture(value, height=H, width=W):
    return torch.full((height, width, 3), value, dtype=torch.uint8)


def video(*values):
    return torch.stack([picture(value) for value in values])


def clip(*values):
    """What the engine's Clip looks like from here."""
    return SimpleNamespace(frames=video(*values))


def placed(known, frames=8, **options):
    """frame index -> grey value, as resolved."""
    resolved = resolve(known, frames, H, W, **options)
    assert resolved.images.dtype == torch.uint8
    assert resolved.images.shape == (len(resolved.indices), H, W, 3)
    return {index: int(image[0, 0, 0]) for index, image in zip(resolved.indices, resolved.images, strict=True)}


@pytest.mark.parametrize(
    "known, options, expected",
    [
        (None, {}, {}),
        ({}, {}, {}),
        ({0: picture(1)}, {}, {0: 1}),
        ({-1: picture(2), 0: picture(1)}, {}, {0: 1, 7: 2}),
        ({5: picture(3), np.int64(-6): picture(2).numpy()}, {}, {2: 2, 5: 3}),
        ({3: clip(4)}, {}, {3: 4}),
        (picture(9), {}, {0: 9}),
        (clip(1, 2, 3), {}, {0: 1, 1: 2, 2: 3}),
        (video(1, 2, 3).numpy(), {}, {0: 1, 1: 2, 2: 3}),
        (video(1, 2, 3), {"extend": "backward"}, {5: 1, 6: 2, 7: 3}),
        (clip(*range(7)), {"extend": "backward"}, {i + 1: i for i in range(7)}),
        (image_to_video(picture(1)), {}, {0: 1}),
        (extend_forward(clip(1, 2)), {}, {0: 1, 1: 2}),
        (extend_backward(clip(1, 2)), {}, {6: 1, 7: 2}),
        (interpolate(picture(1), picture(2)), {}, {0: 1, 7: 2}),
        (interpolate(clip(1, 2), video(3, 4, 5)), {}, {0: 1, 1: 2, 5: 3, 6: 4, 7: 5}),
        (loop(picture(6)), {}, {0: 6, 7: 6}),
    ],
)
def test_resolve(known, options, expected):
    assert placed(known, **options) == expected


def test_arrays_that_tensors_cannot_share():
    array = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
    read_only = array.copy()
    read_only.flags.writeable = False
    images = resolve({0: read_only, 1: array[::-1, :, ::-1]}, 3, H, W).images
    assert np.array_equal(images[0].numpy(), array)
    assert np.array_equal(images[1].numpy(), array[::-1, :, ::-1])


@pytest.mark.parametrize(
    "known, options, exception, message",
    [
        ({8: picture(0)}, {}, ValueError, r"known\[8\]: expected an index from -8 to 7 in a video of 8 frames"),
        ({-9: picture(0)}, {}, ValueError, r"known\[-9\]"),
        ({7: picture(0), -1: picture(0)}, {}, ValueError, r"known\[-1\]: frame 7 of the 8 is given twice"),
        ({0.0: picture(0)}, {}, TypeError, "known: expected integers as frame indices, got 0.0"),
        ({True: picture(0)}, {}, TypeError, "known: expected integers as frame indices, got True"),
        ({0: picture(0, H, 5)}, {}, ValueError, r"known\[0\]: expected shape \(4, 6, 3\) as the video has, got \(4, 5, 3\)"),
        ({0: picture(0).float()}, {}, TypeError, r"known\[0\]: expected uint8 pixels from 0 to 255, got torch.float32"),
        ({0: picture(0)[..., :1]}, {}, ValueError, r"known\[0\]: expected RGB pixels .* got \(4, 6, 1\)"),
        ({0: picture(0)[..., 0]}, {}, ValueError, r"known\[0\]: expected RGB pixels .* got \(4, 6\)"),
        ({0: clip(1, 2)}, {}, ValueError, r"known\[0\]: expected one image, got 2 frames"),
        ({0: "first.png"}, {}, TypeError, r"known\[0\]: expected a Clip, or a tensor or NumPy array of uint8, got str"),
        ({0: None}, {}, TypeError, r"known\[0\]: .* got NoneType"),
        (video(1, 2)[:0], {}, ValueError, r"clip: expected RGB pixels"),
        (clip(*range(8)), {}, ValueError, "known: expected at least one frame left to make, got all 8"),
        (clip(*range(9)), {}, ValueError, r"known\[8\]: expected an index"),
        (clip(*range(9)), {"extend": "backward"}, ValueError, r"known\[-9\]: expected an index"),
        (clip(1), {"extend": "both"}, ValueError, "extend: expected 'forward' or 'backward', got 'both'"),
    ],
)
def test_resolve_refuses(known, options, exception, message):
    with pytest.raises(exception, match=message):
        resolve(known, 8, H, W, **options)


def test_a_single_frame_cannot_be_known():
    with pytest.raises(ValueError, match="at least one frame left"):
        resolve({0: picture(1)}, 1, H, W)
    with pytest.raises(ValueError, match="frame 0 of the 1 is given twice"):
        resolve(loop(picture(1)), 1, H, W)
    with pytest.raises(ValueError, match="frames, height, width"):
        resolve(None, 0, H, W)


def test_image_to_video_takes_one_image():
    with pytest.raises(ValueError, match="image: expected one image, got 2 frames"):
        image_to_video(video(1, 2))


def test_mask_and_paste():
    known = resolve({-1: picture(7), 1: picture(5)}, 4, H, W)
    assert known.mask(4).tolist() == [False, True, False, True]
    sampled = video(10, 11, 12, 13)
    pasted = known.paste(sampled)
    assert torch.equal(pasted, video(10, 5, 12, 7))
    assert torch.equal(sampled, video(10, 11, 12, 13))
    with pytest.raises(ValueError, match=r"video: expected uint8 frames of shape \(4, 6, 3\), got torch.float32"):
        known.paste(sampled.float())
    with pytest.raises(ValueError, match=r"video: .*got torch.uint8 \(4, 5, 3\)"):
        known.paste(sampled[:, :, :5])


def test_no_known_frames_change_nothing():
    known = resolve(None, 3, H, W)
    assert known.mask(3).tolist() == [False] * 3
    assert torch.equal(known.paste(video(1, 2, 3)), video(1, 2, 3))


@settings(deadline=None, max_examples=200)
@given(frames=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_random_masks_leave_something_to_make(frames, seed):
    mask = random_known_mask(frames, torch.Generator().manual_seed(seed))
    assert mask.shape == (frames,)
    assert mask.dtype == torch.bool
    assert not mask.all()
    assert frames > 1 or not mask.any()
    assert torch.equal(mask, random_known_mask(frames, torch.Generator().manual_seed(seed)))


def kind(mask):
    """Which of the users' tasks a mask is, told from the mask alone; the first that fits."""
    known, frames = mask.nonzero().flatten().tolist(), len(mask)
    if not known:
        return "none"
    if known == list(range(len(known))):
        return "first"
    if known == list(range(frames - len(known), frames)):
        return "last"
    unknown = (~mask).nonzero().flatten().tolist()
    if unknown == list(range(unknown[0], unknown[-1] + 1)):
        return "ends"
    if len(known) > 1 and len({b - a for a, b in pairwise(known)}) == 1:
        return "every"
    return "subset"


def test_random_masks_cover_the_tasks():
    generator, draws = torch.Generator().manual_seed(0), 4000
    masks = [random_known_mask(16, generator) for _ in range(draws)]
    share = {}
    for mask in masks:
        share[kind(mask)] = share.get(kind(mask), 0) + 1 / draws
    assert share.keys() == {"none", "first", "last", "ends", "every", "subset"}
    assert share["none"] == pytest.approx(0.5, abs=0.03)
    assert all(share[task] > 0.05 for task in share)
    alone = sum(int(mask.sum()) == 1 and bool(mask[0]) for mask in masks) / draws
    assert alone > 0.02  # image to video is no rarity, also in long clips


def test_two_frames():
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(random_known_mask(2, generator).tolist()) for _ in range(100)}
    assert drawn == {(False, False), (True, False), (False, True)}
    with pytest.raises(ValueError, match="frames: expected an integer >= 1, got 0"):
        random_known_mask(0, generator)
