"""The definition: softmax(scale * q k^T + mask) v with the mask as a dense matrix, in float64; and the log of the softmax's denominator."""

import torch

from ..layout import VideoLayout, to_device
from ..masks import Mask


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: VideoLayout,
    mask: Mask,
    kv_layout: VideoLayout,
    scale: float,
    text_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (tokens, heads, d), k and v (kv tokens, kv heads, d), kv heads a divisor of heads. text_lengths: (clips,), see `there`.

    Returns out (tokens, heads, d) in q's dtype and lse (heads, tokens), float64 for float64 and else float32. A query with no visible key
    gives a row of zeros and -inf.
    """
    allowed = mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])
    if text_lengths is not None:
        allowed = allowed & there(kv_layout, text_lengths)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for i in allowed.any(dim=1).nonzero().flatten().tolist():
        # One query at a time, over its visible keys alone, so that an invisible NaN cannot reach it through 0 * NaN.
        seen = allowed[i]
        logits = torch.einsum("hd,khd->hk", q[i].double(), k[seen]) * scale
        out[i] = torch.einsum("hk,khd->hd", logits.softmax(dim=-1), v[seen])
        lse[i] = logits.logsumexp(dim=-1)
    return out.to(q.dtype), lse.T.to(torch.promote_types(q.dtype, torch.float32))


def there(layout: VideoLayout, text_lengths: torch.Tensor) -> torch.Tensor:
    """Which tokens are there, bool (tokens,), if of clip i's text only the first text_lengths[i] are."""
    clips, places = layout.table("text places", _text_places)
    return places < text_lengths.clamp(min=0)[clips]


def _text_places(layout: VideoLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip of each token, and its place in the clip's text, -1 for video: always there."""
    clips = layout.coordinates.clip.long().clamp(min=0)
    places = torch.full((layout.tokens,), -1, dtype=torch.int32)
    for clip in layout.clips:
        places[clip.text_start : clip.text_stop] = torch.arange(clip.text_length, dtype=torch.int32)
    return clips, to_device(places, layout.device)
