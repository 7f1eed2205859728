"""SANA-Video (Chen et al. 2025), whose self-attention is linear and whose feed-forward is of convolutions: both stay the library's.

What is computed otherwise than in diffusers: timesteps of tokens (image to video) are a few timesteps, and the index of each token's; the
padding of texts is a number of tokens for each.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_sana_video as sana
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import ops
from .fp8 import Rows
from .swaps import PASSES_ON, Processor, Swaps, are_served, takes_fp8

LINEAR = "sums over the keys without a softmax: two products of the library"
CONVOLUTIONS = "the library's: the feed-forward is of convolutions, over frames and over their sites"
Step = Tensor | tuple[Tensor, Tensor]
"""Modulation (batch, n, 6 * dim), of n stretches of tokens, or rows (n, 6 * dim) and the row of each token (batch * tokens,)."""


def swap(swaps: Swaps) -> None:
    """Serve a SanaVideoTransformer3DModel."""
    swaps.patches("patch_embedding")
    served = []
    for where, module in list(swaps.named(sana.SanaVideoTransformerBlock)):
        norms = ("norm_q", "norm_k")
        swaps.processor(f"{where}.attn1", attend_linearly, sana.SanaLinearAttnProcessor3_0, "qk_norm_rope", norms=norms)
        served.append(swaps.processor(f"{where}.attn2", attend, sana.SanaAttnProcessor2_0, "qk_norm_rope", "attention", norms=norms))
        swaps.leave("linear attention", f"{where}.attn1", LINEAR)
        swaps.linears(where)
        for name, _ in module.ff.named_children():
            if name.startswith("conv"):
                swaps.leave("convolution", f"{where}.ff.{name}", CONVOLUTIONS)
        swaps.block(where, block, sana.SanaVideoTransformerBlock, "norm1", "norm2")
    sites = {"timesteps of tokens": ("modulated_norm", "gated_residual")}
    if all(served):
        sites["masks of texts"] = ("attention",)
    else:
        swaps.leave("masks of texts", "", PASSES_ON, servable=True)
    if swaps.forward("", forward, sites, kind=sana.SanaVideoTransformer3DModel):
        swaps.serve("norm", "norm_out", "final_layer")
        swaps.last_layer("norm_out.norm", "proj_out")


def project(attn: Attention, hidden_states: Rows, encoder_hidden_states: Tensor | None, swaps: Swaps) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch, tokens, heads, head_dim), the former two after their norms."""
    text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
    if attn.norm_q is not None:
        q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, across_heads=True, swaps=swaps)
    return q, k, v


def attend_linearly(
    attn: Attention,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What SanaLinearAttnProcessor3_0 computes: the products see queries and keys that are turned, their denominator those that are not."""
    q, k, v = project(attn, hidden_states, encoder_hidden_states, swaps)
    q, k = F.relu(q), F.relu(k)
    cos, sin = (table[0, :, 0] for table in ops.repeated_neighbours(*rotary_emb))
    turned = ops.norm_rope(q, k, cos=cos, sin=sin, swaps=swaps)
    sums = torch.einsum("bnhc,bnhd->bhcd", turned[1].float(), v.float())
    out = torch.einsum("bnhc,bhcd->bnhd", turned[0].float(), sums)
    out = out * (1 / (torch.einsum("bnhc,bhc->bnh", q, k.sum(dim=1)) + 1e-15))[..., None]
    out = out.flatten(2).to(v.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out


def attend(
    attn: Attention,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What SanaAttnProcessor2_0 computes. attention_mask: or how many tokens of each text are there, the first, int32 (batch,)."""
    lengths, text = attention_mask, encoder_hidden_states
    if lengths is not None and lengths.dim() > 1:
        lengths, text = ops.ordered(attention_mask, hidden_states if text is None else text)
    q, k, v = project(attn, hidden_states, text, swaps)
    out = ops.attend(q, k, v, cross=text is not None, lengths=lengths, swaps=swaps).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def block(
    module: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Step | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What SanaVideoTransformerBlock computes."""
    x, attn, (step, rows) = hidden_states, module.attn1, timestep if isinstance(timestep, tuple) else (timestep, None)
    how = {"swaps": swaps, "rows": rows}
    shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + step.unflatten(-1, (6, -1))).unbind(-2)
    x = ops.promoted(x, gate)
    fp8 = takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=fp8, **how)
    x = ops.gate(x, attn(h, rotary_emb=rotary_emb), gate, **how)
    y = module.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, h = ops.gate_and_modulate(x, y, None, module.norm2, shift2, scale2, **how)
    y = module.ff(h.unflatten(1, (frames, height, width))).flatten(1, 3)
    return ops.gate(x, y, gate2, **how)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    guidance: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    attention_kwargs: dict | None = None,
    controlnet_block_samples: tuple[Tensor] | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What SanaVideoTransformer3DModel computes."""
    patch, batch, blocks = self.config.patch_size, len(hidden_states), self.transformer_blocks
    grid = [side // p for side, p in zip(hidden_states.shape[2:], patch, strict=True)]
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
    timestep, rows = timestep.flatten(), None
    if len(timestep) > batch and guidance is None and are_served(blocks):
        timestep, rows = ops.distinct(timestep, batch * grid[0])
    more = {"batch_size": batch} if guidance is None else {"guidance": guidance}
    step, embedded = (
        each if rows is not None else each.unflatten(0, (batch, -1)) for each in self.time_embed(timestep, hidden_dtype=x.dtype, **more)
    )
    text = self.caption_norm(self.caption_projection(encoder_hidden_states).view(batch, -1, x.shape[-1]))
    mask = encoder_attention_mask
    if mask is not None and mask.ndim == 2:
        mask = ((1 - mask.to(x.dtype)) * -10000.0)[:, None]
    if mask is not None and all(isinstance(layer.attn2.processor, Processor) for layer in blocks):
        mask, text = ops.ordered(mask, text)
    given = None, text, mask, step if rows is None else (step, rows), *grid, rotary_emb
    samples = controlnet_block_samples or ()
    for i, layer in enumerate(blocks):
        x = ops.checkpointed(self, layer, x, *given)
        if 0 < i <= len(samples):
            x = x + samples[i - 1]
    shift, scale = (self.scale_shift_table + embedded[..., None, :]).unbind(-2)
    x = ops.unpatch(ops.project(x, self.proj_out, self.norm_out.norm, shift, scale, rows=rows, swaps=swaps), grid, patch)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
