"""CUDA graphs on and off, by token count: four blocks of Wan 2.1 1.3B, launched by the host kernel by kernel, or replayed."""

from typing import Any

import torch
from torch import Tensor

from .block import SMALL, TOLERANCES, layers
from .harness import DEFAULT, QUICK, Case, Implementation, Problem
from .wan import Packed, WanModel, flops

OP = "CUDA graph"


def problem(grid: tuple[int, int, int], words: int, device: torch.device) -> Problem:
    config, dtype = layers(SMALL, 4), torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(config).to(dtype).eval().requires_grad_(False)
    model.fuse()
    pack = Packed.of([grid], [words], config.head_dim, device)

    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        sizes = {"x": (pack.layout.tokens, config.width), "text": (words, config.width), "condition": (1, 6, config.width)}
        return {name: torch.randn(size, generator=generator, device=device, dtype=dtype) for name, size in sizes.items()}

    def run(x, text, condition) -> Tensor:
        for block in model.blocks:
            x = block.packed(x, text, condition, pack)
        return x

    def replayed(inputs: dict[str, Tensor]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(**inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(**inputs)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        exact = WanModel(config).to(device).requires_grad_(False)
        exact.load_state_dict(model.state_dict())
        x, text, condition = (inputs[name].float() for name in ("x", "text", "condition"))
        x = x[None]
        for block in exact.blocks:
            x = block.dense(x, text[None], condition, pack.cos, pack.sin)
        return x[0]

    return Problem(
        make=make,
        implementations=[
            Implementation("tubelet", lambda inputs: lambda: run(**inputs), ours=True),
            Implementation("tubelet in a CUDA graph", replayed, ours=True, comparable=False),
        ],
        reference=reference,
        dtype=dtype,
        flops=flops(config, [grid], [words]),
        bytes=0.0,
        tolerance=TOLERANCES[dtype],
        capturable=False,
    )


def cases() -> list[Case]:
    found = []
    for tokens, grid in ((256, (1, 16, 16)), (1024, (4, 16, 16)), (4096, (4, 32, 32)), (16_384, (16, 32, 32)), (32_760, (21, 30, 52))):
        shape = {"tokens": tokens, "heads": 12, "head_dim": 128, "layers": 4, "dtype": "bfloat16"}
        level = QUICK if tokens == 1024 else DEFAULT
        found.append(Case(OP, f"{tokens} tokens", shape, lambda device, grid=grid: problem(grid, 77, device), level, "four blocks"))
    return found
