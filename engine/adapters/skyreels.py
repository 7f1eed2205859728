"""SkyReels-V2 (SkyReels Team 2025): Wan's blocks, with diffusion forcing: a timestep for each frame, attention causal by blocks of frames.

What is computed otherwise than in diffusers, besides what `wan` does: no mask of pairs is made, and modulation has a row for each frame and
not for each token.
"""

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from tubelet.kernels import FrameCausal

from . import ops
from .swaps import Swaps
from .wan import block, swap_attention, swap_block, through


def swap(swaps: Swaps) -> None:
    """Serve a SkyReelsV2Transformer3DModel."""
    swaps.patches("patch_embedding")
    for where, _ in list(swaps.named(skyreels.SkyReelsV2Attention)):
        swap_attention(swaps, where, (skyreels.SkyReelsV2AttnProcessor,))
    model, kind = skyreels.SkyReelsV2Transformer3DModel, skyreels.SkyReelsV2TransformerBlock
    blocks = [where for where, _ in swaps.named(kind)]
    # The model's forward and its blocks are served together: what they pass on differs from the library's.
    whole = type(swaps.model).forward is model.forward and not any(swaps.refusal(swaps.module(where)) for where in ("", *blocks))
    if not whole:
        for where in ("", *blocks):
            swaps.leave("norms, modulation, gates", where, "the model's forward or one of its blocks was replaced", servable=True)
        return
    for where in blocks:
        swap_block(swaps, where, kind, block)
    swaps.forward("", forward, {"mask, timesteps of frames": ("attention", "modulated_norm", "gated_residual")}, kind=model)
    swaps.last_layer("norm_out", "proj_out")


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    enable_diffusion_forcing: bool = False,
    fps: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict | None = None,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What SkyReelsV2Transformer3DModel computes."""
    patch = self.config.patch_size
    grid = [side // p for side, p in zip(hidden_states.shape[2:], patch, strict=True)]
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
    chunk = self.config.num_frame_per_block
    mask = (FrameCausal(chunk=chunk), ops.Clip(frames=grid[0])) if chunk > 1 else None
    temb, modulation, text, image = self.condition_embedder(timestep, encoder_hidden_states, encoder_hidden_states_image)
    modulation = modulation.unflatten(-1, (6, -1))
    text = text if image is None else torch.cat((image, text), dim=1)
    if self.config.inject_sample_info:
        rate = self.fps_projection(self.fps_embedding(torch.tensor(fps, dtype=torch.long, device=x.device))).unflatten(1, (6, -1))
        modulation = modulation + (rate.repeat(timestep.shape[1], 1, 1) if enable_diffusion_forcing else rate)
    x = through(self, x, text, modulation, rotary_emb, mask)
    shift, scale = (self.scale_shift_table + temb.unsqueeze(-2)).to(x.device).unbind(-2)
    x = ops.unpatch(ops.project(x, self.proj_out, self.norm_out, shift, scale, swaps=swaps), grid, patch)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)
