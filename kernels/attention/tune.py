"""The search for the settings of the attention kernels on a GPU: what `tubelet tune attention` runs, and sampling never does.

The three kernels of a class of shapes are tuned one after the other, each in three rounds over shapes of real models:

1. every tile that shared memory and registers have room for, in a few numbers of warps, with as many stages as fit up to three; and the
   specialised forward kernel, where there is one, in all of its settings;
2. the best of these, with every number of stages that fits;
3. the winner against the rule, in turn: the fastest of many noisy timings looks faster than it is.

A candidate that does not run, or whose result is not that of the rule's settings, is left out, and reported. What counts is the geometric
mean over the shapes; the rule stays where nothing is more than 1 % faster. Each kernel of the backward pass is timed with the whole of it,
the kernels before it launched as they were tuned.
"""

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import NamedTuple

import torch
import triton
from triton.testing import do_bench

from ..layout import VideoLayout
from ..masks import FrameCausal, Full, Mask, Spatial, Temporal
from . import hopper
from .configs import KERNELS, Config, Configs, default_configs, fitted, limits, split_head_dim
from .fused import attention_fused, attention_fused_backward

BLOCKS = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
FIRST_STAGES, MOST_STAGES = 3, 4
FINALISTS = 3
HOPELESS = 1.25
"""A candidate this many times slower than the best on the shapes so far is not timed on the others."""
LEAST_GAIN = 1.01

Timer = Callable[[Callable], float]
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Shape:
    """A pack to time on. Its head dim and dtype are those of the class that is tuned."""

    name: str
    grids: Sequence[tuple[int, int, int]]
    heads: int
    mask: Mask
    text: int = 0


SHAPES = {
    "video": (
        Shape("Wan 2.1 1.3B, 480p", [(21, 30, 52)], 12, Full()),
        Shape("SkyReels-V2, 544p, in chunks", [(25, 34, 60)], 16, FrameCausal(chunk=5)),
        Shape("LTX-Video, 512p", [(21, 16, 22)], 32, Full()),
        Shape("CogVideoX 2B, 480p", [(13, 30, 45)], 30, Full(), text=226),
        Shape("eight small clips, by frames", [(16, 8, 8)] * 8, 16, FrameCausal()),
    ),
    "frame": (
        Shape("Open-Sora 1.2, 480p", [(15, 30, 53)], 16, Spatial()),
        Shape("Latte, 512p", [(16, 32, 32)], 16, Spatial()),
        Shape("eight small clips", [(16, 8, 8)] * 8, 16, Spatial()),
    ),
    "site": (
        Shape("a long clip", [(257, 16, 16)], 16, Temporal(causal=False)),
        Shape("a long clip, causal", [(160, 20, 32)], 8, Temporal()),
        Shape("four small ones, by a window", [(400, 8, 8)] * 4, 16, Temporal(window=128)),
    ),
}
"""For each kind of mask, the shapes to time on, after models of those names; of sites, clips too long for `temporal`."""


class Milliseconds(NamedTuple):
    """Of a pass with a kernel launched by the rule, and as tuned: geometric means over the shapes."""

    rule: float
    tuned: float


@dataclass(frozen=True)
class Tuning:
    """What the search found: the settings, the times of each kernel, and which candidates were left out, why."""

    configs: Configs
    milliseconds: dict[str, Milliseconds]
    left_out: dict[str, str]

    def entry(self) -> dict:
        """As `tuned` keeps it, the times to four digits."""
        kernels = {kernel: asdict(getattr(self.configs, kernel)) for kernel in KERNELS}
        times = {kernel: {name: float(f"{ms:.4g}") for name, ms in each._asdict().items()} for kernel, each in self.milliseconds.items()}
        return kernels | {"specialised": self.configs.specialised, "milliseconds": times}


def median(call: Callable) -> float:
    """Milliseconds."""
    return do_bench(call, return_mode="median")


