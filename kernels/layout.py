"""Where each clip and frame of a pack lies.

A pack holds the tokens of several clips of any sizes on one token axis, with no padding between them (NaViT, Dehghani et al. 2023). A
clip's video tokens lie in (t, h, w) order; in a joint layout its text tokens lie before or after them. The layout is planned on the host
from the grids and read by kernels from small int32 tensors on the device; with a fixed capacity those tensors keep their size whatever the
pack holds, and `refill` puts another pack into the same tensors, so that a captured CUDA graph serves every pack that fits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch

from .masks import Coordinates


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes that packs must fit: numbers of clips, of frames and of tokens."""

    clips: int
    frames: int
    tokens: int


@dataclass(frozen=True)
class ClipSpan:
    """One clip of a pack. Token ranges are [start, stop) on the token axis."""

    grid: tuple[int, int, int]
    video_start: int
    text_start: int
    text_length: int
    first_frame: int
    known: tuple[bool, ...]
    positions: tuple[float, ...]

    @property
    def frames(self) -> int:
        return self.grid[0]

    @property
    def frame_tokens(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def video_stop(self) -> int:
        return self.video_start + self.frames * self.frame_tokens

    @property
    def text_stop(self) -> int:
        return self.text_start + self.text_length

    @property
    def start(self) -> int:
        return min(self.video_start, self.text_start)

    @property
    def stop(self) -> int:
        return max(self.video_stop, self.text_stop)


class _Tables(NamedTuple):
    """The small tensors of a layout, on its device."""

    clip_offsets: torch.Tensor
    clip_grids: torch.Tensor
    frame_starts: torch.Tensor
    frame_lengths: torch.Tensor
    frame_clips: torch.Tensor
    frame_known: torch.Tensor


class VideoLayout:
    """The table of a pack. Build it with `VideoLayout.pack` or, for text alone, `VideoLayout.segments`.

    Host side: `clips` (a tuple of ClipSpan), `tokens` (length of the token axis), `used_tokens` (without the unused end of a capacity),
    `num_clips`, `num_frames`. Device side, int32, of capacity size where one is given, offsets past the end repeating the last one:
    `clip_offsets` (clips + 1,), `clip_grids` (clips, 3), `frame_starts` (frames,), `frame_lengths` (frames,), `frame_clips` (frames,); and
    `frame_known` (frames,) bool.
    """

    _alive: ClassVar[WeakValueDictionary[int, "VideoLayout"]] = WeakValueDictionary()
    _handles = count(1 << 40)  # no size of a tensor is as large, so torch.compile does not take the two for the same number

    def __init__(self, clips: Sequence[ClipSpan], capacity: Capacity | None, device: torch.device | str):
        self.capacity = capacity
        self.device = _indexed(device)
        self._place(clips)
        self.tokens = capacity.tokens if capacity else self.used_tokens
        self.cache: dict = {}  # host-side plans that ops derive from this layout; they die with what it holds
        self._derived: dict = {}
        self._dependents: WeakSet[VideoLayout] = WeakSet()
        self.handle = next(self._handles)
        self._alive[self.handle] = self

    def _place(self, clips: Sequence[ClipSpan]) -> None:
        clips = tuple(clips)
        frames, tokens = sum(clip.frames for clip in clips), clips[-1].stop if clips else 0
        if self.capacity:
            for name, used in (("clips", len(clips)), ("frames", frames), ("tokens", tokens)):
                if used > getattr(self.capacity, name):
                    raise ValueError(f"capacity: the pack has {used} {name}, the capacity is {getattr(self.capacity, name)}")
        self.clips, self.num_clips, self.num_frames, self.used_tokens = clips, len(clips), frames, tokens

    @classmethod
    def of_handle(cls, handle: int) -> "VideoLayout":
        """The layout whose `handle` this is: operators of torch.library take numbers, not layouts. Raises ValueError if it is gone."""
        layout = cls._alive.get(handle)
        if layout is None:
            raise ValueError(f"layout: expected the handle of a living VideoLayout, got {handle}")
        return layout

    @classmethod
    def pack(
        cls,
        grids: Sequence[tuple[int, int, int]],
        *,
        text: Sequence[int] | None = None,
        text_first: bool = False,
        known: Sequence[Sequence[bool] | None] | None = None,
        first_frames: Sequence[int] | None = None,
        positions: Sequence[Sequence[float] | None] | None = None,
        capacity: Capacity | None = None,
        device: torch.device | str = "cpu",
    ) -> "VideoLayout":
        """Lay clips of (T, H, W) tokens one after the other.

        text: tokens of text of each clip (a joint layout), after its video or, with text_first, before it. known: per clip, which frames
        are known. first_frames: the index that a clip's first frame has for the masks (0), so that a chunk can attend to a cache of earlier
        frames. positions: per clip, the place of each frame on the time axis of the position embedding (first_frame, first_frame + 1, ...).
        Raises ValueError on a mismatch of lengths or an empty grid.
        """
        for name, values in (("text", text), ("known", known), ("first_frames", first_frames), ("positions", positions)):
            if values is not None and len(values) != len(grids):
                raise ValueError(f"{name}: expected one entry for each of {len(grids)} clips, got {len(values)}")
        clips, offset = [], 0
        for i, grid in enumerate(grids):
            grid = _check_grid(i, grid)
            video = grid[0] * grid[1] * grid[2]
            length = _check_length(f"text[{i}]", text[i]) if text is not None else 0
            first = _check_frame(f"first_frames[{i}]", first_frames[i]) if first_frames is not None else 0
            marks = _per_frame(f"known[{i}]", known[i] if known is not None else None, [False] * grid[0])
            places = _per_frame(f"positions[{i}]", positions[i] if positions is not None else None, range(first, first + grid[0]))
            clips.append(
                ClipSpan(
                    grid=grid,
                    video_start=offset + (length if text_first else 0),
                    text_start=offset + (0 if text_first else video),
                    text_length=length,
                    first_frame=first,
                    known=tuple(bool(mark) for mark in marks),
                    positions=tuple(float(place) for place in places),
                )
            )
            offset += video + length
        return cls(clips, capacity, device)

    @classmethod
    def segments(cls, lengths: Sequence[int], *, capacity: Capacity | None = None, device: torch.device | str = "cpu") -> "VideoLayout":
        """Text alone: one segment of `lengths[i]` tokens for clip i (0 is allowed), for cross-attention."""
        clips, offset = [], 0
        for i, length in enumerate(lengths):
            length = _check_length(f"lengths[{i}]", length)
            clips.append(ClipSpan((0, 0, 0), offset + length, offset, length, 0, (), ()))
            offset += length
        return cls(clips, capacity, device)

    def __repr__(self) -> str:
        parts = [f"{'x'.join(map(str, c.grid))}" + (f"+{c.text_length} text" if c.text_length else "") for c in self.clips]
        return f"VideoLayout({', '.join(parts)}; {self.tokens} tokens on {self.device})"

    def to(self, device: torch.device | str) -> "VideoLayout":
        """The same layout for another device (itself if it is there already)."""
        return self if _indexed(device) == self.device else VideoLayout(self.clips, self.capacity, device)

    def __reduce__(self):  # a copy is another layout, with a handle of its own, and so is one that comes from another process
        return VideoLayout, (self.clips, self.capacity, self.device)

    def refill(self, other: "VideoLayout") -> None:
        """Hold the clips of `other` instead, a layout of the same capacity. Every tensor of this layout, and every table that an op has
        derived from it, is written anew in place: a captured CUDA graph that reads them replays with the new lengths. Where layouts serve
        an op together (kv_layout), refill them all before the replay. Raises ValueError if one has no capacity or they differ.
        """
        if self.capacity is None or other.capacity != self.capacity:
            raise ValueError(f"other: expected a layout of this one's capacity, which must be given, {self.capacity}, got {other.capacity}")
        self._place(other.clips)
        self.cache.clear()
        self._derive_again(lambda partner: True)
        for dependent in self._dependents:
            dependent._derive_again(lambda partner: partner is self)

    def _derive_again(self, concerned: Callable[["VideoLayout | None"], bool]) -> None:
        for build, partner, value in self._derived.values():
            if concerned(partner):
                for old, new in zip(_tensors(value), _tensors(_build(build, self, partner)), strict=True):
                    old.copy_(new)

    def table(self, key: Any, build: Callable, partner: "VideoLayout | None" = None) -> Any:
        """What `build(layout)`, or with a partner `build(layout, partner)`, gives: tensors on the device, alone, in tuples or in dicts.
        Built once, and by `refill` again into the same tensors; so with a capacity their shapes may depend on that alone. `build` must not
        hold the layout, which it would keep alive.
        """
        if partner is not None and partner is not self:
            key = key, partner.handle if partner.capacity else partner.clips
            partner._dependents.add(self)
        if key not in self._derived:
            self._derived[key] = build, None if partner is self else partner, _build(build, self, partner)
        return self._derived[key][2]

    @property
    def _tables(self) -> _Tables:
        return self.table("tables", VideoLayout._build_tables)

    def _build_tables(self) -> _Tables:
        clips, frames = (self.capacity.clips, self.capacity.frames) if self.capacity else (self.num_clips, self.num_frames)

        def table(values: list, size: int, fill) -> torch.Tensor:
            return to_device(torch.tensor(values + [fill] * (size - len(values)), dtype=torch.int32), self.device)

        known = table([int(mark) for clip in self.clips for mark in clip.known], frames, 0)
        starts = [clip.video_start + t * clip.frame_tokens for clip in self.clips for t in range(clip.frames)]
        return _Tables(
            clip_offsets=table([0] + [clip.stop for clip in self.clips], clips + 1, self.used_tokens),
            clip_grids=table([list(clip.grid) for clip in self.clips], clips, [0, 0, 0]),
            frame_starts=table(starts, frames, self.used_tokens),
            frame_lengths=table([clip.frame_tokens for clip in self.clips for _ in range(clip.frames)], frames, 0),
            frame_clips=table([i for i, clip in enumerate(self.clips) for _ in range(clip.frames)], frames, -1),
            frame_known=known.bool(),
        )

    @property
    def clip_offsets(self) -> torch.Tensor:
        return self._tables.clip_offsets

    @property
    def clip_grids(self) -> torch.Tensor:
        return self._tables.clip_grids

    @property
    def frame_starts(self) -> torch.Tensor:
        return self._tables.frame_starts

    @property
    def frame_lengths(self) -> torch.Tensor:
        return self._tables.frame_lengths

    @property
    def frame_clips(self) -> torch.Tensor:
        return self._tables.frame_clips

    @property
    def frame_known(self) -> torch.Tensor:
        return self._tables.frame_known

    @property
    def coordinates(self) -> Coordinates:
        """Where each token lies: int32 and bool tensors (tokens,). `t` counts from the clip's first_frame."""
        return self.table("coordinates", VideoLayout._build_coordinates)

    def _build_coordinates(self) -> Coordinates:
        fields = {name: torch.zeros(self.tokens, dtype=torch.int32) for name in ("t", "h", "w")}
        clip_of = torch.full((self.tokens,), -1, dtype=torch.int32)
        text = torch.zeros(self.tokens, dtype=torch.bool)
        known = torch.zeros(self.tokens, dtype=torch.bool)
        for i, clip in enumerate(self.clips):
            clip_of[clip.start : clip.stop] = i
            text[clip.text_start : clip.text_stop] = True
            span = slice(clip.video_start, clip.video_stop)
            axes = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in clip.grid), indexing="ij")
            for name, axis in zip(("t", "h", "w"), axes, strict=True):
                fields[name][span] = axis.flatten()
            fields["t"][span] += clip.first_frame
            known[span] = torch.tensor(clip.known, dtype=torch.bool).repeat_interleave(clip.frame_tokens)
        return Coordinates(*(to_device(x, self.device) for x in (clip_of, fields["t"], fields["h"], fields["w"], text, known)))

    @property
    def positions(self) -> torch.Tensor:
        """(tokens, 3) float32: the place of each token on the axes (t, h, w) of a position embedding; 0 for text."""
        return self.table("positions", VideoLayout._build_positions)

    def _build_positions(self) -> torch.Tensor:
        where = self.coordinates
        table = torch.stack((where.t, where.h, where.w), dim=-1).to(torch.float32)
        for clip in self.clips:
            places = to_device(torch.tensor(clip.positions, dtype=torch.float32), self.device)
            table[clip.video_start : clip.video_stop, 0] = places.repeat_interleave(clip.frame_tokens)
        return table

    def rows(self, per: str = "frame") -> torch.Tensor:
        """The modulation row of each token, int32 (tokens,): one row per "clip", or one per "frame" counted over the pack.

        With "frame", the text of clip i in a joint layout has row num_frames + i. Tokens past the end of the pack have row 0.
        """
        if per not in ("clip", "frame"):
            raise ValueError(f"per: expected 'clip' or 'frame', got {per!r}")
        return self.table(("rows", per), VideoLayout._build_clip_rows if per == "clip" else VideoLayout._build_frame_rows)

    def _build_clip_rows(self) -> torch.Tensor:
        table = torch.zeros(self.tokens, dtype=torch.int32)
        for i, clip in enumerate(self.clips):
            table[clip.start : clip.stop] = i
        return to_device(table, self.device)

    def _build_frame_rows(self) -> torch.Tensor:
        table = torch.zeros(self.tokens, dtype=torch.int32)
        frame = 0
        for i, clip in enumerate(self.clips):
            video = torch.arange(frame, frame + clip.frames, dtype=torch.int32)
            table[clip.video_start : clip.video_stop] = video.repeat_interleave(clip.frame_tokens)
            table[clip.text_start : clip.text_stop] = self.num_frames + i
            frame += clip.frames
        return to_device(table, self.device)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a host's table on the device, which the host does not wait for. Raises RuntimeError while a CUDA graph is captured: each
    replay would write what the table holds now.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():  # which cannot trace what pins memory
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("layout: its tables are made by the first call with it, which cannot be captured: call once before the capture")
    return x.pin_memory().to(device, non_blocking=True)


