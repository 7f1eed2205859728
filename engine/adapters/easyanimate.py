"""EasyAnimate 5.1 (Xu et al. 2024).

What is computed otherwise than in diffusers: the table of angles is made where the clips are, once a step; there it is made on the host and
copied in each layer, for queries and again for keys.
"""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_easyanimate as easyanimate
from torch import Tensor, nn

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .swaps import Swaps, takes_fp8


def swap(swaps: Swaps) -> None:
    """Serve an EasyAnimateTransformer3DModel."""
    swaps.patches("proj")
    names = "norm_q", "norm_k", "norm_added_q", "norm_added_k"
    for where, module in list(swaps.named(easyanimate.EasyAnimateTransformerBlock)):
        processor = easyanimate.EasyAnimateAttnProcessor2_0
        swaps.processor(f"{where}.attn1", attend, processor, "qk_norm_rope", "attention", norms=names)
        swaps.linears(where, "norm1", "norm2")
        for name in ("ff", "txt_ff"):
            if getattr(module, name) is not None:
                swaps.feed_forward(f"{where}.{name}")
        norms = ("norm1.norm", "norm2.norm", *(["norm3"] if module.norm3 is not None else []))
        swaps.block(where, block, easyanimate.EasyAnimateTransformerBlock, *norms)
    swaps.forward("rope_embedding", angles, {"table of angles": ("qk_norm_rope",)}, kind=easyanimate.EasyAnimateRotaryPosEmbed)
    sites, norms = {"last norms": ("modulated_norm", "final_layer")}, ("norm_final", "norm_out.norm")
    if swaps.forward("", forward, sites, kind=easyanimate.EasyAnimateTransformer3DModel, norms=norms):
        swaps.serve("norm", "norm_final", "modulated_norm")
        swaps.serve("norm", "norm_out", "final_layer")
        swaps.last_layer("norm_out.norm", "proj_out")


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Rows,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What EasyAnimateAttnProcessor2_0 computes: a text in front of its video, of which the video turns."""
    x, text, dual = hidden_states, encoder_hidden_states, attn.add_q_proj is not None
    words = (text[0] if isinstance(text, tuple) else text).shape[1]
    x = x if dual else torch.cat((text, x), dim=1)
    q, k, v = (to(x).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    cos, sin = (None, None) if image_rotary_emb is None else ops.repeated_neighbours(*(each.to(q.device) for each in image_rotary_emb))
    skip = (0, 0) if dual else (words, 0)
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, skip=skip, swaps=swaps)
    if dual:
        q2, k2, v2 = (to(text).unflatten(-1, (attn.heads, -1)) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        q2, k2 = ops.norm_rope(q2, k2, q_norm=attn.norm_added_q, k_norm=attn.norm_added_k, swaps=swaps)
        q, k, v = (torch.cat(each, dim=1) for each in ((q2, q), (k2, k), (v2, v)))
    out = masked_attention(q, k, v, attention_mask, swaps=swaps).flatten(2)
    x, text = out[:, words:], out[:, :words]
    for layer in attn.to_out:
        x = layer(x)
    return x, attn.to_add_out(text) if dual else text


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What EasyAnimateTransformerBlock computes."""
    x, text, attn, ff, how = hidden_states, encoder_hidden_states, module.attn1, module.ff, {"swaps": swaps}
    of_text = ff if module.txt_ff is None else module.txt_ff
    norm, norm2, dual = module.norm1.norm, module.norm2.norm, attn.add_q_proj is not None
    shift, scale, gate, c_shift, c_scale, c_gate = modulation(module.norm1, temb, len(x), 6)
    shift2, scale2, gate2, c_shift2, c_scale2, c_gate2 = modulation(module.norm2, temb, len(x), 6)
    h = ops.modulate(x, norm, shift, scale, fp8=dual and takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v), **how)
    fp8 = dual and takes_fp8(attn, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    c = ops.modulate(text, norm, c_shift, c_scale, fp8=fp8, **how)
    y, c = attn(hidden_states=h, encoder_hidden_states=c, image_rotary_emb=image_rotary_emb)
    x, h = ops.gate_and_modulate(x, y, gate, norm2, shift2, scale2, fp8=takes(ff, ff.net[0].proj), **how)
    text, c = ops.gate_and_modulate(text, c, c_gate, norm2, c_shift2, c_scale2, fp8=takes(of_text, of_text.net[0].proj), **how)
    y, c = ff(h), of_text(c)
    if module.norm3 is not None:
        y, c = (ops.modulate(each, module.norm3, **how) for each in (y, c))
    return ops.gate(x, y, gate2, **how), ops.gate(text, c, c_gate2, **how)


def modulation(norm: nn.Module, temb: Tensor, batch: int, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates (batch, channels) that the module around a norm makes of a step's embeddings."""
    return norm.linear(norm.silu(temb)).expand(batch, -1).chunk(parts, dim=1)


def angles(module: nn.Module, hidden_states: Tensor, *, swaps: Swaps) -> tuple[Tensor, Tensor]:
    """What EasyAnimateRotaryPosEmbed computes, where the clips (batch, channels, T, H, W) are."""
    frames, *sides = hidden_states.shape[2:]
    grid = tuple(side // module.patch_size for side in sides)
    region = module.get_resize_crop_region_for_grid(grid, 90 // module.patch_size, 60 // module.patch_size)
    return get_3d_rotary_pos_embed(module.rope_dim, region, grid, frames, device=hidden_states.device)


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    timestep_cond: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_t5: Tensor | None = None,
    inpaint_latents: Tensor | None = None,
    control_latents: Tensor | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What EasyAnimateTransformer3DModel computes."""
    (batch, _, frames, *sides), patch = hidden_states.shape, self.config.patch_size
    temb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype), timestep_cond)
    rotary_emb = self.rope_embedding(hidden_states)
    clips = torch.cat([each for each in (hidden_states, inpaint_latents, control_latents) if each is not None], dim=1)
    x = self.proj(clips.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (batch, frames)).flatten(1, 2)
    text = self.text_proj(encoder_hidden_states)
    if encoder_hidden_states_t5 is not None:
        text = torch.cat((text, self.text_proj_t5(encoder_hidden_states_t5)), dim=1)
    for layer in self.transformer_blocks:
        x, text = ops.checkpointed(self, layer, x, text, temb, rotary_emb)
    shift, scale = modulation(self.norm_out, temb, batch, 2)
    x = ops.project(ops.modulate(x, self.norm_final, swaps=swaps), self.proj_out, self.norm_out.norm, shift, scale, swaps=swaps)
    x = x.unflatten(2, (-1, patch, patch)).unflatten(1, (frames, *(side // patch for side in sides))).permute(0, 4, 1, 2, 5, 3, 6)
    x = x.flatten(5, 6).flatten(3, 4)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
