"""Where clips, frames and text lie in a pack, written out by hand and counted again token by token."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tubelet.kernels import Capacity, VideoLayout
from tubelet.kernels.layout import to_device

TABLES = ("clip_offsets", "clip_grids", "frame_starts", "frame_lengths", "frame_clips", "frame_known")
# Two clips, the second with one frame, and two tokens of text for the first.
GRIDS = [(2, 1, 3), (1, 2, 2)]


def lists(layout):
    return {name: getattr(layout, name).tolist() for name in TABLES}


def test_video_alone():
    layout = VideoLayout.pack(GRIDS)
    assert (layout.tokens, layout.used_tokens, layout.num_clips, layout.num_frames) == (10, 10, 2, 3)
    assert lists(layout) == {
        "clip_offsets": [0, 6, 10],
        "clip_grids": [[2, 1, 3], [1, 2, 2]],
        "frame_starts": [0, 3, 6],
        "frame_lengths": [3, 3, 4],
        "frame_clips": [0, 0, 1],
        "frame_known": [False, False, False],
    }
    assert all(getattr(layout, name).dtype == (torch.bool if name == "frame_known" else torch.int32) for name in TABLES)


def test_text_after_the_video():
    layout = VideoLayout.pack(GRIDS, text=[2, 0])
    assert layout.tokens == 12
    assert layout.clip_offsets.tolist() == [0, 8, 12]
    assert layout.frame_starts.tolist() == [0, 3, 8]
    assert layout.coordinates.text.nonzero().flatten().tolist() == [6, 7]
    assert layout.rows("clip").tolist() == [0] * 8 + [1] * 4
    assert layout.rows("frame").tolist() == [0] * 3 + [1] * 3 + [3] * 2 + [2] * 4
    assert (layout.clips[0].start, layout.clips[0].stop, layout.clips[0].text_start, layout.clips[0].text_stop) == (0, 8, 6, 8)


def test_text_before_the_video():
    layout = VideoLayout.pack(GRIDS, text=[2, 1], text_first=True)
    assert layout.clip_offsets.tolist() == [0, 8, 13]
    assert layout.frame_starts.tolist() == [2, 5, 9]
    assert layout.coordinates.text.nonzero().flatten().tolist() == [0, 1, 8]
    assert layout.rows("clip").tolist() == [0] * 8 + [1] * 5
    assert layout.rows().tolist() == [3] * 2 + [0] * 3 + [1] * 3 + [4] + [2] * 4
    assert (layout.clips[1].start, layout.clips[1].stop, layout.clips[1].video_start, layout.clips[1].video_stop) == (8, 13, 9, 13)


def test_coordinates():
    layout = VideoLayout.pack([(2, 2, 1), (1, 1, 2)], text=[1, 0], known=[[False, True], None], first_frames=[5, 0])
    where = layout.coordinates
    assert where.clip.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert where.t.tolist() == [5, 5, 6, 6, 0, 0, 0]
    assert where.h.tolist() == [0, 1, 0, 1, 0, 0, 0]
    assert where.w.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert where.text.tolist() == [False] * 4 + [True] + [False] * 2
    assert where.known.tolist() == [False, False, True, True] + [False] * 3
    assert layout.frame_known.tolist() == [False, True, False]
    assert [field.dtype for field in (where.clip, where.t, where.h, where.w)] == [torch.int32] * 4
    assert where[2:4].h.tolist() == [0, 1] and where[:, None].t.shape == (7, 1)


def test_positions_follow_the_first_frame():
    layout = VideoLayout.pack([(2, 1, 2), (2, 1, 1)], text=[0, 1], first_frames=[3, 0])
    assert layout.positions.tolist() == [[3, 0, 0], [3, 0, 1], [4, 0, 0], [4, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert layout.positions.dtype == torch.float32


def test_positions_given():
    """Any frames of a long video, in any places; the masks keep counting from the first frame."""
    layout = VideoLayout.pack([(3, 1, 1), (2, 1, 1)], positions=[[7, 0.5, 120], None], first_frames=[0, 4])
    assert layout.positions[:, 0].tolist() == [7, 0.5, 120, 4, 5]
    assert layout.coordinates.t.tolist() == [0, 1, 2, 4, 5]
    assert layout.clips[0].positions == (7.0, 0.5, 120.0)


def test_segments():
    layout = VideoLayout.segments([2, 0, 3])
    assert (layout.tokens, layout.num_clips, layout.num_frames) == (5, 3, 0)
    assert layout.clip_offsets.tolist() == [0, 2, 2, 5]
    assert layout.coordinates.clip.tolist() == [0, 0, 2, 2, 2]
    assert layout.coordinates.text.all()
    assert layout.rows("clip").tolist() == [0, 0, 2, 2, 2]
    assert layout.rows("frame").tolist() == [0, 0, 2, 2, 2]
    assert layout.positions.tolist() == [[0, 0, 0]] * 5
    assert layout.frame_starts.shape == (0,) and layout.clip_grids.tolist() == [[0, 0, 0]] * 3


def test_capacity_repeats_the_end():
    layout = VideoLayout.pack(GRIDS, text=[2, 0], known=[[True, False], [True]], capacity=Capacity(clips=4, frames=5, tokens=16))
    assert (layout.tokens, layout.used_tokens, layout.num_clips, layout.num_frames) == (16, 12, 2, 3)
    assert lists(layout) == {
        "clip_offsets": [0, 8, 12, 12, 12],
        "clip_grids": [[2, 1, 3], [1, 2, 2], [0, 0, 0], [0, 0, 0]],
        "frame_starts": [0, 3, 8, 12, 12],
        "frame_lengths": [3, 3, 4, 0, 0],
        "frame_clips": [0, 0, 1, -1, -1],
        "frame_known": [True, False, True, False, False],
    }
    where = layout.coordinates
    assert where.clip.tolist() == [0] * 8 + [1] * 4 + [-1] * 4
    assert not where.text[12:].any() and not where.known[12:].any()
    assert layout.rows("clip").tolist() == [0] * 8 + [1] * 4 + [0] * 4
    assert layout.rows("frame").tolist()[12:] == [0] * 4
    assert layout.positions.shape == (16, 3) and not layout.positions[12:].any()


def test_tables_of_one_capacity_have_one_shape():
    capacity = Capacity(clips=3, frames=8, tokens=40)
    packs = [VideoLayout.pack(grids, capacity=capacity) for grids in ([(1, 1, 1)], [(2, 3, 3), (3, 2, 2), (1, 5, 1)], [])]
    for name in TABLES:
        assert len({(getattr(layout, name).shape, getattr(layout, name).dtype) for layout in packs}) == 1
    assert packs[2].clip_offsets.tolist() == [0, 0, 0, 0]


def test_an_exact_capacity_is_enough():
    assert VideoLayout.pack(GRIDS, capacity=Capacity(clips=2, frames=3, tokens=10)).tokens == 10
    assert VideoLayout.segments([1, 2], capacity=Capacity(clips=2, frames=0, tokens=3)).tokens == 3


@pytest.mark.parametrize(
    "capacity, words",
    [
        (Capacity(1, 3, 10), "capacity: the pack has 2 clips, the capacity is 1"),
        (Capacity(2, 2, 10), "capacity: the pack has 3 frames, the capacity is 2"),
        (Capacity(2, 3, 9), "capacity: the pack has 10 tokens, the capacity is 9"),
    ],
)
def test_over_capacity(capacity, words):
    with pytest.raises(ValueError) as caught:
        VideoLayout.pack(GRIDS, capacity=capacity)
    assert str(caught.value) == words


def test_to_another_device():
    capacity = Capacity(clips=3, frames=4, tokens=13)
    layout = VideoLayout.pack(GRIDS, text=[2, 1], known=[[True, False], None], first_frames=[1, 2], capacity=capacity)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device == torch.device("meta") and moved.clips == layout.clips and moved.capacity == capacity
    for name in TABLES:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(layout, name).shape
    assert moved.rows().device.type == moved.positions.device.type == moved.coordinates.t.device.type == "meta"
    assert lists(moved.to("cpu")) == lists(layout)


def test_tables_are_made_once():
    layout = VideoLayout.pack(GRIDS)
    for get in (lambda: layout.clip_offsets, lambda: layout.coordinates.t, lambda: layout.positions, lambda: layout.rows("clip")):
        assert get() is get()


def test_repr_tells_the_grids():
    assert repr(VideoLayout.pack(GRIDS, text=[2, 0])) == "VideoLayout(2x1x3+2 text, 1x2x2; 12 tokens on cpu)"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), st.integers(0, 3)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
)
def test_tables_agree_with_one_another(clips, text_first, spare):
    """Each token, asked for its clip, frame and place, is where the tables say."""
    grids, text = zip(*clips, strict=True)
    plain = VideoLayout.pack(grids, text=text, text_first=text_first)
    capacity = Capacity(plain.num_clips + spare, plain.num_frames + spare, plain.tokens + spare)
    layout = VideoLayout.pack(grids, text=text, text_first=text_first, capacity=capacity)
    where = layout.coordinates
    assert layout.used_tokens == sum(t * h * w + n for (t, h, w), n in clips)
    for token in range(layout.used_tokens):
        clip = int(where.clip[token])
        assert layout.clip_offsets[clip] <= token < layout.clip_offsets[clip + 1]
        assert layout.rows("clip")[token] == clip
        row = int(layout.rows("frame")[token])
        if where.text[token]:
            assert row == layout.num_frames + clip
            continue
        _, height, width = grids[clip]
        assert layout.frame_clips[row] == clip
        assert layout.frame_starts[row] <= token < layout.frame_starts[row] + layout.frame_lengths[row]
        assert token - layout.frame_starts[row] == where.h[token] * width + where.w[token]
        assert where.h[token] < height and where.w[token] < width
        assert layout.positions[token].tolist() == [where.t[token], where.h[token], where.w[token]]


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: VideoLayout.pack([(1, 2, 2), (0, 2, 2)]), r"grids\[1\]: expected three integers >= 1 \(T, H, W\), got \(0, 2, 2\)"),
        (lambda: VideoLayout.pack([(2, 2)]), r"grids\[0\]: expected three integers .* got \(2, 2\)"),
        (lambda: VideoLayout.pack([(1, 1.5, 2)]), r"grids\[0\]: expected three integers .* got \(1, 1.5, 2\)"),
        (lambda: VideoLayout.pack(GRIDS, text=[1]), "text: expected one entry for each of 2 clips, got 1"),
        (lambda: VideoLayout.pack(GRIDS, text=[1, -1]), r"text\[1\]: expected a number of tokens >= 0, got -1"),
        (lambda: VideoLayout.pack(GRIDS, known=[[True, True]]), "known: expected one entry for each of 2 clips, got 1"),
        (lambda: VideoLayout.pack(GRIDS, known=[[True], None]), r"known\[0\]: expected one entry for each of 2 frames, got 1"),
        (lambda: VideoLayout.pack(GRIDS, positions=[None, [1, 2]]), r"positions\[1\]: expected one entry for each of 1 frames, got 2"),
        (lambda: VideoLayout.pack(GRIDS, first_frames=[0]), "first_frames: expected one entry for each of 2 clips, got 1"),
        (lambda: VideoLayout.pack(GRIDS, first_frames=[0, 1.5]), r"first_frames\[1\]: expected a whole number, got 1.5"),
        (lambda: VideoLayout.segments([2, -3]), r"lengths\[1\]: expected a number of tokens >= 0, got -3"),
        (lambda: VideoLayout.pack(GRIDS).rows("token"), "per: expected 'clip' or 'frame', got 'token'"),
    ],
)
def test_what_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# A layout that is filled again.


def everything(layout):
    """All of a layout's tensors."""
    return [*(getattr(layout, name) for name in TABLES), *layout.coordinates, layout.positions, layout.rows("clip"), layout.rows("frame")]


