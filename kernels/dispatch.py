"""Choosing an implementation of an op, and the record of which one ran.

Silently running a slow path is the failure that users of fused kernels report most, so every call is recorded: `engaged()` tells, for each
op, how often each implementation ran and why the ones that were preferred could not.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad

try:
    import triton

    INTERPRETED = triton.knobs.runtime.interpret  # as the kernels, which are decorated while this package is imported
except ModuleNotFoundError as error:  # a CPU needs no triton
    if error.name != "triton":
        raise
    triton = None

HAS_TRITON = triton is not None
NO_GLUON = "this op has no Gluon kernel"
IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "gluon")


@dataclass
class Engagement:
    """How often an implementation ran; for each preferred one that was passed over, why; and how often each kernel of it was launched, of
    an implementation that has several.
    """

    calls: int = 0
    passed_over: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)


_record: dict[str, dict[str, Engagement]] = {}


def engaged() -> dict[str, dict[str, Engagement]]:
    """op -> implementation -> Engagement, since the start or the last `reset_engaged()`; a copy, which later calls do not change.

    Of the ops that torch.compile traces into, calls inside its graphs are not counted: a count is a value that changes, and would compile
    the graph anew at each call. Attention is one call in a graph, and is counted there.
    """
    return copy.deepcopy(_record)


def reset_engaged() -> None:
    """Forget what ran so far."""
    _record.clear()


def launched(op: str, name: str, kernel: str) -> None:
    """Record a launch of a kernel of an implementation; in a graph of torch.compile, of an op that is one call there."""
    kernels = _record.setdefault(op, {}).setdefault(name, Engagement()).kernels
    kernels[kernel] = kernels.get(kernel, 0) + 1


def choose(op: str, requested: str, available: Mapping[str, Callable], unavailable: Mapping[str, str] | None = None) -> str:
    """The name of the implementation of `op` to run.

    `available` maps names to functions, the preferred first ("auto" takes that); `unavailable` maps the names of implementations that
    cannot run here to the reason. Raises ValueError for a name that is unknown or cannot run, with the reason.
    """
    name = next(iter(available)) if requested == "auto" else requested
    if name in available:
        return name
    if unavailable and name in unavailable:
        raise ValueError(f"implementation: {op} cannot run as {name!r}: {unavailable[name]}")
    raise ValueError(f"implementation: expected one of {', '.join(('auto', *available))} for {op}, got {requested!r}")


def select(op: str, requested: str, available: Mapping[str, Callable], unavailable: Mapping[str, str] | None = None) -> Callable:
    """The function of the implementation that `choose` names, recorded as engaged."""
    name = choose(op, requested, available, unavailable)
    if torch.compiler.is_compiling():
        return available[name]
    engagement = _record.setdefault(op, {}).setdefault(name, Engagement())
    engagement.calls += 1
    if requested == "auto":
        engagement.passed_over.update(unavailable or {})
    return available[name]


def no_triton(x: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on x, if they cannot, whatever the kernel."""
    if not HAS_TRITON:
        return "triton is not installed"
    if x.dtype == torch.float64:
        return "the kernel computes in float32; float64 has the reference"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"it needs a GPU, and the tensors are on {x.device} (TRITON_INTERPRET=1, set before the import, interprets it)"
    return None


def triton_first(x: torch.Tensor) -> bool:
    """Whether "auto" prefers Triton's kernel for x: not where it would be interpreted."""
    return x.device.type == "cuda"


def with_triton(
    x: torch.Tensor, others: Mapping[str, Callable], fused: Callable | None = None, reason: str | None = None
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The last two arguments of `choose` and `select` for an op on x that can also run as `fused`, in Triton (None without triton), unless
    there is a `reason` against it.
    """
    reason = no_triton(x) or reason
    if reason is not None:
        return dict(others), {"triton": f"the Triton kernel: {reason}", "gluon": NO_GLUON}
    return ({"triton": fused} | dict(others) if triton_first(x) else dict(others) | {"triton": fused}), {"gluon": NO_GLUON}


class Operator:
    """A function as an operator of torch.library, for what has to know of it: autograd, torch.compile, fake tensors, counters of FLOPs.
    Where none of them looks, a call goes to the function at once: the way through torch takes as long as a launch.
    """

    def __init__(self, name: str, function: Callable):
        self._function, self._operator = function, torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_autograd = self._operator.register_fake, self._operator.register_autograd

    def __call__(self, *arguments):
        return self._operator(*arguments) if watched(arguments) else self._function(*arguments)


def as_operator(name: str) -> Callable[[Callable], Operator]:
    """Of a function whose result shares no memory with its arguments, none of which it changes."""
    return lambda function: Operator(name, function)


def watched(arguments) -> bool:
    """Whether something of torch has to see a call with these: autograd, a compiler, a dispatch mode. Raises NotImplementedError for
    tangents, which would be lost without a word.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if forward_ad._current_level >= 0 and any(isinstance(x, torch.Tensor) and _has_tangent(x) for x in _flat(arguments)):
        raise NotImplementedError("forward-mode differentiation: the Triton kernels have none; implementation='torch' has")
    return _any_watched(arguments, torch.is_grad_enabled())


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _flat(arguments):
    for x in arguments:
        yield from _flat(x) if isinstance(x, list | tuple) else (x,)


def _any_watched(arguments, differentiates: bool) -> bool:
    for x in arguments:
        kind = type(x)
        if kind in _PLAIN:
            if x.is_meta or (differentiates and x.requires_grad):
                return True
        elif kind not in _VALUES and (_any_watched(x, differentiates) if isinstance(x, list | tuple) else isinstance(x, torch.Tensor)):
            return True
    return False


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_VALUES = frozenset({type(None), bool, int, float, str})
