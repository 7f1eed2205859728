"""Where each clip and frame of a pack lies.

A pack holds the tokens of several clips of any sizes on one token axis, with no padding between them (NaViT, Dehghani et al. 2023). A
clip's video tokens lie in (t, h, w) order; in a joint layout its text tokens lie before or after them. The layout is planned on the host
from the grids and read by kernels from small int32 tensors on the device; with a fixed capacity those tensors keep their size whatever the
pack holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


class VideoLayout:
    """The table of a pack. Build it with `VideoLayout.pack` or, for text alone, `VideoLayout.segments`.

    Host side: `clips` (a tuple of ClipSpan), `tokens` (length of the token axis), `used_tokens` (without the unused end of a capacity),
    `num_clips`, `num_frames`. Device side, int32, of capacity size where one is given, offsets past the end repeating the last one:
    `clip_offsets` (clips + 1,), `clip_grids` (clips, 3), `frame_starts` (frames,), `frame_lengths` (frames,), `frame_clips` (frames,); and
    `frame_known` (frames,) bool.
    """

    def __init__(self, clips: Sequence[ClipSpan], capacity: Capacity | None, device: torch.device | str):
        self.clips = tuple(clips)
        self.capacity = capacity
        self.device = torch.device(device)
        self.num_clips = len(self.clips)
        self.num_frames = sum(clip.frames for clip in self.clips)
        self.used_tokens = self.clips[-1].stop if self.clips else 0
        self.tokens = capacity.tokens if capacity else self.used_tokens
        self.cache: dict = {}  # schedules and tables that ops derive from this layout; they live and die with it
        if capacity:
            for name, used, most in (
                ("clips", self.num_clips, capacity.clips),
                ("frames", self.num_frames, capacity.frames),
                ("tokens", self.used_tokens, capacity.tokens),
            ):
                if used > most:
                    raise ValueError(f"capacity: the pack has {used} {name}, the capacity is {most}")

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
        return self if torch.device(device) == self.device else VideoLayout(self.clips, self.capacity, device)

    def _cached(self, name, build):
        if name not in self.cache:
            self.cache[name] = build()
        return self.cache[name]

    def _table(self, name: str, values: list, size: int | None, fill) -> torch.Tensor:
        if size is not None:
            values = values + [fill] * (size - len(values))
        return self._cached(name, lambda: torch.tensor(values, dtype=torch.int32, device=self.device))

    @property
    def clip_offsets(self) -> torch.Tensor:
        values = [0] + [clip.stop for clip in self.clips]
        return self._table("clip_offsets", values, self.capacity and self.capacity.clips + 1, self.used_tokens)

    @property
    def clip_grids(self) -> torch.Tensor:
        return self._table("clip_grids", [list(clip.grid) for clip in self.clips], self.capacity and self.capacity.clips, [0, 0, 0])

    @property
    def frame_starts(self) -> torch.Tensor:
        values = [clip.video_start + t * clip.frame_tokens for clip in self.clips for t in range(clip.frames)]
        return self._table("frame_starts", values, self.capacity and self.capacity.frames, self.used_tokens)

    @property
    def frame_lengths(self) -> torch.Tensor:
        values = [clip.frame_tokens for clip in self.clips for _ in range(clip.frames)]
        return self._table("frame_lengths", values, self.capacity and self.capacity.frames, 0)

    @property
    def frame_clips(self) -> torch.Tensor:
        values = [i for i, clip in enumerate(self.clips) for _ in range(clip.frames)]
        return self._table("frame_clips", values, self.capacity and self.capacity.frames, -1)

    @property
    def frame_known(self) -> torch.Tensor:
        values = [int(mark) for clip in self.clips for mark in clip.known]
        return self._cached(
            "frame_known_bool", lambda: self._table("frame_known", values, self.capacity and self.capacity.frames, 0).bool()
        )

    @property
    def coordinates(self) -> Coordinates:
        """Where each token lies: int32 and bool tensors (tokens,). `t` counts from the clip's first_frame."""
        return self._cached("coordinates", self._build_coordinates)

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
        return Coordinates(*(x.to(self.device) for x in (clip_of, fields["t"], fields["h"], fields["w"], text, known)))

    @property
    def positions(self) -> torch.Tensor:
        """(tokens, 3) float32: the place of each token on the axes (t, h, w) of a position embedding; 0 for text."""
        return self._cached("positions", self._build_positions)

    def _build_positions(self) -> torch.Tensor:
        where = self.coordinates
        table = torch.stack((where.t, where.h, where.w), dim=-1).to(torch.float32)
        for clip in self.clips:
            places = torch.tensor(clip.positions, dtype=torch.float32, device=self.device)
            table[clip.video_start : clip.video_stop, 0] = places.repeat_interleave(clip.frame_tokens)
        return table

    def rows(self, per: str = "frame") -> torch.Tensor:
        """The modulation row of each token, int32 (tokens,): one row per "clip", or one per "frame" counted over the pack.

        With "frame", the text of clip i in a joint layout has row num_frames + i. Tokens past the end of the pack have row 0.
        """
        if per not in ("clip", "frame"):
            raise ValueError(f"per: expected 'clip' or 'frame', got {per!r}")
        return self._cached(("rows", per), lambda: self._build_rows(per))

    def _build_rows(self, per: str) -> torch.Tensor:
        table = torch.zeros(self.tokens, dtype=torch.int32)
        frame = 0
        for i, clip in enumerate(self.clips):
            if per == "clip":
                table[clip.start : clip.stop] = i
                continue
            video = torch.arange(frame, frame + clip.frames, dtype=torch.int32)
            table[clip.video_start : clip.video_stop] = video.repeat_interleave(clip.frame_tokens)
            table[clip.text_start : clip.text_stop] = self.num_frames + i
            frame += clip.frames
        return table.to(self.device)


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
