"""Kernels for video transformers over packs of clips. Needs torch alone on a CPU, and triton on a GPU."""

from .attention import attention, merge_attention
from .dispatch import Engagement, engaged, reset_engaged
from .fp8 import fp8_linear, gelu_quantize_rows, quantize_rows
from .group_norm import group_norm_silu
from .guidance import guided_step
from .layout import Capacity, ClipSpan, VideoLayout
from .masks import Coordinates, FrameCausal, Full, Mask, Spatial, Temporal
from .norms import Modulation, gated_residual, modulated_norm
from .patch_embed import final_layer, grid_of, patch_embed, patchify, unpatchify
from .rotary import NormRope, qk_norm_rope, rotary_table

__all__ = [
    "Capacity",
    "ClipSpan",
    "Coordinates",
    "Engagement",
    "FrameCausal",
    "Full",
    "Mask",
    "Modulation",
    "NormRope",
    "Spatial",
    "Temporal",
    "VideoLayout",
    "attention",
    "engaged",
    "final_layer",
    "fp8_linear",
    "gated_residual",
    "gelu_quantize_rows",
    "grid_of",
    "group_norm_silu",
    "guided_step",
    "merge_attention",
    "modulated_norm",
    "patch_embed",
    "patchify",
    "qk_norm_rope",
    "quantize_rows",
    "reset_engaged",
    "rotary_table",
    "unpatchify",
]
