"""What is measured, and how: an implementation is checked against the reference first, and only a right one is timed.

On a GPU a call is timed by events on the device, after warm-up, its inputs changing from call to call and the L2 cache overwritten before
each, the host ahead of the device; a call shorter than LAUNCH_BOUND is timed in a CUDA graph as well. On a CPU the clock of the process is
read around each call. What is kept are the median and the quartiles.
"""

import contextlib
import gc
import importlib
import math
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .record import Measurement

LAUNCH_BOUND = 2.0
"""Milliseconds under which the host's part of a call may show in its time."""
MOST_SETS = 16
"""Of inputs that take turns."""
LONGEST_START = 0.02
"""Seconds that the device waits at most for the host to get ahead of it."""
QUICK, DEFAULT, FULL = range(3)
"""Levels: a run takes the cases of its level and those below."""


class Tolerance(NamedTuple):
    """The relative error allowed: of the norm, and of the largest element against the largest element."""

    norm: float
    largest: float


TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-9),
    torch.float32: Tolerance(2e-4, 1e-3),  # products of three TF32 ones are allowed, those of one are not
    torch.float16: Tolerance(4e-3, 2e-2),
    torch.bfloat16: Tolerance(2.5e-2, 1e-1),  # what eager torch needs, which rounds scores and weights
}
"""Looser than what this project's tests ask of its own kernels: peers round where they like, and what is looked for are wrong results."""
FP8_TOLERANCE = Tolerance(8e-2, 2.5e-1)


class Unsupported(Exception):
    """What an implementation says that cannot do a case."""


class TimeLimit(Exception):
    """A measurement took longer than it may."""


@dataclass(frozen=True)
class Implementation:
    """build: from one set of inputs to a call without arguments that gives the outputs; what happens in `build` is not timed. needs: the
    modules that it imports. ours: of this project. comparable: does the same work from the same inputs; if not, it is shown, and is no peer
    in ratios. slow: compiles for some seconds, so that a quick run leaves it out, and one of the default level times it in representative
    cases alone. tolerance: if it may err more than others of its case.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    needs: tuple[str, ...] = ()
    ours: bool = False
    comparable: bool = True
    slow: bool = False
    tolerance: Tolerance | None = None


@dataclass
class Problem:
    """A case made ready on a device.

    make: inputs, other ones for each seed. reference: from inputs to what the outputs should be, in float64 or float32, or a part of each,
    which `part` takes from a result. flops, bytes: the least that any implementation has to do; flops are 0 where they are not known.
    tolerance: else that of `dtype`. gradients: whether calls differentiate. capturable: whether calls can be in a CUDA graph; if not, they
    are of a whole model, and what the host takes for them is part of their time.
    """

    make: Callable[[int], Any]
    implementations: Sequence[Implementation]
    reference: Callable[[Any], Any]
    dtype: torch.dtype
    flops: float
    bytes: float
    part: Callable[[Any], Any] = lambda result: result
    tolerance: Tolerance | None = None
    gradients: bool = False
    capturable: bool = True


@dataclass(frozen=True)
class Case:
    """op: the name of the group. name: of the model and its size. shape: what a reader asks for: tokens, heads, head_dim, dtype, pass, ...
    make: a Problem on a device. series: cases of one series differ in their tokens alone. devices: kinds that it is meant for.
    representative: the default level times slow implementations too; cases of the quick level are that anyway.
    """

    op: str
    name: str
    shape: dict[str, Any]
    make: Callable[[torch.device], Problem]
    level: int = DEFAULT
    series: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    representative: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def takes_slow(self, level: int) -> bool:
        """Whether a run of a level times slow implementations here."""
        return level == FULL or (level == DEFAULT and (self.representative or self.level == QUICK))


@dataclass(frozen=True)
class Settings:
    """device: to measure on. seconds: of timing for each implementation, if it is not so slow that LEAST calls take longer. limit: seconds
    that an implementation may take in all, compiling included.
    """

    device: torch.device
    seconds: float = 0.25
    limit: float = 60.0
    least: int = 5
    most: int = 200
    level: int = FULL


@dataclass
class Times:
    """Milliseconds of single calls; and, on a GPU, those after which they return to the host, the device still at work."""

    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def tensors(result: Any) -> list[Tensor]:
    """Those of a result: a tensor, or several in lists, tuples or dicts; what else is there is left out."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    return [x for each in result for x in tensors(each)] if isinstance(result, list | tuple) else []


