"""The predicate of each mask against the rule told in words, one pair of tokens at a time, on plain integers."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tubelet.kernels import Capacity, FrameCausal, Full, Mask, Spatial, Temporal, VideoLayout


class Token(NamedTuple):
    clip: int
    t: int
    h: int
    w: int
    text: bool
    known: bool


def tokens_of(grids, text=None, text_first=False, known=None, first_frames=None):
    """The tokens of a pack in order, written out from the grids."""
    tokens = []
    for i, (frames, height, width) in enumerate(grids):
        first = first_frames[i] if first_frames else 0
        video = [
            Token(i, first + t, h, w, False, bool(known and known[i] and known[i][t]))
            for t in range(frames)
            for h in range(height)
            for w in range(width)
        ]
        words = [Token(i, 0, 0, 0, True, False)] * (text[i] if text else 0)
        tokens += words + video if text_first else video + words
    return tokens


def sees(mask, query: Token, key: Token) -> bool:
    """The rule in words: see the documentation of the masks."""
    if query.clip != key.clip:
        return False  # different clips never see each other
    if query.text or key.text:
        return True  # text sees, and is seen by, every token of its clip
    t, u = query.t, key.t
    if isinstance(mask, Full):
        return True
    if isinstance(mask, Spatial):
        return u == t
    if isinstance(mask, Temporal):
        if (query.h, query.w) != (key.h, key.w):
            return False
        if key.known:
            return True
        if mask.causal and u > t:
            return False
        return mask.window is None or abs(t - u) < mask.window
    if isinstance(mask, FrameCausal):
        if key.known:
            return True
        chunk_of_query, chunk_of_key = t // mask.chunk, u // mask.chunk
        if chunk_of_key > chunk_of_query:
            return False
        return mask.window is None or chunk_of_query - chunk_of_key < mask.window or u < mask.sink
    raise AssertionError(mask)


def visible(mask, queries: list[Token], keys: list[Token]) -> torch.Tensor:
    return torch.tensor([[sees(mask, query, key) for key in keys] for query in queries]).reshape(len(queries), len(keys))


def allowed(mask, layout, kv_layout) -> torch.Tensor:
    return mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])


MASKS = st.one_of(
    st.just(Full()),
    st.just(Spatial()),
    st.builds(Temporal, causal=st.booleans(), window=st.none() | st.integers(1, 4)),
    st.builds(FrameCausal, chunk=st.integers(1, 4), window=st.none() | st.integers(1, 3), sink=st.integers(0, 4)),
)


@st.composite
def packs(draw):
    """The arguments of `VideoLayout.pack`."""
    grids = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
    known = [draw(st.none() | st.lists(st.booleans(), min_size=grid[0], max_size=grid[0])) for grid in grids]
    return {
        "grids": grids,
        "text": draw(st.none() | st.lists(st.integers(0, 3), min_size=len(grids), max_size=len(grids))),
        "text_first": draw(st.booleans()),
        "known": draw(st.none() | st.just(known)),
        "first_frames": draw(st.none() | st.lists(st.integers(0, 5), min_size=len(grids), max_size=len(grids))),
    }


@settings(max_examples=60, deadline=None)
@given(pack=packs(), mask=MASKS, spare=st.integers(0, 3))
def test_within_a_pack(pack, mask, spare):
    tokens = tokens_of(**pack)
    used = len(tokens)
    layout = VideoLayout.pack(**pack, capacity=Capacity(clips=3, frames=15, tokens=used + spare) if spare else None)
    matrix = allowed(mask, layout, layout)
    assert torch.equal(matrix[:used, :used], visible(mask, tokens, tokens))
    assert not matrix[used:].any() and not matrix[:, used:].any()


@settings(max_examples=60, deadline=None)
@given(pack=packs(), mask=MASKS, earlier=st.lists(st.integers(0, 3), min_size=3, max_size=3), data=st.data())
def test_chunk_and_cache(pack, mask, earlier, data):
    """Queries are the last frames of a longer clip."""
    earlier = earlier[: len(pack["grids"])]
    longer = [(grid[0] + more, *grid[1:]) for grid, more in zip(pack["grids"], earlier, strict=True)]
    first = pack["first_frames"] or [0] * len(longer)
    cache = {
        "grids": longer,
        "known": [data.draw(st.lists(st.booleans(), min_size=grid[0], max_size=grid[0])) for grid in longer],
        "first_frames": [frame - more + 3 for frame, more in zip(first, earlier, strict=True)],
    }
    pack["first_frames"] = [frame + 3 for frame in first]
    queries, keys = VideoLayout.pack(**pack), VideoLayout.pack(**cache)
    assert torch.equal(allowed(mask, queries, keys), visible(mask, tokens_of(**pack), tokens_of(**cache)))


@settings(max_examples=30, deadline=None)
@given(pack=packs(), mask=MASKS, lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_cross_attention(pack, mask, lengths):
    lengths = lengths[: len(pack["grids"])]
    words = [Token(i, 0, 0, 0, True, False) for i, length in enumerate(lengths) for _ in range(length)]
    matrix = allowed(mask, VideoLayout.pack(**pack), VideoLayout.segments(lengths))
    assert torch.equal(matrix, visible(mask, tokens_of(**pack), words))


# Written by hand: rows are the frames of the queries, columns those of the keys; frame 4 of 5 is known where that is said.
TABLES = [
    (Full(), None, ["11111", "11111", "11111", "11111", "11111"]),
    (Spatial(), 4, ["10000", "01000", "00100", "00010", "00001"]),
    (Temporal(), None, ["10000", "11000", "11100", "11110", "11111"]),
    (Temporal(), 4, ["10001", "11001", "11101", "11111", "11111"]),
    (Temporal(causal=False), None, ["11111", "11111", "11111", "11111", "11111"]),
    (Temporal(window=2), None, ["10000", "11000", "01100", "00110", "00011"]),
    (Temporal(window=1), 4, ["10001", "01001", "00101", "00011", "00001"]),
    (Temporal(causal=False, window=2), None, ["11000", "11100", "01110", "00111", "00011"]),
    (FrameCausal(), None, ["10000", "11000", "11100", "11110", "11111"]),
    (FrameCausal(chunk=2), None, ["11000", "11000", "11110", "11110", "11111"]),
    (FrameCausal(chunk=2), 4, ["11001", "11001", "11111", "11111", "11111"]),
    (FrameCausal(chunk=2, window=1), None, ["11000", "11000", "00110", "00110", "00001"]),
    (FrameCausal(chunk=2, window=2), None, ["11000", "11000", "11110", "11110", "00111"]),
    (FrameCausal(chunk=2, window=1, sink=1), None, ["11000", "11000", "10110", "10110", "10001"]),
    (FrameCausal(window=2, sink=1), 4, ["10001", "11001", "11101", "10111", "10011"]),
    (FrameCausal(chunk=8), None, ["11111", "11111", "11111", "11111", "11111"]),
]


@pytest.mark.parametrize("mask, known, rows", TABLES, ids=lambda value: str(value) if isinstance(value, Mask) else "")
def test_tables(mask, known, rows):
    table = torch.tensor([[mark == "1" for mark in row] for row in rows])
    layout = VideoLayout.pack([(5, 1, 1)], known=[[frame == known for frame in range(5)]])
    assert torch.equal(allowed(mask, layout, layout), table)


@settings(max_examples=60, deadline=None)
@given(mask=MASKS, t=st.integers(0, 9), u=st.integers(0, 9), known=st.booleans())
def test_one_rule_for_ints_arrays_and_tensors(mask, t, u, known):
    truth = bool(mask.rule(t, u, known))
    assert bool(mask.rule(np.array(t), np.array(u), np.array(known))) == truth
    assert bool(mask.rule(torch.tensor(t), torch.tensor(u), torch.tensor(known))) == truth
    assert truth == sees(mask, Token(0, t, 0, 0, False, False), Token(0, u, 0, 0, False, known))


@pytest.mark.parametrize(
    "mask, words",
    [
        (lambda: Temporal(window=0), "window: expected an integer from 1 to 16384 or None, got 0"),
        (lambda: Temporal(window=2.0), "window: expected an integer from 1 to 16384 or None, got 2.0"),
        (lambda: FrameCausal(chunk=0), "chunk: expected an integer from 1 to 16384, got 0"),
        (lambda: FrameCausal(chunk=None), "chunk: expected an integer from 1 to 16384, got None"),
        (lambda: FrameCausal(chunk=True), "chunk: expected an integer from 1 to 16384, got True"),
        (lambda: FrameCausal(window=10**9), "window: expected an integer from 1 to 16384 or None, got 1000000000"),
        (lambda: FrameCausal(sink=10**9), "sink: expected a number of frames from 0 to 16384, got 1000000000"),
        (lambda: FrameCausal(window=-1), "window: expected an integer from 1 to 16384 or None, got -1"),
        (lambda: FrameCausal(window=1, sink=-1), "sink: expected a number of frames from 0 to 16384, got -1"),
    ],
)
def test_refused_settings(mask, words):
    with pytest.raises(ValueError) as caught:
        mask()
    assert str(caught.value) == words


def test_the_base_class_is_no_mask():
    with pytest.raises(TypeError, match="Full, Spatial, Temporal or FrameCausal"):
        Mask().rule(0, 0, False)


def test_masks_are_values():
    """Equal settings are one key of a schedule cache; different masks are different keys, though neither has settings."""
    assert {Full(): 1, Spatial(): 2, Temporal(): 3, FrameCausal(2): 4}[FrameCausal(chunk=2)] == 4
    assert Full() != Spatial() and FrameCausal(1) != FrameCausal(2)
