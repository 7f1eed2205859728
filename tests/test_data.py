"""The procedural worlds: determinism, what is drawn where, the words, and the reader of real videos."""

import json
import re
import time
import warnings
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from tubelet.engine.training.data import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    PALETTE,
    SHAPES,
    Mixture,
    PanWorld,
    Sample,
    Scene,
    ShapesWorld,
    SizeSampler,
    Thing,
    VideoFolder,
    coverage,
    vocabulary_captions,
)

SIZES = [(1, 32, 32), (2, 48, 32), (16, 64, 64), (16, 32, 96), (32, 96, 32), (5, 33, 47)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def mask_of(frames: torch.Tensor, colour: str) -> torch.Tensor:
    """(T, H, W) bool: pixels of exactly this palette colour, by definition and not by the oracle."""
    return (frames == torch.tensor(PALETTE[colour], dtype=torch.uint8)).all(-1)


def middle(frames: torch.Tensor, colour: str) -> torch.Tensor:
    """(T, 2): the middle (x, y) of the box around a colour's pixels."""
    boxes = []
    for mask in mask_of(frames, colour):
        y, x = torch.nonzero(mask, as_tuple=True)
        boxes.append([(x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2])
    return torch.tensor(boxes)


@pytest.mark.parametrize("world", [ShapesWorld, PanWorld])
@pytest.mark.parametrize("size", SIZES)
def test_draw_is_deterministic_and_has_the_asked_size(world, size):
    sample, again = world(seed=3).draw(5, *size), world(seed=3).draw(5, *size)
    assert sample.frames.shape == (*size, 3) and sample.frames.dtype == torch.uint8 and sample.frames.is_contiguous()
    assert torch.equal(sample.frames, again.frames) and sample.caption == again.caption and sample.long_caption == again.long_caption
    for other in (world(seed=4).draw(5, *size), world(seed=3).draw(6, *size), world(seed=3, split="test").draw(5, *size)):
        assert not torch.equal(sample.frames, other.frames)


def test_drawing_does_not_touch_global_random_state():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    ShapesWorld().draw(0, 4, 32, 32)
    PanWorld().draw(0, 4, 32, 32)
    assert before[0] == np.random.get_state()[1].tolist() and torch.equal(before[1], torch.get_rng_state())


def test_held_out_pairs_are_drawn_by_the_test_split_alone():
    assert len(HELD_OUT) == 4 and len({colour for colour, _ in HELD_OUT}) == 4 and {shape for _, shape in HELD_OUT} == set(SHAPES)
    pairs = {
        split: {(t.colour, t.shape) for i in range(600) for t in ShapesWorld(0, split).draw(i, 2, 8, 8).scene.things}
        for split in ("train", "test")
    }
    every = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert pairs["train"] == every - HELD_OUT
    assert pairs["test"] == every


def test_frequencies_of_scenes():
    scenes = [ShapesWorld(1).draw(i, 4, 16, 16).scene for i in range(800)]
    assert 0.65 < np.mean([len(scene.things) == 1 for scene in scenes]) < 0.75
    assert {thing.motion for scene in scenes for thing in scene.things} == set(MOTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    for scene in scenes:
        names = [thing.colour for thing in scene.things] + [scene.background]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", SIZES)
def test_things_never_leave_the_frame(size):
    for i in range(60):
        sample = ShapesWorld(2).draw(i, *size)
        border = torch.cat([sample.frames[:, 0], sample.frames[:, -1], sample.frames[:, :, 0], sample.frames[:, :, -1]], dim=1)
        allowed = [sample.scene.background, "black" if sample.scene.background == "gray" else "gray"]  # the wall reaches the border
        match = torch.stack([(border == torch.tensor(PALETTE[name], dtype=torch.uint8)).all(-1) for name in allowed]).any(0)
        if any(thing.motion == "behind" for thing in sample.scene.things):
            for thing in sample.scene.things:
                assert not (border == torch.tensor(PALETTE[thing.colour], dtype=torch.uint8)).all(-1).any()
        else:
            assert match.all(), sample.caption


@pytest.mark.parametrize(("direction", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
@pytest.mark.parametrize(("speed", "rate"), [("slow", 0.02), ("normal", 0.035), ("fast", 0.06)])
def test_moving_things_go_their_way_at_their_speed(direction, step, speed, rate):
    scene = Scene((Thing("red", "square", "small", "move", direction, speed),), "blue")
    for i in range(3):
        track = middle(ShapesWorld(0).draw(i, 8, 64, 64, scene=scene).frames, "red")
        expected = rate * 64 * 7 * torch.tensor(step)
        assert (track[-1] - track[0] - expected).abs().max() <= 1.0
        steps = (track[1:] - track[:-1]) @ torch.tensor(step, dtype=torch.float)
        assert steps.min() >= 0


def test_speed_is_clamped_to_the_room():
    scene = Scene((Thing("red", "square", "large", "move", "right", "fast"),), "blue")
    track = middle(ShapesWorld(0).draw(0, 32, 64, 64, scene=scene).frames, "red")
    assert track[-1, 0] - track[0, 0] == pytest.approx(64 - 2 * (0.28 * 64 + 1), abs=1)


@pytest.mark.parametrize("frames", [16, 400])
def test_bounce_reflects_and_stays_inside(frames):
    scene = Scene((Thing("red", "square", "small", "bounce", None, "normal"),), "blue")
    turned = 0
    for i in range(8):
        track = middle(ShapesWorld(0).draw(i, frames, 64, 64, scene=scene).frames, "red")
        assert track.min() >= 0.16 * 64 and track.max() <= 64 - 0.16 * 64
        steps = track[1:] - track[:-1]
        turned += bool(((steps.min(0).values < -0.5) & (steps.max(0).values > 0.5)).any())
    assert turned >= 6


def test_circle_keeps_its_distance_from_a_centre():
    scene = Scene((Thing("red", "square", "small", "circle", None, "fast"),), "blue")
    track = middle(ShapesWorld(0).draw(1, 100, 64, 64, scene=scene).frames, "red")
    centre = (track.max(0).values + track.min(0).values) / 2
    distance = (track - centre).norm(dim=1)
    assert distance.min() > 0.1 * 64 and distance.max() - distance.min() < 2


@pytest.mark.parametrize(("motion", "grows"), [("grow", True), ("shrink", False)])
def test_growing_and_shrinking(motion, grows):
    area = mask_of(ShapesWorld(0).draw(0, 10, 64, 64, scene=Scene((Thing("red", "circle", motion=motion),), "blue")).frames, "red").sum(
        (1, 2)
    )
    steps = area[1:] - area[:-1]
    assert (steps > 0).all() if grows else (steps < 0).all()


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize(("background", "wall"), [("blue", "gray"), ("gray", "black")])
def test_behind_a_wall_the_thing_disappears_and_comes_back_on_the_other_side(direction, background, wall):
    sample = ShapesWorld(0).draw(0, 24, 64, 96, scene=Scene((Thing("red", "circle", "small", "behind", direction),), background))
    area = mask_of(sample.frames, "red").sum((1, 2))
    assert area[0] > 0 and area[-1] > 0 and area.min() == 0
    assert mask_of(sample.frames, wall).all(1).any(1).all()  # a bar as high as the frame, in every frame
    ends = middle(sample.frames[[0, -1]], "red")[:, 0]
    assert (ends[1] > ends[0]) == (direction == "right")


def test_coverage_sums_to_the_area_of_the_shape():
    """Against the geometry: anti-aliased coverage sums to the exact area."""
    r = 20.3
    exact = {"circle": np.pi, "square": 1.7**2, "triangle": 0.95 * 1.8, "cross": 4 * 0.72 - 0.72**2}
    for shape, share in exact.items():
        total = coverage(shape, np.array([[31.7, 32.4]]), np.array([r]), 64, 64).sum()
        assert total == pytest.approx(share * r * r, rel=0.01)


def test_the_first_thing_is_on_top_and_two_things_start_apart():
    overlaps = 0
    for i in range(60):
        scene = Scene((Thing("red", "square", "small"), Thing("cyan", "circle", "small")), "black")
        frames = ShapesWorld(0).draw(i, 2, 64, 64, scene=scene).frames
        assert mask_of(frames, "red").sum() >= 2 * 16**2  # .85 * 2 * .16 * 64 = 17.4 pixels a side, whole whatever lies below
        overlaps += int(mask_of(frames, "cyan").sum() < 2 * 0.9 * np.pi * (0.16 * 64 - 0.75) ** 2)
    assert overlaps <= 3


def test_a_given_scene_is_shown_and_said():
    scene = Scene((Thing("red", "circle", "large", "move", "left", "slow"), Thing("yellow", "square", motion="bounce")), "white")
    sample = ShapesWorld(0).draw(0, 8, 64, 64, scene=scene)
    assert sample.scene == scene
    assert {"red", "circle", "large", "left", "slowly", "yellow", "square", "white"} <= words(sample.caption)
    drawn = ShapesWorld(0).draw(7, 8, 64, 64)
    assert torch.equal(ShapesWorld(0).draw(7, 8, 64, 64, scene=drawn.scene).frames, drawn.frames)


def test_canonical_captions():
    red = Thing("red", "circle", motion="bounce")
    small = Thing("green", "cross", "small", "move", "left")
    long = Scene((Thing("red", "circle", "large", "move", "right", "slow"),), "blue").caption(long=True)
    assert Scene((red,), "blue").caption() == "a red circle bounces on a blue background"
    assert Scene((small,), "white").caption() == "a small green cross moves left on a white background"
    assert Scene((small,), "white").caption(image=True) == "a small green cross on a white background"
    assert Scene((red, replace(red, colour="yellow", shape="square")), "blue").caption() == (
        "a red circle and a yellow square bounce on a blue background"
    )
    assert Scene((red, small), "blue").caption() == "a red circle bounces and a small green cross moves left on a blue background"
    assert long == "The video shows a large red circle that moves slowly from left to right in front of a plain blue background."
    behind = [
        Scene((Thing("red", "circle", motion="behind", direction="left"),), "blue").caption(long=True, rng=np.random.default_rng(i))
        for i in range(9)
    ]
    assert any("moves to the left and passes behind a wall" in caption for caption in behind)


def test_captions_say_the_scene_and_images_no_motion():
    verbs = words(
        "moves goes move go rises falls bounces circles grows gets shrinks passes stands stays still slowly quickly fast left right wall"
    )
    cases = set()
    for i in range(300):
        sample = ShapesWorld(0).draw(i, 1 if i % 2 else 8, 48, 48)
        for caption in (sample.caption, sample.long_caption):
            expected = {word for thing in sample.scene.things for word in (thing.colour, thing.shape)} | {sample.scene.background}
            assert expected <= words(caption)
            cases.add(caption[0].isupper())
            if i % 2:
                assert not (words(caption) - {"circle"}) & verbs, caption
        for thing in sample.scene.things:
            if thing.motion == "move" and len(sample.frames) > 1:
                said = {"left": {"left"}, "right": {"right"}, "up": {"up", "rises", "rise"}, "down": {"down", "falls", "fall"}}[
                    thing.direction
                ]
                assert said & words(sample.caption), sample.caption
    assert cases == {True, False}


def test_vocabulary_is_closed_and_covered():
    vocabulary = set().union(*(words(caption) for caption in vocabulary_captions(2000)))
    assert len(vocabulary) < 200
    assert list(vocabulary_captions(20, seed=1)) == list(vocabulary_captions(20, seed=1)) != list(vocabulary_captions(20, seed=2))
    for world in (ShapesWorld(9), ShapesWorld(9, "test"), PanWorld(9)):
        for i in range(500):
            sample = world.draw(i, 1 + i % 5, 8, 8)
            assert words(sample.caption) | words(sample.long_caption) <= vocabulary


def test_drawing_is_fast():
    world = ShapesWorld(0)
    best = min(_seconds(lambda i=i: world.draw(i, 16, 64, 64)) for i in range(20))
    assert best < 0.004, f"16 x 64 x 64 takes {best * 1e3:.1f} ms"


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("size", [(16, 64, 64), (16, 32, 96), (32, 48, 48), (3, 64, 64), (1, 32, 32)])
def test_pan_landmarks_are_where_the_track_says(size):
    frames = size[0]
    for i in range(10):
        sample = PanWorld(0).draw(i, *size)
        track = sample.landmarks
        visible = track.visible()
        assert visible.shape == (frames, len(track.colours)) and sample.scene is None
        assert (track.spans[1:, 0] > track.spans[:-1, 1]).all()
        for t, landmark in np.argwhere(visible > 0.999):
            x = int(track.spans[landmark].mean() - track.views[t, 0])
            assert tuple(sample.frames[t, -1, x].tolist()) == PALETTE[COLOURS[track.colours[landmark]]]
        for t in range(frames):
            unseen = set(range(len(COLOURS))) - {int(track.colours[n]) for n in np.flatnonzero(visible[t] > 0)}
            for colour in unseen:
                assert not mask_of(sample.frames[t : t + 1], COLOURS[colour]).any()


def test_pan_goes_away_for_one_to_two_views_and_returns():
    reaches, directions = [], set()
    for i in range(40):
        sample = PanWorld(0).draw(i, 16, 64, 64)
        offsets = sample.landmarks.views[:, 0] / 64
        reaches.append(np.ptp(offsets))
        directions.add("right" if offsets[7] > offsets[0] else "left")
        assert ("right" if offsets[7] > offsets[0] else "left") in words(sample.caption)
        assert torch.equal(sample.frames[0], sample.frames[-1])
        visible = sample.landmarks.visible()
        whole = visible[0] > 0.999
        assert whole.any() and (visible[7:9][:, whole] == 0).all()  # what the start shows whole is out of sight at the far end
    assert directions == {"left", "right"}
    assert 1 <= min(reaches) < 1.2 < 1.8 < max(reaches) <= 2


def test_pan_colours_cannot_be_guessed():
    colours = np.concatenate([PanWorld(0).draw(i, 16, 16, 16).landmarks.colours for i in range(200)])
    assert np.bincount(colours, minlength=6).min() > 0.7 * len(colours) / 6
    assert abs(np.mean(colours[1:] == colours[:-1]) - 1 / 6) < 0.05


def test_mixture_draws_in_proportion():
    shapes, pans = ShapesWorld(0), PanWorld(0)
    mixture = Mixture([(shapes, 3.0), (pans, 1.0)])
    samples = [mixture.draw(i, 2, 16, 16) for i in range(400)]
    share = np.mean([sample.landmarks is not None for sample in samples])
    assert 0.18 < share < 0.32
    for i in range(20):
        world = shapes if samples[i].scene else pans
        assert torch.equal(samples[i].frames, world.draw(i, 2, 16, 16).frames)
    for weights in ([], [(shapes, -1.0)], [(shapes, 0.0)], [(shapes, float("nan"))]):
        with pytest.raises(ValueError, match="weights"):
            Mixture(weights)


@pytest.mark.parametrize("tokens", [4, 30, 128, 2000])
def test_sizes_fit_the_budget(tokens):
    sampler = SizeSampler(tokens)
    sizes = [sampler.draw(i) for i in range(400)]
    assert sizes == [SizeSampler(tokens).draw(i) for i in range(400)]
    for frames, height, width in sizes:
        assert 1 <= frames <= 32 and height % 16 == width % 16 == 0
        assert min(height, width) >= 32 and max(height, width) <= 96 and max(height, width) <= 3 * min(height, width)
        assert frames * (height // 16) * (width // 16) <= tokens
    if tokens == 2000:
        assert {s[1] for s in sizes} == {s[2] for s in sizes} == {32, 48, 64, 80, 96} and {s[0] for s in sizes} == set(range(1, 33))
        assert 0.14 < np.mean([s[0] == 1 for s in sizes]) < 0.26
    with pytest.raises(ValueError, match="tokens"):
        SizeSampler(3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ShapesWorld(split="val"), "split"),
        (lambda: PanWorld(split="val"), "split"),
        (lambda: ShapesWorld().draw(-1, 1, 8, 8), "index"),
        (lambda: ShapesWorld().draw(0, 0, 8, 8), "frames"),
        (lambda: PanWorld().draw(0, 1, 8.0, 8), "height"),
        (lambda: ShapesWorld().draw(0, 1, 8, 0), "width"),
        (lambda: Thing("pink", "circle"), "colour"),
        (lambda: Thing("red", "circle", motion="move"), "direction"),
        (lambda: Thing("red", "circle", motion="bounce", direction="left"), "direction"),
        (lambda: Scene((), "blue"), "at least one"),
        (lambda: Scene((Thing("red", "circle"),), "red"), "no colour twice"),
        (lambda: Scene((Thing("red", "circle"),), "brown"), "background"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def write_video(path, frames: np.ndarray) -> None:
    """A lossless video, written without the code under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr0"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture
def counting():
    """Ten frames of 24 x 48 whose brightness says their number; the left and right quarters are red."""
    frames = np.repeat(np.arange(10, dtype=np.uint8)[:, None, None, None] * 20, 24, 1).repeat(48, 2).repeat(3, 3)
    frames[:, :, :12] = frames[:, :, 36:] = (255, 0, 0)
    return frames


def numbers(sample: Sample) -> list[int]:
    height, width = sample.frames.shape[1:3]
    return [round(value / 20) for value in sample.frames[:, height // 2, width // 2, 0].tolist()]


def test_video_folder_takes_a_random_crop_in_time_and_the_middle_in_space(tmp_path, counting):
    write_video(tmp_path / "a.mkv", counting)
    (tmp_path / "a.txt").write_text("a gray ramp\n")
    folder = VideoFolder(tmp_path)
    starts = set()
    for i in range(20):
        sample = folder.draw(i, 4, 12, 12)
        assert sample.frames.shape == (4, 12, 12, 3) and sample.caption == sample.long_caption == "a gray ramp"
        shown = numbers(sample)
        assert shown == list(range(shown[0], shown[0] + 4))
        assert (sample.frames[..., 0].int() - sample.frames[..., 1].int()).abs()[:, :, 1:-1].max() <= 2  # the red sides are cut off
        starts.add(shown[0])
        assert torch.equal(sample.frames, folder.draw(i, 4, 12, 12).frames)
    assert min(starts) == 0 and max(starts) == 6
    assert torch.equal(folder.draw(0, 10, 24, 48).frames, torch.from_numpy(counting))
    assert numbers(folder.draw(0, 24, 48, 48)) == [*range(10), *range(8, -1, -1), *range(1, 6)]


def test_video_folder_reads_a_table(tmp_path, counting):
    write_video(tmp_path / "a.mkv", counting)
    write_video(tmp_path / "b.mkv", counting[:1])
    rows = [{"file": "a.mkv", "caption": "one", "long_caption": "one in words"}, {"file": "b.mkv", "caption": "two"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    folder = VideoFolder(tmp_path)
    assert len(folder) == 2
    assert (folder.draw(2, 1, 8, 8).caption, folder.draw(2, 1, 8, 8).long_caption) == ("one", "one in words")
    assert folder.draw(1, 3, 8, 8).long_caption == "two"  # a video of one frame repeats it


def test_video_folder_names_what_is_missing(tmp_path, counting):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no video"):
        VideoFolder(tmp_path)
    write_video(tmp_path / "a.mkv", counting)
    with pytest.raises(FileNotFoundError, match=r"a\.txt"):
        VideoFolder(tmp_path)
    table = tmp_path / "captions.jsonl"
    table.write_text('{"file": "gone.mp4", "caption": "x"}')
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        VideoFolder(tmp_path)
    for line in ('{"file": "a.mkv"}', "not json", "[]", '{"file": "a.mkv", "caption": 3}'):
        table.write_text(line)
        with pytest.raises(ValueError, match="line 1"):
            VideoFolder(tmp_path)
    table.write_text("\n")
    with pytest.raises(FileNotFoundError, match="names no video"):
        VideoFolder(tmp_path)


def test_a_video_that_cannot_be_decoded_is_left_out(tmp_path, counting):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mkv", counting)
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mkv").read_bytes()[:200])
    folder = VideoFolder(tmp_path)
    assert folder.captions() == ["caption a", "caption b"]
    with pytest.warns(RuntimeWarning, match=r"a\.mkv: cannot be decoded .*; it is left out"):
        assert folder.draw(0, 2, 8, 8).caption == "caption b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told of once
        assert folder.draw(2, 2, 8, 8).caption == "caption b"
    (tmp_path / "b.mkv").write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="none of its videos can be decoded"):
        folder.draw(1, 2, 8, 8)
