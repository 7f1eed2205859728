"""HunyuanVideo (Kong et al. 2024), whose blocks FramePack and HunyuanVideo-1.5 share.

What is computed otherwise than in diffusers: padding of texts is a number of tokens for each, on the device, never a mask of pairs, and the
host waits for none of them. Where the first frame has a modulation of its own (image to video), the two are rows of one table. Single
blocks give on the video and its text as the parts of one tensor, which the next takes as it is.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_hunyuan_video as hunyuan
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import generic, ops
from .fp8 import Rows, takes
from .swaps import ONCE, Processor, Swaps, takes_fp8

DUAL = hunyuan.HunyuanVideoTransformerBlock, hunyuan.HunyuanVideoTokenReplaceTransformerBlock
SINGLE = hunyuan.HunyuanVideoSingleTransformerBlock, hunyuan.HunyuanVideoTokenReplaceSingleTransformerBlock
MASKS = {"masks of texts": ("attention",)}
QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def swap(swaps: Swaps) -> None:
    """Serve a HunyuanVideoTransformer3DModel."""
    swap_blocks(swaps)
    swap_model(swaps, forward, hunyuan.HunyuanVideoTransformer3DModel)


def swap_blocks(swaps: Swaps) -> None:
    """Serve all but what a model does around its blocks."""
    for name, _ in list(swaps.named(nn.Conv3d)):
        swaps.patches(name)
    swap_refiners(swaps, attend_to_text, hunyuan.HunyuanVideoIndividualTokenRefiner, hunyuan.HunyuanVideoIndividualTokenRefinerBlock)
    for kind in DUAL:
        swap_dual_blocks(swaps, kind, hunyuan.HunyuanVideoAttnProcessor2_0)
    for kind in SINGLE:
        swap_single_blocks(swaps, kind)


def swap_refiners(swaps: Swaps, attention: Callable, kind: type, block: type) -> None:
    """Serve refiners of texts, whose linears are of few tokens."""
    for name, _ in list(swaps.named(block)):
        swaps.processor(f"{name}.attn", attention, AttnProcessor2_0)
        swaps.leave("gates", f"{name}.norm_out", ONCE)
        swaps.block(name, refiner_block, block, "norm1", "norm2")
    for name, module in list(swaps.named(kind)):
        swaps.forward(name, refine, MASKS, kind=kind, passes_on=are_ours(module.refiner_blocks))


def swap_dual_blocks(swaps: Swaps, kind: type, processor: type) -> None:
    """Serve blocks of two streams."""
    for name, _ in list(swaps.named(kind)):
        swaps.processor(f"{name}.attn", attend, processor, "qk_norm_rope", "attention", norms=QK_NORMS)
        swaps.linears(name, "norm1", "norm1_context")
        swaps.feed_forward(f"{name}.ff")
        swaps.feed_forward(f"{name}.ff_context")
        swaps.block(name, dual_block, kind, "norm1.norm", "norm1_context.norm", "norm2", "norm2_context")


def swap_single_blocks(swaps: Swaps, kind: type) -> None:
    """Serve blocks of one stream."""
    for name, _ in list(swaps.named(kind)):
        swaps.processor(f"{name}.attn", attend, hunyuan.HunyuanVideoAttnProcessor2_0, "qk_norm_rope", "attention", norms=QK_NORMS)
        swaps.linears(name, "norm")
        swaps.block(name, single_block, kind, "norm.norm")


def swap_model(swaps: Swaps, function: Callable, kind: type) -> None:
    """Serve what a model does around its blocks."""
    blocks = *swaps.model.transformer_blocks, *getattr(swaps.model, "single_transformer_blocks", ())
    if swaps.forward("", function, MASKS, kind=kind, passes_on=are_ours(blocks)):
        swaps.last_layer("norm_out.norm", "proj_out")


# ------------------------------------------------------------------------------------------------------------------------- attention


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Rows | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor | None]:
    """What HunyuanVideoAttnProcessor2_0 computes, and HunyuanVideo15AttnProcessor2_0 too.

    hidden_states: of single blocks also the video with its text behind it, and no encoder_hidden_states. attention_mask: or how many tokens
    of each text are there, int32 (batch,).
    """
    text, dual = encoder_hidden_states, attn.add_q_proj is not None
    if text is not None and not dual:
        hidden_states = torch.cat((hidden_states, text), dim=1)
    q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    cos, sin = ops.repeated_neighbours(*image_rotary_emb)
    video = len(cos)
    q, k = ops.norm_rope(
        q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, skip=(0, q.shape[1] - video), swaps=swaps
    )  # fmt: skip
    if text is not None and dual:
        q2, k2, v2 = (to(text).unflatten(-1, (attn.heads, -1)) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        q2, k2 = ops.norm_rope(q2, k2, q_norm=attn.norm_added_q, k_norm=attn.norm_added_k, swaps=swaps)
        q, k, v = (torch.cat(each, dim=1) for each in ((q, q2), (k, k2), (v, v2)))
    lengths = attention_mask
    if lengths is not None and lengths.dim() > 1:
        lengths = ops.lengths_of(lengths[..., video - q.shape[1] :])
    out = ops.attend(q, k, v, clip=ops.Clip(text=q.shape[1] - video), lengths=lengths, swaps=swaps).flatten(2)
    if text is None:
        return out, None
    out, text = out[:, :video], out[:, video:]
    if dual:
        out, text = attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(text)
    return out, text


def attend_to_text(
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What AttnProcessor2_0 computes in HunyuanVideo's text refiner. attention_mask: or bool (batch, tokens), which are there; these see
    each other and the first, the others the first alone.
    """
    if attention_mask is None or attention_mask.dim() > 2:
        return generic.attend(attn, hidden_states, encoder_hidden_states, attention_mask, swaps=swaps)
    q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    seen = F.pad(attention_mask[:, 1:], (1, 0), value=True)
    lengths, *keys = ops.ordered(seen, k, v)
    out = ops.attend(q, *keys, cross=True, lengths=lengths, swaps=swaps)
    out = torch.where(attention_mask[:, :, None, None], out, v[:, :1]).flatten(2)
    return attn.to_out[1](attn.to_out[0](out))


