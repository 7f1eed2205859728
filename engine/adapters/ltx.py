"""LTX-Video (HaCohen et al. 2024).

What is computed otherwise than in diffusers: a timestep for each token (known frames) is a few timesteps, and the index of each token's;
the padding of texts is a number of tokens for each; angles are tables of pairs, made once, and of clips of the same grid for one of them.
"""

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_ltx as ltx
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .ltx2 import Angles, Step, as_bias, parts
from .swaps import PASSES_ON, Processor, Swaps, are_served, takes_fp8


def swap(swaps: Swaps) -> None:
    """Serve an LTXVideoTransformer3DModel."""
    blocks = [swap_block(swaps, where) for where, _ in list(swaps.named(ltx.LTXVideoTransformerBlock))]
    sites = {"timesteps of tokens": ("modulated_norm", "gated_residual"), "masks of texts": ("attention",)}
    if not all(blocks):
        for site in sites:
            swaps.leave(site, "", PASSES_ON, servable=True)
    elif swaps.forward("", forward, sites, kind=ltx.LTXVideoTransformer3DModel):
        swaps.last_layer("norm_out", "proj_out")


def swap_block(swaps: Swaps, where: str) -> bool:
    """Serve a block; whether its forward and its attention could be replaced."""
    how = attend, ltx.LTXVideoAttnProcessor, "qk_norm_rope", "attention"
    served = [swaps.processor(f"{where}.{name}", *how, norms=("norm_q", "norm_k")) for name in ("attn1", "attn2")]
    swaps.linears(where)
    swaps.feed_forward(f"{where}.ff")
    return swaps.block(where, block, ltx.LTXVideoTransformerBlock, "norm1", "norm2") and all(served)


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | Angles | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What LTXVideoAttnProcessor computes. attention_mask: or how many keys of each entry are there, the first, int32 (batch,)."""
    text, mask = hidden_states if encoder_hidden_states is None else encoder_hidden_states, attention_mask
    q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
    cos, sin = (None, None) if image_rotary_emb is None else angles_of(image_rotary_emb, attn.heads)
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, across_heads=True, swaps=swaps)
    if mask is None or mask.dim() == 1:
        out = ops.attend(q, k, v, cross=encoder_hidden_states is not None, lengths=mask, swaps=swaps)
    elif mask.numel() == len(k) * k.shape[1]:
        lengths, k, v = ops.ordered(mask, k, v)
        out = ops.attend(q, k, v, cross=True, lengths=lengths, swaps=swaps)
    else:
        mask = attn.prepare_attention_mask(mask, k.shape[1], len(k)).view(len(k), attn.heads, -1, k.shape[1])
        out = masked_attention(q, k, v, mask, swaps=swaps)
    out = out.flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def angles_of(rotary_emb: tuple[Tensor, Tensor] | Angles, heads: int) -> Angles:
    """The library's tables (batch, tokens, channels) hold each angle twice, side by side."""
    if isinstance(rotary_emb, Angles):
        return rotary_emb
    return Angles(*(table[..., ::2].unflatten(2, (heads, -1)).float().contiguous() for table in rotary_emb))


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Step,
    image_rotary_emb: tuple[Tensor, Tensor] | Angles | None = None,
    encoder_attention_mask: Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What LTXVideoTransformerBlock computes."""
    x, attn, ff = hidden_states, module.attn1, module.ff
    (shift, scale, gate, shift2, scale2, gate2), rows = parts(module.scale_shift_table, temb)
    how, x = {"rows": rows, "swaps": swaps}, ops.promoted(x, gate)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v), **how)
    y = attn(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    x = ops.gate(x, y, gate, **how)
    y = module.attn2(x, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=None, attention_mask=encoder_attention_mask)
    x, h = ops.gate_and_modulate(x, y, None, module.norm2, shift2, scale2, fp8=takes(ff, ff.net[0].proj), **how)
    return ops.gate(x, ff(h), gate2, **how)


def forward(self: nn.Module, *args, swaps: Swaps, **kwargs) -> Transformer2DModelOutput | tuple[Tensor]:
    """What LTXVideoTransformer3DModel computes; its own forward gives processors of others what they know."""
    blocks = self.transformer_blocks
    if are_served(blocks) and all(isinstance(attn.processor, Processor) for each in blocks for attn in (each.attn1, each.attn2)):
        return served_forward(self, *args, swaps=swaps, **kwargs)
    return type(self).forward(self, *args, **kwargs)


@apply_lora_scale("attention_kwargs")
def served_forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor | None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: tuple[Tensor | float, float, float] | Tensor | None = None,
    video_coords: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What LTXVideoTransformer3DModel computes with all of its blocks served."""
    batch, factors = len(hidden_states), () if rope_interpolation_scale is None else rope_interpolation_scale
    alike = video_coords is None and not any(isinstance(factor, Tensor) and factor.dim() for factor in factors)
    like = hidden_states[:1] if alike else hidden_states
    tables = self.rope(like, num_frames, height, width, rope_interpolation_scale, video_coords)
    angles = angles_of(tables, self.config.num_attention_heads)
    x = self.proj_in(hidden_states)
    timestep, rows = timestep.flatten(), None
    if len(timestep) > batch:
        timestep, rows = ops.distinct(timestep, batch * (num_frames or 1))
    step, embedded = (
        each if rows is not None else each.unflatten(0, (batch, -1))
        for each in self.time_embed(timestep, batch_size=batch, hidden_dtype=x.dtype)
    )
    text, mask = self.caption_projection(encoder_hidden_states).view(batch, -1, x.shape[-1]), encoder_attention_mask
    if mask is not None and mask.dim() == 2:
        mask = as_bias(mask, hidden_states)[:, None]
    if mask is not None and mask.numel() == batch * text.shape[1]:
        mask, text = ops.ordered(mask, text)
    given = text, step if rows is None else (step, rows), angles, mask
    for layer in self.transformer_blocks:
        x = ops.checkpointed(self, layer, x, *given)
    shift, scale = (self.scale_shift_table + embedded[..., None, :]).unbind(-2)
    x = ops.project(x, self.proj_out, self.norm_out, shift, scale, rows=rows, swaps=swaps)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
