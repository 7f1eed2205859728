"""Patch embedding and its inverse as operators of torch.library, of what the kernels compute, with their gradients.

Several clips come out as one tensor, whose views they are: the results of an operator may not share memory. Where the norm of a projection
was not done to its weight, the backward pass computes it again, by the norm's own kernels, forwards and backwards: between them lies an
embedding of the clips' gradient.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..dispatch import NO_GLUON, as_operator, select
from ..layout import VideoLayout
from ..norms import fused as norms
from .clips import Source, as_clip, one_after_the_other
from .embed import embed
from .gradients import MOST_ELEMENTS, few_rows, gradient_of_table, gradient_of_tokens, gradients_of_parameters, products_over_tokens
from .project import folds, project_tokens
from .reference import check_layout, grid_of, pack_pieces, patches, video_rows, without_gaps


def parts(flat: Tensor, channels: int, sides: Sequence[int]) -> list[Tensor]:
    """The clips (channels, T, H, W) that lie in it, one after the other. sides: their (T, H, W), likewise."""
    clips, start = [], 0
    for i in range(0, len(sides), 3):
        size = channels, *sides[i : i + 3]
        clips.append(flat[start : start + math.prod(size)].view(size))
        start = start + math.prod(size)
    return clips


def _length(channels: int, sides: Sequence[int]) -> int:
    """Of such a tensor."""
    return sum(channels * math.prod(sides[i : i + 3]) for i in range(0, len(sides), 3))


def _sides(clips: Sequence[Tensor]) -> list[int]:
    return [side for clip in clips for side in clip.shape[1:]]


def _or_empty(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """What an operator gives, which has no None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _rows_contiguous(d: Tensor) -> Tensor:
    return d if d.shape[1] == 1 or d.stride(1) == 1 else d.contiguous()


def _in_tokens(clips: Sequence[Tensor], patch: Sequence[int], layout: VideoLayout | None) -> Tensor:
    """Patches where their tokens are."""
    return pack_pieces([patches(clip, patch) for clip in clips], layout)


