"""CUDA graphs of a step that repeats. A GPU runs one without the host, which takes ten times as long to launch the kernels of a small pack
as they take to run.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_one_at_a_time = threading.Lock()  # captures are on one stream
LEAST_CALLS = 3
"""What is called fewer times is not captured: a capture takes the host as long as a call."""


class Repeated:
    """A function that is called so many times, on tensors of the same shapes, and works in place on others that it holds.

    The first call runs as it is; what is compiled, chosen or put into tables at first use is there then. With `graphs`, those of what was
    repeated before and is not any more, the second captures the function in another, for itself and later calls to replay. They share
    their memory, and whoever holds the list keeps it until the last has run. Where a capture fails, calls go on as the first, with a
    RuntimeWarning.
    """

    def __init__(self, function: Callable[..., None], calls: int, graphs: list | None):
        self._function, self._graphs = function, graphs if calls >= LEAST_CALLS else None
        self._inputs: tuple[Tensor, ...] = ()
        self._graph = None
        self._called = False

    def __call__(self, *inputs: Tensor) -> None:
        if self._graphs is not None and self._called and self._graph is None:
            self._inputs = tuple(x.clone() for x in inputs)
            pool = self._graphs[0].pool() if self._graphs else None
            try:
                self._graph = capture(lambda: self._function(*self._inputs), inputs[0].device, pool)
                self._graphs.append(self._graph)
            except RuntimeError as error:
                warnings.warn(f"a step runs without a CUDA graph, since it could not be captured: {error}", RuntimeWarning, stacklevel=2)
                self._graphs = None
        self._called = True
        if self._graph is None:
            self._function(*inputs)
            return
        for held, x in zip(self._inputs, inputs, strict=True):
            held.copy_(x)
        self._graph.replay()


def capture(function: Callable[[], None], device: torch.device, pool=None) -> torch.cuda.CUDAGraph:
    """What a function launches on a CUDA device, without running it; pool: of another graph, for memory that they share.

    Raises RuntimeError if the function waits for the device, or copies from the host's memory.
    """
    with _one_at_a_time, torch.cuda.device(device):
        graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        # Not by `torch.cuda.graph`, which first frees all that the allocator keeps. Other threads may allocate meanwhile.
        with torch.cuda.stream(side):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a capture that has become invalid
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(side)
    return graph


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The one that all is captured on: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)
