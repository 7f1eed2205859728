"""Patches of clips to tokens and back: the first and the last layer of a video transformer.

    patch_embed:  token[t, h, w] = weight @ flatten(x[:, t*pt:(t+1)*pt, h*ph:(h+1)*ph, w*pw:(w+1)*pw]) + bias

Clips of any sizes go into one pack. A side that the patch does not divide is filled up with zeros at its end, and cut off again by
`unpatchify`. FLOPs: 2 * tokens * patch elements * dim. Bytes: the clips, the weight and the tokens once each; the patches themselves need
never be written.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import select
from .layout import VideoLayout

_PENDING = {"triton": "this op has no Triton kernel yet", "gluon": "this op has no Gluon kernel"}


def grid_of(clip: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The (T, H, W) grid of tokens of a clip (channels, T, H, W)."""
    return tuple(-(-side // p) for side, p in zip(clip.shape[1:], patch, strict=True))


def patchify(clips: Sequence[Tensor], patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """Clips (channels, T, H, W), each of its own size, to (tokens, channels * pt * ph * pw), channels slowest.

    Raises ValueError on a mismatch.
    """
    _check_clips(clips, patch)
    return torch.cat([_patches(clip, patch) for clip in clips])


def unpatchify(
    tokens: Tensor,
    layout: VideoLayout,
    channels: int,
    patch: tuple[int, int, int] = (1, 2, 2),
    *,
    sizes: Sequence[tuple[int, int, int]] | None = None,
) -> list[Tensor]:
    """The inverse of `patchify`: tokens (tokens, channels * pt * ph * pw) to one (channels, T, H, W) a clip.

    sizes: the (T, H, W) of each clip before patching, if the patch does not divide them. Raises ValueError on a mismatch.
    """
    width = channels * patch[0] * patch[1] * patch[2]
    if tokens.shape != (layout.tokens, width):
        raise ValueError(
            f"tokens: expected ({layout.tokens}, {width}) for {channels} channels in patches of {patch}, got {tuple(tokens.shape)}"
        )
    if sizes is not None and len(sizes) != layout.num_clips:
        raise ValueError(f"sizes: expected one for each of {layout.num_clips} clips, got {len(sizes)}")
    clips = []
    for i, span in enumerate(layout.clips):
        x = tokens[span.video_start : span.video_stop].view(*span.grid, channels, *patch)
        x = x.permute(3, 0, 4, 1, 5, 2, 6).reshape(channels, *(n * p for n, p in zip(span.grid, patch, strict=True)))
        if sizes is not None:
            if len(sizes[i]) != 3 or tuple(-(-side // p) for side, p in zip(sizes[i], patch, strict=True)) != span.grid:
                raise ValueError(f"sizes[{i}]: expected a size whose grid is {span.grid}, got {tuple(sizes[i])}")
            x = x[:, : sizes[i][0], : sizes[i][1], : sizes[i][2]]
        clips.append(x)
    return clips


def patch_embed(
    clips: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: tuple[int, int, int] = (1, 2, 2),
    implementation: str = "auto",
) -> Tensor:
    """Clips (channels, T, H, W), each of its own size, to tokens (tokens, dim).

    weight: (dim, channels * pt * ph * pw), channels slowest, as a flattened Conv3d weight. bias: (dim,) or None. Raises ValueError on a
    mismatch.
    """
    _check_clips(clips, patch)
    width = clips[0].shape[0] * patch[0] * patch[1] * patch[2]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight: expected (dim, {width}) for {clips[0].shape[0]} channels in patches of {patch}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    run = select("patch_embed", implementation, {"torch": _patch_embed_torch, "reference": patch_embed_reference}, _PENDING)
    return run(clips, weight, bias, patch)


def _check_clips(clips: Sequence[Tensor], patch: tuple[int, int, int]) -> None:
    if not clips:
        raise ValueError("clips: expected at least one clip, got none")
    if len(patch) != 3 or any(p < 1 for p in patch):
        raise ValueError(f"patch: expected three sides >= 1 (t, h, w), got {tuple(patch)}")
    for i, clip in enumerate(clips):
        if clip.dim() != 4 or clip.shape[0] != clips[0].shape[0] or 0 in clip.shape:
            raise ValueError(f"clips[{i}]: expected ({clips[0].shape[0]}, T, H, W), none of them 0, got {tuple(clip.shape)}")


def _patches(clip: Tensor, patch: tuple[int, int, int]) -> Tensor:
    grid = grid_of(clip, patch)
    fill = [n * p - side for n, p, side in zip(grid, patch, clip.shape[1:], strict=True)]
    if any(fill):
        clip = F.pad(clip, (0, fill[2], 0, fill[1], 0, fill[0]))
    x = clip.reshape(clip.shape[0], grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(grid[0] * grid[1] * grid[2], -1)


def _patch_embed_torch(clips, weight, bias, patch):
    return F.linear(patchify(clips, patch), weight, bias)


def patch_embed_reference(clips, weight, bias, patch):
    """The definition, in float64: a Conv3d whose stride is its kernel."""
    tokens = []
    for clip in clips:
        fill = [-side % p for side, p in zip(clip.shape[1:], patch, strict=True)]
        padded = F.pad(clip.double(), (0, fill[2], 0, fill[1], 0, fill[0]))
        kernel = weight.double().view(weight.shape[0], clip.shape[0], *patch)
        out = F.conv3d(padded[None], kernel, None if bias is None else bias.double(), stride=patch)
        tokens.append(out[0].flatten(1).T)
    return torch.cat(tokens).to(clips[0].dtype)
