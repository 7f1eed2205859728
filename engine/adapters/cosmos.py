"""Cosmos Predict 1, 2 and 2.5 (NVIDIA 2025), with the control net of Transfer 2.5.

What is computed otherwise than in diffusers: where each frame has a timestep of its own, the modulation has a row for each frame and not
for each token; a position that every block adds is added by the norm that follows. Patches are never copied.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets import controlnet_cosmos as controlnet
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_cosmos as cosmos
from torch import Tensor, nn
from tubelet.kernels import patch_embed

from . import ops
from .fp8 import Rows, takes
from .functions import masked_attention
from .swaps import Swaps, are_served, takes_fp8

Context = Tensor | tuple[Tensor | None, Tensor | None] | None
"""A text, or with it the tokens of an image."""
PROCESSORS = cosmos.CosmosAttnProcessor2_0, cosmos.CosmosAttnProcessor2_5
QK_NORMS = ("norm_q", "norm_k", "q_img_norm", "k_img_norm")


def swap(swaps: Swaps) -> None:
    """Serve a CosmosTransformer3DModel or a CosmosControlNetModel."""
    for where, _ in list(swaps.named(cosmos.CosmosPatchEmbed)):
        swap_patches(swaps, where, "proj", embed, cosmos.CosmosPatchEmbed)
    for where, _ in list(swaps.named(cosmos.CosmosTransformerBlock)):
        for name, kinds in (("attn1", PROCESSORS[:1]), ("attn2", PROCESSORS)):
            swaps.processor(f"{where}.{name}", attend, kinds, "qk_norm_rope", "attention", norms=QK_NORMS)
        swaps.linears(where, "norm1", "norm2", "norm3")
        swaps.feed_forward(f"{where}.ff")
        swaps.block(where, block, cosmos.CosmosTransformerBlock, "norm1.norm", "norm2.norm", "norm3.norm")
    sites = {"timesteps of frames": ("modulated_norm", "gated_residual")}
    if isinstance(swaps.model, controlnet.CosmosControlNetModel):
        swaps.forward("", control_forward, sites, kind=controlnet.CosmosControlNetModel)
    elif swaps.forward("", forward, sites, kind=cosmos.CosmosTransformer3DModel):
        swaps.serve("norm", "norm_out", "final_layer")
        swaps.last_layer("norm_out.norm", "proj_out")


def swap_patches(swaps: Swaps, where: str, name: str, function: Callable, kind: type) -> None:
    """Serve a module that gives patches to the linear of that name."""
    linear = swaps.module(f"{where}.{name}")
    reason = swaps.refusal(linear, "weight", "bias") or (None if type(linear) is nn.Linear else f"it is a {type(linear).__name__}")
    if reason:
        swaps.leave("patch embedding", f"{where}.{name}", reason)
    elif swaps.forward(where, function, {"patch embedding": ("patch_embed",)}, kind=kind):
        swaps.serve("linear", f"{where}.{name}", "patch_embed")


# ------------------------------------------------------------------------------------------------------------------------- attention


def attend(
    attn: Attention,
    hidden_states: Rows,
    encoder_hidden_states: Context = None,
    attention_mask: Context = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What CosmosAttnProcessor2_0 and CosmosAttnProcessor2_5 compute."""
    (text, image), (text_mask, image_mask) = both(encoder_hidden_states), both(attention_mask)
    text = hidden_states if text is None else text
    q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)))
    cos, sin = (None, None) if image_rotary_emb is None else ops.repeated_halves(*image_rotary_emb)
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, interleaved=False, swaps=swaps)
    out = masked_attention(q, k, v, text_mask, swaps=swaps)
    if image is not None:
        q, k, v = (
            to(x).unflatten(2, (attn.heads, -1)) for to, x in ((attn.q_img, hidden_states), (attn.k_img, image), (attn.v_img, image))
        )
        q, k = ops.norm_rope(q, k, q_norm=attn.q_img_norm, k_norm=attn.k_img_norm, swaps=swaps)
        out = out + masked_attention(q, k, v, image_mask, swaps=swaps)
    out = out.flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def reads_fp8(attn: Attention, context: Context) -> bool:
    """Whether an attention module takes E4M3."""
    text, image = both(context)
    reads = [attn.to_q, *([attn.to_k, attn.to_v] if text is None else []), *([] if image is None else [attn.q_img])]
    return takes_fp8(attn, *reads)


