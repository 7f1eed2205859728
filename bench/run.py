"""A run: the cases one after another in a process of their own, results written as they come.

What is measured runs in a worker process. If a peer takes it down, by a crash, an error that leaves the GPU unusable or a call that does
not return, the failure is put down to that implementation and a new worker goes on behind it.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import ahead, record
from .record import Ceilings, Measurement, Run

SECONDS = {"quick": 0.06, "default": 0.1, "full": 0.4}
"""Of timing for each implementation of a case."""
LIMITS = {"quick": 20.0, "default": 40.0, "full": 150.0}
"""Seconds for each, compiling included."""
BUDGETS = {"cuda": {"quick": 80.0, "default": 465.0, "full": None}, "cpu": {"quick": 80.0, "default": 285.0, "full": None}}
"""Seconds for a run, a little less than is promised, since programs start and end too; what is not measured by then is "not run"."""
GRACE = 15.0
"""Seconds after its limit after which a worker that does not answer is ended."""
START = 180.0
"""Seconds in which a worker has to start and to measure the ceilings."""


@dataclass
class Progress:
    """What is told while a run goes on: implementations done, the last one done, and whether the case is new; `left` is a guess in
    seconds.
    """

    case: str = ""
    implementation: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None
    finished: Measurement | None = None


@dataclass
class Plan:
    """What a run is to do. extra: modules to import in the worker, which add cases to `suite.MODULES` (for tests and plug-ins). compilers:
    processes that compile ahead, else as many as `ahead` finds worth while on a GPU.
    """

    device: str
    level: str = "default"
    only: Sequence[str] = ()
    seconds: float | None = None
    limit: float | None = None
    budget: float | None = None
    extra: Sequence[str] = field(default=())
    compilers: int | None = None

    def __post_init__(self):
        self.seconds = SECONDS[self.level] if self.seconds is None else self.seconds
        self.limit = LIMITS[self.level] if self.limit is None else self.limit
        self.budget = BUDGETS[self.device][self.level] if self.budget is None else self.budget
        self.compilers = (ahead.processes() if self.device == "cuda" else 0) if self.compilers is None else self.compilers


def cases_of(plan: Plan) -> list:
    """Raises ValueError for a word of `only` that fits no case."""
    import importlib

    from . import suite

    for name in plan.extra:
        module = importlib.import_module(name)
        if module not in suite.MODULES:
            suite.MODULES += (module,)
    return suite.select(plan.device, plan.level, plan.only)


def device_name(kind: str) -> str:
    """Of the GPU, or of the processor."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    name, number = platform.processor() or platform.machine(), threads()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"CPU {name}, {number} thread{'s' if number > 1 else ''}"


def threads() -> int:
    """Of the CPU that torch uses; OMP_NUM_THREADS says how many."""
    import torch

    return torch.get_num_threads()


def run(plan: Plan, out: Path, tell: Callable[[Progress], None] = lambda progress: None) -> tuple[Path, Run]:
    """Measure, and write to a new file in the folder `out`, also if it is interrupted (KeyboardInterrupt is raised on). The path and the
    run.
    """
    cases = cases_of(plan)
    result = record.begin(device_name(plan.device), plan.device, plan.level, plan.only, plan.budget)
    result.host["threads"] = threads()
    path = record.path_of(result, out)
    record.write(result, path)
    clocks, worker = Clocks(plan.device), None
    start, done, broken_starts = time.monotonic(), set(), 0
    progress, counts = Progress(total=len(cases)), _Counts(len(cases))
    log = path.with_suffix(".log")

    def add(measurement: Measurement) -> None:
        done.add(measurement.key)
        result.measurements.append(record.plain(measurement))
        record.write(result, path)
        progress.finished = measurement
        tell(progress)
        progress.finished = None

    def compiling(cases_done: int, total: int) -> None:
        tell(Progress(case="compiling ahead", done=cases_done, total=total))

    try:
        if plan.compilers:
            ahead.compile_ahead(plan, cases_of, plan.compilers, ahead.SHARE * plan.budget if plan.budget else ahead.MOST_SECONDS, compiling)
            tell(progress)
        while True:
            worker = _Worker(plan, counts.finished, done, result.ceilings if result.ceilings.copy else None, log)
            state = worker.follow(plan, progress, counts, add, result, lambda: record.write(result, path), tell, start)
            worker.end()
            if state == "end":
                result.complete = True
                break
            if state == "budget":
                why = f"the {plan.budget:.0f} s of the run were over"
                for case in cases[counts.finished :]:  # that which was under way too, since it is not whole
                    result.measurements.append(_blank(case, "not run", reason=why))
                break
            if state != "started":  # it died, or was ended, before it measured anything
                broken_starts += 1
                if broken_starts >= 3:
                    raise RuntimeError(f"the benchmark's worker process does not start: {state}; see {log}")
            else:
                broken_starts = 0
    finally:
        if worker is not None:
            worker.end()
        result.clocks = clocks.stop()
        record.write(result, path)
        with contextlib.suppress(OSError):
            if log.exists() and log.stat().st_size == 0:
                log.unlink()
    return path, result


def _blank(case: Any, status: str = "failed", **fields) -> Measurement:
    """Of a case as a whole."""
    return Measurement(case.op, case.name, "", status, shape=case.shape, series=case.series, **fields)


class _Counts:
    """How far a run is, and from that how long it will take; no longer than its budget."""

    def __init__(self, cases: int):
        self.cases, self.finished = cases, 0

    def left(self, spent: float, budget: float | None) -> float | None:
        left = spent / self.finished * (self.cases - self.finished) if self.finished else None
        return left if left is None or budget is None else max(0.0, min(left, budget - spent))


