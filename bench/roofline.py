"""The two ceilings of a device, measured in the run that they judge: how fast it copies, and how fast it multiplies matrices.

    floor of a call = max(bytes / copy, FLOPs / matmul)

A copy is counted as read and written. Both ceilings are the best that the library reaches of many calls, not what a data sheet says; a
kernel whose working set stays in the cache, or whose products are done at other clocks, can be faster than its floor.

No kernel starts and ends at full speed, and what that costs does not depend on its size. So copies are timed by size too, as kernels are:
what a copy of as many bytes takes is what is left to gain for a kernel that is bound by them.
"""

from itertools import islice, pairwise

import torch

from .harness import Settings, Stopwatch, digits
from .record import Ceilings, Measurement

FP8 = torch.float8_e4m3fn


def measure(settings: Settings) -> Ceilings:
    """Both ceilings; what the device cannot do is left out."""
    stopwatch, device = Stopwatch(settings), settings.device
    cuda = device.type == "cuda"
    ceilings = Ceilings()
    try:
        size = (1 << 30) if cuda else (1 << 26)
        source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        ceilings.copy = 2 * size / (1e-3 * min(stopwatch.time([lambda: target.copy_(source)]).samples))
        while size >= 1 << 20:
            ceilings.copies[str(2 * size)] = digits(_copy_ms(stopwatch, source, target, size))
            size >>= 2
    except Exception:
        pass
    for dtype in (torch.bfloat16, torch.float16, torch.float32, FP8):
        name = str(dtype).removeprefix("torch.")
        try:
            if not cuda and dtype is not torch.float32:
                continue
            n = 8192 if cuda else 1024
            ceilings.matmul[name] = 2 * n**3 / (1e-3 * min(stopwatch.time([_product(n, dtype, device)]).samples))
        except Exception:
            continue
    return ceilings


def _copy_ms(stopwatch: Stopwatch, source: torch.Tensor, target: torch.Tensor, size: int) -> float:
    """Of so many bytes of the two, whose parts take turns as the inputs of kernels do; timed as short kernels are."""
    parts = zip(source.split(size), target.split(size), strict=True)
    calls = [lambda a=a, b=b: b.copy_(a) for a, b in islice(parts, stopwatch.sets(size))]
    return (stopwatch.time_in_graph if stopwatch.cuda else stopwatch.time)(calls).median


def _product(n: int, dtype: torch.dtype, device: torch.device):
    # Of random numbers: of zeros a GPU draws less power, and so runs at higher clocks than any real product.
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if dtype is FP8:
        a, b, one = a.to(FP8), b.to(FP8), torch.ones(1, device=device)
        return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    a, b = a.to(dtype), b.to(dtype)
    return lambda: a @ b


def floor_ms(measurement: Measurement, ceilings: Ceilings) -> float | None:
    """The least time that the ceilings allow, in milliseconds; None where the FLOPs are not known, since bytes alone say little then."""
    if not measurement.flops:
        return None
    rates = ceilings.matmul
    rate = rates.get(measurement.shape.get("dtype", ""), max(rates.values(), default=None)) if rates else None
    parts = [measurement.bytes / ceilings.copy if ceilings.copy and measurement.bytes else 0.0]
    parts.append(measurement.flops / rate if rate else 0.0)
    return 1e3 * max(parts) or None


def copy_ms(measurement: Measurement, ceilings: Ceilings) -> float | None:
    """What a copy of as many bytes takes, in milliseconds, between the sizes that were timed in proportion; None where the products take
    longer than the bytes, and where either is not known.
    """
    floor, bytes_ = floor_ms(measurement, ceilings), measurement.bytes
    if not floor or not bytes_ or not ceilings.copy or not ceilings.copies or floor > 1.001e3 * bytes_ / ceilings.copy:
        return None
    points = sorted((float(size), ms) for size, ms in ceilings.copies.items())
    if bytes_ <= points[0][0]:
        return points[0][1]
    for (less, before), (more, after) in pairwise(points):
        if bytes_ <= more:
            return before + (after - before) * (bytes_ - less) / (more - less)
    return points[-1][1] * bytes_ / points[-1][0]
