"""Cases of operations whose definition is a plain torch expression: it is the reference, in float64, and as it stands and compiled a
peer.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Implementation, Problem, Tolerance, storage_bytes, tensors
from .peers import compile_

Draw = Callable[..., Tensor]


def wide(x: Tensor) -> Tensor:
    """In which an expression is computed: float32, or float64 where the reference is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def doubled(inputs: Any) -> Any:
    """Inputs with the tensors of floating point in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.dtype.is_floating_point else inputs
    if isinstance(inputs, dict):
        return {name: doubled(each) for name, each in inputs.items()}
    return type(inputs)(doubled(each) for each in inputs) if isinstance(inputs, list | tuple) else inputs


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def differentiated(function: Callable[..., Any], inputs: dict[str, Any], leaves: Sequence[str]) -> Callable[[], Any]:
    """The backward pass of a function alone: the gradients of some of its inputs, from those of its outputs, which any call draws alike."""
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}
    outputs, wanted = tensors(function(**inputs)), [inputs[name] for name in leaves]
    device = outputs[0].device
    generator, dtype = torch.Generator(device).manual_seed(0), dtype_on(device)
    given = [torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x.dtype) for x in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, given, retain_graph=True)


def implementation(name: str, function: Callable[..., Any], leaves: Sequence[str] = (), **how: Any) -> Implementation:
    """Of a function of named inputs; with `leaves`, of its backward pass."""

    def build(inputs: dict[str, Any]) -> Callable[[], Any]:
        return differentiated(function, inputs, leaves) if leaves else lambda: function(**inputs)

    return Implementation(name, build, **how)


def case(
    op: str,
    name: str,
    shape: dict[str, Any],
    *,
    make: Callable[[Draw, torch.device], dict[str, Any]],
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    moved: Callable[[dict[str, Any], Any], float] = lambda inputs, outputs: storage_bytes(inputs) + storage_bytes(outputs),
    flops: float = 0.0,
    level: int,
    devices: tuple[str, ...] = ("cuda",),
    others: Callable[[torch.device], list[Implementation]] = lambda device: [],
    reference: Callable[..., Any] | None = None,
    part: Callable[[Any], Any] = lambda result: result,
    tolerance: Tolerance | None = None,
    in_torch: bool = True,
    leaves: Sequence[str] = (),
    representative: bool = False,
) -> Case:
    """make(draw, device): named inputs, draw(*size, dtype=None) giving random numbers. ours(**inputs, implementation=...) and
    plain(**inputs) give the outputs; without a reference, that is `plain` in float64. moved: bytes that have to be, from inputs and
    outputs. in_torch: whether ours also has an implementation in torch, to be shown beside it. leaves: of the inputs, those whose
    gradients are computed: the case is of the backward pass, whose outputs are for `moved` those of both passes, the first ones standing
    for their gradients.
    """

    def problem(device: torch.device) -> Problem:
        dtype = dtype_on(device)

        def draw_inputs(seed: int) -> dict[str, Any]:
            generator = torch.Generator(device).manual_seed(seed)

            def draw(*size: int, dtype: torch.dtype | None = None) -> Tensor:
                return torch.randn(size, generator=generator, device=device, dtype=dtype or dtype_on(device))

            return make(draw, device)

        def with_(name: str) -> Callable[..., Any]:
            return lambda **inputs: ours(**inputs, implementation=name)

        compiled = cache(lambda: compile_(plain))
        found = [implementation("tubelet", with_("auto"), leaves, ours=True), implementation("eager torch", plain, leaves)]
        if device.type == "cuda":
            found.append(implementation("torch.compile", lambda **inputs: compiled()(**inputs), leaves, slow=True))
        found += others(device)
        if device.type == "cuda" and in_torch:
            found.append(implementation("tubelet in torch", with_("torch"), leaves, ours=True, comparable=False))
        inputs = draw_inputs(0)
        with torch.no_grad():
            outputs = plain(**inputs)
        size = moved(inputs, [outputs, [inputs[name] for name in leaves]])

        def expected(inputs: dict[str, Any]) -> Any:
            return part(implementation("reference", reference or plain, leaves).build(doubled(inputs))())

        return Problem(
            make=draw_inputs,
            implementations=found,
            reference=expected,
            part=part,
            dtype=dtype,
            flops=flops,
            bytes=size,
            tolerance=tolerance,
            gradients=bool(leaves),
        )

    dtype = "float32" if devices == ("cpu",) else shape.get("dtype", "bfloat16")
    shape, name = shape | {"dtype": dtype, "pass": "backward" if leaves else "forward"}, f"{name}, backward" if leaves else name
    return Case(op, name, shape, problem, level, None, devices, representative)
