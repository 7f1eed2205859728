"""Other people's video transformers on the kernels of `tubelet.kernels`."""

import warnings
from importlib import import_module
from importlib.metadata import version

from torch import nn

from .report import Report
from .swaps import Swaps

KNOWN_DIFFUSERS = "0.42"
FAMILIES = {
    "AllegroTransformer3DModel": "allegro",
    "CogVideoXTransformer3DModel": "cogvideox",
    "ConsisIDTransformer3DModel": "consisid",
    "CosmosControlNetModel": "cosmos",
    "CosmosTransformer3DModel": "cosmos",
    "EasyAnimateTransformer3DModel": "easyanimate",
    "HeliosTransformer3DModel": "helios",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "framepack",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "I2VGenXLUNet": "animatediff",
    "Kandinsky5Transformer3DModel": "kandinsky",
    "LatteTransformer3DModel": "latte",
    "LTX2VideoTransformer3DModel": "ltx2",
    "LTXVideoTransformer3DModel": "ltx",
    "MochiTransformer3DModel": "mochi",
    "SanaVideoTransformer3DModel": "sana_video",
    "SkyReelsV2Transformer3DModel": "skyreels",
    "STDiT3": "open_sora",
    "TransformerTemporalModel": "animatediff",
    "UNet3DConditionModel": "animatediff",
    "UNetMotionModel": "animatediff",
    "WanAnimateTransformer3DModel": "wan",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}
"""Class -> the module here whose `swap` knows it."""
LIBRARIES = ("diffusers", "opensora")
"""Where these classes are."""


def accelerate(model: nn.Module, *, precision: str | None = None, strict: bool = False, implementation: str = "auto") -> Report:
    """Let a video transformer compute with the ops of `tubelet.kernels`, in place; nothing but this model changes.

    model: the transformer, `pipe.transformer`; of classes that are not known, only attention is served. precision: "fp8" also computes the
    linears of the blocks in E4M3 (`fp8_linear`), whose weights are quantised now, beside the model's own; it has no gradient. strict: raise
    if a site that can be served in other models of its class is not. implementation: of all ops, see `tubelet.kernels`; "auto" takes the
    fastest.

    Returns a Report: print it; `restore()` makes the model what it was; `engaged()` tells after a forward pass what ran. Call this before
    torch.compile, and before offloading or caching hooks are added; after loading weights, quantising and sharding.

    Raises TypeError for what is no module, ValueError for a model that was compiled or is accelerated already, for an unknown precision or
    implementation, and with `strict`. Warns of a version of diffusers that the adapters were not written for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module such as pipe.transformer, got {type(model).__name__}")
    if precision not in (None, "fp8"):
        raise ValueError(f"precision: expected None or 'fp8', got {precision!r}")
    if implementation not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f"implementation: expected 'auto', 'triton', 'torch' or 'reference', got {implementation!r}")
    for name, module in (("", model), *model.named_modules()):
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(f"model: expected one that is compiled after this call, but {name or 'it'} is compiled already")
    if getattr(model, "_tubelet_report", None) is not None:
        raise ValueError("model: expected one that is not accelerated yet; call restore() of its report first")
    swaps = Swaps(model, implementation, precision)
    kind = next((kind for kind in type(model).__mro__ if kind.__name__ in FAMILIES and _library(kind) in LIBRARIES), None)
    family = None if kind is None else FAMILIES[kind.__name__]
    if family is not None and _library(kind) == "diffusers" and not (found := version("diffusers")).startswith(KNOWN_DIFFUSERS + "."):
        warnings.warn(f"diffusers {found} is not known: the adapters were written for {KNOWN_DIFFUSERS}", stacklevel=2)
    if family is None:
        swaps.notes.append(f"{type(model).__name__} is not known: its attention sites alone are served")
    report = Report(type(model).__name__, swaps.sites, swaps.notes, swaps.undo)
    try:
        import_module(f".{family or 'generic'}", __package__).swap(swaps)
        swaps.sweep()
        missed = [site for site in swaps.sites if site.servable and not site.served_by]
        if strict and missed:
            listed = "; ".join(f"{site.op} at {site.where or 'the model'}: {site.reason}" for site in missed)
            raise ValueError(f"strict: expected every site to be served, but {len(missed)} are not: {listed}")
    except BaseException:
        report.restore()
        raise
    swaps.set(model, "_tubelet_report", report)
    return report


def _library(kind: type) -> str:
    return kind.__module__.split(".")[0]
