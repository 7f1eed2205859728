"""Cases of the engine with the bundled model: decoding latents, and requests from prompts to frames, in one pack or one by one."""

import copy
from typing import Any

import torch
from torch import Tensor
from tubelet.engine import Engine, Request

from .harness import DEFAULT, FULL, QUICK, Case, Implementation, Problem, Tolerance, storage_bytes
from .peers import compile_

DECODE, SAMPLE = "VAE decode", "sampling"
PROMPTS = ("a red circle bounces on a blue background", "a small green cross moves left on a white background")


def decode(frames: int, height: int, width: int, device: torch.device) -> Problem:
    vae = Engine.from_pretrained(device=device).vae.requires_grad_(False)
    half = copy.deepcopy(vae).to(torch.bfloat16)

    def make(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(1, vae.config.latent_channels, frames, height // 8, width // 8, generator=generator, device=device)

    found = [Implementation("tubelet", lambda space: lambda: vae.decode_space(space), ours=True)]
    if device.type == "cuda":
        found.append(Implementation("tubelet, bfloat16", lambda space: lambda: half.decode_space(space.to(torch.bfloat16)), ours=True))
        compiled = compile_(vae.decode_space)
        found.append(Implementation("tubelet, torch.compile", lambda space: lambda: compiled(space), comparable=False, slow=True))
    exact = copy.deepcopy(vae).double()
    return Problem(
        make=make,
        implementations=found,
        reference=lambda space: exact.decode_space(space.double()),
        dtype=torch.float32,
        flops=0.0,
        bytes=storage_bytes(make(0)) + 4 * 3 * frames * height * width,
        tolerance=Tolerance(3e-2, 1.5e-1),  # bfloat16's; float32 with TF32 in convolutions is well within
        capturable=False,
    )


def sample(requests: list[tuple[int, int, int]], device: torch.device, **options: int) -> Problem:
    """options: of `Engine.sample`; those that the model is tuned for if not given."""
    engine = Engine.from_pretrained(device=device)

    def make(seed: int) -> list[Request]:
        return [Request(PROMPTS[i % 2], t, h, w, seed=seed + i) for i, (t, h, w) in enumerate(requests)]

    def frames(clips: Any) -> list[Tensor]:
        return [clip.frames.float() for clip in clips]

    def one_by_one(each: list[Request]) -> list[Tensor]:
        return frames([engine.sample(request, **options) for request in each])

    found = [Implementation("tubelet", lambda each: lambda: frames(engine.sample(each, **options)), ours=True)]
    if len(requests) > 1:
        found.append(Implementation("tubelet one by one", lambda each: lambda: one_by_one(each), ours=True, comparable=False))
    pixels = sum(t * h * w for t, h, w in requests)
    return Problem(
        make=make,
        implementations=found,
        reference=one_by_one,
        dtype=torch.float32,
        flops=0.0,
        bytes=3 * pixels,
        tolerance=Tolerance(2e-2, 5e-1),  # frames are rounded to eight bits; a request alone and in a pack differ by rounding
        capturable=False,
    )


def cases() -> list[Case]:
    found = []
    for name, size, level, devices in (
        ("16 frames of 64x64", (16, 64, 64), QUICK, ("cuda", "cpu")),
        ("32 frames of 256x256", (32, 256, 256), DEFAULT, ("cuda",)),
        ("64 frames of 480x832", (64, 480, 832), FULL, ("cuda",)),
    ):
        shape = {"frames": size[0], "height": size[1], "width": size[2], "dtype": "float32"}
        found.append(Case(DECODE, name, shape, lambda device, size=size: decode(*size, device), level, None, devices))
    small, mixed, together = (16, 64, 64), [(16, 64, 64), (8, 32, 96), (1, 64, 64), (24, 48, 64)], {"steps": 4, "stagger": 0}
    for name, requests, options, level, devices in (
        ("one request, 4 steps", [small], together, QUICK, ("cuda",)),
        ("one request as the model is tuned", [small], {}, DEFAULT, ("cuda",)),
        ("8 requests, 4 steps", [small] * 8, together, DEFAULT, ("cuda",)),
        ("4 mixed requests, 4 steps", mixed, together, DEFAULT, ("cuda",)),
        ("32 requests, 4 steps", [small] * 32, together, FULL, ("cuda",)),
        ("one request, 2 steps", [(8, 32, 32)], {"steps": 2, "stagger": 0}, QUICK, ("cpu",)),
        ("4 mixed requests, 2 steps", [(8, 32, 32), (4, 32, 64), (1, 64, 64), (12, 32, 32)], {"steps": 2, "stagger": 0}, DEFAULT, ("cpu",)),
    ):
        shape = {"clips": len(requests), "frames": sum(each[0] for each in requests), "dtype": "float32"} | options

        def make(device, requests=requests, options=options):
            return sample(requests, device, **options)

        found.append(Case(SAMPLE, name, shape, make, level, None, devices))
    return found
