"""Other video models on tubelet's kernels: `accelerate` for those of diffusers, functions for those in their own repositories."""

from .accelerate import accelerate
from .backend import register_diffusers_backend, use_diffusers_backend
from .functions import comfy_attention, flash_attention, hunyuan_attention
from .report import Report, Site

__all__ = [
    "Report",
    "Site",
    "accelerate",
    "comfy_attention",
    "flash_attention",
    "hunyuan_attention",
    "register_diffusers_backend",
    "use_diffusers_backend",
]
