"""Compiles what a run on a GPU will time, several cases at once in processes of their own, before the run: kernels are kept on disk by
Triton, and graphs by torch.compile. Nothing is timed meanwhile, and what goes wrong here is left for the run to find and to tell of.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence

from .harness import Case

CORES = 4
"""With fewer, there is nothing to be gained."""
MOST = 12
"""Processes: each holds inputs on the GPU."""
SHARE = 0.25
"""Of a run's budget; what is not compiled by then is compiled when its turn comes."""
MOST_SECONDS = 600.0
"""Of a run without a budget."""


def processes() -> int:
    """How many are worth while; 0 if none are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores - 1) if cores >= CORES else 0


def compile_ahead(plan, cases_of: Callable[..., Sequence[Case]], count: int, seconds: float, tell: Callable[[int, int], None]) -> None:
    """Make one call of each implementation that compiles, in `count` processes, for so many seconds at most. cases_of: from the plan to its
    cases. tell: told how many cases are done, and of how many.
    """
    context = multiprocessing.get_context("spawn")
    total, taken, done = len(cases_of(plan)), context.Value("i", 0), context.Value("i", 0)
    workers = [context.Process(target=_compile, args=(plan, cases_of, taken, done)) for _ in range(min(count, total))]
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    try:
        while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
            tell(done.value, total)
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


def _compile(plan, cases_of, taken, done) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else each process would start as many as there are cores
    import torch

    from . import adapters, suite

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    device, level, cases = torch.device(plan.device), suite.LEVELS.index(plan.level), cases_of(plan)
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(cases):
            return
        if cases[number].op != adapters.OP:  # of whole models, of which a GPU may not hold as many as there are processes
            with contextlib.suppress(Exception):
                _call(cases[number], device, level, plan.limit)
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        if device.type == "cuda":  # where it cannot be used any more, an error ends this process: the others take what is left
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        with done.get_lock():
            done.value += 1


def _call(case: Case, device, level: int, limit: float) -> None:
    """limit: seconds that making the case, and each call, may take."""
    import torch

    from .harness import missing, time_limit

    with time_limit(limit):
        problem = case.make(device)
    for implementation in problem.implementations:
        compiles = implementation.ours or (implementation.slow and case.takes_slow(level))
        if not compiles or missing(implementation.needs):
            continue
        with contextlib.suppress(Exception), time_limit(limit), torch.enable_grad() if problem.gradients else torch.inference_mode():
            implementation.build(problem.make(0))()
