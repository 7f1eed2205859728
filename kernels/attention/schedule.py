"""The tables from which the block kernel reads where clips lie, and in which order its tiles run.

A tile is BLOCK neighbouring tokens of one sequence: of a clip's video, of its text, or, for masks of one site, of one site's frames. Tiles
begin where their clip begins, so what a clip gives does not depend on what it is packed with. They run in the order of their work, the
largest first (Graham 1969), which keeps the GPU busy to the end when long and short clips share a pack.
"""

from dataclasses import dataclass

import torch

from ..layout import ClipSpan, VideoLayout
from ..masks import Mask

VIDEO, TEXT = -1, -2


@dataclass(frozen=True)
class Clips:
    """int32 tables of a layout; those over frames have a row for each frame of the pack (or of its capacity).

    spans: (clips, 7), of each clip video_start, frames, frame_tokens, text_start, text_length, first_frame, and the row of its first frame.
    known: (frames,), 1 where a frame is known. runs: (frames, 2), the stretches [start, stop) of neighbouring known frames, counted within
    their clip; run_offsets: (clips + 1,), where those of each clip begin.
    """

    spans: torch.Tensor
    known: torch.Tensor
    runs: torch.Tensor
    run_offsets: torch.Tensor

    @classmethod
    def of(cls, layout: VideoLayout) -> "Clips":
        """Built once for a layout."""
        if "clips" not in layout.cache:
            layout.cache["clips"] = cls._build(layout)
        return layout.cache["clips"]

    @classmethod
    def _build(cls, layout: VideoLayout) -> "Clips":
        capacity = layout.capacity
        clips, frames = (capacity.clips, capacity.frames) if capacity else (layout.num_clips, layout.num_frames)
        spans, known, runs, offsets = [], [], [], [0]
        for clip in layout.clips:
            spans.append(
                (clip.video_start, clip.frames, clip.frame_tokens, clip.text_start, clip.text_length, clip.first_frame, len(known))
            )
            known += clip.known
            runs += _runs(clip.known)
            offsets.append(len(runs))
        spans += [(0,) * 7] * (clips - len(spans))
        known += [False] * (max(frames, 1) - len(known))  # a table of a pack without video is not empty: kernels take its address
        runs += [(0, 0)] * (max(frames, 1) - len(runs))
        offsets += offsets[-1:] * (clips + 1 - len(offsets))
        return cls(*(torch.tensor(values, dtype=torch.int32, device=layout.device) for values in (spans, known, runs, offsets)))


def tiles(layout: VideoLayout, block: int, mask: Mask, other: VideoLayout, *, of_keys: bool = False) -> torch.Tensor:
    """int32 (tiles, 3) on the layout's device: clip (-1 past the end), first row, and site, or VIDEO or TEXT.

    The tiles are of queries, and `other` is where the keys lie, or with `of_keys` the other way round. Built once for its arguments.
    """
    key = ("tiles", block, mask, of_keys, None if other is layout else other.clips)
    if key not in layout.cache:
        table = _order(layout, block, mask, other, of_keys)
        size = len(table)
        if layout.capacity:  # of text and of video each clip may have one partial tile, of single sites no tile need be full
            size = layout.capacity.tokens if mask.same_site else layout.capacity.tokens // block + 2 * layout.capacity.clips
        padded = torch.full((max(size, 1), 3), -1, dtype=torch.int32)
        padded[: len(table)] = table
        layout.cache[key] = padded.to(layout.device)
    return layout.cache[key]


def _order(layout: VideoLayout, block: int, mask: Mask, other: VideoLayout, of_keys: bool) -> torch.Tensor:
    parts, work = [torch.zeros(0, 3, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
    for i, (clip, partner) in enumerate(zip(layout.clips, other.clips, strict=True)):
        everything = partner.frames * partner.frame_tokens + partner.text_length
        if mask.same_site:
            sites, length, frame, seen_tokens = torch.arange(clip.frame_tokens), clip.frames, 1, 1
        else:
            sites, length, frame, seen_tokens = (
                torch.tensor([VIDEO]),
                clip.frames * clip.frame_tokens,
                clip.frame_tokens,
                partner.frame_tokens,
            )
        frames = torch.arange(0, length, block) // max(frame, 1)
        work.append((_seen(clip, partner, mask, of_keys)[frames] * seen_tokens + partner.text_length).repeat(len(sites)))
        parts.append(_tiles_of(i, torch.arange(0, length, block), sites))
        parts.append(_tiles_of(i, torch.arange(0, clip.text_length, block), torch.tensor([TEXT])))
        work.append(torch.full((len(parts[-1]),), everything))
    return torch.cat(parts)[torch.cat(work).argsort(descending=True, stable=True)]


def _tiles_of(clip: int, rows: torch.Tensor, sites: torch.Tensor) -> torch.Tensor:
    site, row = sites.repeat_interleave(len(rows)), rows.repeat(len(sites))
    return torch.stack((torch.full_like(row, clip), row, site), dim=1).int()


def _seen(clip: ClipSpan, partner: ClipSpan, mask: Mask, of_keys: bool) -> torch.Tensor:
    """How many frames of the partner each frame of the clip sees or, with of_keys, is seen by."""
    queries, keys = (partner, clip) if of_keys else (clip, partner)
    t = torch.arange(queries.frames)[:, None] + queries.first_frame
    u = torch.arange(keys.frames)[None, :] + keys.first_frame
    return mask.rule(t, u, torch.tensor(keys.known, dtype=torch.bool)[None, :]).sum(dim=0 if of_keys else 1)


def _runs(known: tuple[bool, ...]) -> list[tuple[int, int]]:
    edges = [i for i, (a, b) in enumerate(zip((False, *known), (*known, False), strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