def both(context: Context) -> tuple[Tensor | None, Tensor | None]:
    """What is of the text and what of the image."""
    return context if isinstance(context, tuple) else (context, None)


# ---------------------------------------------------------------------------------------------------------------------------- blocks


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Context,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Context = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
    *,
    swaps: Swaps,
) -> Tensor | tuple[Tensor, Tensor]:
    """What CosmosTransformerBlock computes. embedded_timestep, temb: (batch, channels), or (batch, n, channels) of n stretches of tokens,
    such as frames.
    """
    x, context = hidden_states, encoder_hidden_states
    if module.before_proj is not None:
        x = module.before_proj(x) + latents
    shift, scale, gate = modulation(module.norm1, embedded_timestep, temb).chunk(3, dim=-1)
    x = ops.promoted(x, gate if extra_pos_emb is None else extra_pos_emb)
    how = {"fp8": reads_fp8(module.attn1, None), "swaps": swaps}
    if extra_pos_emb is None:
        h = ops.modulate(x, module.norm1.norm, shift, scale, **how)
    else:
        x, h = ops.gate_and_modulate(x, extra_pos_emb, None, module.norm1.norm, shift, scale, **how)
    y = module.attn1(h, image_rotary_emb=image_rotary_emb)
    shift, scale, gate2 = modulation(module.norm2, embedded_timestep, temb).chunk(3, dim=-1)
    x, h = ops.gate_and_modulate(x, y, gate, module.norm2.norm, shift, scale, fp8=reads_fp8(module.attn2, context), swaps=swaps)
    y = module.attn2(h, encoder_hidden_states=context, attention_mask=attention_mask)
    shift, scale, gate3 = modulation(module.norm3, embedded_timestep, temb).chunk(3, dim=-1)
    x, h = ops.gate_and_modulate(x, y, gate2, module.norm3.norm, shift, scale, fp8=takes(module.ff, module.ff.net[0].proj), swaps=swaps)
    x = ops.gate(x, module.ff(h), gate3, swaps=swaps)
    if controlnet_residual is not None:
        x = x + controlnet_residual.to(x.dtype)
    return x if module.after_proj is None else (x, module.after_proj(x))


def modulation(norm: nn.Module, embedded_timestep: Tensor, temb: Tensor | None) -> Tensor:
    """Shifts, scales and gates, one after the other, that a module around a norm makes of a step's embeddings."""
    table = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
    return table if temb is None else table + temb[..., : table.shape[-1]]


# ---------------------------------------------------------------------------------------------------------------------------- models


def embed(module: nn.Module, x: Tensor, *, swaps: Swaps) -> Tensor:
    """What CosmosPatchEmbed computes: the tokens of clips (batch, channels, T, H, W), as (batch, t, h, w, dim)."""
    linear, patch = module.proj, tuple(module.patch_size)
    if type(linear) is not nn.Linear or swaps.refusal(linear, "weight", "bias"):
        return type(module).forward(module, x)
    tokens = patch_embed(x.unbind(0), linear.weight, linear.bias, patch=patch, implementation=swaps.implementation)
    return tokens.view(len(x), *grid_of(x, patch), -1)


