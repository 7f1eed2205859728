"""Cases of FP8: quantising rows to E4M3, also of a GELU, and linear layers whose input is quantised as it comes."""

import torch
import torch.nn.functional as F
from tubelet.kernels import fp8_linear, gelu_quantize_rows, quantize_rows

from .harness import DEFAULT, FP8_TOLERANCE, FULL, QUICK, Case, Implementation
from .norms import dequantised
from .peers import compile_
from .plain import case, implementation, wide

QUANTIZE, LINEAR = "quantise", "FP8 linear"


def plain_quantize(x):
    y = wide(x)
    largest = y.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / 448)
    return (y / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales[..., 0].float()


def plain_gelu(x):
    return plain_quantize(F.gelu(wide(x), approximate="tanh"))


def linear(x, weight, w8, scales, bias):
    """What FP8 is to be faster than: the product in bfloat16."""
    return F.linear(x, weight, bias)


def exact(x, weight, w8, scales, bias):
    """The reference: the weight as it was quantised, the input as it is."""
    return x @ (w8.double() * scales.double()[:, None]).T + bias


def quantised_linear(quantize):
    """Rows of the input quantised by a function, then the library's product with a scale for each row."""

    def run(x, weight, w8, scales, bias):
        x8, x_scales = quantize(x)
        how = {"scale_a": x_scales[:, None], "scale_b": scales[None], "bias": bias, "out_dtype": x.dtype, "use_fast_accum": True}
        return torch._scaled_mm(x8, w8.T, **how)

    return run


def ours_linear(x, weight, w8, scales, bias, implementation):
    return fp8_linear(x, w8, scales, bias, implementation=implementation)


def others(device: torch.device) -> list[Implementation]:
    """Our product in Triton, which is for GPUs where the library has none, and the library's behind a compiled quantisation."""
    mine = {"ours": True, "comparable": False}
    return [
        implementation("tubelet, product in Triton", lambda **inputs: ours_linear(**inputs, implementation="triton"), **mine),
        implementation("torch.compile quantise + torch._scaled_mm", compile_(quantised_linear(plain_quantize)), slow=True),
    ]


def cases() -> list[Case]:
    found = []
    for name, tokens, width, gelu, level, devices in (
        ("Wan 2.1 1.3B 480p", 32_760, 1536, False, QUICK, ("cuda",)),
        ("Wan 2.1 1.3B 480p, of GELU", 32_760, 8960, True, DEFAULT, ("cuda",)),
        ("HunyuanVideo 544p", 67_320, 3072, False, DEFAULT, ("cuda",)),
        ("LTX-Video 512p", 7392, 2048, False, FULL, ("cuda",)),
        ("small", 512, 1152, False, QUICK, ("cpu",)),
        ("small, of GELU", 512, 1152, True, DEFAULT, ("cpu",)),
    ):
        how = {"ours": gelu_quantize_rows, "plain": plain_gelu, "reference": lambda x: [F.gelu(x, approximate="tanh")]}
        how = how if gelu else {"ours": quantize_rows, "plain": plain_quantize, "reference": lambda x: [x]}
        found.append(
            case(
                QUANTIZE, name, {"tokens": tokens, "channels": width},
                make=lambda draw, device, n=tokens, c=width: {"x": draw(n, c)}, part=dequantised, tolerance=FP8_TOLERANCE,
                flops=(20 if gelu else 2) * tokens * width, level=level, devices=devices, representative=gelu, **how,
            )
        )  # fmt: skip
    for name, tokens, width, out, level in (
        ("Wan 2.1 1.3B 480p, MLP in", 32_760, 1536, 8960, QUICK),
        ("Wan 2.1 1.3B 480p, MLP out", 32_760, 8960, 1536, DEFAULT),
        ("Wan 2.1 14B 480p, MLP in", 32_760, 5120, 13_824, DEFAULT),
        ("HunyuanVideo 544p, QKV", 67_320, 3072, 9216, FULL),
        ("4096 tokens of 3072, square", 4096, 3072, 3072, FULL),
    ):

        def make(draw, device, tokens=tokens, width=width, out=out):
            weight = draw(out, width) * width**-0.5
            w8, scales = plain_quantize(weight)
            return {"x": draw(tokens, width), "weight": weight, "w8": w8, "scales": scales, "bias": draw(out)}

        size = tokens * width * 2 + out * width + tokens * out * 2
        found.append(
            case(
                LINEAR, name, {"tokens": tokens, "channels": width, "width": out, "dtype": "float8_e4m3fn"}, make=make, ours=ours_linear,
                plain=linear, reference=exact_rows, part=some_rows, moved=lambda inputs, outputs, size=size: size, tolerance=FP8_TOLERANCE,
                flops=2 * tokens * width * out, level=level, others=others, in_torch=False, representative=True,
            )
        )  # fmt: skip
    return found


SAMPLED = 997
"""Every so many-th row is compared: all of them in float64 would take longer than all else."""


def some_rows(result):
    return result if result.dtype == torch.float64 else result[::SAMPLED]


def exact_rows(x, weight, w8, scales, bias):
    return exact(x[::SAMPLED], weight, w8, scales, bias)
