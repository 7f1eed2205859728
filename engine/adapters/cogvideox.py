"""CogVideoX (Yang et al. 2024) and CogVideoX 1.5, whose blocks ConsisID shares.

What is computed otherwise than in diffusers: a text and its video are one tensor through all blocks, nothing is put together or taken apart
in them: their two modulations are rows of one table.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import cogvideox_transformer_3d as cogvideox
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from tubelet.kernels import patch_embed

from . import ops
from .cosmos import swap_patches
from .fp8 import Rows, takes
from .functions import key_padding, masked_attention
from .hunyuan_video import joined
from .swaps import Processor, Swaps, takes_fp8

ONE_TENSOR = {"text and video in one tensor": ("modulated_norm", "gated_residual")}
PROCESSORS = CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0


def swap(swaps: Swaps) -> None:
    """Serve a CogVideoXTransformer3DModel."""
    served = swap_parts(swaps, cogvideox.CogVideoXBlock)
    swap_model(swaps, forward, cogvideox.CogVideoXTransformer3DModel, served)


def swap_parts(swaps: Swaps, kind: type) -> bool:
    """Serve the patch embedding, and the blocks, whose class is `kind`; whether the forwards of all of these could be replaced."""
    embedding = swaps.module("patch_embed")
    if isinstance(embedding.proj, nn.Conv2d):
        swaps.patches("patch_embed.proj")
    elif embedding.use_positional_embeddings or embedding.use_learned_positional_embeddings:
        swaps.leave("patch embedding", "patch_embed.proj", "positions are added to its patches, which no published model does")
    else:
        swap_patches(swaps, "patch_embed", "proj", embed, CogVideoXPatchEmbed)
    served = []
    for where, _ in list(swaps.named(kind)):
        swaps.processor(f"{where}.attn1", attend, PROCESSORS, "qk_norm_rope", "attention", norms=("norm_q", "norm_k"))
        swaps.linears(where, "norm1", "norm2")
        swaps.feed_forward(f"{where}.ff")
        served.append(swaps.block(where, block, kind, "norm1.norm", "norm2.norm"))
    return all(served)


def swap_model(swaps: Swaps, function: Any, kind: type, passes_on: bool) -> None:
    """Serve what a model does around its blocks. passes_on: whether all of these are served."""
    if swaps.forward("", function, ONE_TENSOR, kind=kind, norms=("norm_final", "norm_out.norm"), passes_on=passes_on):
        swaps.serve("norm", "norm_final", "modulated_norm")
        swaps.serve("norm", "norm_out", "final_layer")
        swaps.last_layer("norm_out.norm", "proj_out")


def embed(module: nn.Module, text_embeds: Tensor, image_embeds: Tensor, *, swaps: Swaps) -> Tensor:
    """What CogVideoXPatchEmbed computes with a linear of patches (batch, T, channels, H, W), without positions."""
    linear, text = module.proj, module.text_proj(text_embeds)
    if type(linear) is not nn.Linear or swaps.refusal(linear, "weight", "bias"):
        return type(module).forward(module, text_embeds, image_embeds)
    patch, how = (module.patch_size_t, module.patch_size, module.patch_size), {"implementation": swaps.implementation}
    tokens = patch_embed(image_embeds.transpose(1, 2).unbind(0), linear.weight, linear.bias, patch=patch, **how)
    return torch.cat((text, tokens.unflatten(0, (len(text), -1))), dim=1)


def attend(
    attn: Attention,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | int,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> Tensor | tuple[Tensor, Tensor]:
    """What CogVideoXAttnProcessor2_0 and FusedCogVideoXAttnProcessor2_0 compute; texts as in `block`."""
    x, text = hidden_states, encoder_hidden_states
    if apart := isinstance(text, Tensor):
        x, text = torch.cat((text, x), dim=1), text.shape[1]
    linears = readers(attn)
    q, k, v = (y.unflatten(-1, (attn.heads, -1)) for to in linears for y in to(x).chunk(3 // len(linears), dim=-1))
    cos, sin = (None, None) if image_rotary_emb is None else ops.repeated_neighbours(*(each.to(q.device) for each in image_rotary_emb))
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, skip=(text, 0), swaps=swaps)
    mask = attention_mask
    if mask is not None and key_padding(mask, *k.shape[:2]) is None:
        mask = attn.prepare_attention_mask(mask, k.shape[1], len(k))
        mask = mask.view(len(k), attn.heads, -1, mask.shape[-1])
    out = masked_attention(q, k, v, mask, swaps=swaps).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return (out[:, text:], out[:, :text]) if apart else out


def readers(attn: Attention) -> tuple[nn.Module, ...]:
    """The linears that read what an attention module is given."""
    fused = type(getattr(attn.processor, "own", None)) is FusedCogVideoXAttnProcessor2_0
    return (attn.to_qkv,) if fused else (attn.to_q, attn.to_k, attn.to_v)


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | int,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor | int]:
    """What a block of CogVideoX computes. encoder_hidden_states: the text, or of how many tokens it is if it lies in front of the video in
    hidden_states; given back in the same way.
    """
    x, text, attn = hidden_states, encoder_hidden_states, module.attn1
    if apart := isinstance(text, Tensor):
        x, text = joined(text, x), text.shape[1]
    how = {"rows": rows_of(x, text), "swaps": swaps}
    shift, scale, gate = modulation(module.norm1, temb, len(x))
    shift2, scale2, gate2 = modulation(module.norm2, temb, len(x))
    h = ops.modulate(x, module.norm1.norm, shift, scale, fp8=takes_fp8(attn, *readers(attn)), **how)
    more = {"image_rotary_emb": image_rotary_emb, **(attention_kwargs or {})}
    if isinstance(attn.processor, Processor):
        y = attn(hidden_states=h, encoder_hidden_states=text, **more)
    else:
        y = torch.cat(attn(hidden_states=h[:, text:], encoder_hidden_states=h[:, :text], **more)[::-1], dim=1)
    x, h = ops.gate_and_modulate(x, y, gate, module.norm2.norm, shift2, scale2, fp8=takes(module.ff, module.ff.net[0].proj), **how)
    x = ops.gate(x, module.ff(h), gate2, **how)
    return (x[:, text:], x[:, :text]) if apart else (x, text)


def modulation(norm: nn.Module, temb: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates (2 * batch, channels), of each entry's video and of its text."""
    return norm.linear(norm.silu(temb.expand(batch, -1))).unflatten(1, (2, 3, -1)).flatten(0, 1).unbind(1)


