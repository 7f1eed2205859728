"""Attention with the signatures of other code bases, to put in the place of theirs. They need torch and tubelet alone.

    wan.modules.model.flash_attention = adapters.flash_attention                                     # Wan's own repository
    hyvideo.modules.models.attention = adapters.hunyuan_attention                                    # HunyuanVideo's
    model.model_options["transformer_options"]["optimized_attention_override"] = adapters.comfy_attention      # ComfyUI

Padding is hidden by numbers of tokens on the device, which the host does not wait for. Masks of pairs, and scores with a bias, which these
kernels have no use for, go to torch's SDPA (or ComfyUI's function).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tubelet.kernels import FrameCausal

from . import ops
from .swaps import Swaps

_AS_IT_IS = Swaps(torch.nn.Module())
HALF = (torch.float16, torch.bfloat16)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Wan's `flash_attention` (and `attention`, whose `fa_version` is `version` here): (batch, queries, heads, head_dim) in q's dtype.

    q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv heads, head_dim). k_lens: (batch,), how many keys of each entry are there;
    on any device. q_lens: likewise; what stands in the rows of queries that are not there is of no meaning. dtype: computed in, on a GPU,
    where v is of no half precision. deterministic, version: without effect, these kernels always are. Raises ValueError for dropout,
    windows, and causal attention with k_lens or unequal numbers of queries and keys.
    """
    if dropout_p:
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}")
    if tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size: expected (-1, -1), got {tuple(window_size)}")
    if causal and (k_lens is not None or q.shape[1] != k.shape[1]):
        raise ValueError(f"causal: expected False with k_lens or {q.shape[1]} queries of {k.shape[1]} keys, got True")
    wide, narrow = q.dtype, q.dtype
    if q.device.type == "cuda":
        narrow = v.dtype if v.dtype in HALF else dtype
    q, k, v = (x.to(narrow) for x in (q, k, v))
    if q_scale is not None:
        q = q * q_scale
    lengths = None if k_lens is None else torch.as_tensor(k_lens).to(q.device, torch.int32, non_blocking=True)
    return _attend(q, k, v, causal, lengths, softmax_scale).to(wide)


def hunyuan_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "flash",
    drop_rate: float = 0,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    batch_size: int = 1,
) -> Tensor:
    """HunyuanVideo's `attention`: (batch, queries, heads * head_dim).

    q: (batch, queries, heads, head_dim), k, v likewise. mode "flash": cu_seqlens_q and cu_seqlens_kv (2 batch + 1,), where in each entry
    what is there ends and the padding behind it; what stands in rows of padding is of no meaning. "torch", "vanilla": attn_mask, bool
    (batch, keys), is served; one of pairs or of numbers goes to torch's SDPA. Raises ValueError for dropout or another mode.
    """
    if drop_rate:
        raise ValueError(f"drop_rate: expected 0, got {drop_rate}")
    if mode not in ("flash", "torch", "vanilla"):
        raise ValueError(f"mode: expected 'flash', 'torch' or 'vanilla', got {mode!r}")
    lengths = None
    if mode == "flash" and cu_seqlens_kv is not None:
        if cu_seqlens_kv.shape != (2 * q.shape[0] + 1,):
            raise ValueError(f"cu_seqlens_kv: expected ({2 * q.shape[0] + 1},), got {tuple(cu_seqlens_kv.shape)}")
        lengths = (cu_seqlens_kv[1::2] - cu_seqlens_kv[:-1:2]).to(q.device, torch.int32)
    elif mode != "flash" and attn_mask is not None:
        return masked_attention(q, k, v, attn_mask, causal).flatten(2)
    return _attend(q, k, v, causal, lengths).flatten(2)


def comfy_attention(
    func: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **more,
) -> Tensor:
    """ComfyUI's `optimized_attention_override`; func, ComfyUI's own function, is called for what is not served: masks other than bool ones
    of keys, float64, head dims above 256, a precision above that of q.

    q, k, v: (batch, tokens, heads * head_dim) or, skip_reshape, (batch, heads, tokens, head_dim). Returns (batch, tokens, heads * head_dim)
    or, skip_output_reshape, (batch, heads, tokens, head_dim).
    """
    padding = None if mask is None else key_padding(mask, q.shape[0], k.shape[-2])
    head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    precise = attn_precision is not None and attn_precision.itemsize > q.dtype.itemsize
    if (mask is not None and padding is None) or head_dim > 256 or q.dtype == torch.float64 or precise:
        reshape = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        return func(q, k, v, heads, mask=mask, attn_precision=attn_precision, **reshape, **more)
    scale = more.get("scale")
    if skip_reshape and padding is None and q.shape[0] > 1:
        # Heads of all entries as those of one: so none of the tensors, whose tokens lie head by head, is copied.
        batch = q.shape[0]
        q, k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        out = _attend(q, k, v, False, None, scale)[0].transpose(0, 1).unflatten(0, (batch, heads))
    else:
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        lengths, *keys = ops.ordered(padding, k, v)
        out = _attend(q, *keys, False, lengths, scale).transpose(1, 2)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    *,
    swaps: Swaps = _AS_IT_IS,
) -> Tensor:
    """As SDPA computes it, but for tensors (batch, tokens, heads, head_dim): bool masks of keys alone are served, others go to SDPA."""
    padding = None if mask is None else key_padding(mask, q.shape[0], k.shape[1])
    if (mask is not None and (padding is None or causal)) or (causal and q.shape[1] != k.shape[1]):
        gqa = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa).transpose(1, 2)
    lengths, *keys = ops.ordered(padding, k, v)
    return _attend(q, *keys, causal, lengths, scale, swaps)


def key_padding(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """A mask as which keys of each entry are there, bool (batch, keys), if its shape says that this is all it hides."""
    if mask.dtype != torch.bool or mask.shape[-1] != keys:
        return None
    if mask.dim() == 2 and mask.shape[0] == batch:
        return mask
    if mask.dim() in (3, 4) and mask.shape[0] in (1, batch) and all(side == 1 for side in mask.shape[1:-1]):
        return mask.reshape(-1, keys).expand(batch, keys)
    return None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None, scale: float | None = None, swaps: Swaps = _AS_IT_IS
) -> Tensor:
    if causal:  # a frame for each token
        return ops.attend(q, k, v, mask=FrameCausal(), clip=ops.Clip(frames=q.shape[1]), scale=scale, swaps=swaps)
    return ops.attend(q, k, v, cross=lengths is not None or q.shape[1] != k.shape[1], lengths=lengths, scale=scale, swaps=swaps)
