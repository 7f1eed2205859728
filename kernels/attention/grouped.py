"""Attention in plain torch, fast on a CPU: equal blocks of the mask are gathered into one batch and given to SDPA.

Every mask of ours decomposes exactly into blocks of queries that see the same keys: the frames of a clip for `Spatial`, its sites for
`Temporal`, its chunks for `FrameCausal`, the clip for `Full`. Blocks of equal shape, of one clip or of many, make one call of
`scaled_dot_product_attention`. No dense mask is built: only `Temporal` needs one, of T x T entries shared by all sites. The blocks depend
on the layouts and the mask alone and are kept in the layout's cache.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..layout import ClipSpan, VideoLayout
from ..masks import Mask
from .reference import there

TEXT_MULTIPLE = 16
REMEMBERED_TOKENS = 2048
"""Up to this size the blocks of a clip are kept for the next pack that has one like it: training draws the same few grids all the time."""
OWN_TOKENS = 512
"""From this size on the sites of a clip are a batch of their own."""


@dataclass(frozen=True)
class Batch:
    """`n` blocks of equal shape: token indices of queries (n, m) and of keys (n, l); where not all keys are seen, `visible`, bool and
    broadcastable to (n, heads, m, l), and whether that is just the lower triangle, which SDPA knows by itself. blind: which queries see
    nothing, where that is not known beforehand, broadcastable to (n, heads, m); to these all is `visible`, so that nothing is divided by 0.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor | None
    causal: bool
    queries_view: tuple[int, ...] | None
    keys_view: tuple[int, ...] | None
    blind: torch.Tensor | None = None


def attention_grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    text_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments and `out` as of `attention_reference`."""
    return _grouped(q, k, v, layout, mask, kv_layout, scale, text_lengths, with_lse=False)[0]


def attention_grouped_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and result as `attention_reference`. SDPA tells no lse, so the scores are written out."""
    out, lse = _grouped(q, k, v, layout, mask, kv_layout, scale, text_lengths, with_lse=True)
    return out, lse.T


def attention_grouped_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv from do (tokens, heads, d): written out, for where autograd does not look. The scores are computed again."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    k, v, batches = _present(k, v, batches_of(layout, mask, kv_layout), kv_layout, text_lengths)
    for batch in batches:
        # (n, kv heads, groups, m or l, d)
        qs, dos = (x[batch.queries].to(wide).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4) for x in (q, do))
        ks, vs = (x[batch.keys].to(wide).transpose(1, 2).unsqueeze(2) for x in (k, v))
        logits = scale * qs @ ks.transpose(-1, -2)
        if batch.visible is not None:
            visible = batch.visible if batch.visible.dim() == 2 else batch.visible.unsqueeze(2)
            logits = logits.masked_fill(~visible, -torch.inf)
        p = logits.softmax(dim=-1)
        if batch.blind is not None:
            p = p.masked_fill(batch.blind.unsqueeze(2)[..., None], 0.0)
        dp = dos @ vs.transpose(-1, -2)
        ds = scale * p * (dp - (dp * p).sum(dim=-1, keepdim=True))
        dq = (ds @ ks).permute(0, 3, 1, 2, 4).flatten(2, 3)
        dk, dv = ((x.transpose(-1, -2) @ y).sum(dim=2).transpose(1, 2) for x, y in ((ds, qs), (p, dos)))
        for grad, index, part in zip(grads, (batch.queries, batch.keys, batch.keys), (dq, dk, dv), strict=True):
            grad.index_add_(0, index.flatten(), part.flatten(0, 1))
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


def _grouped(q, k, v, layout, mask, kv_layout, scale, text_lengths, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (tokens, heads, d), lse (tokens, heads) or None)."""
    k, v, batches = _present(k, v, batches_of(layout, mask, kv_layout), kv_layout, text_lengths)
    stretches = not with_lse and all(each.queries_view for each in batches) and sum(each.queries.numel() for each in batches) == len(q)
    outs, sums = [], []
    for batch in batches:
        keys = (_take(x, batch.keys, batch.keys_view) for x in (k, v))
        out, lse = _attend(_take(q, batch.queries, batch.queries_view), *keys, batch, scale, with_lse)
        if batch.blind is not None:
            out = out.masked_fill(batch.blind[..., None], 0.0)
            lse = lse if lse is None else lse.masked_fill(batch.blind, -torch.inf)
        outs.append(_put(out, batch.queries_view) if stretches else out.transpose(1, 2).flatten(0, 1))
        if with_lse:
            sums.append(lse.transpose(1, 2).flatten(0, 1))
    if stretches and outs:
        if len(outs) == 1:
            return outs[0], None
        return torch.cat([outs[i] for i in sorted(range(len(outs)), key=lambda i: batches[i].queries_view)]), None
    result = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device) if with_lse else None
    if not outs:
        return result, lse
    places = torch.cat([batch.queries.flatten() for batch in batches])
    return result.index_copy(0, places, torch.cat(outs)), lse.index_copy(0, places, torch.cat(sums)) if with_lse else None


def _present(
    k: torch.Tensor, v: torch.Tensor, batches: list[Batch], kv_layout: VideoLayout, text_lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[Batch]]:
    """Keys and values of a text that is not there as zeros, which no query sees."""
    if text_lengths is None:
        return k, v, batches
    present = there(kv_layout, text_lengths)
    k, v = (x.masked_fill(~present[:, None, None], 0.0) for x in (k, v))
    found = []
    for batch in batches:
        visible = present[batch.keys][:, None, None]
        if batch.visible is not None:
            visible = visible & batch.visible
        blind = ~visible.any(dim=-1)
        found.append(replace(batch, visible=visible | blind[..., None], causal=False, blind=blind))
    return k, v, found


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale q k^T) v over (n, heads, m, d), and its log-sum-exp (n, heads, m) if that is asked for."""
    half_training = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled() and q.requires_grad
    if not with_lse and not half_training:
        mask = None if batch.causal else batch.visible
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=batch.causal, scale=scale, enable_gqa=gqa), None
    # SDPA's low-precision backward on a CPU is several times slower than these products on blocks as short as frames and sites.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q * scale) @ k.transpose(-1, -2)
    if batch.visible is not None:
        logits = logits.masked_fill(~batch.visible, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = logits.to(wide).logsumexp(dim=-1) if with_lse else None
    return logits.softmax(dim=-1, dtype=wide).to(v.dtype) @ v, lse


def _take(x: torch.Tensor, index: torch.Tensor, view: tuple[int, ...] | None) -> torch.Tensor:
    """x[index] as (n, heads, m, d); where the index is regular, a view (of `_regular`): no gather, in the gradient neither."""
    if view is None:
        return x[index].transpose(1, 2)
    start, clips, sites, m = view
    tokens = clips * sites * m
    if tokens != x.shape[0]:
        x = x.narrow(0, start, tokens)
    return x.view(clips, m, sites, *x.shape[1:]).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _put(out: torch.Tensor, view: tuple[int, ...]) -> torch.Tensor:
    """(n, heads, m, d) as the stretch of tokens (n * m, heads, d) that a view takes."""
    return out.unflatten(0, view[1:3]).permute(0, 3, 1, 2, 4).flatten(0, 2)


def batches_of(layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> list[Batch]:
    """What `attention_grouped` gives to SDPA, call by call."""
    key = ("grouped", mask, None if kv_layout is layout else tuple(kv_layout.clips))
    if key not in layout.cache:
        with torch.inference_mode(False):  # the next pass over this layout may have a gradient
            layout.cache[key] = _plan(layout, mask, kv_layout)
    return layout.cache[key]


def _plan(layout: VideoLayout, mask: Mask, kv_layout: VideoLayout) -> list[Batch]:
    buckets = defaultdict(list)
    for query, key in zip(layout.clips, kv_layout.clips, strict=True):
        blocks = _remembered_blocks if query.stop - query.start <= REMEMBERED_TOKENS else _blocks
        for queries, keys, visible in blocks(_at_zero(query), _at_zero(key), mask):
            if not queries.numel() or not keys.numel():
                continue
            queries, keys = queries + query.start, keys + key.start
            if not key.frames:
                # Texts differ in length by a few tokens: filled up to a common length (with the clip's own first key, hidden) they make one
                # batch. The length depends on the text alone, so a clip's result does not depend on what it is packed with.
                length = -(-keys.shape[1] // TEXT_MULTIPLE) * TEXT_MULTIPLE
                visible = None if length == keys.shape[1] else torch.arange(length)[None, None, None] < keys.shape[1]
                keys = torch.cat((keys, keys[:, :1].expand(-1, length - keys.shape[1])), dim=1)
            shared = None if visible is None or visible.dim() == 4 else visible.numpy().tobytes()
            # The sites of several clips in one batch are a copy, which pays where the clips are small.
            alone = query.start if mask.same_site and queries.numel() >= OWN_TOKENS else -1
            buckets[queries.shape[1], keys.shape[1], visible is None, shared or b"", alone].append((queries, keys, visible))
    batches = []
    # Sorted, so that the gradients of a key that several batches share are added in an order that does not depend on the other clips.
    for _, blocks in sorted(buckets.items(), key=lambda item: item[0]):
        queries, keys = torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])
        visible = blocks[0][2]
        if visible is not None and visible.dim() == 4:
            visible = torch.cat([block[2] for block in blocks])
        views = (_regular(queries), _regular(keys))
        device = layout.device
        causal = visible is not None and visible.dim() == 2 and torch.equal(visible, torch.ones_like(visible).tril())
        batches.append(Batch(queries.to(device), keys.to(device), None if visible is None else visible.to(device), causal, *views))
    return batches


def _at_zero(clip: ClipSpan) -> ClipSpan:
    """The clip as if it began its pack, with what matters to the masks alone."""
    return replace(clip, video_start=clip.video_start - clip.start, text_start=clip.text_start - clip.start, positions=())


@lru_cache(maxsize=512)
def _remembered_blocks(query: ClipSpan, key: ClipSpan, mask: Mask) -> list:
    return list(_blocks(query, key, mask))


def _blocks(query: ClipSpan, key: ClipSpan, mask: Mask):
    """The blocks of one clip: (queries (n, m), keys (n, l), visible (m, l) or None)."""
    text_q = torch.arange(query.text_start, query.text_stop)
    text_k = torch.arange(key.text_start, key.text_stop)
    video_q = torch.arange(query.video_start, query.video_stop).view(query.frames, query.frame_tokens)
    video_k = torch.arange(key.video_start, key.video_stop).view(key.frames, key.frame_tokens)
    all_k = torch.cat((video_k.flatten(), text_k)).sort().values
    t = torch.arange(query.frames)[:, None] + query.first_frame
    u = torch.arange(key.frames)[None, :] + key.first_frame
    seen = mask.rule(t, u, torch.tensor(key.known, dtype=torch.bool)[None, :])

    if mask.same_site and key.frames and query.frames:
        yield text_q[None], all_k[None], None
        rows = seen.any(dim=1) | bool(len(text_k))
        columns = seen[rows].any(dim=0)
        keys = torch.cat((video_k[columns].T, text_k.expand(video_k.shape[1], -1)), dim=1)
        visible = torch.cat((seen[rows][:, columns], torch.ones(int(rows.sum()), len(text_k), dtype=torch.bool)), dim=1)
        yield video_q[rows].T, keys, None if visible.all() else visible
        return
    # Frames that see the same frames make one block; the text, which sees everything, joins those that do too.
    members = defaultdict(list)
    for frame, row in enumerate(seen.tolist()):
        members[tuple(row)].append(video_q[frame])
    if len(text_q):
        members[(True,) * key.frames].append(text_q)
    for row, tokens in members.items():
        keys = torch.cat((video_k[torch.tensor(row, dtype=torch.bool)].flatten(), text_k)).sort().values
        yield torch.cat(tokens).sort().values[None], keys[None], None


def _regular(index: torch.Tensor) -> tuple[int, ...] | None:
    """(start, clips, sites, m) if the blocks tile a stretch of tokens, as the sites of equal clips or as whole runs, clips of one site."""
    n, m = index.shape
    start, sites = int(index.min()), 1
    while m > 1 and sites < n and index[sites, 0] == index[0, 0] + sites:
        sites += 1
    if n % sites == 0:
        tokens = torch.arange(start, start + n * m).view(n // sites, m, sites)
        if torch.equal(index, tokens.transpose(1, 2).reshape(n, m)):
            return start, n // sites, sites, m
    return None