def rows_of(x: Tensor, text: int) -> Tensor:
    """The row of each token in `modulation`, int32 (batch * tokens,)."""
    return ops.once(_rows, *x.shape[:2], text, x.device)


def _rows(batch: int, tokens: int, text: int, device: torch.device) -> Tensor:
    of_text = torch.arange(tokens, device=device) < text
    return (2 * torch.arange(batch, device=device)[:, None] + of_text).flatten().int()


def are_ours(blocks: Iterable[nn.Module]) -> bool:
    """Whether these blocks take text and video in one tensor; what has hooks is called as the library calls it."""
    return all(getattr(each.forward, "func", None) is block for each in blocks)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    timestep_cond: Tensor | None = None,
    ofs: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What CogVideoXTransformer3DModel computes."""
    emb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype), timestep_cond)
    if self.ofs_embedding is not None:
        emb = emb + self.ofs_embedding(self.ofs_proj(ofs).to(hidden_states.dtype))
    x, text = begin(self, hidden_states, encoder_hidden_states)
    for layer in self.transformer_blocks:
        x, text = ops.checkpointed(self, layer, x, text, emb, image_rotary_emb, attention_kwargs)
    patch = (self.config.patch_size_t or 1, self.config.patch_size, self.config.patch_size)
    return finish(self, x, emb, hidden_states, patch, return_dict, swaps)


def begin(model: nn.Module, clips: Tensor, texts: Tensor) -> tuple[Tensor, Tensor | int]:
    """What the blocks take: text and video in one tensor and of how many tokens the text is, or video and text."""
    x, text = model.embedding_dropout(model.patch_embed(texts, clips)), texts.shape[1]
    return (x, text) if are_ours(model.transformer_blocks) else (x[:, text:], x[:, :text])


def finish(
    model: nn.Module, x: Tensor, emb: Tensor, clips: Tensor, patch: tuple[int, int, int], return_dict: bool, swaps: Swaps
) -> Transformer2DModelOutput | tuple[Tensor]:  # fmt: skip
    """The last norms and projection, and the clips of their patches. x: the video, maybe behind a text, whose few rows cost less than a
    copy of the others.
    """
    frames, _, *sides = clips.shape[1:]
    grid = [-(-frames // patch[0]), *(side // p for side, p in zip(sides, patch[1:], strict=True))]
    norm = model.norm_out
    shift, scale = norm.linear(norm.silu(emb)).expand(len(x), -1).chunk(2, dim=1)
    x = ops.project(ops.modulate(x, model.norm_final, swaps=swaps), model.proj_out, norm.norm, shift, scale, swaps=swaps)
    x = x[:, -math.prod(grid) :].unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 1, 5, 4, 2, 6, 3, 7)
    x = x.flatten(6, 7).flatten(4, 5).flatten(1, 2)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
