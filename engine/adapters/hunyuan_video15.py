"""HunyuanVideo-1.5, whose blocks are those of two streams of HunyuanVideo.

What is computed otherwise than in diffusers: no mask of pairs is made, which were one for each layer, and the texts are put in order in one
operation for all entries of a batch.
"""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_hunyuan_video15 as hunyuan
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import generic, ops
from .hunyuan_video import are_ours, finish, grid_of, swap_dual_blocks, swap_model, swap_refiners, through
from .swaps import Swaps


def swap(swaps: Swaps) -> None:
    """Serve a HunyuanVideo15Transformer3DModel."""
    swaps.patches("x_embedder.proj")
    swap_refiners(swaps, generic.attend, hunyuan.HunyuanVideo15IndividualTokenRefiner, hunyuan.HunyuanVideo15IndividualTokenRefinerBlock)
    swap_dual_blocks(swaps, hunyuan.HunyuanVideo15TransformerBlock, hunyuan.HunyuanVideo15AttnProcessor2_0)
    swap_model(swaps, forward, hunyuan.HunyuanVideo15Transformer3DModel)


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    attention_kwargs: dict | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What HunyuanVideo15Transformer3DModel computes. What is there of image and texts comes first, and an image of zeros is not there."""
    grid = grid_of(self, hidden_states)
    rotary_emb = self.rope(hidden_states)
    temb = self.time_embed(timestep, timestep_r=timestep_r)
    x = self.x_embedder(hidden_states)
    kinds = self.cond_type_embed(torch.arange(3, device=x.device))
    image = self.image_embedder(image_embeds) + kinds[2]
    text2 = self.context_embedder_2(encoder_hidden_states_2) + kinds[1]
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask) + kinds[0]
    seen = (image_embeds != 0).any().expand(image.shape[:2]), encoder_attention_mask_2.bool(), encoder_attention_mask.bool()
    seen = torch.cat(seen, dim=1)
    text = torch.cat((image, text2, text), dim=1).masked_fill(~seen[..., None], 0)
    lengths, text = ops.ordered(seen, text)
    blocks = self.transformer_blocks
    mask = lengths if are_ours(blocks) else torch.arange(text.shape[1], device=x.device) < lengths[:, None]
    x, _ = through(self, blocks, x, text, temb, mask, rotary_emb)
    return finish(self, x, temb, grid, return_dict, swaps)