def test_refill():
    """In place, whatever was and was not looked at before; in inference mode too."""
    capacity = Capacity(clips=3, frames=8, tokens=40)
    packs = [
        {"grids": GRIDS, "text": [2, 0], "known": [[True, False], None]},
        {"grids": [(2, 3, 3), (3, 2, 2), (1, 5, 1)], "text": [1, 1, 1], "positions": [[2, 4], None, [0.5]], "first_frames": [0, 2, 9]},
        {"grids": []},
    ]
    with torch.inference_mode():
        layout = VideoLayout.pack(**packs[0], capacity=capacity)
        tensors = everything(layout)
        doubled = layout.table("doubled", lambda layout: {"frames": (2 * layout.frame_lengths,)})
    layout.cache["plan"] = "of the first pack"
    for pack in [*packs[1:], packs[0]]:
        other = VideoLayout.pack(**pack, capacity=capacity)
        layout.refill(other)
        assert layout.clips == other.clips and layout.cache == {}
        assert (layout.num_clips, layout.num_frames, layout.used_tokens) == (other.num_clips, other.num_frames, other.used_tokens)
        for ours, theirs, now in zip(tensors, everything(other), everything(layout), strict=True):
            assert torch.equal(ours, theirs) and ours is now
        assert torch.equal(doubled["frames"][0], 2 * other.frame_lengths)