def storage_bytes(result: Any) -> int:
    """Of all tensors of a result; what several of them are views of counts once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(result)}.values())


def relative_error(result: Any, expected: Any) -> Tolerance:
    """The largest over the tensors of a result; NaN or infinity if there is one anywhere, or if the shapes differ."""
    worst = Tolerance(0.0, 0.0)
    found, wanted = tensors(result), tensors(expected)
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=False)):
        return Tolerance(math.inf, math.inf)
    for a, b in zip(found, wanted, strict=True):
        dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
        a, b = a.detach().to(dtype), b.detach().to(dtype)
        wrong = a - b
        norm, largest = float(wrong.norm() / b.norm().clamp_min(1e-30)), float(wrong.abs().max() / b.abs().max().clamp_min(1e-30))
        if math.isnan(norm) or math.isnan(largest):
            return Tolerance(math.nan, math.nan)
        worst = Tolerance(max(worst.norm, norm), max(worst.largest, largest))
    return worst


def is_finite(result: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors(result) if x.dtype.is_floating_point and x.dtype.itemsize > 1)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the block when it is over. In a main thread alone; a call into a library is interrupted when it returns."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(signum, frame):
        raise TimeLimit(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Times calls on a device."""

    def __init__(self, settings: Settings):
        self.settings, self.cuda = settings, settings.device.type == "cuda"
        self.cache = 64 << 20  # of a CPU; larger ones are rare
        if self.cuda:
            self.cache = max(getattr(torch.cuda.get_device_properties(settings.device), "L2_cache_size", 0), 32 << 20)
        # As integers, since those of a NaN pattern are no slower; twice the cache, since it need not evict the oldest line first.
        self.flushed = torch.zeros(2 * self.cache // 4, dtype=torch.int32, device=settings.device)

    def sets(self, bytes_: float) -> int:
        """How many sets of inputs of so many bytes take turns: enough that the first is out of the cache when it comes again."""
        if not self.cuda or not bytes_:  # prompts, whose tensors each call makes
            return 2
        wanted = min(MOST_SETS, max(2, math.ceil(2 * self.cache / max(bytes_, 1))))
        free, _ = torch.cuda.mem_get_info(self.settings.device)
        return max(1, min(wanted, int(0.3 * free / max(bytes_, 1))))

    def time(self, calls: Sequence[Callable[[], Any]], ahead: bool = True) -> Times:
        """Of calls that take turns, one by one. ahead: on a GPU, without what the host takes to launch them."""
        return self._time_cuda(calls, ahead) if self.cuda else self._time_cpu(calls)

    def _slow(self, times: Times) -> bool:
        """Whether calls are so long that three of them have to do."""
        return len(times.samples) >= min(3, self.settings.least) and sum(times.samples) > 4e3 * self.settings.seconds

    def _time_cpu(self, calls) -> Times:
        for call in calls:
            call()
        times, end = Times(), time.perf_counter() + self.settings.seconds
        while len(times.samples) < self.settings.most and not self._slow(times):
            call = calls[len(times.samples) % len(calls)]
            self.flushed.add_(1)
            start = time.perf_counter()
            call()
            times.samples.append(1e3 * (time.perf_counter() - start))
            if time.perf_counter() > end and len(times.samples) >= self.settings.least:
                break
        return times

    def _time_cuda(self, calls, ahead: bool) -> Times:
        host, whole = self._warm_up(calls)
        size = self.settings.least if whole < self.settings.seconds else 1
        times, end = Times(), time.perf_counter() + self.settings.seconds
        while len(times.samples) < self.settings.most and not self._slow(times):
            # In batches, so that the host can look at the clock between them. The device waits until the host has launched a batch: short
            # calls would else be timed with the launches in between, which in a model hide behind what runs before.
            batch = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(size)]
            if ahead:
                torch.cuda._sleep(int(2e9 * min(1.5 * host * size, LONGEST_START)))  # in clocks
            for i, (start, stop) in enumerate(batch):
                self.flushed.add_(1)
                start.record()
                begin = time.perf_counter()
                calls[(len(times.samples) + i) % len(calls)]()
                times.host.append(1e3 * (time.perf_counter() - begin))
                stop.record()
            torch.cuda.synchronize()
            times.samples += [start.elapsed_time(stop) for start, stop in batch]
            if time.perf_counter() > end and len(times.samples) >= self.settings.least:
                break
        return times

    def _warm_up(self, calls) -> tuple[float, float]:
        """Each call once, of slow ones some. Seconds that the host takes to launch one, and until it is done."""
        start, host, whole = time.perf_counter(), 0.0, 0.0
        for i, call in enumerate((*calls, *calls)[: max(3, len(calls))]):
            begin = time.perf_counter()
            self.flushed.add_(1)
            call()
            host = time.perf_counter() - begin
            torch.cuda.synchronize()
            whole = time.perf_counter() - begin
            if i > 0 and time.perf_counter() - start > 4 * self.settings.seconds:
                break
        return host, whole

    def time_in_graph(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """Of calls that take turns in a captured CUDA graph, which holds at least eight; the cache is warm where all inputs fit it."""
        count = len(calls) * math.ceil(8 / len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                calls[i % len(calls)]()
        graph.replay()
        torch.cuda.synchronize()
        times, end = Times(), time.perf_counter() + self.settings.seconds
        while len(times.samples) < self.settings.most:
            self.flushed.add_(1)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times.samples.append(start.elapsed_time(stop) / count)
            if time.perf_counter() > end and len(times.samples) >= self.settings.least:
                break
        return times

    def memory(self, call: Callable[[], Any]) -> tuple[int | None, int | None]:
        """(bytes allocated at the peak of a call beyond what was there before, those beyond its outputs); None off a GPU."""
        if not self.cuda:
            return None, None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak, max(0, peak - storage_bytes(result))


def missing(needs: Sequence[str]) -> str | None:
    """Why modules cannot be imported, if they cannot."""
    for name in needs:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken build may raise anything
            return f"{name}: {type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class Bench:
    """Measures the implementations of one case after another."""

    def __init__(self, settings: Settings):
        self.settings, self.stopwatch = settings, Stopwatch(settings)
        self.samples: list[float] = []  # of the last implementation that was timed, milliseconds

    def measure(self, case: Case, skip: Callable[[str], bool] = lambda name: False, on_start: Callable = lambda blank: None):
        """Yields a Measurement of each implementation of a case but those to skip; no failure of one is one of another. An error of the
        case itself, or of its reference, is yielded as that of an implementation without a name. on_start: told of each before it runs,
        by a Measurement that says no more than what it will be of.
        """
        result, start = self._blank(case, None), time.perf_counter()
        try:
            with time_limit(self.settings.limit):
                problem = case.make(self.settings.device)
                slow = case.takes_slow(self.settings.level)
                todo = [each for each in problem.implementations if (slow or not each.slow) and not skip(each.name)]
                expected = problem.reference(problem.make(0)) if todo else None
        except Exception as error:
            self._fail(result, _status(error), error)
            self._tidy()
            yield result
            return
        setup = round(time.perf_counter() - start, 3)
        for implementation in todo:
            start, result = time.perf_counter(), self._blank(case, implementation, problem)
            result.setup_seconds, setup = setup, None
            on_start(result)
            why = missing(implementation.needs)
            if why is not None:
                result.status, result.reason = "missing", why
            else:
                try:
                    with time_limit(self.settings.limit):
                        self._measure(problem, implementation, expected, result)
                except Unsupported as error:
                    result.status, result.reason = "unsupported", first_line(error)
                except Exception as error:
                    self._fail(result, _status(error), error)
            result.seconds = round(time.perf_counter() - start, 3)
            self._tidy()
            yield result
        del problem, todo, expected  # a model may be among them, and the next case needs its memory
        self._tidy()

    def _fail(self, result: Measurement, status: str, error: BaseException) -> None:
        result.ms = result.low = result.high = result.graph_ms = result.graph_low = result.graph_high = result.host_ms = None
        result.status, result.reason = status, f"{type(error).__name__}: {first_line(error)}"
        result.where = "".join(traceback.format_tb(error.__traceback__)[-3:])[-1200:]

    def _measure(self, problem: Problem, implementation: Implementation, expected: Any, result: Measurement) -> None:
        from tubelet.kernels import engaged, reset_engaged

        allowed = implementation.tolerance or problem.tolerance or TOLERANCE[problem.dtype]
        with torch.enable_grad() if problem.gradients else torch.inference_mode():
            inputs = problem.make(0)
            call = implementation.build(inputs)
            reset_engaged()
            outcome = call()
            if implementation.ours:
                result.engaged = {op: sorted(ran) for op, ran in engaged().items()}
            error = relative_error(problem.part(outcome), expected)
            finite = is_finite(outcome)
            result.error, result.allowed = [digits(x) for x in error], list(allowed)
            if not (finite and error.norm <= allowed.norm and error.largest <= allowed.largest):
                result.status = "wrong"
                result.reason = f"relative error {error.norm:.1e} of the norm, {error.largest:.1e} of the largest; allowed " + (
                    f"{allowed.norm:.1e} and {allowed.largest:.1e}" if finite else "none that is not finite"
                )
                return
            del outcome
            result.peak_bytes, result.workspace_bytes = self.stopwatch.memory(call)
            sets = self.stopwatch.sets(storage_bytes(inputs))
            calls = [call] + [implementation.build(problem.make(seed)) for seed in range(1, sets)]
            times = self.stopwatch.time(calls, problem.capturable)
            self.samples = times.samples
            result.ms, (result.low, result.high) = digits(times.median), map(digits, times.quartiles)
            result.host_ms = digits(statistics.median(times.host)) if times.host else None
            result.samples, result.status = len(times.samples), "ok"
            if self.stopwatch.cuda and problem.capturable and not problem.gradients and times.median < LAUNCH_BOUND:
                try:
                    times = self.stopwatch.time_in_graph(calls)
                    result.graph_ms, (result.graph_low, result.graph_high) = digits(times.median), map(digits, times.quartiles)
                except TimeLimit:
                    raise
                except Exception as error:  # the time of the call stands
                    result.reason = f"not in a graph: {type(error).__name__}: {first_line(error, 120)}"

    def _blank(self, case: Case, implementation: Implementation | None, problem: Problem | None = None, **fields) -> Measurement:
        return Measurement(
            op=case.op,
            case=case.name,
            series=case.series,
            shape=case.shape,
            implementation=implementation.name if implementation else "",
            ours=implementation.ours if implementation else False,
            comparable=implementation.comparable if implementation else False,
            flops=float(problem.flops) if problem else None,
            bytes=float(problem.bytes) if problem else None,
            **{"status": "failed"} | fields,
        )

    def broken(self) -> str | None:
        """Why the device cannot be used any more in this process, if so."""
        if not self.stopwatch.cuda:
            return None
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.settings.device).item()
        except Exception as error:
            return first_line(error)
        return None

    def _tidy(self) -> None:
        gc.collect()
        if self.stopwatch.cuda:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
                torch.cuda.empty_cache()


def _status(error: Exception) -> str:
    return "timed out" if isinstance(error, TimeLimit) else "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"


def digits(value: float | None, count: int = 5) -> float | None:
    """Rounded to so many digits."""
    return None if value is None else float(f"{value:.{count}g}")
