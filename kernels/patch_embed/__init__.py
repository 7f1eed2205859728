"""Patches of clips to tokens and back: the first and the last layer of a video transformer.

    patch_embed:  token[t, h, w] = weight @ flatten(x[:, t*pt:(t+1)*pt, h*ph:(h+1)*ph, w*pw:(w+1)*pw]) + bias
                                   + position + known * known_weight
    final_layer:  patch[token] = weight @ modulated_norm(token) + bias;  unpatchify then puts each patch back into its clip

Clips of any sizes go into one pack. A side that the patch does not divide is filled up with zeros at its end, and cut off again by
`unpatchify`. As kernels, `patch_embed` gathers the patches while it multiplies, and `unpatchify` normalises, modulates, multiplies and
scatters: no permuted copy of a clip is written, nor the norm. Both are their own opposites: the gradient of clips is a projection that is
scattered, that of tokens an embedding of the clips' gradient, and the two weights share a kernel.

FLOPs: 2 * tokens * patch elements * dim each. Bytes: the clips once and the tokens once each, the weight; patches have few elements (64 of
Wan) for a dim of thousands, so that the tokens' bandwidth is the floor. In bfloat16, at 3.35 TB/s, of 32,760 tokens (a clip of 81 frames at
480p):

    op                               dim    bytes of tokens, of clips   FLOPs        floor
    patch_embed, unpatchify         1536    101 MB, 4.2 MB              6.4 GFLOP    31 us
      per-token positions                   201 MB, 4.2 MB                           61 us
    patch_embed, unpatchify         5120    335 MB, 4.2 MB              21 GFLOP     101 us
    backward of patch_embed         1536    101 MB twice, 4.2 MB twice  13 GFLOP     63 us
    backward of unpatchify          1536    101 MB thrice, 4.2 MB x 4   13 GFLOP     95 us

Tables of positions per axis are small, and are read from the caches. In half precision `unpatchify` reads each row of tokens once: the norm
is done to the weight, for each row of the modulation, and corrected by the token's statistics in the end. Backwards, what the norm needs of
all channels follows from the projection's result, so that tokens are read twice, once for their gradient and once for those of the
parameters. Else it reads each row twice, once for the statistics, once to normalise it; what is between the two is meant to stay in the
second-level cache; and the backward pass computes the norm again.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON, choose, select, with_triton
from ..layout import VideoLayout
from ..norms import Modulation
from .reference import (
    check_layout,
    final_layer_reference,
    final_layer_torch,
    from_patches,
    grid_of,
    patch_embed_reference,
    patch_embed_torch,
    patches,
)

if HAS_TRITON:
    from . import clips as _clips
    from . import operator
    from . import project as _project

__all__ = ["final_layer", "grid_of", "patch_embed", "patchify", "unpatchify"]


def patchify(clips: Sequence[Tensor], patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """Clips (channels, T, H, W), each of its own size, to (tokens, channels * pt * ph * pw), channels slowest.

    Raises ValueError on a mismatch.
    """
    _check_clips(clips, patch)
    return torch.cat([patches(clip, patch) for clip in clips])


def patch_embed(
    clips: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: tuple[int, int, int] = (1, 2, 2),
    positions: Tensor | Sequence[Tensor] | None = None,
    layout: VideoLayout | None = None,
    known: Tensor | None = None,
    known_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Clips (channels, T, H, W), each of its own size and with any strides, to tokens (tokens, dim).

    clips: or what `patchify` makes of them, one tensor (tokens, channels * pt * ph * pw), for which patch has no meaning. weight: (dim,
    channels * pt * ph * pw), channels slowest, as a flattened Conv3d weight; its dtype, under autocast that of autocast, is that of the
    product. bias: (dim,) or None. positions: added to each token: (tokens, dim), or tables of the axes t, h and w, (n, dim) each, of which
    each token gets the sum of those at its place, `layout.positions` without its fraction, past the end of a table that table's last entry;
    but a clip's sides must be in theirs. layout: where the tokens are to lie, needed with tables: text of a joint layout and what is past
    the end of a pack get zeros. known: bool (tokens,), which tokens get known_weight (dim,) too, as of a channel that marks them. dtype: of
    the tokens, the product's by default; sums are in float32 (float64 for float64) and rounded once.

    Raises ValueError or TypeError on a mismatch.
    """
    in_tokens = isinstance(clips, Tensor)
    weight = _autocast(weight)
    if not in_tokens:
        _check_clips(clips, patch)
        width, of = clips[0].shape[0] * math.prod(patch), f" for {clips[0].shape[0]} channels in patches of {tuple(patch)}"
        tokens = sum(math.prod(grid_of(clip, patch)) for clip in clips)
    else:
        if clips.dim() != 2:
            raise ValueError(f"clips: expected a sequence of clips, or tokens (tokens, channels), got a tensor {tuple(clips.shape)}")
        (tokens, width), of = clips.shape, " for these tokens"
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected (dim, {width}){of}, got {tuple(weight.shape)}")
    if layout is not None:
        if not isinstance(layout, VideoLayout):
            raise TypeError(f"layout: expected a VideoLayout, got {type(layout).__name__}")
        if in_tokens and tokens != layout.tokens:
            raise ValueError(f"clips: expected {layout.tokens} tokens as in the layout, got {tokens}")
        tokens = layout.tokens
    _check_devices(weight, clips=clips if in_tokens else clips[0], layout=layout)
    _check_added(weight, tokens, bias, positions, layout, known, known_weight)
    dtype = dtype or weight.dtype
    if dtype.itemsize < 2 or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype of 16 bits or more, got {dtype}")
    sources = [clips] if in_tokens else list(clips)
    available = _embeddings(weight, dtype, sources[0].dtype, bias, *_listed(positions), known_weight)
    if choose("patch_embed", implementation, *available) == "triton":
        handle = None if layout is None else layout.handle
        patch = None if in_tokens else list(patch)
        added = bias, _listed(positions), known, known_weight
        return operator.patch_embed(sources, weight, *added, patch, handle, tokens, dtype, implementation)[0]
    if layout is not None:
        check_layout(None if in_tokens else clips, layout, patch, positions)
    run = select("patch_embed", implementation, *available)
    return run(clips, weight, bias, patch, positions, layout, known, known_weight, dtype)


