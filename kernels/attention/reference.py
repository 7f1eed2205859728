"""The definition: softmax(scale * q k^T + mask) v with the mask as a dense matrix, in float64; and the log of the softmax's denominator."""

import torch

from ..layout import VideoLayout
from ..masks import Mask


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, mask: Mask, kv_layout: VideoLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (tokens, heads, d), k and v (kv tokens, kv heads, d), kv heads a divisor of heads.

    Returns out (tokens, heads, d) in q's dtype and lse (heads, tokens), float64 for float64 and else float32. A query with no visible key
    gives a row of zeros and -inf.
    """
    allowed = mask.allowed(layout.coordinates[:, None], kv_layout.coordinates[None, :])
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
