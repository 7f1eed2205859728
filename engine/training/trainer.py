"""The loop both stages share: Muon and AdamW, warm-up and cosine decay, a moving average of the weights, a log, checkpoints that a run
resumes from.

A run lives in a folder: `checkpoint.safetensors` (weights, their average, the optimisers' moments) and `state.json` (step, seconds),
written whole or not at all, and `log.jsonl`, a line every few steps. Each step draws from generators seeded by (seed, step), so a resumed
run sees the data it would have seen.
"""

import json
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..pretrained import load_tensors, read_json, save_tensors, write_json

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What the optimisers remember of each parameter: AdamW the first two, Muon the last."""
MOST_BROKEN = 20
"""Steps in a row whose gradients are not finite, after which a run ends."""


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how to train. With `minutes` the run ends after that much time in all, and the learning rate decays with the time
    instead of with the steps.
    """

    steps: int = 10_000
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"
    seed: int = 0
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self):
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision: expected 'bf16' or 'fp32', got {self.precision!r}")
        for name in ("steps", "learning_rate", "log_every", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: expected a number above 0, got {self.minutes}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a whole number, not below 0, got {self.seed}")


class Trainer:
    """Trains `model` in `folder`; resumes where a run in that folder stopped.

    `hidden` are the matrices between hidden features: their updates are orthogonalised (Muon, Jordan et al. 2024, scaled to AdamW's
    root mean square as in Liu et al. 2025, "Muon is scalable for LLM training", so that one learning rate serves both). All other
    parameters take AdamW (Loshchilov & Hutter 2019), those in `slow` at a tenth of the learning rate.
    """

    def __init__(
        self, model: nn.Module, folder: str | Path, config: TrainerConfig, hidden: Iterable[Tensor] = (), slow: Iterable[Tensor] = ()
    ):
        self.model, self.config, self.folder = model, config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = list(hidden)
        orthogonal = {id(p) for p in hidden}
        delayed = {id(p) for p in slow}
        kinds = defaultdict(list)
        for p in self.parameters.values():
            if id(p) not in orthogonal:
                kinds[p.dim() > 1, id(p) in delayed].append(p)
        groups = [
            {"params": parameters, "weight_decay": config.weight_decay if matrix else 0.0, "share": 0.1 if late else 1.0}
            for (matrix, late), parameters in kinds.items()
        ]
        self.optimisers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)]
        if hidden:
            muon = torch.optim.Muon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimisers.append(muon)
        self.buffers = {name: buffer for name, buffer in model.state_dict().items() if name not in dict(model.named_parameters())}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.seconds = 0, 0.0
        if (self.folder / "state.json").is_file():
            self._load()

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        if self.config.minutes is not None:
            return min(1.0, self.seconds / (60 * self.config.minutes))
        return min(1.0, self.step / self.config.steps)

    def run(self, loss: Callable[[int], dict[str, Tensor]], describe: str) -> None:
        """Call `loss(step)` for a dict whose "loss" is minimised and whose other entries are logged, until the budget is spent.

        An interrupt (Ctrl-C, or SIGTERM) ends the run after its step and a checkpoint, with KeyboardInterrupt.
        """
        begun, sums, counted, broken = time.monotonic() - self.seconds, {}, 0, 0
        with self._bar(describe) as show, _interrupts() as interrupted:
            while self.progress < 1 and not interrupted:
                rate = self.config.learning_rate * min(1, (self.step + 1) / self.config.warmup)
                rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress))
                for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                    group["lr"] = rate * group.get("share", 1.0)
                device = next(iter(self.parameters.values())).device.type
                with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                    terms = loss(self.step)
                terms["loss"].backward()
                terms["gradient"] = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
                if torch.isfinite(terms["gradient"]):
                    broken = 0
                    for optimiser in self.optimisers:
                        optimiser.step()
                else:
                    broken += 1
                if broken == MOST_BROKEN:
                    raise ValueError(
                        f"training: gradients were not finite for {MOST_BROKEN} steps, up to {self.step + 1}: it diverged (a lower "
                        f"--learning-rate may help); the last checkpoint is as it was"
                    )
                self.model.zero_grad(set_to_none=True)
                self._update_average()
                self.step, self.seconds, counted = self.step + 1, time.monotonic() - begun, counted + 1
                sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in terms.items()}
                if self.step % self.config.log_every == 0 or self.progress == 1 or interrupted:
                    means = {name: value / counted for name, value in sums.items()}
                    self._log({"step": self.step, "seconds": round(self.seconds, 1), "rate": rate, **means})
                    show(means)
                    sums, counted = {}, 0
                if self.step % self.config.save_every == 0:
                    self.save()
        self.save()
        if interrupted:
            raise KeyboardInterrupt

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short average at first, so that it does not remember the start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights."""
        raw = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(raw)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def save(self) -> None:
        """Write the checkpoint. Its step is inside it, so weights and step cannot come apart."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"model.{name}"], tensors[f"average.{name}"] = p, self.average[name]
            for optimiser in self.optimisers:
                moments = optimiser.state.get(p, {})
                tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS if moment in moments}
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        tensors["step"] = torch.tensor(self.step)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        save_tensors(self.folder / "checkpoint.safetensors", tensors)
        write_json(self.folder / "state.json", {"step": self.step, "seconds": self.seconds})

    def _load(self) -> None:
        read_json(self.folder / "state.json")
        path = self.folder / "checkpoint.safetensors"
        tensors = load_tensors(path)
        for name, p in self.parameters.items():
            if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != p.shape:
                raise ValueError(
                    f"{path}: {name!r} does not fit the model that is to be trained; use another folder or the same configuration"
                )
            with torch.no_grad():
                p.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
            moments = {moment: tensors[f"{moment}.{name}"].to(p.device) for moment in MOMENTS if f"{moment}.{name}" in tensors}
            if moments:
                optimiser = next(o for o in self.optimisers if any(p is q for group in o.param_groups for q in group["params"]))
                optimiser.state[p] = moments | ({"step": tensors["step"].float().clone()} if "exp_avg" in moments else {})
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
        self.step, self.seconds = int(tensors["step"]), float(tensors["seconds"])

    def _log(self, line: dict) -> None:
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}) + "\n")

    @contextmanager
    def _bar(self, describe: str) -> Iterator[Callable[[dict[str, float]], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        columns = (*columns, TextColumn("{task.fields[terms]}"))
        by_time = self.config.minutes is not None
        with Progress(*columns, refresh_per_second=1) as bar:  # drawing the bar takes time from the training
            task = bar.add_task(describe, total=round(60 * self.config.minutes) if by_time else self.config.steps, terms="")

            def show(terms: dict[str, float]) -> None:
                text = " ".join(f"{name} {value:.4g}" for name, value in terms.items())
                bar.update(task, completed=round(self.seconds) if by_time else self.step, terms=text)

            yield show


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The list of the interrupts that came. A step is not left halfway; who insists with a second one gets Python's own handling."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield came
        return

    def handle(number: int, frame) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
