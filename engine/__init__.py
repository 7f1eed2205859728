"""The engine: prompts and known frames in, clips out."""

from .conditioning import KnownFrames, extend_backward, extend_forward, image_to_video, interpolate, loop
from .dit import DiTConfig, VideoDiT
from .engine import Engine, EngineConfig
from .packing import Request
from .text import TextEncoder
from .vae import VAEConfig, VideoVAE
from .video import Clip, contact_sheet, load_image

__all__ = [
    "Clip",
    "DiTConfig",
    "Engine",
    "EngineConfig",
    "KnownFrames",
    "Request",
    "TextEncoder",
    "VAEConfig",
    "VideoDiT",
    "VideoVAE",
    "contact_sheet",
    "extend_backward",
    "extend_forward",
    "image_to_video",
    "interpolate",
    "load_image",
    "loop",
]