def header(device: torch.device) -> dict[str, str]:
    """What a file of settings says about the machine."""
    return {
        "device": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def tune(
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
    device: torch.device,
    *,
    quick: bool = False,
    shapes: Sequence[Shape] | None = None,
    blocks: Sequence[int] = BLOCKS,
    timer: Timer = median,
    progress: Progress = lambda kernel, done, total, gain: None,
) -> Tuning:
    """Tune a class of shapes; `kind` is that of its masks.

    quick: two shapes, one number of warps for each tile, no second round. shapes: others than SHAPES[kind]. blocks: the tile sizes to try.
    timer: milliseconds of a call. progress: told which kernel is at work, timings done and at most to do, and how many times as fast as the
    rule the best is so far. Errors of the rule's own settings are raised.
    """
    shapes = shapes or SHAPES[kind][: 2 if quick else None]
    search = _Search(head_dim, dtype, device, shapes, blocks, quick, timer, progress)
    configs, milliseconds = default_configs(head_dim, dtype, kind, **limits(device)), {}
    for kernel in KERNELS:
        configs, milliseconds[kernel] = search.fastest(kernel, configs)
    return Tuning(configs, milliseconds, search.left_out)


def describe(configs: Configs, kernel: str) -> str:
    """The settings of a kernel, in words."""
    config = getattr(configs, kernel)
    special = ", specialised" if configs.specialised and kernel == "forward" else ""
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{special}"


class _Problem:
    """The tensors of a shape."""

    def __init__(self, shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.layout = VideoLayout.pack(shape.grids, text=[shape.text] * len(shape.grids), device=device)
        self.mask, self.scale = shape.mask, head_dim**-0.5
        size = self.layout.tokens, 4, shape.heads, head_dim
        packed = torch.randn(size, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
        *self.qkv, self.do = packed.unbind(1)  # views of one tensor, as in models

    def call(self, kernel: str, configs: Configs) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The pass that `kernel` is part of."""
        rest = self.layout, self.mask, self.layout, self.scale
        if kernel == "forward":
            return lambda: attention_fused(*self.qkv, *rest, configs=configs)
        result = attention_fused(*self.qkv, *rest, configs=configs)
        return lambda: attention_fused_backward(self.do, *self.qkv, *result, *rest, configs=configs)


@dataclass
class _Search:
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    shapes: Sequence[Shape]
    blocks: Sequence[int]
    quick: bool
    timer: Timer
    progress: Progress
    left_out: dict[str, str] = field(default_factory=dict)

    def fastest(self, kernel: str, rule: Configs) -> tuple[Configs, Milliseconds]:
        """`rule` with the settings of one kernel replaced by the fastest."""
        tiles = self._tiles(kernel, rule)
        first = len(self.shapes) * (1 + len(tiles))
        second = 0 if self.quick else len(self.shapes) * (1 + FINALISTS * MOST_STAGES)
        total = first + second + 2 * len(self.shapes)
        times = self._time(kernel, rule, tiles, 0, total)
        if not self.quick:
            times = self._time(kernel, rule, self._stages(kernel, sorted(times, key=times.get)[:FINALISTS]), first, total)
        winner = min(times, key=times.get)
        times = self._time(kernel, rule, [winner], first + second, total)
        if times[rule] < LEAST_GAIN * times.get(winner, math.inf):
            winner = rule
        self.progress(kernel, total, total, times[rule] / times[winner])
        return winner, Milliseconds(times[rule], times[winner])

    def _tiles(self, kernel: str, rule: Configs) -> list[Configs]:
        """The candidates of the first round."""
        width, found = sum(split_head_dim(self.head_dim, self.dtype)), []
        for m, n in product(self.blocks, self.blocks):
            # What is accumulated, and the scores: float32 values, shared out among threads with 255 registers. The operands need the rest.
            values = {"forward": m * (width + n), "queries": m * (width + 2 * n), "keys": 2 * n * (width + m)}[kernel]
            warps = [w for w in WARPS if values <= 160 * 32 * w and (w == 1 or values >= 24 * 32 * w)]
            for w in warps[len(warps) // 2 :][:1] if self.quick else warps:
                found.append(rule._replace(**{kernel: self._fitted(kernel, Config(m, n, w, FIRST_STAGES))}))
        if kernel == "forward":
            problem = _Problem(self.shapes[0], self.head_dim, self.dtype, self.device)
            if hopper.unavailable(*problem.qkv, problem.mask) is None:
                for n, stages in product((64, 128), range(1, MOST_STAGES + 1)):
                    found.append(rule._replace(forward=self._fitted(kernel, Config(128, n, 4, stages), True), specialised=True))
        return found

    def _stages(self, kernel: str, best: list[Configs]) -> list[Configs]:
        """The candidates of the second round: the best of the first, in all numbers of stages."""
        return [
            configs._replace(**{kernel: self._fitted(kernel, replace(getattr(configs, kernel), num_stages=stages), configs.specialised)})
            for configs, stages in product(best, range(1, MOST_STAGES + 1))
        ]

    def _fitted(self, kernel: str, config: Config, specialised: bool = False) -> Config:
        room = limits(self.device)["shared_memory"]
        if specialised and kernel == "forward":
            room -= hopper.EXTRA_SHARED_MEMORY
        return fitted(kernel, config, self.head_dim, self.dtype, room)

    def _time(self, kernel: str, rule: Configs, candidates: list[Configs], done: int, total: int) -> dict[Configs, float]:
        """Milliseconds of the rule and of those candidates that are right and not hopeless, geometric means over the shapes."""
        times: dict[Configs, list[float]] = {configs: [] for configs in (rule, *candidates)}
        for i, shape in enumerate(self.shapes):
            problem = _Problem(shape, self.head_dim, self.dtype, self.device)
            wanted = problem.call(kernel, rule)()
            best = math.inf
            for j, configs in enumerate(list(times)):
                try:
                    call = problem.call(kernel, configs)
                    _check(call(), wanted)
                    times[configs].append(self.timer(call))
                except Exception as error:  # of the compiler, the driver, the launcher: each has classes of its own
                    if configs == rule:
                        raise
                    del times[configs]
                    self.left_out[f"{kernel} {describe(configs, kernel)}"] = f"{shape.name}: {type(error).__name__}: {error}"
                    continue
                best = min(best, _mean(times[configs]))
                self.progress(kernel, done + i * (1 + len(candidates)) + j, total, _mean(times[rule]) / best)
            times = {configs: each for configs, each in times.items() if configs == rule or _mean(each) <= HOPELESS * best}
        return {configs: _mean(each) for configs, each in times.items()}


def _mean(times: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, times)) / len(times))


def _check(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    """That they differ by roundings alone; relative to the largest value, since elements near zero carry the rounding of what cancelled in
    them. Raises ArithmeticError.
    """
    for a, b in zip(found, wanted, strict=True):
        error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
        allowed = (256 if a.dtype == torch.float32 else 8) * torch.finfo(a.dtype).eps
        if not error <= allowed:  # NaN is an error
            raise ArithmeticError(f"relative error {error:.1e} against the rule's settings, allowed {allowed:.1e}")
