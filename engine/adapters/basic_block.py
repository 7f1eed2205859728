"""`BasicTransformerBlock` of diffusers, of which Latte's and AnimateDiff's transformers are made.

A block takes what the library's takes, and also whole clips: hidden states (batch, frames * sites, channels), with a mask and what a clip
is for `attention_mask`, in the place of frames or sites that are entries of a batch. Positions of frames are added by the norm before.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from diffusers.models.attention import BasicTransformerBlock, _chunked_feed_forward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from tubelet.kernels import Mask

from . import generic, ops
from .fp8 import Rows, takes
from .swaps import Processor, Swaps, are_served, takes_fp8


class Texts(NamedTuple):
    """Which tokens of a clip's text each of its frames sees.

    lengths: int32 (batch * frames,), how many. rows: (batch * frames, tokens), which of the tokens of all texts, these first.
    """

    lengths: Tensor
    rows: Tensor


def swap_block(swaps: Swaps, where: str) -> None:
    """Serve a block."""
    module = swaps.module(where)
    for name in ("attn1", "attn2"):
        if getattr(module, name) is not None:
            swaps.processor(f"{where}.{name}", attend, AttnProcessor2_0)
    swaps.linears(where)
    swaps.feed_forward(f"{where}.ff")
    norms = [name for name in ("norm1", "norm2", "norm3") if isinstance(getattr(module, name, None), nn.Module)]
    if module.norm_type != "layer_norm" and (module.norm_type != "ada_norm_single" or module.pos_embed is not None):
        for norm in norms:
            swaps.leave("norm", f"{where}.{norm}", f"{module.norm_type} is not known to the adapter")
    else:
        swaps.block(where, block, BasicTransformerBlock, *norms)


def take_clips(blocks: Iterable[nn.Module]) -> bool:
    """Whether these blocks, as they are now, take whole clips."""
    blocks = list(blocks)
    return are_served(blocks) and all(
        block._chunk_size is None and all(attn is None or isinstance(attn.processor, Processor) for attn in (block.attn1, block.attn2))
        for block in blocks
    )


def attend(
    attn: Attention,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | tuple[Mask, ops.Clip] | Texts | None = None,
    temb: Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AttnProcessor2_0 computes; attention_mask: or what a clip's tokens see of each other, or its frames of its text."""
    if isinstance(attention_mask, Tensor):
        return generic.attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, swaps=swaps)
    cross = encoder_hidden_states is not None
    text = encoder_hidden_states if cross else hidden_states
    q, k, v = (to(x).unflatten(-1, (attn.heads, -1)) for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
    if isinstance(attention_mask, Texts):
        lengths, rows = attention_mask
        batch, frames = len(q), len(rows) // len(q)
        q, k, v = q.unflatten(1, (frames, -1)).flatten(0, 1), k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]
        out = ops.attend(q, k, v, cross=True, lengths=lengths, swaps=swaps).unflatten(0, (batch, frames)).flatten(1, 2)
    else:
        mask, clip = attention_mask or (None, ops.Clip())
        out = ops.attend(q, k, v, mask=mask, clip=clip, cross=cross, swaps=swaps)
    out = out.flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def block(
    module: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | tuple[Mask, ops.Clip] | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | Texts | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What BasicTransformerBlock computes, with plain norms or one modulation of all (`ada_norm_single`)."""
    x, text, more = hidden_states, encoder_hidden_states, cross_attention_kwargs or {}
    if more.get("gligen") is not None:
        how = attention_mask, text, encoder_attention_mask, timestep, more, class_labels, added_cond_kwargs
        return type(module).forward(module, x, *how)
    whole = isinstance(attention_mask, tuple)
    text_mask = attention_mask if whole and text is None else encoder_attention_mask
    shift = scale = gate = shift2 = scale2 = gate2 = None
    if single := module.norm_type == "ada_norm_single":
        shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + timestep.unflatten(-1, (6, -1))).unbind(1)
        x = ops.promoted(x, gate)
    elif module.pos_embed is not None:
        frames = attention_mask[1].frames if whole else x.shape[1]
        shift = module.pos_embed.pe[:, :frames].expand(len(x), frames, -1)
    last, proj = module.norm2 if single else module.norm3, module.ff.net[0].proj
    of_last = {"fp8": module._chunk_size is None and takes(module.ff, proj), "swaps": swaps}
    own = text if module.only_cross_attention else None
    h = ops.modulate(x, module.norm1, shift, scale, fp8=reads_fp8(module.attn1, attention_mask, own), swaps=swaps)
    y = module.attn1(h, encoder_hidden_states=own, attention_mask=attention_mask, **more)
    if module.attn2 is None:
        x, h = ops.gate_and_modulate(x, y, gate, last, shift2, scale2, **of_last)
    else:
        if single:
            h = x = ops.gate(x, y, gate, swaps=swaps)
        else:
            x, h = ops.gate_and_modulate(x, y, None, module.norm2, shift, fp8=reads_fp8(module.attn2, text_mask, text), swaps=swaps)
        y = module.attn2(h, encoder_hidden_states=text, attention_mask=text_mask, **more)
        x, h = ops.gate_and_modulate(x, y, None, last, shift2, scale2, **of_last)
    y = module.ff(h) if module._chunk_size is None else _chunked_feed_forward(module.ff, h, module._chunk_dim, module._chunk_size)
    return ops.gate(x, y, gate2, swaps=swaps)


def reads_fp8(attn: nn.Module, mask: Any, text: Tensor | None) -> bool:
    """Whether an attention module takes E4M3."""
    reads = (attn.to_q, attn.to_k, attn.to_v) if text is None else (attn.to_q,)
    return not isinstance(mask, Tensor) and takes_fp8(attn, *reads)