def test_refill_of_a_partner():
    """What is derived from two layouts follows both."""
    capacity = Capacity(clips=3, frames=8, tokens=40)
    layout, partner = (VideoLayout.pack(GRIDS, capacity=capacity) for _ in range(2))
    sums = layout.table("sum", lambda layout, partner: layout.frame_lengths + 100 * partner.frame_lengths, partner)
    assert layout.table("sum", None, partner) is sums
    for refilled, expected in ((partner, 3 + 900), (layout, 9 + 900)):
        refilled.refill(VideoLayout.pack([(2, 3, 3)], capacity=capacity))
        assert sums[0] == expected and torch.equal(sums, layout.frame_lengths + 100 * partner.frame_lengths)
    assert layout.table("sum", lambda layout, partner: layout.frame_lengths * 0, VideoLayout.pack([], capacity=capacity)) is not sums


@pytest.mark.parametrize(
    "capacities", [(None, None), (None, Capacity(3, 8, 40)), (Capacity(3, 8, 40), None), (Capacity(3, 8, 40), Capacity(3, 8, 41))]
)
def test_refill_needs_one_capacity(capacities):
    layout, other = (VideoLayout.pack(GRIDS, capacity=capacity) for capacity in capacities)
    with pytest.raises(ValueError, match="other: expected a layout of this one's capacity, which must be given"):
        layout.refill(other)


