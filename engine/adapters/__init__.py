"""Other video models on tubelet's kernels: `accelerate` for those of diffusers, functions for those in their own repositories."""

from .accelerate import accelerate
from .report import Report, Site

__all__ = ["Report", "Site", "accelerate"]
