"""What results say: the rows of a run, how ours compares with the best peer and with the floor, the cost against length, and the waits of
packed requests.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .record import FOLDER, Measurement, Run, beyond_noise, committed, read
from .roofline import copy_ms, floor_ms


@dataclass(frozen=True)
class Row:
    """A case: ours and the best peer, both right and timed, None where there is none; `ratio` is how many times as fast ours is. floor,
    copy: the least time, and that of a copy of as many bytes where these are what takes time. compiled: whether a compiled peer was tried.
    """

    op: str
    case: str
    ours: Measurement | None
    peer: Measurement | None
    floor: float | None
    copy: float | None
    in_graph: bool
    compiled: bool = False

    def time(self, measurement: Measurement) -> float:
        return measurement.graph_ms if self.in_graph else measurement.ms

    @property
    def ratio(self) -> float | None:
        return self.time(self.peer) / self.time(self.ours) if self.ours and self.peer else None

    @property
    def of_floor(self) -> float | None:
        """The floor over our time: 1 at the physical limit."""
        return self.floor / self.time(self.ours) if self.ours and self.floor else None


def load(paths: Sequence[Path] | None = None) -> list[tuple[Path, Run]]:
    """Of files and folders; the committed ones if none are given. Raises ValueError or OSError for what is no result."""
    found = []
    for path in paths or [FOLDER]:
        found += committed(path) if path.is_dir() else [(path, read(path))]
    return sorted(found, key=lambda each: each[1].date)


def latest(runs: Sequence[tuple[Path, Run]]) -> list[tuple[Path, Run]]:
    """Of each device the newest, but a quick one only if there is no other; and if it was not finished, or of some cases alone, the newest
    before it that was whole, with the cases that the first lacks. GPUs come first.
    """
    devices: dict[str, list[tuple[Path, Run]]] = {}
    for path, run in sorted(runs, key=lambda each: (each[1].level != "quick", each[1].date), reverse=True):
        devices.setdefault(run.device, []).append((path, run))
    chosen = []
    for (path, newest), *older in devices.values():
        chosen.append((path, newest))
        has = {(each.op, each.case) for each in newest.measurements if each.implementation}
        for path, run in older:
            if _is_whole(run) and not _is_whole(newest):
                chosen.append((path, replace(run, measurements=[each for each in run.measurements if (each.op, each.case) not in has])))
                break
    return sorted(chosen, key=lambda each: (each[1].kind != "cuda", each[1].device))


def _is_whole(run: Run) -> bool:
    return run.complete and not run.only


def rows(run: Run) -> list[Row]:
    """The cases of a run that have been run, op by op. Like is compared with like: if ours and a peer were timed in a graph, the best of
    those, and else the best of single calls.
    """
    cases: dict[tuple[str, str], list[Measurement]] = {}
    for each in sorted(run.measurements, key=in_order(run)):
        if each.implementation:
            cases.setdefault((each.op, each.case), []).append(each)
    found = []
    for (op, case), each in cases.items():
        timed = [m for m in each if m.status == "ok" and m.comparable]
        mine, theirs = [m for m in timed if m.ours], [m for m in timed if not m.ours]
        in_graph = any(m.graph_ms for m in mine) and (any(m.graph_ms for m in theirs) or not theirs)
        ours, peer = (
            min((m for m in some if m.graph_ms or not in_graph), key=lambda m: m.graph_ms if in_graph else m.ms, default=None)
            for some in (mine, theirs)
        )
        floors = floor_ms(each[0], run.ceilings), copy_ms(each[0], run.ceilings)
        compiled = any("compile" in m.implementation or "Flex" in m.implementation for m in each if not m.ours and m.status != "missing")
        found.append(Row(op, case, ours, peer, *floors, in_graph, compiled))
    return found


def in_order(run: Run):
    """A key of measurements: op by op, as they first come. A run goes from one to the next and back."""
    place: dict[str, int] = {}
    for each in run.measurements:
        place.setdefault(each.op, len(place))
    return lambda each: place[each.op]


def outcome(run: Run) -> str:
    """How many cases are faster than the best peer, and how many are not: of all, so that none is picked; on a GPU also of those where a
    compiled peer was tried, which mostly is the best. And which peers were not there.
    """
    found = [row for row in rows(run) if row.ratio]
    if not found:
        return ""
    told = f"Against the best peer, of {len(found)} cases: {_counted(found)}."
    compiled = [row for row in found if row.compiled]
    if run.kind == "cuda" and 0 < len(compiled) < len(found):
        told += f" A compiled peer was tried in {len(compiled)} of them: {_counted(compiled)}."
    elif run.kind == "cuda" and not compiled:
        told += " No compiled peer was tried."
    there = {each.implementation for each in run.measurements if each.status != "missing"}
    missing = dict.fromkeys(
        each.implementation for each in run.measurements if each.status == "missing" and each.implementation not in there
    )
    return told + (f" Not installed there: {', '.join(missing)}." if missing else "")


def _counted(some: Sequence[Row]) -> str:
    verdicts = [verdict(row) for row in some]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("faster", "slower", "the same within the noise"))
    return f"{counts}; the median is {statistics.median(row.ratio for row in some):.2f} times as fast"


def verdict(row: Row) -> str:
    ours, peer = (each.times(row.in_graph) for each in (row.ours, row.peer))
    return "faster" if beyond_noise(ours, peer) else "slower" if beyond_noise(peer, ours) else "the same within the noise"


def exponents(run: Run) -> list[tuple[str, str, float, list[tuple[int, float]]]]:
    """(series, implementation, exponent, [(tokens, ms), ...]) of cases that differ in their tokens alone, of three or more. The exponent
    is the slope of log time over log tokens in the upper half, where constants no longer tell.
    """
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for each in run.measurements:
        if each.series and each.status == "ok" and each.op == "length":
            lines.setdefault((each.series, each.implementation), []).append((each.shape["tokens"], each.graph_ms or each.ms))
    found = []
    for (series, name), points in lines.items():
        points.sort()
        if len(points) >= 3:
            found.append((series, name, slope(points[-max(3, len(points) // 2) :]), points))
    return found


@dataclass(frozen=True)
class Served:
    """Requests of a packing case by one implementation: tokens a second, and the milliseconds until the mean and the last are done."""

    series: str
    case: str
    how: str
    requests: int
    rate: float
    mean: float
    longest: float


def packing(run: Run) -> list[Served]:
    """In a pack or a batch all are done at its end. One by one, of requests of one size, the i-th of n is done after i n-ths of the time;
    mixed sizes are taken to come in any order, so that the mean is the same.
    """
    found = []
    for each in run.measurements:
        if each.op == "packing" and each.status == "ok":
            n, alone = each.shape["clips"], each.implementation.endswith("one by one")
            rate = each.shape["tokens"] / each.ms * 1e3
            served = Served(each.series or each.case, each.case, each.implementation, n, rate, each.ms, each.ms)
            found.append(replace(served, mean=each.ms * (n + 1) / (2 * n)) if alone else served)
            if n == 1:  # there is nothing to pack
                found.append(replace(served, how=f"{each.implementation} one by one"))
    order = list(dict.fromkeys(each.series for each in found))
    return sorted(found, key=lambda each: (order.index(each.series), each.requests))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y over log x, by least squares."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def is_busy(run: Run) -> bool:
    """Whether, when a run on a CPU began, other programs kept busy what it was to use."""
    spare = (run.host.get("processors") or 1) - (run.host.get("threads") or 1)
    return run.kind != "cuda" and (run.host.get("load") or 0) > spare + 0.3
