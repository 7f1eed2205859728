"""Latte (Ma et al. 2024), whose blocks attend in turn within frames and along time.

What is computed otherwise than in diffusers: tokens stay where they are, (batch, frames * sites, channels), through both kinds of blocks.
Timesteps are not repeated for each frame or site, and a clip has one text, whose keys and values are computed once.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import Tensor, nn
from tubelet.kernels import Spatial, Temporal

from . import ops
from .basic_block import Texts, swap_block, take_clips
from .swaps import Swaps


def swap(swaps: Swaps) -> None:
    """Serve a LatteTransformer3DModel."""
    swaps.patches("pos_embed.proj")
    for where, _ in list(swaps.named(BasicTransformerBlock)):
        swap_block(swaps, where)
    sites = {"frames and sites as entries of a batch": ("attention", "modulated_norm", "gated_residual")}
    if swaps.forward("", forward, sites, kind=LatteTransformer3DModel):
        swaps.last_layer("norm_out", "proj_out")


def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    enable_temporal_attentions: bool = True,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What LatteTransformer3DModel computes."""
    (batch, _, frames, *sides), mask = hidden_states.shape, encoder_attention_mask
    words = encoder_hidden_states.shape[1]
    known = mask is None or mask.shape in ((batch * frames, words), (batch * frames, 1, words))
    if not known or not take_clips((*self.transformer_blocks, *self.temporal_transformer_blocks)):
        arguments = timestep, encoder_hidden_states, mask, enable_temporal_attentions, return_dict
        return type(self).forward(self, hidden_states, *arguments)
    patch = self.config.patch_size
    x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)
    no_sizes = {"resolution": None, "aspect_ratio": None}
    step, embedded = self.adaln_single(timestep, added_cond_kwargs=no_sizes, batch_size=batch, hidden_dtype=x.dtype)
    text = self.caption_projection(encoder_hidden_states)
    texts = None if mask is None else texts_of(mask, batch, frames)
    within, along = ((mask, ops.Clip(frames=frames)) for mask in (Spatial(), Temporal(causal=False)))
    for i, (spatial, temporal) in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)):
        x = ops.checkpointed(self, spatial, x, within, text, texts, step)
        if enable_temporal_attentions:
            if i == 0 and frames > 1:
                x = (x.unflatten(1, (frames, -1)) + self.temp_pos_embed[0, :, None].to(x.dtype)).flatten(1, 2)
            x = ops.checkpointed(self, temporal, x, along, None, None, step)
    shift, scale = (self.scale_shift_table + embedded[:, None]).unbind(1)
    x = ops.project(x, self.proj_out, self.norm_out, shift, scale, swaps=swaps)
    x = ops.unpatch(x, (frames, *(side // patch for side in sides)), (1, patch, patch))
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def texts_of(mask: Tensor, batch: int, frames: int) -> Texts:
    """Of the mask of each frame's text (batch * frames, [1,] tokens)."""
    words = mask.shape[-1]
    rows = torch.arange(batch * words, device=mask.device).view(batch, 1, words).expand(batch, frames, words)
    return Texts(*ops.ordered(mask, rows.flatten(0, 1)))
