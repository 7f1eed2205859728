"""Launching Triton kernels, in as little of the host's time as can be: small calls wait for the host, not for the GPU."""

from functools import cache

import torch
import triton

from .dispatch import INTERPRETED, launched


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` is made for kernels, and takes a host microseconds."""
    return -(-a // b)


def lanes() -> int:
    """Threads of a warp."""
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def constants(record: tuple) -> tuple:
    """A tuple of constants, named or not, of numbers and such tuples, as kernels take it; for equal ones of one type it is one object."""
    return _constants(type(record), record)


@cache
def _constants(kind: type, record: tuple) -> tuple:
    parts = [constants(x) if isinstance(x, tuple) else triton.language.constexpr(x) for x in record]
    result = kind(*parts) if hasattr(record, "_fields") else tuple(parts)
    _records[id(result)] = result
    return result


_records: dict[int, tuple] = {}
"""What `constants` gave, by identity, so that `launch` need not look into it; kept as long as the process."""
_compiled: dict[tuple, tuple] = {}
"""What `launch` compiled: for a kernel, a device, the kinds of the arguments and the constants, the compiled kernel and the constants that
are its last arguments.
"""


def launch(op: str, kernel, programs: int, *arguments, **options) -> None:
    """Run a Triton kernel of `op` as so many programs, on the device of its first argument, and record it. options: constants, tuples of
    them, and what Triton takes.

    Products and sums are rounded one by one, unless the kernel says otherwise (`tl.fma`): what a compiler fuses differs between variants.
    What is compiled is found by a key of this module's, since Triton takes longer to find it than a GPU for many a kernel.
    """
    if not programs:
        return
    launched(op, "triton", kernel.fn.__name__)
    device = arguments[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, programs, arguments, options, device)
    return _launch(kernel, programs, arguments, options, device)


def _launch(kernel, programs: int, arguments: tuple, options: dict, device: int) -> None:
    key = (id(kernel), device, *_kinds(arguments), *options.items())
    found = _compiled.get(key)
    if found is not None:
        compiled, last = found
        compiled[programs, 1, 1](*arguments, *last)
        return
    options = {name: constants(value) if isinstance(value, tuple) else value for name, value in options.items()}
    compiled = kernel[(programs,)](*arguments, enable_fp_fusion=False, **options)
    if isinstance(kernel, triton.JITFunction) and isinstance(compiled, triton.compiler.CompiledKernel) and not torch.version.hip:
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(options[name] for name in names)


def _kinds(arguments) -> tuple:
    """What Triton's compiler may look at in arguments of a CUDA kernel, or more."""
    kinds = []
    add = kinds.append
    for x in arguments:
        kind = type(x)
        if kind is int:
            add(1 if x == 1 else 2 if x & 15 else 16)
            if not -0x80000000 <= x < 0x80000000:
                add("long")
        elif isinstance(x, torch.Tensor):
            add(x.dtype)
            add(x.data_ptr() & 15 == 0)
        elif x is None or kind is bool:
            add(kind)
        elif isinstance(x, float):  # NumPy's too
            add(float)
        elif id(x) in _records:
            add(id(x))
        elif isinstance(x, tuple):  # named ones too, of tensors and constants
            add(kind)
            add(_kinds(x))
        elif kind is triton.language.constexpr:
            add(kind)
            add((type(x.value), x.value))
        else:
            raise TypeError(f"arguments of a kernel: expected tensors, numbers, None and tuples of these, got {kind.__name__}")
    return tuple(kinds)
