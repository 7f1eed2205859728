"""Allegro (Zhou et al. 2024).

What is computed otherwise than in diffusers: tables of angles and the lengths of texts are made once a step, not in each layer.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel, AllegroTransformerBlock
from torch import Tensor, nn

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .swaps import PASSES_ON, Processor, Swaps, takes_fp8

Axes = tuple[Tensor, Tensor, Tensor]
Angles = tuple[tuple[tuple[Tensor, Tensor], ...], Axes] | tuple[Tensor, Tensor]
"""cos and sin of each axis, and the places of the tokens (1 or batch, tokens) on each; or tables of pairs, of `tables`."""


def swap(swaps: Swaps) -> None:
    """Serve an AllegroTransformer3DModel."""
    swaps.patches("pos_embed.proj")
    served = []
    for where, _ in list(swaps.named(AllegroTransformerBlock)):
        served.append(swaps.processor(f"{where}.attn1", attend, AllegroAttnProcessor2_0, "qk_norm_rope", "attention"))
        served.append(swaps.processor(f"{where}.attn2", attend, AllegroAttnProcessor2_0))
        swaps.linears(where)
        swaps.feed_forward(f"{where}.ff")
        swaps.block(where, block, AllegroTransformerBlock, "norm1", "norm2")
        swaps.leave("norm", f"{where}.norm3", "the model does not call it")
    sites = {"masks, tables of angles": ("attention", "qk_norm_rope")}
    if not all(served):
        swaps.leave(*sites, "", PASSES_ON, servable=True)
    elif swaps.forward("", forward, sites, kind=AllegroTransformer3DModel):
        swaps.last_layer("norm_out", "proj_out")


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Angles | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AllegroAttnProcessor2_0 computes; attention_mask: or how many tokens of each text are there, int32 (batch,)."""
    cross, mask = encoder_hidden_states is not None, attention_mask
    text = encoder_hidden_states if cross else hidden_states
    q, k, v = (to(x).unflatten(-1, (attn.heads, -1)) for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
    if image_rotary_emb is not None and not attn.is_cross_attention:
        cos, sin = tables(image_rotary_emb)
        q, k = ops.norm_rope(q, k, cos=cos, sin=sin, interleaved=False, axes=(q.shape[-1] // 3,) * 3, swaps=swaps)
    if mask is None or mask.dim() == 1:
        out = ops.attend(q, k, v, cross=cross, lengths=mask, swaps=swaps)
    elif is_of_keys(mask, k):
        lengths, k, v = ops.ordered(mask, k, v)
        out = ops.attend(q, k, v, cross=True, lengths=lengths, swaps=swaps)
    else:
        mask = attn.prepare_attention_mask(mask, k.shape[1], len(k)).view(len(k), attn.heads, -1, k.shape[1])
        out = masked_attention(q, k, v, mask, swaps=swaps)
    out = out.flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def tables(angles: Angles) -> tuple[Tensor, Tensor]:
    """cos and sin of the pairs of each token's channels, those of one axis after the other: (tokens, pairs), or (batch, tokens, pairs)."""
    if isinstance(angles[0], Tensor):
        return angles
    axes, places = angles
    parts = [[F.embedding(at, table[:, : table.shape[1] // 2]) for table in axis] for axis, at in zip(axes, places, strict=True)]
    cos, sin = (torch.cat(each, dim=-1).float() for each in zip(*parts, strict=True))
    return (cos, sin) if len(cos) > 1 else (cos[0], sin[0])


def is_of_keys(mask: Tensor, k: Tensor) -> bool:
    """Whether a mask has one number for each of the keys (batch, tokens, ...)."""
    return mask.shape in (k.shape[:2], (len(k), 1, k.shape[1]))


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Angles | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AllegroTransformerBlock computes."""
    attn, ff = module.attn1, module.ff
    shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + temb.unflatten(-1, (6, -1))).unbind(1)
    x = ops.promoted(hidden_states, gate)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v), swaps=swaps)
    y = attn(h, encoder_hidden_states=None, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
    x = ops.gate(x, y, gate, swaps=swaps)
    y = module.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, h = ops.gate_and_modulate(x, y, None, module.norm2, shift2, scale2, fp8=takes(ff, ff.net[0].proj), swaps=swaps)
    return ops.gate(x, ff(h), gate2, swaps=swaps)


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Angles | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What AllegroTransformer3DModel computes."""
    blocks, mask, text_mask = self.transformer_blocks, attention_mask, encoder_attention_mask
    if not all(isinstance(attn.processor, Processor) for layer in blocks for attn in (layer.attn1, layer.attn2)):
        arguments = timestep, mask, text_mask, image_rotary_emb, return_dict
        return type(self).forward(self, hidden_states, encoder_hidden_states, *arguments)
    batch, _, frames, *sides = hidden_states.shape
    patch = self.config.patch_size_t, self.config.patch_size, self.config.patch_size
    grid = [side // p for side, p in zip((frames, *sides), patch, strict=True)]
    step, embedded = self.adaln_single(timestep, batch_size=batch, hidden_dtype=hidden_states.dtype)
    x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)
    text = self.caption_projection(encoder_hidden_states)
    text = text.view(batch, -1, text.shape[-1])
    if mask is not None and mask.dim() == 4:  # of pixels
        mask = mask[:, :frames].to(x.dtype)
        mask = to_add(F.max_pool3d(mask[:, None], patch, patch).flatten(1).bool(), x.dtype) if mask.numel() else None
    if text_mask is not None and text_mask.dim() == 2:
        text_mask = to_add(text_mask, self.dtype)
    if text_mask is not None and is_of_keys(text_mask, text):
        text_mask, text = ops.ordered(text_mask, text)
    angles = None if image_rotary_emb is None else tables(image_rotary_emb)
    for layer in blocks:
        x = ops.checkpointed(self, layer, x, text, step, mask, text_mask, angles)
    shift, scale = (self.scale_shift_table + embedded[:, None]).unbind(1)
    x = ops.project(x, self.proj_out, self.norm_out, shift, scale, swaps=swaps)
    x = ops.unpatch(x.reshape(batch, math.prod(grid), -1), grid, patch)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def to_add(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (batch, tokens) of ones for what is there, as what is added to scores; where nothing is there that is nothing."""
    return (1 - seen.to(dtype)) * -10000.0