def final_layer(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Modulation | None = None,
    rows: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """weight @ modulated_norm(token) + bias of each token, (tokens, channels * pt * ph * pw): patches, for a sampler that stays in tokens.

    tokens: (tokens, dim). weight: (channels * pt * ph * pw, dim), whose dtype, under autocast that of autocast, is that of the product and
    of the result. bias: one number for each row of it, or None. norm: what is done to the tokens before, with `rows`, as in
    `modulated_norm`. Raises ValueError or TypeError on a mismatch.
    """
    weight = _autocast(weight)
    _check_projection(tokens, weight, bias, norm, rows)
    available = _projections(tokens, weight, bias, norm)
    if choose("final_layer", implementation, *available) == "triton":
        return operator.project(tokens, weight, bias, *_parted(norm, rows), [], [], [], "final_layer", implementation)[0]
    return select("final_layer", implementation, *available)(tokens, weight, bias, norm, rows)


def unpatchify(
    tokens: Tensor,
    layout: VideoLayout,
    channels: int,
    patch: tuple[int, int, int] = (1, 2, 2),
    *,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Modulation | None = None,
    rows: Tensor | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """The inverse of `patchify`: tokens (tokens, channels * pt * ph * pw) to one (channels, T, H, W) a clip.

    sizes: the (T, H, W) of each clip before patching, if the patch does not divide them. With weight, (channels * pt * ph * pw, dim), the
    tokens are (tokens, dim), and what is put back into the clips is their `final_layer`, with bias, norm and rows; Triton's kernel then
    does all at once. Raises ValueError or TypeError on a mismatch.
    """
    width = channels * math.prod(patch)
    if weight is None:
        for name, given in (("bias", bias), ("norm", norm), ("rows", rows)):
            if given is not None:
                raise ValueError(f"{name}: expected None without a weight, got {type(given).__name__}")
    if tokens.shape[0] != layout.tokens or (weight is None and tokens.shape != (layout.tokens, width)):
        wanted = "dim)" if weight is not None else f"{width}) for {channels} channels in patches of {patch}"
        raise ValueError(f"tokens: expected ({layout.tokens}, {wanted}, got {tuple(tokens.shape)}")
    if sizes is not None and len(sizes) != layout.num_clips:
        raise ValueError(f"sizes: expected one for each of {layout.num_clips} clips, got {len(sizes)}")
    for i, (size, clip) in enumerate(zip(sizes or (), layout.clips, strict=sizes is not None)):
        if len(size) != 3 or tuple(-(-side // p) for side, p in zip(size, patch, strict=True)) != clip.grid:
            raise ValueError(f"sizes[{i}]: expected a size whose grid is {clip.grid}, got {tuple(size)}")
    if weight is not None:
        weight = _autocast(weight)
        if weight.shape[:1] != (width,):
            raise ValueError(
                f"weight: expected ({width}, dim) for {channels} channels in patches of {tuple(patch)}, got {tuple(weight.shape)}"
            )
        _check_projection(tokens, weight, bias, norm, rows)
        available = _projections(tokens, weight, bias, norm)
        if not layout.clips:
            return []
        if choose("unpatchify", implementation, *available) == "triton":
            sizes = sizes or [tuple(n * p for n, p in zip(clip.grid, patch, strict=True)) for clip in layout.clips]
            flat = [side for size in sizes for side in size]
            starts = [clip.video_start for clip in layout.clips]
            out = operator.project(tokens, weight, bias, *_parted(norm, rows), list(patch), flat, starts, "unpatchify", implementation)[0]
            return operator.parts(out, channels, flat)
        tokens = select("unpatchify", implementation, *available)(tokens, weight, bias, norm, rows)
    return [
        from_patches(tokens[clip.video_start : clip.video_stop], clip.grid, channels, patch, sizes and sizes[i])
        for i, clip in enumerate(layout.clips)
    ]


def _autocast(weight: Tensor) -> Tensor:
    """As autocast gives it to a product."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype == torch.float32:
        return weight.to(torch.get_autocast_dtype(kind))
    return weight


def _listed(positions: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    return [] if positions is None else [positions] if isinstance(positions, Tensor) else list(positions)


def _parted(norm: Modulation | None, rows: Tensor | None) -> tuple:
    """A norm as an operator takes it; no norm if kind is None."""
    if norm is None:
        return None, None, None, None, None, None, 0.0
    indexed = norm.shift is not None or norm.scale is not None
    return norm.shift, norm.scale, rows if indexed else None, norm.weight, norm.bias, norm.kind, norm.eps


def _embeddings(weight: Tensor, *others) -> tuple[dict, dict]:
    available = {"torch": patch_embed_torch, "reference": patch_embed_reference}
    if not HAS_TRITON:
        return with_triton(weight, available)
    return with_triton(weight, available, operator.patch_embed, _clips.unavailable(weight, *others))


def _projections(tokens: Tensor, weight: Tensor, bias: Tensor | None, norm: Modulation | None) -> tuple[dict, dict]:
    available = {"torch": final_layer_torch, "reference": final_layer_reference}
    if not HAS_TRITON:
        return with_triton(weight, available)
    reason = _clips.unavailable(weight, tokens, bias) or _project.unavailable_norm(tokens, norm)
    return with_triton(weight, available, operator.project, reason)


def _check_clips(clips: Sequence[Tensor], patch: tuple[int, int, int]) -> None:
    if not clips:
        raise ValueError("clips: expected at least one clip, got none")
    if len(patch) != 3 or any(p < 1 for p in patch):
        raise ValueError(f"patch: expected three sides >= 1 (t, h, w), got {tuple(patch)}")
    for i, clip in enumerate(clips):
        if clip.dim() != 4 or clip.shape[0] != clips[0].shape[0] or 0 in clip.shape:
            raise ValueError(f"clips[{i}]: expected ({clips[0].shape[0]}, T, H, W), none of them 0, got {tuple(clip.shape)}")
        if clip.dtype != clips[0].dtype or clip.device != clips[0].device:
            raise ValueError(f"clips[{i}]: expected {clips[0].dtype} on {clips[0].device} as the first, got {clip.dtype} on {clip.device}")


def _check_added(weight, tokens, bias, positions, layout, known, known_weight) -> None:
    dim = weight.shape[0]
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({dim},), got {tuple(bias.shape)}")
    if isinstance(positions, Tensor):
        if positions.shape != (tokens, dim):
            raise ValueError(f"positions: expected ({tokens}, {dim}) or three tables, got {tuple(positions.shape)}")
    elif positions is not None:
        if len(positions) != 3 or any(table.dim() != 2 or table.shape[1] != dim or not table.shape[0] for table in positions):
            shapes = [tuple(table.shape) for table in positions]
            raise ValueError(f"positions: expected (tokens, {dim}) or three tables (n, {dim}) of the axes t, h and w, got {shapes}")
        if layout is None:
            raise ValueError("layout: expected a VideoLayout, which says where each token lies in the tables of positions, got None")
    if (known is None) != (known_weight is None):
        raise ValueError("known: expected it and known_weight together, got one of them alone")
    if known is not None:
        if known.shape != (tokens,) or known.dtype != torch.bool:
            raise ValueError(f"known: expected bool ({tokens},), got {known.dtype} {tuple(known.shape)}")
        if known_weight.shape != weight.shape[:1]:
            raise ValueError(f"known_weight: expected ({dim},), got {tuple(known_weight.shape)}")
    _check_devices(weight, bias=bias, known=known, known_weight=known_weight)
    for table in _listed(positions):
        _check_devices(weight, positions=table)


def _check_devices(weight: Tensor, **others: Tensor | VideoLayout | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as the weight is, got on {other.device}")


def _check_projection(tokens, weight, bias, norm, rows) -> None:
    if tokens.dim() != 2 or not tokens.is_floating_point():
        raise ValueError(f"tokens: expected (tokens, dim) of a floating point dtype, got {tokens.dtype} {tuple(tokens.shape)}")
    dim = tokens.shape[1]
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise ValueError(f"weight: expected (channels, {dim}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    _check_devices(weight, tokens=tokens, bias=bias, rows=rows)
    if norm is None:
        if rows is not None:
            raise ValueError(f"rows: expected None without a norm, got {tuple(rows.shape)}")
        return
    if norm.kind not in ("layer", "rms"):
        raise ValueError(f"norm: expected a kind of 'layer' or 'rms', got {norm.kind!r}")
    if norm.kind == "rms" and norm.bias is not None:
        raise ValueError("norm: expected no bias, since an RMS norm has none")
    for name in ("weight", "bias"):
        parameter = getattr(norm, name)
        if parameter is not None and parameter.shape != (dim,):
            raise ValueError(f"norm: expected a {name} ({dim},), got {tuple(parameter.shape)}")
    tables = {name: getattr(norm, name) for name in ("shift", "scale") if getattr(norm, name) is not None}
    for name, table in tables.items():
        if table.dim() != 2 or table.shape[1] != dim:
            raise ValueError(f"norm: expected a {name} (rows, {dim}), got {tuple(table.shape)}")
    if len(tables) == 2 and len(norm.shift) != len(norm.scale):
        raise ValueError(f"norm: expected as many rows of shift as of scale, got {tuple(norm.shift.shape)} and {tuple(norm.scale.shape)}")
    _check_devices(weight, **{f"norm.{name}": getattr(norm, name) for name in ("shift", "scale", "weight", "bias")})
    if tables:
        if rows is None:
            raise ValueError(f"rows: expected the table row of each token along with {' and '.join(tables)}, got None")
        if rows.shape != tokens.shape[:1] or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows: expected int32 or int64 ({tokens.shape[0]},), got {rows.dtype} {tuple(rows.shape)}")
