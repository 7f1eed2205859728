"""Cases of a whole transformer block and of a whole denoising step, with the weights of one model: packed with this project's ops, dense in
plain torch, and by diffusers.
"""

import copy
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .harness import DEFAULT, FP8_TOLERANCE, FULL, QUICK, Case, Implementation, Problem, Tolerance
from .peers import compile_
from .wan import Packed, WanConfig, WanModel, flops

Grid = tuple[int, int, int]
SMALL = WanConfig(heads=12, head_dim=128, mlp=8960, layers=30)
LARGE = WanConfig(heads=40, head_dim=128, mlp=13_824, layers=40)
ON_CPU = WanConfig(heads=4, head_dim=64, mlp=1024, layers=4, text_width=256)
TOLERANCES = {torch.float32: Tolerance(1e-3, 5e-3), torch.bfloat16: Tolerance(5e-2, 2e-1)}
"""Of some tens of layers."""
NOT_COMPARABLE = ("tubelet one by one", "tubelet without FP8")


def problem(
    config: WanConfig,
    grids: Sequence[Grid],
    words: int,
    device: torch.device,
    only: Sequence[str] | None = None,
    blocks: bool = False,
    fp8: bool = False,
) -> Problem:
    """One evaluation of the model on requests of these grids, each with so many words; with `blocks`, of its blocks alone, on tokens. only:
    names of implementations, of all. fp8: the products of ours, and of a peer, are in E4M3; of the others, which are what that is to be
    faster than, in bfloat16.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    text, uniform = [words] * len(grids), len(set(grids)) == 1
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(config).to(dtype).eval().requires_grad_(False)
    model.fuse(fp8)
    pack = Packed.of(grids, text, config.head_dim, device)
    singles = [Packed.of([grid], [words], config.head_dim, device) for grid in grids]
    longest = max(grids, key=lambda grid: grid[0] * grid[1] * grid[2])
    most = longest[0] * longest[1] * longest[2]
    tokens = pack.layout.tokens

    def make(seed: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size):
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        if blocks:
            x = draw(tokens, config.width)
            return {"x": x, "text": draw(sum(text), config.width), "condition": draw(len(grids), 6, config.width)}
        clips = [draw(config.channels, t, 2 * h, 2 * w) for t, h, w in grids]
        times = torch.linspace(900, 100, len(grids), device=device)
        return {"clips": clips, "times": times, "text": draw(sum(text), config.text_width)}

    def of_clip(inputs, i: int) -> dict[str, Any]:
        """The inputs of one request."""
        span = pack.layout.clips[i]
        mine = {"text": inputs["text"][i * words : (i + 1) * words]}
        if blocks:
            return mine | {"x": inputs["x"][span.video_start : span.video_stop], "condition": inputs["condition"][i : i + 1]}
        return mine | {"clips": inputs["clips"][i : i + 1], "times": inputs["times"][i : i + 1]}

    def packed(inputs, where: Packed = pack, fp8: bool = fp8) -> list[Tensor]:
        if not blocks:
            return model.packed(**inputs, pack=where, fp8=fp8)
        x = inputs["x"]
        for block in model.blocks:
            x = block.packed(x, inputs["text"], inputs["condition"], where, fp8)
        return [x[span.video_start : span.video_stop] for span in where.layout.clips]

    def dense(blocks_of, step, inputs, where: Packed, batch: int = 1) -> list[Tensor]:
        """Requests of one grid as a batch."""
        n = where.layout.tokens // batch
        cos, sin = where.cos[:n], where.sin[:n]
        text = inputs["text"].unflatten(0, (batch, -1))
        if not blocks:
            return list(step(torch.stack(list(inputs["clips"])), inputs["times"], text, cos, sin))
        x = inputs["x"].unflatten(0, (batch, n))
        for block in blocks_of:
            x = block(x, text, inputs["condition"], cos, sin)
        return list(x)

    def in_turn(run) -> Any:
        return lambda inputs: [run(of_clip(inputs, i), single)[0] for i, single in enumerate(singles)]

    def eager_on(module: WanModel):
        return lambda inputs, where, batch=1: dense([block.dense for block in module.blocks], module.dense, inputs, where, batch)

    eager = eager_on(model)

    @cache
    def compiled(module: WanModel = model):
        # Block by block, as one compiles such models: a graph of all of them would take minutes to compile.
        one = compile_(type(module.blocks[0]).dense)
        each, step = [partial(one, block) for block in module.blocks], partial(module.dense, run=one)
        return lambda inputs, where, batch=1: dense(each, step, inputs, where, batch)

    @cache
    def by_torchao():
        torchao = import_module("torchao.quantization")
        other = copy.deepcopy(model)
        by_row = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
        torchao.quantize_(other.blocks, by_row)
        return compiled(other)

    @cache
    def theirs():
        other = model.in_diffusers()

        def step(clips, times, text, cos, sin):
            return other(clips, times, text, return_dict=False)[0]

        def block(module):
            def run(x, text, condition, cos, sin):
                doubled = [each.repeat_interleave(2, dim=-1)[None, :, None] for each in (cos, sin)]
                return module(x, text, condition, doubled)

            return run

        return lambda inputs, where, batch=1: dense([block(each) for each in other.blocks], step, inputs, where, batch)

    def padded(inputs) -> list[Tensor]:
        """All requests filled up to the longest, in tokens: what a batch without packs costs."""
        spans = pack.layout.clips
        x = inputs["x"].new_zeros(len(grids), most, config.width)
        cos, sin = (each.new_zeros(len(grids), most, each.shape[1]) for each in (pack.cos, pack.sin))
        for i, span in enumerate(spans):
            length = span.video_stop - span.video_start
            for into, each in ((x, inputs["x"]), (cos, pack.cos), (sin, pack.sin)):
                into[i, :length] = each[span.video_start : span.video_stop]
        text = inputs["text"].unflatten(0, (len(grids), -1))
        for each in model.blocks:
            x = each.dense(x, text, inputs["condition"], cos, sin, hidden)
        return [x[i, : span.video_stop - span.video_start] for i, span in enumerate(spans)]

    hidden = torch.stack([torch.arange(most, device=device) >= span.video_stop - span.video_start for span in pack.layout.clips])
    runs: dict[str, tuple] = {"tubelet": (lambda: packed, (), True)}
    if len(grids) > 1:
        runs["tubelet one by one"] = (lambda: in_turn(packed), (), True)
    if fp8:
        runs["tubelet without FP8"] = (lambda: lambda inputs: packed(inputs, fp8=False), (), True)
    if uniform:
        whole = {"torch": lambda: eager, "torch.compile": compiled}
        whole |= {"torchao FP8, torch.compile": by_torchao} if fp8 else {"diffusers": theirs}
        for name, ready in whole.items():
            runs[name] = (lambda ready=ready: lambda inputs: ready()(inputs, pack, len(grids)), _needs(name), False)
    elif blocks:
        runs["torch padded"] = (lambda: padded, (), False)
    if len(grids) > 1:
        for name, ready in {"torch": lambda: eager, "torch.compile": compiled, "diffusers": theirs}.items():
            runs[f"{name} one by one"] = (lambda ready=ready: in_turn(ready()), _needs(name), False)
    if device.type != "cuda":
        runs = {name: run for name, run in runs.items() if "compile" not in name}
    implementations = [
        Implementation(
            name, lambda inputs, ready=ready: _bound(ready(), inputs), needs, ours, name not in NOT_COMPARABLE, "compile" in name
        )
        for name, (ready, needs, ours) in runs.items()
        if only is None or name in only
    ]

    def reference(inputs) -> list[Tensor]:
        exact = copy.deepcopy(model).to(torch.float32 if device.type == "cuda" else torch.float64)
        dtype = exact.proj_out.weight.dtype
        run, wide = eager_on(exact), lambda x: [wide(each) for each in x] if isinstance(x, list) else x.to(dtype)
        inputs = {name: x if name == "times" else wide(x) for name, x in inputs.items()}
        with torch.no_grad():
            return [run(of_clip(inputs, i), single)[0] for i, single in enumerate(singles)]

    return Problem(
        make=make,
        implementations=implementations,
        reference=reference,
        dtype=dtype,
        flops=flops(config, grids, text),
        bytes=model.weight_bytes(blocks, fp8) + 2 * config.layers * tokens * config.width * dtype.itemsize,
        tolerance=FP8_TOLERANCE if fp8 else TOLERANCES[dtype],
        capturable=False,
    )


def _needs(name: str) -> tuple[str, ...]:
    return tuple(each for each in ("diffusers", "torchao") if name.startswith(each))


def _bound(run, inputs):
    return lambda: run(inputs)


def case(op: str, name: str, config: WanConfig, grids: Sequence[Grid], level: int, words: int = 512, series=None, **how) -> Case:
    """A case of `problem`; on a CPU if the model is that for CPUs."""
    on_cpu = config.width == ON_CPU.width
    shape = {
        "tokens": sum(t * h * w for t, h, w in grids),
        "clips": len(grids),
        "grid": "x".join(map(str, grids[0])) if len(set(grids)) == 1 else f"{len(set(grids))} sizes",
        "heads": config.heads,
        "head_dim": config.head_dim,
        "layers": config.layers,
        "words": words,
        "dtype": "float8_e4m3fn" if how.get("fp8") else "float32" if on_cpu else "bfloat16",
    }
    devices = ("cpu",) if on_cpu else ("cuda",)
    make = partial(problem, config, grids, words, **how)
    return Case(op, name, shape, make, level, series, devices, representative=len(grids) == 1)


def layers(config: WanConfig, count: int) -> WanConfig:
    return WanConfig(config.heads, config.head_dim, config.mlp, count, config.channels, config.text_width)


MIXED = [(21, 30, 52), (1, 64, 64), (5, 30, 52), (9, 20, 36)]
CPU_MIXED = [(5, 10, 14), (1, 16, 16), (8, 6, 6), (3, 10, 14)]


def cases() -> list[Case]:
    one, one_large, one_cpu = layers(SMALL, 1), layers(LARGE, 1), layers(ON_CPU, 1)
    return [
        case("block", "Wan 2.1 1.3B 480p", one, [(21, 30, 52)], QUICK, blocks=True),
        case("block", "Wan 2.1 14B 480p", one_large, [(21, 30, 52)], DEFAULT, blocks=True),
        case("block", "Wan 2.1 1.3B 480p, FP8", one, [(21, 30, 52)], DEFAULT, blocks=True, fp8=True),
        case("block", "Wan 2.1 14B 480p, FP8", one_large, [(21, 30, 52)], FULL, blocks=True, fp8=True),
        case("block", "Wan 2.1 1.3B, mixed pack", one, MIXED, DEFAULT, blocks=True),
        case("denoising step", "Wan 2.1 1.3B 480p, 17 frames", SMALL, [(5, 30, 52)], DEFAULT),
        case("denoising step", "Wan 2.1 1.3B 480p, 81 frames", SMALL, [(21, 30, 52)], FULL),
        case("denoising step", "Wan 2.1 1.3B 480p, 81 frames, FP8", SMALL, [(21, 30, 52)], FULL, fp8=True),
        case("denoising step", "Wan 2.1 1.3B, mixed pack", SMALL, MIXED, FULL),
        case("block", "Wan, small", one_cpu, [(5, 10, 14)], QUICK, 32, blocks=True),
        case("block", "Wan, small, mixed pack", one_cpu, CPU_MIXED, QUICK, 32, blocks=True),
        case("block", "Wan, small, FP8", one_cpu, [(5, 10, 14)], FULL, 32, blocks=True, fp8=True),
        case("denoising step", "Wan, small", ON_CPU, [(5, 10, 14)], QUICK, 32),
        case("denoising step", "Wan, small, mixed pack", ON_CPU, CPU_MIXED, DEFAULT, 32),
    ]