def _indexed(device: torch.device | str) -> torch.device:
    """With the number of the GPU, as a tensor's device has it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _build(build: Callable, layout: VideoLayout, partner: VideoLayout | None) -> Any:
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be written again outside of it
        return build(layout) if partner is None or partner is layout else build(layout, partner)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
        return
    for branch in tree.values() if isinstance(tree, dict) else tree:
        yield from _tensors(branch)


def _check_grid(i: int, grid) -> tuple[int, int, int]:
    if len(grid) != 3 or any(int(n) != n or n < 1 for n in grid):
        raise ValueError(f"grids[{i}]: expected three integers >= 1 (T, H, W), got {tuple(grid)}")
    return tuple(int(n) for n in grid)


def _check_length(name: str, length) -> int:
    if int(length) != length or length < 0:
        raise ValueError(f"{name}: expected a number of tokens >= 0, got {length!r}")
    return int(length)


def _check_frame(name: str, frame) -> int:
    if int(frame) != frame:
        raise ValueError(f"{name}: expected a whole number, got {frame!r}")
    return int(frame)


def _per_frame(name: str, values, default) -> list:
    values = list(default if values is None else values)
    if len(values) != len(default):
        raise ValueError(f"{name}: expected one entry for each of {len(default)} frames, got {len(values)}")
    return values
