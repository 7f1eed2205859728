"""CUDA graphs on and off, by token count: four blocks of Wan 2.1 1.3B, launched by the host kernel by kernel, or replayed; with this
project's ops and in plain torch.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .block import SMALL, TOLERANCES, layers
from .harness import DEFAULT, QUICK, Case, Implementation, Problem
from .wan import Packed, WanModel, flops

OP = "CUDA graph"


def replayed(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A call of a function, captured in a graph of its own."""
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

    def packed(x, text, condition) -> Tensor:
        for block in model.blocks:
            x = block.packed(x, text, condition, pack)
        return x

    def dense(x, text, condition, model=model) -> Tensor:
        x = x[None]
        for block in model.blocks:
            x = block.dense(x, text[None], condition, pack.cos, pack.sin)
        return x[0]

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        exact = copy.deepcopy(model).float()
        return dense(**{name: each.float() for name, each in inputs.items()}, model=exact)

    implementations = []
    for name, run, ours in (("tubelet", packed, True), ("torch", dense, False)):
        implementations.append(Implementation(name, lambda inputs, run=run: lambda: run(**inputs), ours=ours))
        implementations.append(Implementation(f"{name} in a CUDA graph", partial(replayed, run), ours=ours))
    return Problem(
        make=make,
        implementations=implementations,
        reference=reference,
        dtype=dtype,
        flops=flops(config, [grid], [words]),
        bytes=model.weight_bytes(True, False) + 2 * config.layers * pack.layout.tokens * config.width * dtype.itemsize,
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
