"""Clips to tokens and back: the definitions in float64, and plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import VideoLayout
from ..norms import Modulation, modulated_norm

Patch = tuple[int, int, int]
Positions = Tensor | Sequence[Tensor] | None


def grid_of(clip: Tensor, patch: Patch) -> Patch:
    """The (T, H, W) grid of tokens of a clip (channels, T, H, W)."""
    return tuple(-(-side // p) for side, p in zip(clip.shape[1:], patch, strict=True))


def patches(clip: Tensor, patch: Patch) -> Tensor:
    """Those of one clip, (tokens, channels * pt * ph * pw); a side that the patch does not divide is filled up with zeros."""
    grid = grid_of(clip, patch)
    fill = [n * p - side for n, p, side in zip(grid, patch, clip.shape[1:], strict=True)]
    if any(fill):
        clip = F.pad(clip, (0, fill[2], 0, fill[1], 0, fill[0]))
    x = clip.reshape(clip.shape[0], grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(grid[0] * grid[1] * grid[2], -1)


def from_patches(tokens: Tensor, grid: Patch, channels: int, patch: Patch, size: Patch | None) -> Tensor:
    """One clip (channels, T, H, W), cut off to its size if that is given."""
    x = tokens.view(*grid, channels, *patch).permute(3, 0, 4, 1, 5, 2, 6)
    x = x.reshape(channels, *(n * p for n, p in zip(grid, patch, strict=True)))
    return x if size is None else x[:, : size[0], : size[1], : size[2]]


def video_rows(layout: VideoLayout) -> Tensor:
    """Which tokens are of a clip's video, bool (tokens,)."""
    return (layout.coordinates.clip >= 0) & ~layout.coordinates.text


def without_gaps(layout: VideoLayout | None) -> bool:
    """Whether all tokens are video, whatever the layout will be refilled with."""
    return layout is None or (layout.capacity is None and not any(clip.text_length for clip in layout.clips))


def check_layout(clips: Sequence[Tensor] | None, layout: VideoLayout, patch: Sequence[int], positions) -> None:
    """What needs a look at the layout's clips, so that a graph compiled for one serves the next. Raises ValueError on a mismatch."""
    if clips is not None:
        grids = [grid_of(clip, patch) for clip in clips]
        if grids != [clip.grid for clip in layout.clips]:
            raise ValueError(f"layout: expected the grids of the clips, {grids}, got {[clip.grid for clip in layout.clips]}")
    if positions is not None and not isinstance(positions, Tensor) and len(positions) == 3:
        sides = positions[1].shape[0], positions[2].shape[0]
        for clip in layout.clips:
            if clip.grid[1] > sides[0] or clip.grid[2] > sides[1]:
                raise ValueError(f"layout: expected sides of at most {sides} tokens, as the tables of positions, got a clip of {clip.grid}")


def patch_embed_torch(
    source: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    patch: Patch,
    positions: Positions,
    layout: VideoLayout | None,
    known: Tensor | None,
    known_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A library's product; what is added to it is summed in float32, and rounded once."""
    x = source if isinstance(source, Tensor) else pack_pieces([patches(clip, patch) for clip in source], layout)
    out = _linear(x.to(weight.dtype), weight, bias)
    return _finish(out, torch.promote_types(dtype, torch.float32), positions, layout, known, known_weight, dtype)


def patch_embed_reference(source, weight, bias, patch, positions, layout, known, known_weight, dtype):
    """The definition, in float64: a Conv3d whose stride is its kernel."""
    weight = weight.double()
    if isinstance(source, Tensor):
        out = source.double() @ weight.T
    else:
        out = []
        for clip in source:
            fill = [-side % p for side, p in zip(clip.shape[1:], patch, strict=True)]
            padded = F.pad(clip.double(), (0, fill[2], 0, fill[1], 0, fill[0]))
            kernel = weight.view(weight.shape[0], clip.shape[0], *patch)
            out.append(F.conv3d(padded[None], kernel, stride=patch)[0].flatten(1).T)
        out = pack_pieces(out, layout)
    out = out if bias is None else out + bias.double()
    return _finish(out, torch.float64, positions, layout, known, known_weight, dtype)


def pack_pieces(pieces: list[Tensor], layout: VideoLayout | None) -> Tensor:
    """One after the other, or where the layout says, with zeros between them."""
    if layout is None:
        return torch.cat(pieces)
    parts, end = [], 0
    for piece, clip in zip(pieces, layout.clips, strict=True):
        parts += [piece.new_zeros(clip.video_start - end, piece.shape[1]), piece]
        end = clip.video_stop
    return torch.cat([*parts, pieces[0].new_zeros(layout.tokens - end, pieces[0].shape[1])])


def _finish(out, wide, positions, layout, known, known_weight, dtype):
    """What is added to the product, in the dtype `wide`."""
    if isinstance(positions, Tensor):
        out = out.to(wide) + positions.to(wide)
    elif positions is not None:
        places = layout.positions.long()
        for axis, table in enumerate(positions):
            # Of the table in float32, so that its gradient is summed in it.
            out = out.to(wide) + table.to(wide)[places[:, axis].clamp(0, table.shape[0] - 1)]
    if known is not None:
        out = out.to(wide) + known[:, None] * known_weight.to(wide)
    if not without_gaps(layout):
        out = torch.where(layout.table("video rows", video_rows)[:, None], out, 0)
    return out.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A library's product, which takes a bias of the weight's dtype alone."""
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def final_layer_torch(tokens: Tensor, weight: Tensor, bias: Tensor | None, norm: Modulation | None, rows: Tensor | None) -> Tensor:
    """A library's product, of the norm rounded to the weight's dtype."""
    return _linear(_normed(tokens, norm, rows, "torch").to(weight.dtype), weight, bias)


def final_layer_reference(tokens, weight, bias, norm, rows):
    """The definition, in float64."""
    if norm is not None:
        norm = Modulation(*(x.double() if isinstance(x, Tensor) else x for x in norm))
    out = _normed(tokens.double(), norm, rows, "reference") @ weight.double().T
    return (out if bias is None else out + bias.double()).to(weight.dtype)


def _normed(tokens, norm, rows, implementation):
    if norm is None:
        return tokens
    shift, scale, kind, weight, bias, eps = norm
    return modulated_norm(tokens, shift, scale, rows, kind=kind, weight=weight, bias=bias, eps=eps, implementation=implementation)