def are_ours(blocks: Iterable[nn.Module]) -> bool:
    """Whether all of these blocks' attention takes numbers of tokens for masks."""
    return all(isinstance(block.attn.processor, Processor) for block in blocks)


# ---------------------------------------------------------------------------------------------------------------------------- blocks


def refine(
    module: nn.Module, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None, *, swaps: Swaps
) -> Tensor:  # fmt: skip
    """What a refiner of texts computes, without its mask of pairs."""
    if not are_ours(module.refiner_blocks):
        return type(module).forward(module, hidden_states, temb, attention_mask)
    mask = None if attention_mask is None else attention_mask.to(hidden_states.device).bool()
    for layer in module.refiner_blocks:
        hidden_states = layer(hidden_states, temb, mask)
    return hidden_states


def refiner_block(
    module: nn.Module, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None, *, swaps: Swaps
) -> Tensor:  # fmt: skip
    """What a block of a refiner of texts computes."""
    gate, gate2 = module.norm_out(temb)
    h = ops.modulate(hidden_states, module.norm1, swaps=swaps)
    y = module.attn(hidden_states=h, encoder_hidden_states=None, attention_mask=attention_mask)
    x, h = ops.gate_and_modulate(hidden_states, y, gate, module.norm2, swaps=swaps)
    return ops.gate(x, module.ff(h), gate2, swaps=swaps)


def dual_block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What a block of two streams computes. token_replace_emb: of the first num_tokens tokens, in the place of temb."""
    x, text, attn = hidden_states, encoder_hidden_states, module.attn
    step, rows = conditions(x, temb, token_replace_emb, num_tokens)
    shift, scale, gate, shift2, scale2, gate2 = modulation(module.norm1, step, 6)
    c_shift, c_scale, c_gate, c_shift2, c_scale2, c_gate2 = modulation(module.norm1_context, temb, 6)
    of_video, of_text = {"rows": rows, "swaps": swaps}, {"swaps": swaps}
    fp8 = takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v)
    h = ops.modulate(x, module.norm1.norm, shift, scale, fp8=fp8, **of_video)
    fp8 = takes_fp8(attn, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    c = ops.modulate(text, module.norm1_context.norm, c_shift, c_scale, fp8=fp8, **of_text)
    y, c = attn(hidden_states=h, encoder_hidden_states=c, attention_mask=attention_mask, image_rotary_emb=freqs_cis)
    x, h = ops.gate_and_modulate(x, y, gate, module.norm2, shift2, scale2, fp8=takes(module.ff, module.ff.net[0].proj), **of_video)
    fp8 = takes(module.ff_context, module.ff_context.net[0].proj)
    text, c = ops.gate_and_modulate(text, c, c_gate, module.norm2_context, c_shift2, c_scale2, fp8=fp8, **of_text)
    return ops.gate(x, module.ff(h), gate2, **of_video), ops.gate(text, module.ff_context(c), c_gate2, **of_text)


def single_block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
    *,
    swaps: Swaps,
) -> tuple[Tensor, Tensor]:
    """What a block of one stream computes; arguments as of `dual_block`."""
    video, attn = hidden_states.shape[1], module.attn
    x = joined(hidden_states, encoder_hidden_states)
    step, rows = conditions(x, temb, token_replace_emb, num_tokens)
    shift, scale, gate = modulation(module.norm, step, 3)
    fp8 = takes_fp8(attn, attn.to_q, attn.to_k, attn.to_v, module.proj_mlp)
    h = ops.modulate(x, module.norm.norm, shift, scale, fp8=fp8, rows=rows, swaps=swaps)
    how = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    if isinstance(attn.processor, Processor):
        y = attn(hidden_states=h, **how)[0]
    else:
        y = torch.cat(attn(hidden_states=h[:, :video], encoder_hidden_states=h[:, video:], **how), dim=1)
    y = module.proj_out(torch.cat((y, module.act_mlp(module.proj_mlp(h))), dim=2))
    x = ops.gate(x, y, gate, rows=rows, swaps=swaps)
    return x[:, :video], x[:, video:]


def conditions(x: Tensor, temb: Tensor, first: Tensor | None, number: int | None) -> tuple[Tensor, Tensor | None]:
    """The embeddings that modulate x, (n, channels), and the row of each token in them: with `first`, two of each entry, of which its first
    `number` tokens have the former.
    """
    if first is None:
        return temb, None
    rows = ops.once(_first_rows, *x.shape[:2], number, x.device)
    return torch.stack((first, temb), dim=1).flatten(0, 1), rows


def _first_rows(batch: int, tokens: int, number: int, device: torch.device) -> Tensor:
    later = torch.arange(tokens, device=device) >= number
    return (2 * torch.arange(batch, device=device)[:, None] + later).flatten().int()


def modulation(norm: nn.Module, step: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates that the module around a norm makes of a step's embeddings."""
    return norm.linear(norm.silu(step)).chunk(parts, dim=1)


