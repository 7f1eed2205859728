"""Helios: Wan's blocks over a chunk of frames behind a history of them at three resolutions, which is at timestep zero.

What is computed otherwise than in diffusers, besides what `wan` does: the modulation has a row for the history and one for each clip, not
one for each token.
"""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_helios as helios
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import ops
from .fp8 import Rows, takes
from .swaps import Swaps
from .wan import A_BLOCK_IS_NOT, reads_fp8, swap_block, through


def swap(swaps: Swaps) -> None:
    """Serve a HeliosTransformer3DModel."""
    for where, _ in list(swaps.named(nn.Conv3d)):
        swaps.patches(where)
    for where, _ in list(swaps.named(helios.HeliosAttention)):
        swaps.processor(where, attend, helios.HeliosAttnProcessor, "qk_norm_rope", "attention", norms=("norm_q", "norm_k"))
    kind = helios.HeliosTransformerBlock
    served = [swap_block(swaps, where, kind, block) for where, _ in list(swaps.named(kind))]
    if not all(served):
        swaps.leave("timesteps of tokens", "", A_BLOCK_IS_NOT, servable=True)
    elif swaps.forward("", forward, {"timesteps of tokens": ("modulated_norm", "gated_residual")}, kind=helios.HeliosTransformer3DModel):
        swaps.serve("norm", "norm_out", "final_layer")
        swaps.last_layer("norm_out.norm", "proj_out")


@ops.half_tables
def tables(rotary: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 ([batch,] tokens, pairs), of the model's table (batch or 1, tokens, 4 pairs), which holds each twice."""
    rotary = rotary[0] if len(rotary) == 1 else rotary
    return tuple(table[..., ::2].float().contiguous() for table in rotary.chunk(2, dim=-1))


def attend(
    attn: nn.Module,
    hidden_states: Rows,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: Tensor | None = None,
    original_context_length: int | None = None,
    *,
    swaps: Swaps,
) -> Tensor:
    """What HeliosAttnProcessor computes."""
    cross = encoder_hidden_states is not None
    lengths, text = ops.ordered(attention_mask, encoder_hidden_states) if cross else (None, None)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in helios._get_qkv_projections(attn, hidden_states, text))
    cos, sin = (None, None) if rotary_emb is None else tables(rotary_emb, rotary_emb)
    q, k = ops.norm_rope(q, k, q_norm=attn.norm_q, k_norm=attn.norm_k, cos=cos, sin=sin, across_heads=True, swaps=swaps)
    history = 0 if cross else k.shape[1] - original_context_length
    if history and attn.is_amplify_history:
        factor = 1.0 + torch.sigmoid(attn.history_key_scale) * (attn.max_scale - 1.0)
        k = torch.cat((k[:, :history] * factor.to(k.dtype)[:, None], k[:, history:]), dim=1)
    out = ops.attend(q, k, v, cross=cross, lengths=lengths, swaps=swaps).flatten(2)
    for layer in attn.to_out:
        out = layer(out)
    return out


def block(
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | tuple[Tensor, Tensor],
    rotary_emb: Tensor,
    original_context_length: int,
    *,
    swaps: Swaps,
) -> Tensor:
    """What HeliosTransformerBlock computes; temb: as in Wan's."""
    x, (temb, rows) = hidden_states, temb if isinstance(temb, tuple) else (temb, None)
    how = {"swaps": swaps, "rows": rows}
    shift, scale, gate, shift2, scale2, gate2 = (module.scale_shift_table + temb.float()).unbind(-2)
    h = ops.modulate(x, module.norm1, shift, scale, fp8=reads_fp8(module.attn1), **how)
    y = module.attn1(h, None, None, rotary_emb, original_context_length)
    history = x.shape[1] - original_context_length if module.guidance_cross_attn else 0
    if isinstance(module.norm2, nn.Identity):
        h = x = ops.gate(x, y, gate, **how)
    else:
        x, h = ops.gate_and_modulate(x, y, gate, module.norm2, fp8=not history and reads_fp8(module.attn2), **how)
    y = module.attn2(h[:, history:] if history else h, encoder_hidden_states, None, None, original_context_length)
    if history:  # which the text says nothing to
        y = nn.functional.pad(y, (0, 0, history, 0))
    x, h = ops.gate_and_modulate(x, y, None, module.norm3, shift2, scale2, fp8=takes(module.ffn, module.ffn.net[0].proj), **how)
    return ops.gate(x, module.ffn(h), gate2, **how)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    indices_hidden_states: Tensor | None = None,
    indices_latents_history_short: Tensor | None = None,
    indices_latents_history_mid: Tensor | None = None,
    indices_latents_history_long: Tensor | None = None,
    latents_history_short: Tensor | None = None,
    latents_history_mid: Tensor | None = None,
    latents_history_long: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict | None = None,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What HeliosTransformer3DModel computes."""
    x = self.patch_embedding(hidden_states)
    batch, grid = len(x), x.shape[2:]
    if indices_hidden_states is None:
        indices_hidden_states = torch.arange(grid[0])[None].expand(batch, -1)
    rotary = [self.rope(indices_hidden_states, *grid[1:], x.device).flatten(2)]
    parts, side = [x.flatten(2)], None
    for latents, indices, patch, factor in (
        (latents_history_short, indices_latents_history_short, "patch_short", 1),
        (latents_history_mid, indices_latents_history_mid, "patch_mid", 2),
        (latents_history_long, indices_latents_history_long, "patch_long", 4),
    ):
        if latents is None or indices is None:
            continue
        if factor > 1:
            latents = helios.pad_for_3d_conv(latents, (factor, 2 * factor, 2 * factor))
        part = getattr(self, patch)(latents)
        side = part.shape[3:] if factor == 1 else side  # of the finest history, whose tables the others pool
        table = self.rope(indices, *side, part.device)
        if factor > 1:
            table = helios.center_down_sample_3d(helios.pad_for_3d_conv(table, (factor,) * 3), (factor,) * 3)
        parts.insert(0, part.flatten(2))
        rotary.insert(0, table.flatten(2))
    x, rotary = (torch.cat(each, dim=2).transpose(1, 2).contiguous() for each in (parts, rotary))
    context = parts[-1].shape[2]
    temb, modulation, text = self.condition_embedder(timestep, encoder_hidden_states)
    step, history = modulation.unflatten(-1, (6, -1)), x.shape[1] - context
    if self.zero_history_timestep and history:
        start = torch.zeros(1, dtype=timestep.dtype, device=timestep.device)
        _, first, _ = self.condition_embedder(start, encoder_hidden_states, is_return_encoder_hidden_states=False)
        rows = ops.once(_rows, batch, history, context, x.device)
        step = torch.cat((first.unflatten(-1, (6, -1)), step)), rows
    x = through(self, x, text.contiguous(), step, rotary, context)
    shift, scale = (self.norm_out.scale_shift_table.to(temb.device) + temb[:, None]).to(x.device).unbind(1)
    x = ops.unpatch(
        ops.project(x[:, -context:], self.proj_out, self.norm_out.norm, shift, scale, swaps=swaps), grid, self.config.patch_size
    )
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def _rows(batch: int, history: int, context: int, device: torch.device) -> Tensor:
    """The row of each token: 0 for the history, those of the clips behind it."""
    clips = torch.arange(1, batch + 1, dtype=torch.int32, device=device)[:, None].expand(-1, context)
    return nn.functional.pad(clips, (history, 0)).flatten()
