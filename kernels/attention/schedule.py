"""The tables from which the block kernel reads where clips lie, and in which order its tiles run.

A tile is BLOCK neighbouring tokens of one sequence: of a clip's video, of its text, or, for masks of one site, of one site's frames. Tiles
begin where their clip begins, so what a clip gives does not depend on what it is packed with. They run in the order of their work, the
largest first (Graham 1969), which keeps the GPU busy to the end when long and short clips share a pack.
"""

from functools import partial
from typing import NamedTuple

import torch

from ..layout import ClipSpan, VideoLayout, to_device
from ..masks import Mask

VIDEO, TEXT = -1, -2
ROWS = (64, 128)
"""Of tiles of whole sites; a clip takes the smallest that it fits."""


class Clips(NamedTuple):
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
        return layout.table("clips", cls._build)

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
        return cls(*(to_device(torch.tensor(values, dtype=torch.int32), layout.device) for values in (spans, known, runs, offsets)))


def tiles(layout: VideoLayout, block: int, mask: Mask, other: VideoLayout, *, of_keys: bool = False, longer_than: int = 0) -> torch.Tensor:
    """int32 (tiles, 3) on the layout's device: clip (-1 past the end), first row, and site, or VIDEO or TEXT.

    The tiles are of queries, and `other` is where the keys lie, or with `of_keys` the other way round. longer_than: not those of
    frames of clips that `site_tiles` of so many rows, and of fewer, have. Built once for its arguments.
    """
    return layout.table(("tiles", block, mask, of_keys, longer_than), partial(_tiles, block, mask, of_keys, longer_than), other)


def _tiles(block: int, mask: Mask, of_keys: bool, longer_than: int, layout: VideoLayout, other: VideoLayout | None = None) -> torch.Tensor:
    table, size = _order(layout, block, mask, other or layout, of_keys, longer_than), None
    if layout.capacity:
        tokens, clips = layout.capacity.tokens, layout.capacity.clips
        if not mask.same_site:  # of text and of video each clip may have one partial tile
            size = tokens // block + 2 * clips
        elif longer_than and other is None:  # of each site of more frames, and of text
            size = tokens // block + tokens // (longer_than + 1) + clips + 1
        else:  # no tile need be full
            size = tokens
    return _padded(table, size, layout)


def _padded(table: torch.Tensor, size: int | None, layout: VideoLayout) -> torch.Tensor:
    if size is not None:
        table = torch.cat((table, torch.full((size - len(table), table.shape[1]), -1, dtype=torch.int32)))
    return to_device(table, layout.device)


def site_tiles(layout: VideoLayout, rows: int, kv_layout: VideoLayout) -> torch.Tensor:
    """int32 (tiles, 2) on the layout's device: clip (-1 past the end) and the first of rows // T sites, T the frames of its queries or of
    its keys, of those clips whose T is at most `rows` and above the smaller of ROWS. Built once for its arguments.
    """
    return layout.table(("site tiles", rows), partial(_site_tiles, rows), kv_layout)


