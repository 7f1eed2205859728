"""Kernels for video transformers over packs of clips. Needs torch alone on a CPU, and triton on a GPU."""

# Not relative: one who looks for the package `kernels` of PyPI (transformers does) finds this folder where it is in the working directory,
# and must not load its modules, and register their operators, a second time.
from tubelet.kernels.attention import attention, merge_attention
from tubelet.kernels.dispatch import Engagement, engaged, reset_engaged
from tubelet.kernels.fp8 import fp8_linear, gelu_quantize_rows, quantize_rows
from tubelet.kernels.group_norm import group_norm_silu
from tubelet.kernels.guidance import guided_step
from tubelet.kernels.layout import Capacity, ClipSpan, VideoLayout
from tubelet.kernels.masks import Coordinates, FrameCausal, Full, Mask, Spatial, Temporal
from tubelet.kernels.norms import Modulation, gated_residual, modulated_norm
from tubelet.kernels.patch_embed import final_layer, grid_of, patch_embed, patchify, unpatchify
from tubelet.kernels.rotary import NormRope, qk_norm_rope, rotary_table

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