def test_a_layout_dies_with_its_last_reference():
    layout, partner = VideoLayout.pack(GRIDS), VideoLayout.pack(GRIDS)
    everything(layout), layout.table("pair", lambda layout, partner: torch.zeros(1), partner)
    handles = layout.handle, partner.handle
    assert VideoLayout.of_handle(handles[0]) is layout
    del layout, partner
    for handle in handles:
        with pytest.raises(ValueError, match="layout: expected the handle of a living VideoLayout"):
            VideoLayout.of_handle(handle)


def test_copies_are_layouts_of_their_own():
    """With handles of their own: refilling one changes no other, and each lives as long as itself."""
    layout = VideoLayout.pack(GRIDS, text=[2, 0], capacity=Capacity(3, 5, 40))
    for other in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other.handle != layout.handle and VideoLayout.of_handle(other.handle) is other
        assert other.clips == layout.clips and other.capacity == layout.capacity and lists(other) == lists(layout)
        before = lists(other)
        layout.refill(VideoLayout.pack([(3, 2, 2)], capacity=Capacity(3, 5, 40)))
        assert lists(other) == before != lists(layout)
        layout.refill(other)


def test_no_table_is_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="layout: its tables are made by the first call with it, which cannot be captured"):
        to_device(torch.zeros(3), torch.device("cuda"))
