"""Wan 2.1 and 2.2 (Wan Team 2025), with VACE (Jiang et al. 2025) and Animate.

What is computed otherwise than in diffusers: hidden states are never copied to float32, norms, modulation, gates and rotary positions are
one op each. A timestep for each token (Wan 2.2 TI2V) is taken for what it is: a few timesteps, and the index of each token's.
"""

from collections.abc import Callable

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_wan as wan
from diffusers.models.transformers import transformer_wan_animate as animate
from diffusers.models.transformers import transformer_wan_vace as vace
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from tubelet.kernels import Mask

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .swaps import Swaps, takes_fp8

TEXT_TOKENS = 512
"""Of the text, which the processor of image-to-video models takes to lie behind the image's."""
A_BLOCK_IS_NOT = "a block is not served, and would not know a table of rows"
Step = Tensor | tuple[Tensor, Tensor]
"""Modulation (batch, 6, dim) or (batch, n, 6, dim), of n stretches of tokens, or rows (n, 6, dim) and the row of each token (tokens,)."""


def swap(swaps: Swaps) -> None:
    """Serve a WanTransformer3DModel, a WanVACETransformer3DModel or a WanAnimateTransformer3DModel."""
    for where, _ in list(swaps.named(nn.Conv3d)):
        swaps.patches(where)
    for where, _ in list(swaps.named(wan.WanAttention, animate.WanAttention)):
        swap_attention(swaps, where, (wan.WanAttnProcessor, animate.WanAttnProcessor))
    for where, _ in list(swaps.named(animate.WanAnimateFaceBlockCrossAttention)):
        norms = ("pre_norm_q", "pre_norm_kv", "norm_q", "norm_k")
        swaps.processor(where, attend_to_face, animate.WanAnimateFaceBlockAttnProcessor, "qk_norm_rope", "attention", norms=norms)
        swaps.linears(where)
    blocks = []
    for kind, function in (
        (wan.WanTransformerBlock, block),
        (animate.WanTransformerBlock, block),
        (vace.WanVACETransformerBlock, vace_block),
    ):
        blocks += [swap_block(swaps, where, kind, function) for where, _ in list(swaps.named(kind))]
    if isinstance(swaps.model, wan.WanTransformer3DModel):
        if not all(blocks):
            swaps.leave("timesteps of tokens", "", A_BLOCK_IS_NOT, servable=True)
        elif swaps.forward("", forward, {"timesteps of tokens": ("modulated_norm", "gated_residual")}, kind=wan.WanTransformer3DModel):
            swaps.last_layer("norm_out", "proj_out")
    else:
        swaps.leave("norm", "norm_out", "once a step, in the model's own forward")


def swap_attention(swaps: Swaps, where: str, kinds: tuple[type, ...]) -> None:
    """Serve an attention module whose processor is Wan's, of one of these classes."""
    swaps.processor(where, attend, kinds, "qk_norm_rope", "attention", norms=("norm_q", "norm_k", "norm_added_k"))