def _to(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(like.dtype)


@as_operator("tubelet::patch_embed")
def patch_embed(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    positions: Sequence[Tensor],
    known: Tensor | None,
    known_weight: Tensor | None,
    patch: list[int] | None,
    layout: int | None,
    tokens: int,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The tokens, and what keeps the layout alive. sources: clips, or tokens without a patch. layout: its handle."""
    where = None if layout is None else VideoLayout.of_handle(layout)
    if where is not None:
        check_layout(sources if patch else None, where, patch, positions)
    run = select("patch_embed", implementation, {"triton": embed}, {"gluon": NO_GLUON})
    out = run(
        "patch_embed", Source.of(sources, patch, where), weight, tokens, dtype, bias=bias, positions=positions,
        places=where.positions if len(positions) == 3 else None, known=known, known_weight=known_weight,
    )  # fmt: skip
    keeper = weight.new_empty(0)
    keeper.untyped_storage().layout = where  # an argument of the backward pass
    return out, keeper


@patch_embed.register_fake
def _(sources, weight, bias, positions, known, known_weight, patch, layout, tokens, dtype, implementation):
    return weight.new_empty((tokens, weight.shape[0]), dtype=dtype), weight.new_empty(0)


@as_operator("tubelet::patch_embed_backward")
def patch_embed_backward(
    d: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    positions: Sequence[Tensor],
    known: Tensor | None,
    known_weight: Tensor | None,
    keeper: Tensor,
    patch: list[int] | None,
    layout: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of sources in one tensor, weight, bias, the tables of positions and known_weight, empty where they are not `wanted`; of
    positions of each token, as the first table, what is to be cast.
    """
    op, where = "patch_embed", None if layout is None else VideoLayout.of_handle(layout)
    d, source = _rows_contiguous(d), Source.of(sources, patch, where)
    dsources = dweight = dbias = dknown = None
    if wanted[0]:
        if patch:
            dsources = sources[0].new_empty(_length(len(sources[0]), _sides(sources)))
            clips = parts(dsources, len(sources[0]), _sides(sources))
        else:
            dsources = sources[0].new_empty(sources[0].shape)
            clips = [as_clip(dsources)]
        project_tokens(op, d, weight, source._replace(clips=clips), across=True)
    video = None if without_gaps(where) else where.table("video rows", video_rows)
    if wanted[1] or wanted[2]:
        narrow = _in_tokens(sources, patch, where) if patch else _rows_contiguous(sources[0])
        products, _, sums = products_over_tokens(op, narrow, d, weight.dtype, used=video, wide_sums=wanted[2])
        dweight, dbias = products[0].T.to(weight.dtype).contiguous() if wanted[1] else None, _to(sums[0], bias) if wanted[2] else None
    dtables = [None] * 3
    if len(positions) == 1 and wanted[3]:
        dtables[0] = d.to(positions[0].dtype, copy=True) if video is None else torch.where(video[:, None], d, 0).to(positions[0].dtype)
    elif len(positions) == 3:
        for axis, table in enumerate(positions):
            if wanted[3 + axis]:
                index = where.positions[:, axis].int().clamp(0, len(table) - 1)
                index = index if video is None else torch.where(video, index, len(table))
                dtables[axis] = gradient_of_table(op, d, index, len(table)).to(table.dtype)
    if wanted[6]:
        marked = known if video is None else known & video
        dknown = gradient_of_table(op, d, (~marked).int(), 1)[0].to(known_weight.dtype)
    return _or_empty(d, dsources, dweight, dbias, *dtables, dknown)


@patch_embed_backward.register_fake
def _(d, sources, weight, bias, positions, known, known_weight, keeper, patch, layout, wanted):
    shape = (_length(sources[0].shape[0], _sides(sources)),) if patch else sources[0].shape
    likes = [weight, bias, *positions, *[None] * (3 - len(positions)), known_weight]
    shapes = [shape, *(None if like is None else like.shape for like in likes)]
    return tuple(
        like.new_empty(shape) if want else d.new_empty(0) for like, shape, want in zip([sources[0], *likes], shapes, wanted, strict=True)
    )


def _save_embed(ctx, inputs, output) -> None:
    sources, weight, bias, positions, known, known_weight, patch, layout, *_ = inputs
    ctx.save_for_backward(*sources, weight, bias, *positions, known, known_weight, output[1])
    ctx.counts, ctx.rest = (len(sources), len(positions)), (patch, layout)
    ctx.layout = getattr(output[1].untyped_storage(), "layout", None)  # hooks may put what is saved elsewhere, in another storage


def _embed_backward(ctx, d, _):
    clips, tables = ctx.counts
    saved, (patch, layout) = ctx.saved_tensors, ctx.rest
    sources, (weight, bias) = saved[:clips], saved[clips : clips + 2]
    positions, rest = saved[clips + 2 : clips + 2 + tables], saved[-3:]  # known, known_weight and what keeps the layout alive
    need = ctx.needs_input_grad
    of_tables = [*need[3], False, False, False][:3]
    wanted = [any(need[0]), need[1], need[2], *of_tables, need[5]]
    grads = patch_embed_backward(d, list(sources), weight, bias, list(positions), *rest, patch, layout, wanted)
    dsources, *grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    if dsources is not None:
        dsources = parts(dsources, sources[0].shape[0], _sides(sources)) if patch else [dsources]
    of_sources = [dsources[i] if each else None for i, each in enumerate(need[0])]
    return of_sources, grads[0], grads[1], grads[2 : 2 + tables], None, grads[5], *(None,) * 5


patch_embed.register_autograd(_embed_backward, setup_context=_save_embed)


@as_operator("tubelet::final_layer")
def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str | None,
    eps: float,
    patch: list[int],
    sides: list[int],
    starts: list[int],
    op: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """`unpatchify` with a weight, to clips (as of `parts`) of these sides whose tokens start there; `final_layer` if patch is empty. And
    the statistics of the tokens (`project_tokens`), empty where the norm is not folded.
    """
    run = select(op, implementation, {"triton": project_tokens}, {"gluon": NO_GLUON})
    out = weight.new_empty(_length(len(weight) // math.prod(patch), sides) if patch else (len(x), len(weight)))
    norm = {"shift": shift, "scale": scale, "rows": rows, "norm_weight": norm_weight, "norm_bias": norm_bias, "kind": kind, "eps": eps}
    statistics = run(op, x, weight, _target(out, len(weight), patch, sides, starts), bias=bias, **norm)
    return out, x.new_empty(0, 2, dtype=torch.float32) if statistics is None else statistics


def _target(out: Tensor, elements: int, patch: Sequence[int], sides: Sequence[int], starts: Sequence[int]) -> Source:
    if not patch:
        return Source.of([out], patch)
    return Source(parts(out, elements // math.prod(patch), sides), starts, patch)


@project.register_fake
def _(x, weight, bias, shift, scale, rows, norm_weight, norm_bias, kind, eps, patch, sides, starts, op, implementation):
    out = weight.new_empty(_length(weight.shape[0] // math.prod(patch), sides) if patch else (x.shape[0], weight.shape[0]))
    return out, x.new_empty((x.shape[0] if folds(x, weight, kind) else 0, 2), dtype=torch.float32)


@as_operator("tubelet::final_layer_backward")
def project_backward(
    d: Tensor,
    out: Tensor | None,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str | None,
    eps: float,
    patch: list[int],
    sides: list[int],
    starts: list[int],
    wanted: list[bool],
    op: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, shift, scale, norm_weight and norm_bias, empty where they are not `wanted`.

    Tokens of no clip have no part in it, whatever they hold.
    """
    source = _target(d.contiguous() if patch else _rows_contiguous(d), len(weight), patch, sides, starts)
    x_all, spans = x, None
    if patch:
        spans = [(start, start + math.prod(grid_of(clip, patch))) for start, clip in zip(starts, source.clips, strict=True)]
        x, rows = _only(x, spans), None if rows is None else _only(rows, spans)
        statistics = _only(statistics, spans) if len(statistics) else statistics
    in_tokens = torch.cat([patches(clip, patch) for clip in source.clips]) if patch else _rows_contiguous(d)
    if patch:
        source = source._replace(starts=one_after_the_other(source.clips, patch))
    norm = shift, scale, rows, norm_weight, norm_bias, kind
    grads, left = [None] * 7, list(wanted)
    if len(statistics) and len(weight) <= MOST_ELEMENTS:
        out = torch.cat([patches(clip, patch) for clip in _target(out, len(weight), patch, sides, starts).clips]) if patch else out
        grads = _gradients_where_folded(op, in_tokens, out, statistics, x, weight, bias, *norm, wanted)
        left = [want and grad is None for want, grad in zip(wanted, grads, strict=True)]
    if any(left):
        others = _gradients_through_norm(op, source, in_tokens, x, weight, bias, *norm, eps, left)
        grads = [other if missing else grad for grad, other, missing in zip(grads, others, left, strict=True)]
    if wanted[0] and spans:
        grads[0] = _among(grads[0], spans, x_all)
    return _or_empty(d, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))


def _gradients_where_folded(
    op, in_tokens, out, statistics, x, weight, bias, shift, scale, rows, norm_weight, norm_bias, kind, wanted
) -> list[Tensor | None]:
    """As of `project_backward`, from the result and the statistics of a folded norm; but of parameters where rows are few alone."""
    made = in_tokens, out, x, statistics, weight, bias, shift, scale, rows, norm_weight, norm_bias, kind
    dx = gradient_of_tokens(op, *made) if wanted[0] else None
    if any(wanted[1:]) and few_rows(len(weight), len(x), shift, scale):
        return [dx, *gradients_of_parameters(op, *made)]
    return [dx, *[None] * 6]


def _gradients_through_norm(
    op, source, in_tokens, x, weight, bias, shift, scale, rows, norm_weight, norm_bias, kind, eps, wanted
) -> list[Tensor | None]:
    """As of `project_backward`, by the norm's own kernels, forwards and backwards. source: the gradient in its clips."""
    normed, grads = x, [None] * 7
    if kind is not None and wanted[1]:
        normed = norms.norm_fused(op, x, None, None, rows, shift, scale, norm_weight, norm_bias, kind, eps, False, False, False)[1]
    if wanted[1]:
        grads[1] = products_over_tokens(op, in_tokens, normed, weight.dtype).products[0].to(weight.dtype)
    if wanted[2]:
        grads[2] = in_tokens.sum(0, dtype=torch.float32).to(bias.dtype)
    if wanted[0] or any(wanted[3:]):
        grads[0] = embed(op, source, weight, len(x), x.dtype, across=True)
        if kind is not None:
            grads[0], _, _, *grads[3:] = norms.norm_fused_backward(
                op, grads[0], None, x, None, None, rows, shift, scale, norm_weight, norm_bias, kind, eps, False, x.dtype,
                [wanted[0], False, False, *wanted[3:]],
            )  # fmt: skip
    return grads


def _only(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The rows of the spans, which follow each other; a view where they are one piece."""
    pieces = [x[start:stop] for start, stop in spans]
    whole = all(before[1] == after[0] for before, after in pairwise(spans))
    return x[spans[0][0] : spans[-1][1]] if whole else torch.cat(pieces)


def _among(dx: Tensor, spans: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
    """Its rows where those of x are, zeros elsewhere."""
    if len(dx) == len(x):
        return dx
    out, taken = dx.new_zeros(x.shape), 0
    for start, stop in spans:
        out[start:stop] = dx[taken : taken + stop - start]
        taken += stop - start
    return out


@project_backward.register_fake
def _(d, out, statistics, x, weight, bias, shift, scale, rows, norm_weight, norm_bias, kind, eps, patch, sides, starts, wanted, op):
    likes = x, weight, bias, shift, scale, norm_weight, norm_bias
    return tuple(like.new_empty(like.shape) if want else d.new_empty(0) for like, want in zip(likes, wanted, strict=True))


def _save_projection(ctx, inputs, output) -> None:
    (out, statistics), (x, weight), kind = output, inputs[:2], inputs[8]
    # A copy, for whoever changes the result in place; it is few numbers beside the tokens.
    out = out.detach().clone() if folds(x, weight, kind) and len(weight) <= MOST_ELEMENTS else None
    ctx.save_for_backward(out, statistics, *inputs[:8])
    ctx.rest, ctx.op = inputs[8:13], inputs[13]


def _project_backward(ctx, d, _):
    need = ctx.needs_input_grad
    wanted = [*need[:5], *need[6:8]]
    grads = project_backward(d, *ctx.saved_tensors, *ctx.rest, wanted, ctx.op)
    dx, dweight, dbias, dshift, dscale, dnorm_weight, dnorm_bias = (
        grad if want else None for grad, want in zip(grads, wanted, strict=True)
    )
    return dx, dweight, dbias, dshift, dscale, None, dnorm_weight, dnorm_bias, *(None,) * 7


project.register_autograd(_project_backward, setup_context=_save_projection)
