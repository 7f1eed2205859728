"""FramePack (Zhang & Agrawala 2025), HunyuanVideo with a history of frames in front of the video and an image in front of the text.

What is computed otherwise than in diffusers: texts of a batch are not cut to their length by the host, nor masks filled entry by entry.
"""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_hunyuan_video_framepack as framepack
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .hunyuan_video import finish, grid_of, key_mask, swap_blocks, swap_model, through
from .swaps import Swaps


def swap(swaps: Swaps) -> None:
    """Serve a HunyuanVideoFramepackTransformer3DModel."""
    swap_blocks(swaps)
    swap_model(swaps, forward, framepack.HunyuanVideoFramepackTransformer3DModel)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    indices_latents: Tensor,
    guidance: Tensor | None = None,
    latents_clean: Tensor | None = None,
    indices_latents_clean: Tensor | None = None,
    latents_history_2x: Tensor | None = None,
    indices_latents_history_2x: Tensor | None = None,
    latents_history_4x: Tensor | None = None,
    indices_latents_history_4x: Tensor | None = None,
    attention_kwargs: dict | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What HunyuanVideoFramepackTransformer3DModel computes, which takes a history of all three scales."""
    grid, blocks = grid_of(self, hidden_states), (*self.transformer_blocks, *self.single_transformer_blocks)
    indices = indices_latents, indices_latents_clean, indices_latents_history_2x, indices_latents_history_4x
    rotary_embs = [self.rope(frames, *hidden_states.shape[3:], hidden_states.device) for frames in indices]
    x = self.x_embedder(hidden_states)
    history = self.clean_x_embedder(latents_clean, latents_history_2x, latents_history_4x)
    x, rotary_emb = self._pack_history_states(x, *history, *rotary_embs, *grid[1:])
    temb, _ = self.time_text_embed(timestep, pooled_projections, guidance)
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    image = self.image_projection(image_embeds)
    text = torch.cat((image, text), dim=1)
    lengths = image.shape[1] + encoder_attention_mask.sum(dim=1, dtype=torch.int32)
    mask = key_mask(blocks, lengths, x.shape[1], text.shape[1])
    x, _ = through(self, blocks, x, text, temb, mask, rotary_emb)
    return finish(self, x[:, -grid[0] * grid[1] * grid[2] :], temb, grid, return_dict, swaps)
