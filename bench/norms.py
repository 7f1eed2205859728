"""Cases of norms with modulation and of gated residuals (adaLN), forwards and backwards: one table row for each frame."""

import torch
import torch.nn.functional as F
from tubelet.kernels import Modulation, gated_residual, modulated_norm

from .harness import DEFAULT, FP8_TOLERANCE, FULL, QUICK, Case, Implementation
from .plain import case, wide

OP = "norms"


def by_frame(x, frames):
    """x (tokens, channels) as (frames, sites, channels), so that a row of a table is broadcast, as other libraries do, and not gathered."""
    return x.unflatten(0, (len(frames), -1))


def plain_norm(x, shift=None, scale=None, rows=None, weight=None, kind="layer"):
    """norm(x) * (1 + scale[rows]) + shift[rows], where each row is that of a frame of one size."""
    y = wide(x)
    y = F.layer_norm(y, y.shape[-1:], eps=1e-6) if kind == "layer" else F.rms_norm(y, y.shape[-1:], eps=1e-6)
    if weight is not None:
        y = y * weight
    if scale is not None:
        y = (by_frame(y, scale) * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1)
    return y.to(x.dtype)


def plain_gate(x, y, gate, shift, scale, rows):
    """x + gate[rows] * y, and its modulated norm."""
    out = (wide(x) + (gate[:, None] * by_frame(y, gate)).flatten(0, 1)).to(x.dtype)
    return out, plain_norm(out, shift, scale, rows)


def ours_gate(x, y, gate, shift, scale, rows, implementation):
    return gated_residual(x, y, gate, rows, norm=Modulation(shift, scale), implementation=implementation)


def ours_norm(implementation, kind="layer", **inputs):
    return modulated_norm(**inputs, kind=kind, implementation=implementation)


def ours_to_fp8(x, shift, scale, rows, implementation):
    return modulated_norm(x, shift, scale, rows, fp8=True, implementation=implementation)


def plain_to_fp8(x, shift, scale, rows):
    y = wide(plain_norm(wide(x), shift, scale, rows))
    largest = y.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / 448)
    return (y / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales[:, 0].float()


def liger(device: torch.device) -> list[Implementation]:
    def build(inputs):
        from importlib import import_module

        function = import_module("liger_kernel.transformers.functional").liger_rms_norm
        return lambda: function(inputs["x"], inputs["weight"], 1e-6)

    return [Implementation("Liger", build, ("liger_kernel.transformers.functional",))] if device.type == "cuda" else []


def cases() -> list[Case]:
    found = []
    sizes = [
        ("Wan 2.1 1.3B 480p", 21, 1560, 1536, QUICK, ("cuda",)),
        ("Wan 2.1 14B 480p", 21, 1560, 5120, DEFAULT, ("cuda",)),
        ("HunyuanVideo 544p", 33, 2040, 3072, FULL, ("cuda",)),
        ("Latte 512p", 16, 1024, 1152, DEFAULT, ("cuda",)),
        ("one frame of 1024 tokens", 1, 1024, 1536, FULL, ("cuda",)),
        ("Latte 128p", 8, 64, 1152, QUICK, ("cpu",)),
    ]
    for name, frames, sites, channels, level, devices in sizes:
        tokens = frames * sites
        shape = {"tokens": tokens, "channels": channels, "rows": frames}

        def inputs(draw, device, frames=frames, sites=sites, tokens=tokens, channels=channels):
            rows = torch.arange(frames, dtype=torch.int32, device=device).repeat_interleave(sites)
            return {"x": draw(tokens, channels), "shift": draw(frames, channels), "scale": draw(frames, channels), "rows": rows}

        def gated(draw, device, frames=frames, tokens=tokens, channels=channels, inputs=inputs):
            return inputs(draw, device) | {"y": draw(tokens, channels), "gate": draw(frames, channels)}

        def weighted(draw, device, tokens=tokens, channels=channels):
            return {"x": draw(tokens, channels), "weight": draw(channels), "kind": "rms"}

        n, once = tokens * channels, DEFAULT if level == QUICK else FULL  # the less telling ones: of one size, but for full runs
        norm = {"make": inputs, "ours": ours_norm, "plain": plain_norm, "devices": devices}
        gate = {"make": gated, "ours": ours_gate, "plain": plain_gate, "devices": devices}
        back = {"level": once, "representative": level == QUICK}
        leaves = ("x", "shift", "scale")
        found += [
            case(OP, f"{name}, norm and modulate", shape, flops=8 * n, level=level, **norm),
            case(OP, f"{name}, gate, add, norm and modulate", shape, flops=10 * n, level=level, **gate),
            case(OP, f"{name}, norm and modulate", shape, flops=20 * n, leaves=leaves, **norm, **back),
            case(OP, f"{name}, gate, add, norm and modulate", shape, flops=24 * n, leaves=(*leaves, "y", "gate"), **gate, **back),
            case(OP, f"{name}, RMS norm", shape, flops=4 * n, others=liger, level=once, **norm | {"make": weighted}),
        ]
        if devices == ("cuda",):
            fp8 = {"make": inputs, "ours": ours_to_fp8, "plain": plain_to_fp8, "reference": lambda **inputs: [plain_norm(**inputs)]}
            fp8 |= {"part": dequantised, "tolerance": FP8_TOLERANCE, "in_torch": False}
            found.append(case(OP, f"{name}, norm, modulate and quantise", shape, flops=10 * n, level=once, **fp8))
    return found


def dequantised(result):
    """What is compared of a result in E4M3: the numbers that it stands for."""
    if len(result) == 1:
        return result
    y8, scales = result
    return [y8.float() * scales[..., None]]
