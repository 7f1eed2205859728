"""ConsisID (Yuan et al. 2024): CogVideoX whose video also attends to a face between blocks.

What is computed otherwise than in diffusers: as in CogVideoX; texts, which lie in front of the video, attend to the face too, and a gate of
zero leaves them what they were: that costs less than copies of the video would.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import consisid_transformer_3d as consisid
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from . import ops
from .cogvideox import begin, finish, rows_of, swap_model, swap_parts
from .fp8 import serves
from .swaps import Swaps


def swap(swaps: Swaps) -> None:
    """Serve a ConsisIDTransformer3DModel."""
    served = swap_parts(swaps, consisid.ConsisIDBlock)
    for kind in (consisid.PerceiverCrossAttention, consisid.PerceiverAttention):
        for where, _ in list(swaps.named(kind)):
            if kind is consisid.PerceiverCrossAttention:
                swaps.linears(where, "to_kv")
            sites = {"attention": ("modulated_norm", "attention")}
            if swaps.forward(where, attend_to_face, sites, kind=kind, norms=("norm1", "norm2")):
                for norm in ("norm1", "norm2"):
                    swaps.serve("norm", f"{where}.{norm}", "modulated_norm")
    swap_model(swaps, forward, consisid.ConsisIDTransformer3DModel, served)


def attend_to_face(module: nn.Module, image_embeds: Tensor, hidden_states: Tensor, *, swaps: Swaps) -> Tensor:
    """What PerceiverCrossAttention computes, and PerceiverAttention, whose hidden states see each other too."""
    face = ops.modulate(image_embeds, module.norm1, swaps=swaps)
    x = ops.modulate(hidden_states, module.norm2, fp8=serves(module.to_q), swaps=swaps)
    if isinstance(module, consisid.PerceiverAttention):
        face = torch.cat((face, x), dim=1)
    q, k, v = (y.unflatten(-1, (module.heads, -1)) for y in (module.to_q(x), *module.to_kv(face).chunk(2, dim=-1)))
    k, v = (y.expand(len(q), -1, -1, -1) for y in (k, v))  # one face, also for two clips of a guided step
    return module.to_out(ops.attend(q, k, v, cross=True, swaps=swaps).flatten(2))


@apply_lora_scale("attention_kwargs")
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    timestep_cond: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    id_cond: Tensor | None = None,
    id_vit_hidden: list[Tensor] | None = None,
    return_dict: bool = True,
    *,
    swaps: Swaps,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """What ConsisIDTransformer3DModel computes."""
    emb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype), timestep_cond)
    x, text = begin(self, hidden_states, encoder_hidden_states)
    face = None
    if self.is_train_face:
        face = self.local_facial_extractor(id_cond.to(hidden_states), [each.to(hidden_states) for each in id_vit_hidden])
        gate, rows = self.local_face_scale * torch.ones(len(x), x.shape[2], device=x.device), None
        if not isinstance(text, Tensor):
            gate, rows = F.pad(gate[:, None], (0, 0, 0, 1)).flatten(0, 1), rows_of(x, text)
    for i, layer in enumerate(self.transformer_blocks):
        x, text = ops.checkpointed(self, layer, x, text, emb, image_rotary_emb)
        if face is not None and i % self.cross_attn_interval == 0:
            attend = self.perceiver_cross_attention[i // self.cross_attn_interval]
            x = ops.gate(x, attend(face, x), gate, rows=rows, swaps=swaps)
    return finish(self, x, emb, hidden_states, (1, self.config.patch_size, self.config.patch_size), return_dict, swaps)
