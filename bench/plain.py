"""Cases of operations whose definition is a plain torch expression: it is the reference, in float64, and as it stands and compiled a
peer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Implementation, Problem, Tolerance, storage_bytes
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
) -> Case:
    """make(draw, device): named inputs, draw(*size, dtype=None) giving random numbers. ours(**inputs, implementation=...) and
    plain(**inputs) give the outputs; without a reference, that is `plain` in float64. moved: bytes that have to be, from inputs and
    outputs. in_torch: whether ours also has an implementation in torch, to be shown beside it.
    """

    def problem(device: torch.device) -> Problem:
        dtype = dtype_on(device)

        def draw_inputs(seed: int) -> dict[str, Any]:
            generator = torch.Generator(device).manual_seed(seed)

            def draw(*size: int, dtype: torch.dtype | None = None) -> Tensor:
                return torch.randn(size, generator=generator, device=device, dtype=dtype or dtype_on(device))

            return make(draw, device)

        compiled = cache(lambda: compile_(plain))
        found = [Implementation("tubelet", lambda inputs: lambda: ours(**inputs, implementation="auto"), ours=True)]
        found.append(Implementation("eager torch", lambda inputs: lambda: plain(**inputs)))
        if device.type == "cuda":
            found.append(Implementation("torch.compile", lambda inputs: lambda: compiled()(**inputs), slow=True))
        found += others(device)
        if device.type == "cuda" and in_torch:
            run = Implementation(
                "tubelet in torch", lambda inputs: lambda: ours(**inputs, implementation="torch"), ours=True, comparable=False
            )
            found.append(run)
        with torch.inference_mode():
            inputs = draw_inputs(0)
            size = moved(inputs, plain(**inputs))
        return Problem(
            make=draw_inputs,
            implementations=found,
            reference=lambda inputs: part((reference or plain)(**doubled(inputs))),
            part=part,
            dtype=dtype,
            flops=flops,
            bytes=size,
            tolerance=tolerance,
        )

    return Case(
        op, name, shape | {"dtype": "float32" if devices == ("cpu",) else shape.get("dtype", "bfloat16")}, problem, level, None, devices
    )