def joined(video: Tensor, text: Tensor) -> Tensor:
    """One after the other: the tensor whose parts they are, where single blocks give both on; under autograd and in graphs a copy."""
    if not torch.compiler.is_compiling() and not video.requires_grad and not text.requires_grad:
        (batch, first, channels), tokens = video.shape, video.shape[1] + text.shape[1]
        strides, place = (tokens * channels, channels, 1), video.storage_offset()
        same = video.untyped_storage().data_ptr() == text.untyped_storage().data_ptr()
        if same and video.stride() == text.stride() == strides and text.storage_offset() == place + first * channels:
            return video.as_strided((batch, tokens, channels), strides, place)
    return torch.cat((video, text), dim=1)


# ---------------------------------------------------------------------------------------------------------------------------- models


def through(
    model: nn.Module, blocks: Iterable[nn.Module], x: Tensor, text: Tensor, *step: Tensor | tuple[Tensor, Tensor] | int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Video and text after a model's blocks."""
    for layer in blocks:
        x, text = ops.checkpointed(model, layer, x, text, *step)
    return x, text


def finish(
    model: nn.Module, x: Tensor, temb: Tensor, grid: list[int], return_dict: bool, swaps: Swaps
) -> Transformer2DModelOutput | tuple[Tensor]:  # fmt: skip
    """The last norm and projection, and the clips of their patches."""
    patch, norm = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size), model.norm_out
    scale, shift = norm.linear(norm.silu(temb).to(x.dtype)).chunk(2, dim=1)
    x = ops.project(x, model.proj_out, norm.norm, shift, scale, swaps=swaps)
    x = x.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def grid_of(model: nn.Module, clips: Tensor) -> list[int]:
    """How many patches lie along each side."""
    patch = model.config.patch_size_t, model.config.patch_size, model.config.patch_size
    return [side // p for side, p in zip(clips.shape[2:], patch, strict=True)]


def key_mask(blocks: Iterable[nn.Module], lengths: Tensor, video: int, text: int) -> Tensor:
    """Which keys are there as blocks take it: numbers of the texts' tokens, or with processors of others' bool (batch, 1, 1, keys)."""
    if are_ours(blocks):
        return lengths
    seen = torch.arange(text, device=lengths.device) < lengths[:, None]
    return F.pad(seen, (video, 0), value=True)[:, None, None]


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
    attention_kwargs: dict | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What HunyuanVideoTransformer3DModel computes."""
    grid, blocks = grid_of(self, hidden_states), (*self.transformer_blocks, *self.single_transformer_blocks)
    rotary_emb = self.rope(hidden_states)
    temb, first = self.time_text_embed(timestep, pooled_projections, guidance)
    x = self.x_embedder(hidden_states)
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    mask = key_mask(blocks, encoder_attention_mask.sum(dim=1, dtype=torch.int32), x.shape[1], text.shape[1])
    x, _ = through(self, blocks, x, text, temb, mask, rotary_emb, first, grid[1] * grid[2])
    return finish(self, x, temb, grid, return_dict, swaps)
