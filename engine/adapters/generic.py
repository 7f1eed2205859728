"""Models of no known class: their attention alone, by the two ways that diffusers has for it."""

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from .backend import register_diffusers_backend
from .functions import key_padding, masked_attention
from .swaps import Swaps


def swap(swaps: Swaps) -> None:
    """Serve the attention sites of any model."""
    backend, found = register_diffusers_backend(), False
    for name, module in swaps.model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        found = True
        if type(processor) is AttnProcessor2_0 and isinstance(module, Attention):
            swaps.processor(name, attend, AttnProcessor2_0)
        elif hasattr(processor, "_attention_backend"):
            swaps.set(processor, "_attention_backend", backend)
            swaps.serve("attention", name, "attention")
        else:
            swaps.leave("attention", name, f"{type(processor).__name__} does not go through diffusers' dispatcher", servable=True)
    if not found:
        swaps.notes.append("no attention module with a processor, as diffusers has them, was found")


def attend(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AttnProcessor2_0 computes."""
    residual, x = hidden_states, hidden_states
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    image = x.shape[2:] if x.ndim == 4 else None
    if image is not None:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    text = x if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    q, k, v = (to(y).unflatten(-1, (attn.heads, -1)) for to, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text)))
    q = q if attn.norm_q is None else attn.norm_q(q.transpose(1, 2)).transpose(1, 2)
    k = k if attn.norm_k is None else attn.norm_k(k.transpose(1, 2)).transpose(1, 2)
    mask = attention_mask
    if mask is not None and key_padding(mask, *k.shape[:2]) is None:
        mask = attn.prepare_attention_mask(mask, k.shape[1], len(k))
        mask = mask.view(len(k), attn.heads, -1, mask.shape[-1])
    x = masked_attention(q, k, v, mask, swaps=swaps).flatten(2).to(q.dtype)
    for layer in attn.to_out:
        x = layer(x)
    if image is not None:
        x = x.transpose(1, 2).unflatten(2, image)
    if attn.residual_connection:
        x = x + residual
    return x / attn.rescale_output_factor