def _site_tiles(rows: int, layout: VideoLayout, kv_layout: VideoLayout | None = None) -> torch.Tensor:
    parts, size = [torch.zeros(0, 2, dtype=torch.int32)], None
    for i, (clip, partner) in enumerate(zip(layout.clips, (kv_layout or layout).clips, strict=False)):
        longest = max(clip.frames, partner.frames)
        if is_short(clip, partner, rows) and rows == min(each for each in ROWS if longest <= each):
            sites = torch.arange(0, clip.frame_tokens, rows // longest, dtype=torch.int32)
            parts.append(torch.stack((torch.full_like(sites, i), sites), dim=1))
    if layout.capacity:
        tokens, clips = layout.capacity.tokens, layout.capacity.clips
        # Of a clip's tiles all but the last are more than half full, if it is not for the partner's frames.
        size = tokens if kv_layout else tokens // (rows // 2 + 1) + clips
    return _padded(torch.cat(parts), size, layout)


def is_short(clip: ClipSpan, partner: ClipSpan, rows: int) -> bool:
    """Whether a clip's frames, at each site, and those of its partner fit a tile of so many rows."""
    return min(clip.frames, partner.frames) >= 1 and max(clip.frames, partner.frames) <= rows


def _order(layout: VideoLayout, block: int, mask: Mask, other: VideoLayout, of_keys: bool, longer_than: int = 0) -> torch.Tensor:
    parts, work = [torch.zeros(0, 3, dtype=torch.int32)], [torch.zeros(0, dtype=torch.int64)]
    for i, (clip, partner) in enumerate(zip(layout.clips, other.clips, strict=False)):  # one may yet have to be refilled
        everything = partner.frames * partner.frame_tokens + partner.text_length
        if mask.same_site:
            sites = torch.arange(0 if is_short(clip, partner, longer_than) else clip.frame_tokens)
            length, frame, seen_tokens = clip.frames, 1, 1
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


def visible_pairs(layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> int:
    """How many pairs of a query and a key see each other."""
    pairs = 0
    for clip, partner in zip(layout.clips, kv_layout.clips, strict=True):
        keys = 1 if mask.same_site else partner.frame_tokens
        video = int(_seen(clip, partner, mask, of_keys=False).sum()) * clip.frame_tokens * keys
        everything = partner.frames * partner.frame_tokens + partner.text_length
        pairs += video + clip.frames * clip.frame_tokens * partner.text_length + clip.text_length * everything
    return pairs


def _runs(known: tuple[bool, ...]) -> list[tuple[int, int]]:
    edges = [i for i, (a, b) in enumerate(zip((False, *known), (*known, False), strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


OPEN, ENDING, RULED, HIDDEN = 0, 1, 2, 3
"""How the mask bears on a stretch of keys: every query of the tile sees it; a query sees it as far as its window reaches (a sink, which
some queries have left behind while others come too early for it); a query sees of it what lies in its window; no query sees it.
"""


def key_blocks(layout: VideoLayout, block_m: int, block_n: int, mask: Mask, kv_layout: VideoLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tiles of `tiles(layout, block_m, mask, kv_layout)` see, on their device; not for masks of one site.

    int32 spans (tiles, 2): which of the blocks are a tile's, [begin, end); tiles that see the same share them. int32 blocks (n, 3): the
    first of block_n rows, the end of the stretch that they belong to, from which on they do not count, both on the token axis of the keys,
    and OPEN, ENDING or RULED. A stretch begins with a block and lies in one clip, so what a clip gives does not depend on what it is packed
    with. Built once for its arguments.
    """
    return layout.table(("key blocks", block_m, block_n, mask), partial(_key_blocks, block_m, block_n, mask), kv_layout)


def _key_blocks(
    block_m: int, block_n: int, mask: Mask, layout: VideoLayout, kv_layout: VideoLayout | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_layout = kv_layout or layout
    table = _order(layout, block_m, mask, kv_layout, of_keys=False)
    list_of_tile, lists, parts = torch.zeros(len(table), dtype=torch.int64), 0, [torch.zeros(4, 0, dtype=torch.int64)]
    for i, (clip, partner) in enumerate(zip(layout.clips, kv_layout.clips, strict=False)):
        mine = table[:, 0] == i
        kinds, edges = _kinds(clip, partner, mask, table[mine], block_m)
        kinds, which = kinds.unique(dim=0, return_inverse=True)
        list_of_tile[mine] = lists + which
        parts.append(_stretches(kinds, edges, lists))
        lists += len(kinds)
    list_of_stretch, start, stop, kind = torch.cat(parts, dim=1)
    counts = (stop - start + block_n - 1) // block_n
    stretch = torch.arange(len(counts)).repeat_interleave(counts)
    nth = torch.arange(len(stretch)) - (counts.cumsum(0) - counts)[stretch]
    found = torch.stack((start[stretch] + block_n * nth, stop[stretch], kind[stretch]), dim=1)
    lengths = torch.zeros(lists, dtype=torch.int64).index_add(0, list_of_stretch, counts)
    ends = lengths.cumsum(0)
    spans = torch.zeros(len(tiles(layout, block_m, mask, kv_layout)), 2, dtype=torch.int32)
    spans[: len(table)] = torch.stack((ends - lengths, ends), dim=1)[list_of_tile]
    blocks = torch.zeros(_most_blocks(len(found), len(spans), block_n, mask, layout, kv_layout), 3, dtype=torch.int32)
    blocks[: len(found)] = found
    return to_device(spans, layout.device), to_device(blocks, layout.device)


def _most_blocks(found: int, tiles: int, block: int, mask: Mask, layout: VideoLayout, kv_layout: VideoLayout) -> int:
    """A number of blocks that is enough for every pack of the capacities; without any, those that were found."""
    if not layout.capacity and not kv_layout.capacity:
        return max(found, 1)
    clips, frames = (layout.capacity.clips, layout.capacity.frames) if layout.capacity else (layout.num_clips, layout.num_frames)
    kv_frames = kv_layout.capacity.frames if kv_layout.capacity else kv_layout.num_frames
    whole, rule = kv_layout.tokens // block, mask.as_rule()
    if not rule.causal and not rule.window:  # a list for each clip, of one stretch
        return max(whole + clips, 1)
    # Tiles inside a frame share a list, tiles across an edge of frames have it to themselves, and so has text. Each frame may be a stretch.
    return max(min(tiles, 2 * frames + clips) * (whole + kv_frames + 1), 1)


def _kinds(clip: ClipSpan, partner: ClipSpan, mask: Mask, tiles: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the partner's frames and its text, as they follow each other, are to a clip's tiles of `block` rows: kinds (tiles, parts). And
    where these parts lie: tokens (parts + 1,).
    """
    t = torch.arange(clip.frames)[:, None] + clip.first_frame
    u = torch.arange(partner.frames)[None, :] + partner.first_frame
    seen = mask.rule(t, u, torch.tensor(partner.known, dtype=torch.bool)[None, :])
    by_earlier = torch.nn.functional.pad(seen.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    length, frame, of_text = clip.frames * clip.frame_tokens, max(clip.frame_tokens, 1), tiles[:, 2] == TEXT
    start = torch.where(of_text, 0, tiles[:, 1] // frame)
    stop = torch.where(of_text, 0, ((tiles[:, 1] + block).clamp(max=length) + frame - 1) // frame)  # text is in no frame, and sees them all
    seeing, sink = by_earlier[stop] - by_earlier[start], mask.as_rule().sink
    kinds = torch.where((u < sink) & (sink > 0), ENDING, RULED).where(seeing > 0, HIDDEN).where(seeing < (stop - start)[:, None], OPEN)
    tokens = partner.video_start + partner.frame_tokens * torch.arange(partner.frames + 1)
    text_first = partner.text_stop <= partner.video_start
    kinds = torch.nn.functional.pad(kinds, (1, 0) if text_first else (0, 1), value=OPEN)
    ends = torch.tensor([partner.text_start]), tokens, torch.tensor([partner.text_stop])
    return kinds, torch.cat(ends[:2] if text_first else ends[1:])


def _stretches(kinds: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Neighbouring parts of one kind, unless they are hidden, as rows list (counted from `first`), first token, past the last one, kind."""
    kinds = torch.nn.functional.pad(kinds, (1, 1), value=HIDDEN)
    row, edge = (kinds[:, 1:] != kinds[:, :-1]).nonzero().unbind(1)
    kind = kinds[row, edge + 1]
    return torch.stack((first + row, tokens[edge], tokens[edge].roll(-1), kind))[:, kind != HIDDEN]  # the last of each list is hidden