def swap_block(swaps: Swaps, where: str, kind: type, function: Callable) -> bool:
    """Serve a block of Wan's parts whose class is `kind` and whose forward `function` computes; whether that could be done."""
    swaps.linears(where)
    swaps.feed_forward(f"{where}.ffn")
    return swaps.block(where, function, kind, "norm1", "norm2", "norm3")


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | tuple[Mask, ops.Clip] | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What WanAttnProcessor computes; attention_mask: of the text's tokens, or for self-attention the mask and what a clip is."""
    image = None
    if attn.add_k_proj is not None:
        image, encoder_hidden_states = encoder_hidden_states.tensor_split((encoder_hidden_states.shape[1] - TEXT_TOKENS,), dim=1)
    cross = encoder_hidden_states is not None
    lengths, *texts = ops.ordered(attention_mask, encoder_hidden_states) if cross else (None, None)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in wan._get_qkv_projections(attn, hidden_states, *texts))
    cos, sin = (None, None) if rotary_emb is None else (table[0, :, 0] for table in ops.repeated_neighbours(*rotary_emb))
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, across_heads=True, swaps=swaps)
    if isinstance(attention_mask, Tensor) and not cross:  # of pairs: of a model whose own forward could not be replaced
        out = masked_attention(q, k, v, attention_mask, swaps=swaps).flatten(2)
    else:
        mask, clip = (None, ops.Clip()) if cross or attention_mask is None else attention_mask
        out = ops.attend(q, k, v, mask=mask, clip=clip, cross=cross, lengths=lengths, swaps=swaps).flatten(2)
    if image is not None:
        k, v = (x.unflatten(-1, (attn.heads, -1)) for x in wan._get_added_kv_projections(attn, image))
        k = ops.modulate(k.flatten(2), attn.norm_added_k, swaps=swaps).unflatten(-1, (attn.heads, -1))
        out = out + ops.attend(q, k, v, cross=True, swaps=swaps).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def attend_to_face(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, *, swaps: Swaps
) -> Tensor:
    """What WanAnimateFaceBlockAttnProcessor computes: each frame's tokens attend to those of its face."""
    batch, frames = encoder_hidden_states.shape[:2]
    x = ops.modulate(hidden_states, attn.pre_norm_q, swaps=swaps)
    faces = ops.modulate(encoder_hidden_states.flatten(1, 2), attn.pre_norm_kv, swaps=swaps)
    q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in wan._get_qkv_projections(attn, x, faces))
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, swaps=swaps)
    q, k, v = (y.unflatten(1, (frames, -1)).flatten(0, 1) for y in (q, k, v))
    out = ops.attend(q, k, v, cross=True, swaps=swaps).unflatten(0, (batch, frames)).flatten(1, 2).flatten(2)
    out = attn.to_out(out)
    return out if attention_mask is None else out * attention_mask.flatten(1)


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Step,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: tuple[Mask, ops.Clip] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What WanTransformerBlock computes."""
    x, (temb, rows) = hidden_states, temb if isinstance(temb, tuple) else (temb, None)
    how = {"swaps": swaps, "rows": rows}
    shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + temb.float()).unbind(-2)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=reads_fp8(module.attn1), **how)
    y = module.attn1(h, None, attention_mask, rotary_emb)
    if isinstance(module.norm2, nn.Identity):
        h = x = ops.gate(x, y, gate, **how)
    else:
        x, h = ops.gate_and_modulate(x, y, gate, module.norm2, fp8=reads_fp8(module.attn2), **how)
    y = module.attn2(h, encoder_hidden_states, None, None)
    x, h = ops.gate_and_modulate(x, y, None, module.norm3, shift2, scale2, fp8=takes(module.ffn, module.ffn.net[0].proj), **how)
    return ops.gate(x, module.ffn(h), gate2, **how)


def vace_block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
    *,
    swaps: Swaps,
) -> tuple[Tensor | None, Tensor]:
    """What WanVACETransformerBlock computes."""
    x = control_hidden_states
    if module.proj_in is not None:
        x = module.proj_in(x) + hidden_states
    x = block(module, x, encoder_hidden_states, temb, rotary_emb, swaps=swaps)
    return None if module.proj_out is None else module.proj_out(x), x


def reads_fp8(attn: nn.Module) -> bool:
    """Whether an attention module takes E4M3."""
    reads = (attn.to_q,) if attn.is_cross_attention else (attn.to_q, attn.to_k, attn.to_v)
    return not attn.fused_projections and takes_fp8(attn, *reads)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict | None = None,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What WanTransformer3DModel computes."""
    patch = self.config.patch_size
    grid = [side // p for side, p in zip(hidden_states.shape[2:], patch, strict=True)]
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
    if timestep.ndim == 2:
        timestep, rows = ops.distinct(timestep, len(x) * grid[0])
    else:
        rows = None
    temb, modulation, text, image = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    modulation = modulation.unflatten(-1, (6, -1))
    text = text if image is None else torch.cat((image, text), dim=1)
    step = modulation if rows is None else (modulation, rows)
    x = through(self, x, text, step, rotary_emb)
    shift, scale = (self.scale_shift_table.to(temb.device) + temb[:, None]).to(x.device).unbind(1)
    x = ops.unpatch(ops.project(x, self.proj_out, self.norm_out, shift, scale, rows=rows, swaps=swaps), grid, patch)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def through(self: nn.Module, x: Tensor, *arguments) -> Tensor:
    """x through the blocks of a model, with its gradient checkpoints."""
    for layer in self.blocks:
        x = ops.checkpointed(self, layer, x, *arguments)
    return x