def grid_of(x: Tensor, patch: Sequence[int]) -> list[int]:
    """How many patches lie along each side."""
    return [side // p for side, p in zip(x.shape[2:], patch, strict=True)]


def with_masks(x: Tensor, condition_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor:
    """Clips with their masks as channels. padding_mask: (1, 1, H, W) of any size."""
    masks = [] if condition_mask is None else [condition_mask]
    if padding_mask is not None:
        size = F.interpolate(padding_mask.float(), x.shape[-2:], mode="nearest").to(x.dtype)
        masks.append(size.unsqueeze(2).expand(len(x), -1, x.shape[2], -1, -1))
    return torch.cat([x, *masks], dim=1)


def conditions(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    clips: Tensor,
    tokens: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Context,
    attention_mask: Tensor | None,
    fps: int | None,
) -> tuple:
    """What a model gives to all of its blocks, as these take it behind the tokens."""
    if timestep.ndim not in (1, 5):
        raise ValueError(f"timestep: expected (batch,) or (batch, 1, frames, 1, 1), got {tuple(timestep.shape)}")
    temb, embedded = model.time_embed(tokens, timestep.flatten() if timestep.ndim == 5 else timestep.expand(len(clips)))
    if timestep.ndim == 5:  # of frames, whose tokens share a row, if all blocks know that
        each = 1 if are_served(blocks) else tokens.shape[1] // timestep.shape[2]
        temb, embedded = (table.unflatten(0, (len(clips), -1)).repeat_interleave(each, dim=1) for table in (temb, embedded))
    text, image = both(encoder_hidden_states)
    if model.config.use_crossattn_projection:
        text = model.crossattn_proj(text)
    if model.config.img_context_dim_in and image is not None:
        image = model.img_context_proj(image)
    context = (text, image) if model.config.img_context_dim_in else text
    position = None if model.learnable_pos_embed is None else model.learnable_pos_embed(clips)
    mask = None if attention_mask is None else attention_mask[:, None, None]
    return context, embedded, temb, model.rope(clips, fps=fps), position, mask


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Context,
    block_controlnet_hidden_states: list[Tensor] | None = None,
    attention_mask: Tensor | None = None,
    fps: int | None = None,
    condition_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What CosmosTransformer3DModel computes."""
    pt, ph, pw = self.config.patch_size
    grid, controls = grid_of(hidden_states, (pt, ph, pw)), block_controlnet_hidden_states
    clips = with_masks(hidden_states, condition_mask, padding_mask if self.config.concat_padding_mask else None)
    x = self.patch_embed(clips).flatten(1, 3)
    shared = conditions(self, self.transformer_blocks, clips, x, timestep, encoder_hidden_states, attention_mask, fps)
    for i, layer in enumerate(self.transformer_blocks):
        controlled = controls is not None and i % self.config.controlnet_block_every_n == 0
        x = ops.checkpointed(self, layer, x, *shared, controls[i // self.config.controlnet_block_every_n] if controlled else None)
    shift, scale = modulation(self.norm_out, *shared[1:3]).chunk(2, dim=-1)
    x = ops.project(x, self.proj_out, self.norm_out.norm, shift, scale, swaps=swaps)
    x = x.unflatten(2, (ph, pw, pt, -1)).unflatten(1, grid).permute(0, 7, 1, 6, 2, 4, 3, 5)
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def control_forward(
    self: nn.Module,
    controls_latents: Tensor,
    latents: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Context,
    condition_mask: Tensor | None,
    conditioning_scale: float | list[float] = 1.0,
    padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    fps: int | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> controlnet.CosmosControlNetOutput | tuple[list[Tensor]]:
    """What CosmosControlNetModel computes."""
    missing = max(self.config.in_channels - 2 - controls_latents.shape[1], 0)
    known = torch.zeros_like(controls_latents[:, :1]) if condition_mask is None else condition_mask
    clips = with_masks(F.pad(controls_latents, (0, 0, 0, 0, 0, 0, 0, missing)), known, padding_mask)
    x = self.patch_embed(clips).flatten(1, 3)
    base = self.patch_embed_base(with_masks(latents, condition_mask, padding_mask)).flatten(1, 3)
    shared = conditions(self, self.control_blocks, clips, base, timestep, encoder_hidden_states, attention_mask, fps)
    samples = []
    for layer, scale in zip(self.control_blocks, self._expand_conditioning_scale(conditioning_scale), strict=False):
        x, sample = ops.checkpointed(self, layer, x, *shared, None, base)
        samples.append(sample * scale)
    return controlnet.CosmosControlNetOutput(control_block_samples=samples) if return_dict else (samples,)
