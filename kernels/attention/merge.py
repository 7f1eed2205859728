"""Joining attention over parts of the keys: parts of a cache, of a sequence that lies on several devices, of text and video.

lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i
"""

from collections.abc import Sequence

import torch


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The (out, lse) that `attention` gives over all keys, from those over each part of them.

    outs: each (tokens, heads, head_dim); lses: each (heads, tokens), -inf where a query sees nothing of that part. Returns out in the dtype
    of outs, summed in that of lses. Raises ValueError for shapes that do not fit.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs, lses: expected equally many of both, one at least, got {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dim() != 3 or out.shape != outs[0].shape or lse.shape != (out.shape[1], out.shape[0]):
            raise ValueError(
                f"outs[{i}], lses[{i}]: expected {tuple(outs[0].shape)} and (heads, tokens), got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    parts = torch.stack(tuple(lses))
    lse = parts.logsumexp(dim=0)
    # Where no part has a key, -inf - -inf would be NaN: the weights are zeros there.
    weights = torch.where(lse == -torch.inf, 0.0, (parts - lse).exp())
    out = sum(weight.T[..., None] * out.to(lse.dtype) for weight, out in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse
