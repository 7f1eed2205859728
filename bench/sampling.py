"""Cases of the engine with the bundled model: decoding latents, and requests from prompts to frames, in one pack or one by one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tubelet.engine import Engine, Request

from .harness import DEFAULT, FULL, QUICK, TOLERANCE, Case, Implementation, Problem, Tolerance, storage_bytes
from .peers import compile_

DECODE, SAMPLE = "VAE decode", "sampling"
TOLERANCES = {"fp32": Tolerance(2e-3, 1e-1), "bf16": Tolerance(3e-2, 5e-1), "fp8": Tolerance(1e-1, 1.0)}
"""Of frames of eight bits; a pixel at an edge may lie on its other side, or in FP8 be of another colour."""
WITH_TF32 = Tolerance(2e-3, 3e-2)
"""Of convolutions in float32 on a GPU, which multiply in TF32 unless they are told not to."""
PROMPTS = ("a red circle bounces on a blue background", "a small green cross moves left on a white background")


def moving_waves(seed: int, frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """A video (1, 3, T, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    axes = (torch.linspace(0, 1, n, device=device) for n in (frames, height, width))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    turns = torch.rand(3, 4, generator=generator).mul_(6).sub_(3).tolist()
    return torch.stack([torch.sin(a + 2 * b * t + 2 * c * y + 2 * d * x) for a, b, c, d in turns])[None]


def decode(frames: int, height: int, width: int, device: torch.device) -> Problem:
    vae = Engine.from_pretrained(device=device).vae.requires_grad_(False)
    half = copy.deepcopy(vae).to(torch.bfloat16)

    @torch.inference_mode()
    def make(seed: int) -> Tensor:
        # Of a video: noise decodes to almost nothing, of which any rounding is a large part.
        return vae.encode_space(moving_waves(seed, frames, height, width, device))[0]

    found = [Implementation("tubelet", lambda space: lambda: vae.decode_space(space), ours=True)]
    if device.type == "cuda":
        rounded = {"ours": True, "tolerance": TOLERANCE[torch.bfloat16]}
        found.append(Implementation("tubelet, bfloat16", lambda space: lambda: half.decode_space(space.to(torch.bfloat16)), **rounded))
        compiled = compile_(vae.decode_space)
        found.append(Implementation("tubelet, torch.compile", lambda space: lambda: compiled(space), ours=True, slow=True))
    exact, space = copy.deepcopy(vae).double(), make(0)
    return Problem(
        make=make,
        implementations=found,
        reference=lambda space: exact.decode_space(space.double()),
        dtype=torch.float32,
        flops=flops_of(lambda: vae.decode_space(space)),
        bytes=storage_bytes(space) + 4 * 3 * frames * height * width,
        tolerance=WITH_TF32 if device.type == "cuda" else None,
        capturable=False,
    )


@torch.inference_mode()
def flops_of(call: Callable[[], Any]) -> float:
    """Of the products and convolutions of a call, which is made."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def sample(requests: list[tuple[int, int, int]], device: torch.device, precision: str = "fp32", **options: int) -> Problem:
    """precision: of the transformer. options: of `Engine.sample`; those that the model is tuned for if not given. The reference samples the
    requests one by one, all of the engine in float64, for which every op takes the library's functions.
    """
    engine, exact = Engine.from_pretrained(device=device, precision=precision), Engine.from_pretrained(device=device)
    for part in (exact.text, exact.dit, exact.vae):
        part.double()

    def make(seed: int) -> list[Request]:
        return [Request(PROMPTS[i % 2], t, h, w, seed=seed + i) for i, (t, h, w) in enumerate(requests)]

    def frames(clips: Any) -> list[Tensor]:
        return [clip.frames.float() for clip in clips]

    def one_by_one(each: list[Request], engine: Engine = engine) -> list[Tensor]:
        return frames([engine.sample(request, **options) for request in each])

    def run(each: list[Request], **how: bool) -> list[Tensor]:
        return frames(engine.sample(each, **options, **how))

    found = [Implementation("tubelet", lambda each: lambda: run(each), ours=True)]
    if device.type == "cuda":
        found.append(Implementation("tubelet, no graph", lambda each: lambda: run(each, graphs=False), ours=True, comparable=False))
    if len(requests) > 1:
        found.append(Implementation("tubelet one by one", lambda each: lambda: one_by_one(each), ours=True, comparable=False))
    pixels = sum(t * h * w for t, h, w in requests)
    return Problem(
        make=make,
        implementations=found,
        reference=lambda each: one_by_one(each, exact),
        dtype=torch.float32,
        flops=flops_of(lambda: engine.sample(make(0), graphs=False, **options)),
        bytes=3 * pixels,
        tolerance=TOLERANCES[precision],
        capturable=False,
    )


def cases() -> list[Case]:
    found = []
    for name, size, level, devices in (
        ("16 frames of 64x64", (16, 64, 64), QUICK, ("cuda", "cpu")),
        ("32 frames of 256x256", (32, 256, 256), DEFAULT, ("cuda",)),
        ("64 frames of 480x832", (64, 480, 832), FULL, ("cuda",)),
    ):
        for device in devices:
            dtype = "bfloat16" if device == "cuda" else "float32"
            shape = {"frames": size[0], "height": size[1], "width": size[2], "dtype": dtype}
            found.append(Case(DECODE, name, shape, lambda device, size=size: decode(*size, device), level, None, (device,)))
    small, mixed, together = (16, 64, 64), [(16, 64, 64), (8, 32, 96), (1, 64, 64), (24, 48, 64)], {"steps": 4, "stagger": 0}
    for name, requests, options, level, devices in (
        ("one request, 4 steps", [small], together, QUICK, ("cuda",)),
        ("one request, 4 steps, bf16", [small], together | {"precision": "bf16"}, DEFAULT, ("cuda",)),
        ("one request, 4 steps, FP8", [small], together | {"precision": "fp8"}, DEFAULT, ("cuda",)),
        ("one request as the model is tuned", [small], {}, DEFAULT, ("cuda",)),
        ("8 requests, 4 steps", [small] * 8, together, DEFAULT, ("cuda",)),
        ("4 mixed requests, 4 steps", mixed, together, DEFAULT, ("cuda",)),
        ("32 requests, 4 steps", [small] * 32, together, FULL, ("cuda",)),
        ("one request, 2 steps", [(8, 32, 32)], {"steps": 2, "stagger": 0}, QUICK, ("cpu",)),
        ("4 mixed requests, 2 steps", [(8, 32, 32), (4, 32, 64), (1, 64, 64), (12, 32, 32)], {"steps": 2, "stagger": 0}, DEFAULT, ("cpu",)),
    ):
        dtype = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}.get(options.get("precision"), "float32")
        shape = {"clips": len(requests), "frames": sum(each[0] for each in requests), "dtype": dtype} | options

        def make(device, requests=requests, options=options):
            return sample(requests, device, **options)

        found.append(Case(SAMPLE, name, shape, make, level, None, devices))
    return found
