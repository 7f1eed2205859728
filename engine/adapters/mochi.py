"""Mochi 1 (Genmo 2024).

What is computed otherwise than in diffusers: which tokens of the texts are there is sorted out once a step, on the device, and all entries
of a batch attend in one call, where the library waits for each of them in each layer. A norm after attention or feed-forward is an op of
its own; its gate through tanh, the sum and the next norm are another.
"""

from typing import NamedTuple

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm, MochiTransformer3DModel, MochiTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import fp8, ops
from .swaps import Processor, Swaps, takes_fp8

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Text(NamedTuple):
    """Which tokens of the texts of a batch are there.

    lengths: int32 (batch,), how many. order: (batch, tokens, 1), their places, and behind them those of the others. there: bool (batch,
    tokens, 1), which of `order` are there.
    """

    lengths: Tensor
    order: Tensor
    there: Tensor


def swap(swaps: Swaps) -> None:
    """Serve a MochiTransformer3DModel."""
    swaps.patches("patch_embed.proj")
    served = []
    for where, module in list(swaps.named(MochiTransformerBlock)):
        served.append(swaps.processor(f"{where}.attn1", attend, MochiAttnProcessor2_0, "qk_norm_rope", "attention", norms=QK_NORMS))
        swaps.linears(where, "norm1", "norm1_context")
        for name in ("ff", "ff_context"):
            if getattr(module, name) is not None:
                swaps.feed_forward(f"{where}.{name}")
        norms = [name for name, norm in module.named_modules() if isinstance(norm, MochiModulatedRMSNorm | RMSNorm)]
        unread = [name for name in norms if module.context_pre_only and name.startswith("norm4_context")]
        swaps.block(where, block, MochiTransformerBlock, *(name for name in norms if name not in unread))
        for name in unread:
            swaps.leave("norm", f"{where}.{name}", "the model does not call it")
    if swaps.forward("", forward, {"masks of texts": ("attention",)}, kind=MochiTransformer3DModel, passes_on=all(served)):
        swaps.last_layer("norm_out.norm", "proj_out")


def attend(
    attn: MochiAttention,
    hidden_states: fp8.Rows,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | Text,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What MochiAttnProcessor2_0 computes, also that what it gives for a text's tokens is one after the other, and zeros behind them."""
    text = attention_mask if isinstance(attention_mask, Text) else text_of(attention_mask)
    words = encoder_hidden_states.take_along_dim(text.order, dim=1)
    if takes_fp8(attn, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj):
        words = fp8.rows(words, swaps)
    q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q2, k2, v2 = (to(words).unflatten(-1, (attn.heads, -1)) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    cos, sin = (None, None) if image_rotary_emb is None else (table[None] for table in image_rotary_emb)
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, swaps=swaps)
    q2, k2 = ops.norm_rope(q2, k2, q_norm=attn.norm_added_q, k_norm=attn.norm_added_k, swaps=swaps)
    q, k, v = (torch.cat(each, dim=1) for each in ((q, q2), (k, k2), (v, v2)))
    out = ops.attend(q, k, v, clip=ops.Clip(text=q2.shape[1]), lengths=text.lengths, swaps=swaps).flatten(2)
    y, words = out.split((q.shape[1] - q2.shape[1], q2.shape[1]), dim=1)
    words = torch.where(text.there, words, 0)
    y = attn.to_out[1](attn.to_out[0](y))
    return y, attn.to_add_out(words) if hasattr(attn, "to_add_out") else words


def text_of(mask: Tensor) -> Text:
    """What a mask (batch, tokens), zero for tokens that are not there, says."""
    places = torch.arange(mask.shape[1], device=mask.device)
    lengths, order = ops.ordered(mask.bool(), places.expand(mask.shape))
    return Text(lengths, order[..., None], (places < lengths[:, None])[..., None])


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor | Text,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What MochiTransformerBlock computes."""
    x, text, attn, norm, text_norm = hidden_states, encoder_hidden_states, module.attn1, module.norm1, module.norm1_context
    scale, *step = norm.linear(norm.silu(temb)).chunk(4, dim=1)
    if module.context_pre_only:
        text_scale = text_norm.linear_1(text_norm.silu(temb).to(text.dtype))
    else:
        text_scale, *text_step = text_norm.linear(text_norm.silu(temb)).chunk(4, dim=1)
    h = ops.modulate(x, norm.norm, None, scale, fp8=takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v), swaps=swaps)
    c = ops.modulate(text, text_norm.norm, None, text_scale, swaps=swaps)
    y, c = attn(hidden_states=h, encoder_hidden_states=c, attention_mask=encoder_attention_mask, image_rotary_emb=image_rotary_emb)
    x = rest(x, y, *step, module.ff, module.norm2, module.norm3, module.norm4, swaps)
    if not module.context_pre_only:
        text = rest(text, c, *text_step, module.ff_context, module.norm2_context, module.norm3_context, module.norm4_context, swaps)
    return x, text


def rest(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, gate2: Tensor, ff: nn.Module, norm2: nn.Module, norm3: nn.Module, norm4: nn.Module,
    swaps: Swaps,
) -> Tensor:  # fmt: skip
    """What a block does with one stream, x, after attention, which gave y for it."""
    y = ops.modulate(y, norm2, swaps=swaps)
    x, h = ops.gate_and_modulate(x, y, gate, norm3, None, scale, tanh=True, fp8=fp8.takes(ff, ff.net[0].proj), swaps=swaps)
    return ops.gate(x, ops.modulate(ff(h), norm4, swaps=swaps), gate2, tanh=True, swaps=swaps)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: dict | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What MochiTransformer3DModel computes."""
    batch, _, frames, height, width = hidden_states.shape
    patch, mask = self.config.patch_size, encoder_attention_mask
    grid = frames, height // patch, width // patch
    temb, text = self.time_embed(timestep, encoder_hidden_states, mask, hidden_dtype=hidden_states.dtype)
    x = self.patch_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).flatten(1, 2)
    rotary_emb = self.rope(self.pos_frequencies, *grid, device=x.device, dtype=torch.float32)
    if all(isinstance(layer.attn1.processor, Processor) for layer in self.transformer_blocks):
        mask = text_of(mask)
    for layer in self.transformer_blocks:
        x, text = ops.checkpointed(self, layer, x, text, temb, mask, rotary_emb)
    norm = self.norm_out
    scale, shift = norm.linear(norm.silu(temb).to(x.dtype)).chunk(2, dim=1)
    x = ops.unpatch(ops.project(x, self.proj_out, norm.norm, shift, scale, swaps=swaps), grid, (1, patch, patch))
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
