"""Cases of the guided step of a solver: two outputs of the model, guidance and the update in one pass over the tokens."""

import torch
from tubelet.kernels import guided_step

from .harness import DEFAULT, FULL, QUICK, Case
from .plain import case, wide

OP = "guided step"


def plain(x, cond, uncond, x0_prev, coefficients, guidance, rows):
    """rows: of clips of one size, whose coefficients are broadcast and not gathered."""
    p, q, a, b, c = coefficients.to(wide(x).dtype)[:, None].split(1, dim=2)
    state, high, low, last = (wide(each).unflatten(0, (len(guidance), -1)) for each in (x, cond, uncond, x0_prev))
    o = low + guidance[:, None, None] * (high - low)
    x0 = p * state + q * o
    return (a * state + b * x0 + c * last).flatten(0, 1).to(x.dtype), x0.flatten(0, 1).to(x.dtype)


def ours(x, cond, uncond, x0_prev, coefficients, guidance, rows, implementation):
    return guided_step(x, cond, uncond, x0_prev, coefficients, guidance=guidance, rows=rows, implementation=implementation)


def cases() -> list[Case]:
    found = []
    for name, clips, tokens, channels, level, devices in (
        ("Wan 2.1 1.3B 480p", 1, 32_760, 64, QUICK, ("cuda",)),
        ("Wan 2.1 720p", 1, 75_600, 64, DEFAULT, ("cuda",)),
        ("eight requests", 8, 4096, 64, DEFAULT, ("cuda",)),
        ("one small request", 1, 1024, 64, FULL, ("cuda",)),
        ("eight small requests", 8, 512, 64, QUICK, ("cpu",)),
    ):
        total = clips * tokens

        def make(draw, device, clips=clips, tokens=tokens, total=total, channels=channels):
            names = ("x", "cond", "uncond", "x0_prev")
            tables = {"coefficients": draw(clips, 5, dtype=torch.float32), "guidance": draw(clips, dtype=torch.float32).abs() + 1}
            rows = torch.arange(clips, dtype=torch.int32, device=device).repeat_interleave(tokens)
            return {name: draw(total, channels) for name in names} | tables | {"rows": rows}

        shape = {"tokens": total, "channels": channels, "clips": clips}
        flops = 11 * total * channels
        found.append(
            case(OP, name, shape, make=make, ours=ours, plain=plain, flops=flops, level=level, devices=devices, representative=True)
        )
    return found