class _Worker:
    """A process that measures, seen from the one that writes results."""

    def __init__(self, plan: Plan, first: int, done: set, ceilings: Ceilings | None, log: Path):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, plan, first, done, ceilings, str(log))
        )  # no daemon: compilers start processes of their own
        self.process.start()
        theirs.close()
        self.log = log

    def follow(self, plan, progress, counts, add, result, save, tell, start) -> str:
        """Take what it says until it ends. "end"; "budget", if the time of the run is over; "started" if another worker is to go on; else
        why this one did not get anywhere.
        """
        current, deadline, state = None, time.monotonic() + START, "it said nothing"
        while True:
            over = math.inf if plan.budget is None else start + plan.budget
            message = self._next(min(deadline, over))
            spent = time.monotonic() - start
            if time.monotonic() >= over and (message is None or message[0] not in ("result", "end")):
                return "budget"
            if message is None:
                dead = not self.process.is_alive()
                why = f"the process ended with code {self.process.exitcode}" if dead else "took too long, and did not stop"
                if current is None:
                    return f"{why}: {_tail(self.log)}" if state != "started" else state
                status = "failed" if dead else "timed out"
                add(replace(current, status=status, reason=f"{why}: {_tail(self.log)}"))
                return "started"
            kind, *content = message
            if kind == "ceilings":
                result.ceilings = content[0]
                save()
                deadline = time.monotonic() + START
            elif kind == "case":
                progress.case, counts.finished = content[0], content[1]
                progress.done, progress.left = counts.finished, counts.left(spent, plan.budget)
                deadline, current = time.monotonic() + plan.limit + GRACE, content[2]
                tell(progress)
            elif kind == "start":
                current, progress.implementation, state = content[0], content[0].implementation, "started"
                deadline = time.monotonic() + plan.limit + GRACE
                tell(progress)
            elif kind == "result":
                add(content[0])
                current = None
                deadline = time.monotonic() + plan.limit + GRACE
            elif kind == "broken":
                return "started"
            elif kind == "end":
                progress.done = counts.cases
                tell(progress)
                return "end"
            elif kind == "error":
                return content[0]

    def _next(self, deadline: float) -> Any:
        """The next message; None if there will be none, or not in time."""
        while time.monotonic() < deadline:
            try:
                if self.connection.poll(0.2):
                    return self.connection.recv()
            except (EOFError, OSError):
                self.process.join(5)
                return None
        return None

    def end(self) -> None:
        """Whatever it is doing."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(3)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.connection.close()


def serve(connection, plan: Plan, first: int, done: set, ceilings: Ceilings | None, log: str) -> None:
    """The worker, which goes on with the case of a number, but for what is done: what it and its libraries print goes to the log."""
    with open(log, "a", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(file.fileno(), stream.fileno())
        sys.stdout = sys.stderr = file
        try:
            _serve(connection, plan, first, done, ceilings)
        except (BrokenPipeError, KeyboardInterrupt):
            pass
        except BaseException as error:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                connection.send(("error", f"{type(error).__name__}: {error}"))


def _serve(connection, plan: Plan, first: int, done: set, ceilings: Ceilings | None) -> None:
    import logging
    import warnings

    import torch

    from . import roofline, suite
    from .harness import Bench, Settings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    settings = Settings(torch.device(plan.device), seconds=plan.seconds, limit=plan.limit, level=suite.LEVELS.index(plan.level))
    if ceilings is None:
        connection.send(("ceilings", roofline.measure(settings)))
    bench = Bench(settings)
    for number, case in list(enumerate(cases_of(plan)))[first:]:
        blank = _blank(case)
        if blank.key in done:
            continue
        connection.send(("case", case.id, number, blank))

        def skip(name: str, case=case) -> bool:
            return (case.op, case.name, name) in done

        for measurement in bench.measure(case, skip, lambda blank: connection.send(("start", blank))):
            connection.send(("result", measurement))
            if measurement.reason and measurement.status not in ("missing", "unsupported") and bench.broken():
                connection.send(("broken",))
                return
        if "torch._dynamo" in sys.modules:  # to import it takes seconds
            with contextlib.suppress(Exception):
                torch._dynamo.reset()
        # What is alive between cases lives as long as the process. To look at it again would take a third of a second each time, and
        # garbage is collected after each implementation.
        gc.collect()
        gc.freeze()
    connection.send(("end",))


def _tail(log: Path, size: int = 300) -> str:
    with contextlib.suppress(OSError):
        return " ".join(log.read_text(errors="replace")[-size:].split())
    return ""


class Clocks:
    """What a GPU's clocks are while a run goes on, from nvidia-smi; nothing where there is none."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self, kind: str):
        self.process = None
        if kind != "cuda":
            return
        command = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits", "-lms", "500", "-i", _index()]
        try:
            self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is open as long as the process runs
            self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL)
        except OSError:
            return

    def stop(self) -> dict[str, Any] | None:
        """field -> [lowest, median, highest], of half-second samples."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        self.file.seek(0)
        columns: list[list[float]] = [[] for _ in self.FIELDS]
        for line in self.file.read().splitlines():
            for column, value in zip(columns, line.split(","), strict=False):
                with contextlib.suppress(ValueError):
                    column.append(float(value))
        self.file.close()
        return {
            name: [min(column), statistics.median(column), max(column)] for name, column in zip(self.FIELDS, columns, strict=True) if column
        } or None


def _index() -> str:
    """Of the GPU that torch calls the first."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
