"""Results as tables and pictures: Markdown, PNG, and one HTML page without any other file, whose table can be sorted and filtered."""

import base64
import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from .record import FOLDER, Measurement, Run, committed, read
from .roofline import copy_ms, floor_ms

BEGIN, END = "<!-- speed: written by `tubelet bench report --readme` -->", "<!-- end of speed -->"
LEVELS = ("quick", "default", "full")
INK, OURS, PEER, BAD = "#1f2430", "#2563eb", "#9aa3b2", "#b91c1c"
OTHERS = (
    "#ea7317",
    "#15803d",
    "#9333ea",
    "#b45309",
    "#0e7490",
    "#be185d",
    "#4d7c0f",
    "#6b7280",
    "#c2410c",
    "#7c3aed",
    "#047857",
    "#a16207",
)
"""Colours of lines that are not ours, none of them blue."""


@dataclass(frozen=True)
class Row:
    """A case: ours and the best peer, both right and timed, None where there is none; `ratio` is how many times as fast ours is. floor,
    copy: the least time, and that of a copy of as many bytes where these are what takes time.
    """

    op: str
    case: str
    ours: Measurement | None
    peer: Measurement | None
    floor: float | None
    copy: float | None
    in_graph: bool

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
    """Of each device the newest, but a quick one only if there is no other; and if it was not finished, the newest before it that was,
    with the cases that the first lacks. GPUs come first.
    """
    devices: dict[str, list[tuple[Path, Run]]] = {}
    for path, run in sorted(runs, key=lambda each: (each[1].level != "quick", each[1].date), reverse=True):
        devices.setdefault(run.device, []).append((path, run))
    chosen = []
    for (path, newest), *older in devices.values():
        chosen.append((path, newest))
        has = {(each.op, each.case) for each in newest.measurements}
        for path, run in older:
            if run.complete and not newest.complete:
                chosen.append((path, replace(run, measurements=[each for each in run.measurements if (each.op, each.case) not in has])))
                break
    return sorted(chosen, key=lambda each: (each[1].kind != "cuda", each[1].device))


def rows(run: Run) -> list[Row]:
    """The cases of a run that have been run, op by op. Like is compared with like: if ours and a peer were timed in a graph, the best of
    those, and else the best of single calls.
    """
    cases: dict[tuple[str, str], list[Measurement]] = {}
    for each in sorted(run.measurements, key=_order(run)):
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
        found.append(Row(op, case, ours, peer, floor_ms(each[0], run.ceilings), copy_ms(each[0], run.ceilings), in_graph))
    return found


def _order(run: Run):
    """A key of measurements: op by op, as they first come. A run goes from one to the next and back."""
    place: dict[str, int] = {}
    for each in run.measurements:
        place.setdefault(each.op, len(place))
    return lambda each: place[each.op]


def outcome(run: Run) -> str:
    """How many cases are faster than the best peer, and how many are not: of all, so that none is picked."""
    found = [_verdict(row) for row in rows(run) if row.ratio]
    if not found:
        return ""
    ratio = statistics.median(row.ratio for row in rows(run) if row.ratio)
    counts = {verdict: found.count(verdict) for verdict in ("faster", "slower", "the same within the noise")}
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"Against the best peer, of {len(found)} cases: {told}; the median is {ratio:.2f} times as fast."


def _verdict(row: Row) -> str:
    if not row.in_graph and row.ours.low <= row.peer.high and row.peer.low <= row.ours.high:
        return "the same within the noise"
    return "faster" if row.ratio > 1 else "slower"


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


def summary(run: Run) -> Table:
    """For the terminal."""
    table = Table("case")
    for name in ("tubelet\nms", "best peer\nms", "times\nas fast", "of the\nfloor"):
        table.add_column(name, justify="right", min_width=6)
    for row in rows(run):
        ours = f"{row.time(row.ours):.4g}" if row.ours else "-"
        peer = f"{row.time(row.peer):.4g} {row.peer.implementation}" if row.peer else "-"
        style = None if row.ratio is None else "green" if row.ratio >= 1.05 else "red" if row.ratio < 0.95 else None
        ratio, floor = _number(row.ratio, "{:.2f}"), _number(row.of_floor, "{:.0%}")
        table.add_row(f"{row.op}: {row.case}", ours, peer, ratio, floor, style=style)
    return table


def write_report(runs: Sequence[tuple[Path, Run]], out: Path) -> list[Path]:
    """report.md, report.html and the pictures, in a folder, which is made. Without matplotlib there are no pictures, and the pages say
    so.
    """
    out.mkdir(exist_ok=True)
    pictures = {path: _pictures(path, run, out) for path, run in runs}
    markdown, page = out / "report.md", out / "report.html"
    markdown.write_text(_markdown(runs, pictures))
    page.write_text(_html(runs, pictures))
    return [markdown, page, *(path for each in pictures.values() for path in each.values())]


def update_readme(path: Path, runs: Sequence[tuple[Path, Run]]) -> None:
    """Write the section between the marks anew. Raises ValueError if the file has not both."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected one line {BEGIN!r} and after it one {END!r}")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{speed_section(runs)}\n{END}{rest.partition(END)[2]}")


def speed_section(runs: Sequence[tuple[Path, Run]]) -> str:
    """For the README: of each device how it came out in all cases, and the first case of each op, which is the one that a quick run has."""
    parts = []
    if not any(run.kind == "cuda" for _, run in runs):
        parts.append("No result of a GPU is committed yet, so no speed on a GPU is claimed. `tubelet bench` measures yours.")
    for path, run in runs:
        shown = list({row.op: row for row in reversed(rows(run)) if row.ours}.values())[::-1]
        what = f"**{run.device}**" + ("" if run.kind == "cuda" else " (a CPU: no GPU was used, and this says nothing of any)")
        commit = (run.commit or "unknown")[:8] + (" with changes" if run.dirty else "")
        lines = [f"{what}, {run.date[:10]}, commit {commit}, torch {run.versions.get('torch', '?')}, from `{path.name}`:", ""]
        lines += ["| op | case | ours, ms | best peer, ms | times as fast | of the floor |", "|---|---|---|---|---|---|"]
        for row in shown:
            peer = f"{row.time(row.peer):.3g} ({row.peer.implementation})" if row.peer else "-"
            cells = [row.op, row.case, f"{row.time(row.ours):.3g}", peer, _number(row.ratio, "{:.2f}"), _number(row.of_floor, "{:.0%}")]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", outcome(run)] if outcome(run) else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def is_busy(run: Run) -> bool:
    """Whether, when a run on a CPU began, other programs kept busy what it was to use."""
    spare = (run.host.get("processors") or 1) - (run.host.get("threads") or 1)
    return run.kind != "cuda" and (run.host.get("load") or 0) > spare + 0.3


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _rate(value: float | None, ms: float | None, unit: float) -> str:
    return "-" if not value or not ms else f"{value / ms / 1e-3 / unit:.4g}"


def _heading(run: Run) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    ceilings = run.ceilings
    rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in ceilings.matmul.items())
    lines = [
        f"Measured on {run.date}, level {run.level}, commit {run.commit or 'unknown'}{' with changes' if run.dirty else ''}"
        + ("" if run.complete else f"; the run was not finished{_left_out(run)}") + ".",
        f"Versions: {versions}." + (f" Driver {run.driver}." if run.driver else ""),
    ]  # fmt: skip
    if ceilings.copy:
        lines.append(f"Ceilings in this run: copy {ceilings.copy / 1e9:.4g} GB/s; matrix products {rates}.")
    if outcome(run):
        lines.append(outcome(run))
    if run.clocks:
        seen = "; ".join(f"{name} {low:g} / {middle:g} / {high:g}" for name, (low, middle, high) in run.clocks.items())
        lines.append(f"Clocks seen, lowest / median / highest: {seen}.")
    if run.kind != "cuda":
        lines.insert(0, "These are figures of a CPU. They say nothing of any GPU.")
        if run.host.get("load"):
            busy = ", so other programs took part of it, and these figures are not to be trusted" if is_busy(run) else ""
            lines.append(f"Load of the machine when the run began: {run.host['load']:g}{busy}.")
    return lines


def _left_out(run: Run) -> str:
    number = sum(each.status == "not run" for each in run.measurements)
    return f", {number} of its cases for want of time" if number else ""


def _markdown(runs, pictures) -> str:
    parts = ["# Benchmarks of tubelet", "", "What each figure means is told in bench/README.md.", ""]
    for path, run in runs:
        parts += [f"## {run.device}", "", *(f"{line}  " for line in _heading(run)), f"From {path.name}.", ""]
        for title, picture in pictures[path].items():
            parts += [f"![{title}]({picture.name})", ""]
        if not pictures[path]:
            parts += ["No pictures: matplotlib is not installed (`pip install tubelet[bench]`).", ""]
        fits = exponents(run)
        if fits:
            parts += ["Cost against length, time ~ tokens^e:", "", "| series | implementation | e |", "|---|---|---|"]
            parts += [f"| {series} | {name} | {exponent:.2f} |" for series, name, exponent, _ in fits] + [""]
        waits = packing(run)
        if waits:
            parts += ["Packing: throughput, and how long a request waits until it is done:", ""]
            parts += ["| requests | how | tokens a second | mean wait, ms | longest wait, ms |", "|---|---|---|---|---|"]
            parts += [f"| {each.case} | {each.how} | {each.rate:,.0f} | {each.mean:.4g} | {each.longest:.4g} |" for each in waits] + [""]
        floors = {(row.op, row.case): row for row in rows(run)}
        for op in dict.fromkeys(each.op for each in run.measurements if each.status == "ok"):
            parts += [f"### {op}", ""]
            parts += [
                "| case | implementation | ms | quartiles | in a graph | host ms | TFLOP/s | GB/s | of the floor | of a copy | peak MB "
                "| workspace MB | error |"
            ]
            parts += ["|---" * 13 + "|"]
            for each in run.measurements:
                if each.op == op and each.status == "ok":
                    row, ms = floors[op, each.case], each.graph_ms or each.ms
                    name = f"**{each.implementation}**" if each.ours else each.implementation
                    cells = [each.case, name, f"{each.ms:.4g}", f"{each.low:.4g} to {each.high:.4g}", _number(each.graph_ms, "{:.4g}")]
                    cells += [_number(each.host_ms, "{:.3g}"), _rate(each.flops, ms, 1e12), _rate(each.bytes, ms, 1e9)]
                    cells += [_number(least and least / ms, "{:.0%}") for least in (row.floor, row.copy)]
                    cells += [_number(x if x is None else x / 1e6, "{:.1f}") for x in (each.peak_bytes, each.workspace_bytes)]
                    parts.append("| " + " | ".join([*cells, f"{each.error[0]:.1e}" if each.error else "-"]) + " |")
            parts.append("")
        others: dict[tuple[str, str, str], list[str]] = {}
        for each in run.measurements:
            if each.status != "ok":
                others.setdefault((each.implementation or "(case)", each.status, (each.reason or "").replace("|", "/")), []).append(each.op)
        if others:
            parts += ["### Not timed", "", "| implementation | why | what it said | cases |", "|---|---|---|---|"]
            for (name, status, reason), ops in others.items():
                parts.append(
                    f"| {name} | {status} | {reason[:200]} | {', '.join(f'{op} ({ops.count(op)})' for op in dict.fromkeys(ops))} |"
                )
            parts.append("")
    return "\n".join(parts)


def _pictures(of: Path, run: Run, out: Path) -> dict[str, Path]:
    """title -> file."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {}
    device = run.device if run.kind == "cuda" else f"{run.device}; no GPU"
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "text.color": INK}
    with pyplot.rc_context(style):
        for name, title, draw in (
            ("ratio", "Times as fast as the best peer", _draw_ratio),
            ("roofline", "Roofline", _draw_roofline),
            ("length", "Time against length", _draw_length),
            ("packing", "Packing", _draw_packing),
            ("graph", "CUDA graphs", _draw_graph),
        ):
            figure = draw(run, pyplot)
            if figure is not None:
                figure.suptitle(f"{title} ({device})", x=0.01, y=1 + 0.12 / figure.get_figheight(), ha="left", va="bottom", fontsize=10)
                path = out / f"{of.stem}-{name}.png"
                figure.savefig(path, dpi=150, bbox_inches="tight")
                pyplot.close(figure)
                found[f"{title}, {device}"] = path
    return found


def _rounded(value: float) -> str:
    """Three digits, and none of them as an exponent."""
    return f"{float(f'{value:.3g}'):,g}"


def _draw_ratio(run: Run, pyplot):
    shown = [row for row in rows(run) if row.ratio]
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.2 * len(shown)), layout="constrained")
    for i, row in enumerate(reversed(shown)):
        colour = {"faster": OURS, "slower": BAD}.get(_verdict(row), PEER)
        axes.barh(i, row.ratio - 1, left=1, color=colour, height=0.7)
        axes.text(max(row.ratio, 1), i, f" {row.ratio:.2f}  {row.peer.implementation}", va="center", fontsize=7)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{row.op}: {row.case}" for row in reversed(shown)], fontsize=7)
    ratios = [row.ratio for row in shown]
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, 0.9 * min(ratios)), 3.5 * max(1.2, *ratios))
    _plain_ticks(axes.xaxis, axes.get_xlim())
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("times as fast as the best peer of the run, which is named; grey: the quartiles overlap")
    return figure


def _plain_ticks(axis, limits: tuple[float, float], values: Sequence[float] | None = None) -> None:
    """On a logarithmic axis, ticks at these values, or at 1, 2 and 5 times powers of ten (powers alone if those are many), written as they
    are.
    """
    from matplotlib import ticker

    if values is None:
        found = [(digit, digit * 10.0**power) for power in range(-9, 13) for digit in (1, 2, 5)]
        found = [(digit, value) for digit, value in found if limits[0] <= value <= limits[1]]
        values = [value for digit, value in found if digit == 1 or len(found) <= 9]
    axis.set_major_locator(ticker.FixedLocator(list(values)))
    axis.set_major_formatter(ticker.FixedFormatter([f"{value:,g}" for value in values]))
    axis.set_minor_locator(ticker.NullLocator())


def _draw_roofline(run: Run, pyplot):
    shown = [(row, row.ours) for row in rows(run) if row.ours and row.ours.flops and row.ours.bytes]
    if not shown or not run.ceilings.copy or not run.ceilings.matmul:
        return None
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    copy, intensities = run.ceilings.copy, [m.flops / m.bytes for _, m in shown]
    roofs: dict[float, list[str]] = {}  # those that are within a tenth of each other are one line
    for name, rate in sorted(run.ceilings.matmul.items(), key=lambda each: -each[1]):
        near = next((other for other in roofs if rate > 0.9 * other), rate)
        roofs.setdefault(near, []).append(name)
    low, high = min(intensities) / 2, 2 * max(*intensities, 2 * max(roofs) / copy)
    for rate, names in roofs.items():
        axes.plot([low, rate / copy, high], [low * copy / 1e12, rate / 1e12, rate / 1e12], color=INK, linewidth=1, alpha=0.7)
        axes.text(high, rate / 1e12, f"{', '.join(names)}: {_rounded(rate / 1e12)} TFLOP/s ", va="bottom", ha="right", fontsize=7)
    ridge = min(roofs) / copy
    middle, what = (low * ridge) ** 0.5, f"copy: {_rounded(copy / 1e9)} GB/s  "
    axes.text(middle, middle * copy / 1e12, what, ha="right", va="bottom", fontsize=7)
    colours, markers = (OURS, *OTHERS), "os^Dv<>Pp*Xhd8"
    for i, op in enumerate(dict.fromkeys(row.op for row, _ in shown)):
        points = [(m.flops / m.bytes, m.flops / row.time(m) / 1e-3 / 1e12) for row, m in shown if row.op == op]
        colour = colours[i % len(colours)]
        filled = colour if i < len(colours) else "none"  # there are more ops than colours that the eye tells apart
        how = {"marker": markers[i % len(markers)], "facecolors": filled, "edgecolors": colour, "s": 28, "alpha": 0.85, "linewidth": 1}
        axes.scatter(*zip(*points, strict=True), label=op, **how)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that has to move", ylabel="TFLOP/s")
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        _plain_ticks(axis, limits)
    figure.legend(fontsize=7, frameon=False, loc="outside right center")
    return figure


def _lines(axes, lines: dict[str, list[tuple[float, float]]], labels: dict[str, str] | None = None, colours: dict | None = None) -> None:
    """Lines by name, those of ours thick and blue, with ticks at the points' own places on a logarithmic x axis."""
    colours = colours or _colours(lines)
    for name, line in lines.items():
        ours = name.startswith("tubelet")
        axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=(labels or {}).get(name, name), color=colours[name],
                  linewidth=2 if name == "tubelet" else 1.2, linestyle="--" if "one by one" in name or "graph" in name else "-",
                  zorder=3 if ours else 2)  # fmt: skip
    axes.set_xscale("log")
    places = sorted({x for line in lines.values() for x, _ in line})
    _plain_ticks(axes.xaxis, (0, math.inf), places[:: 1 + len(places) // 5])


def _colours(names) -> dict[str, str]:
    others = [name for name in names if not name.startswith("tubelet")]
    return {name: OURS if name not in others else OTHERS[others.index(name) % len(OTHERS)] for name in names}


def _draw_length(run: Run, pyplot):
    fits = exponents(run)
    if not fits:
        return None
    series = list(dict.fromkeys(fit[0] for fit in fits))
    figure, panels = pyplot.subplots(1, len(series), figsize=(4.2 * len(series), 4.2), squeeze=False, layout="constrained")
    colours = _colours(dict.fromkeys(fit[1] for fit in fits))
    for axes, name in zip(panels[0], series, strict=True):
        mine = [fit for fit in fits if fit[0] == name]
        labels = {each: f"{each}: tokens^{exponent:.2f}" for _, each, exponent, _ in mine}
        _lines(axes, {each: points for _, each, _, points in mine}, labels, colours)
        axes.set(yscale="log", title=name, xlabel="tokens", ylabel="ms")
        _plain_ticks(axes.yaxis, axes.get_ylim())
        axes.legend(fontsize=6, frameon=False, loc="upper left")
    return figure


def _draw_packing(run: Run, pyplot):
    served: dict[str, list[Served]] = {}
    for each in packing(run):
        served.setdefault(each.series, []).append(each)
    served = {series: some for series, some in served.items() if len({each.requests for each in some}) > 1}
    if not served:
        return None
    figure, panels = pyplot.subplots(2, len(served), figsize=(3.4 * len(served), 6), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(each.how for some in served.values() for each in some))
    colours = _colours(names) | {"tubelet one by one": "#60a5fa"}
    for column, (series, some) in zip(panels.T, served.items(), strict=True):
        for axes, what in zip(column, ("rate", "mean"), strict=True):
            lines = {name: [(each.requests, getattr(each, what)) for each in some if each.how == name] for name in names}
            _lines(axes, {name: line for name, line in lines.items() if line}, colours=colours)
            axes.set_xlabel("requests")
        column[0].set(title=series, ylabel="tokens a second", ylim=(0, None))
        column[0].yaxis.set_major_formatter("{x:,.0f}")
        column[1].set(yscale="log", ylabel="mean wait for a request, ms")
        _plain_ticks(column[1].yaxis, column[1].get_ylim())
    handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, frameon=False, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_graph(run: Run, pyplot):
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in run.measurements:
        if each.op == "CUDA graph" and each.status == "ok":
            lines.setdefault(each.implementation, []).append((each.shape["tokens"], each.ms))
    if max(map(len, lines.values()), default=0) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    _lines(axes, lines)
    axes.set(yscale="log", xlabel="tokens", ylabel="ms of four blocks")
    _plain_ticks(axes.yaxis, axes.get_ylim())
    axes.legend(fontsize=7, frameon=False)
    return figure


def _html(runs, pictures) -> str:
    data = []
    for _, run in runs:
        best = {(row.op, row.case): row for row in rows(run)}
        for each in sorted(run.measurements, key=_order(run)):
            row = best.get((each.op, each.case), Row(each.op, each.case, None, None, None, None, False))
            ms = each.graph_ms or each.ms
            peer = row.time(row.peer) if row.peer else None
            mine = (each.graph_ms if row.in_graph else each.ms) if each.ms else None
            data.append(
                [
                    run.device, each.op, each.case, each.implementation, each.status, each.ms,
                    None if each.ms is None else round(100 * (each.high - each.low) / each.ms, 1), each.graph_ms, each.host_ms,
                    each.flops / ms / 1e9 if each.flops and ms else None, each.bytes / ms / 1e6 if each.bytes and ms else None,
                    100 * row.floor / ms if row.floor and ms else None, 100 * row.copy / ms if row.copy and ms else None,
                    peer / mine if peer and mine else None,
                    None if each.peak_bytes is None else each.peak_bytes / 1e6,
                    None if each.workspace_bytes is None else each.workspace_bytes / 1e6, each.error[0] if each.error else None,
                    each.ours, each.reason or "", ", ".join(f"{name} {value}" for name, value in each.shape.items()),
                ]
            )  # fmt: skip
    sections = []
    for path, run in runs:
        images = "".join(
            f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"></figure>'
            for title, picture in pictures[path].items()
        )
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in _heading(run))
        sections.append(f"<section><h2>{html.escape(run.device)}</h2>{lines}<p>From {html.escape(path.name)}.</p>{images}</section>")
    content = json.dumps(data).replace("</", "<\\/")
    return PAGE.replace("@SECTIONS@", "\n".join(sections)).replace("@DATA@", content)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmarks of tubelet</title>
<style>
:root { color-scheme: light dark; --line: #8884; --ours: #2563eb; --bad: #b91c1c; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem; }
section p { margin: .2rem 0; } figure { margin: 1rem 0; } figcaption { font-weight: 600; } img { max-width: 100%; background: #fff; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; margin: 1rem 0; align-items: center; }
input[type=search] { min-width: 18rem; padding: .3rem .5rem; font: inherit; } select { font: inherit; padding: .25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n, th.n { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--ours); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
tr.ours td:nth-child(4) { color: var(--ours); font-weight: 600; } tr.bad td:nth-child(5) { color: var(--bad); }
</style></head><body>
<h1>Benchmarks of tubelet</h1>
<p>Times are medians; the spread is between the quartiles. "Floor" is the least time that the copy bandwidth and the matrix product rate of
the same run allow. "Against the best peer" above 1 is faster than it. What a device is called begins with CPU where no GPU was used: such
figures say nothing of any GPU. What each figure means in detail is told in bench/README.md.</p>
<h2>All measurements</h2>
<div class="controls"><label>Filter <input type="search" id="words" placeholder="words, all of which must be there"></label>
<label>Device <select id="device"><option value="">all</option></select></label>
<label>Op <select id="op"><option value="">all</option></select></label>
<label><input type="checkbox" id="ours"> tubelet alone</label> <label><input type="checkbox" id="timed" checked> timed alone</label>
<span id="count" role="status"></span></div>
<div class="scroll"><table><thead><tr></tr></thead><tbody></tbody></table></div>
@SECTIONS@
<script>
const data = @DATA@;
const names = ["device", "op", "case", "implementation", "status", "ms", "spread, %", "in a graph, ms", "host, ms", "TFLOP/s", "GB/s",
  "of the floor, %", "of a copy, %", "against the best peer", "peak MB", "workspace MB", "error"];
const OURS = 17, REASON = 18, SHAPE = 19, $ = (id) => document.getElementById(id);
let by = null, down = false;
const head = document.querySelector("thead tr"), body = document.querySelector("tbody");
names.forEach((name, i) => {
  const th = document.createElement("th"), button = document.createElement("button");
  button.textContent = name; button.type = "button"; th.append(button); if (i > 4) th.className = "n";
  button.onclick = () => { down = by === i ? !down : false; by = i; show(); };
  head.append(th);
});
for (const [id, column] of [["device", 0], ["op", 1]])
  for (const value of new Set(data.map((row) => row[column]))) $(id).append(new Option(value, value));
function show() {
  const words = $("words").value.toLowerCase().split(/\\s+/).filter(Boolean);
  let rows = data.filter((row) => (!$("device").value || row[0] === $("device").value) && (!$("op").value || row[1] === $("op").value)
    && (!$("ours").checked || row[OURS]) && (!$("timed").checked || row[4] === "ok")
    && words.every((word) => [...row.slice(0, 5), row[REASON], row[SHAPE]].join(" ").toLowerCase().includes(word)));
  if (by !== null) rows = rows.slice().sort((a, b) => {
    const x = a[by], y = b[by];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" ? x - y : x.localeCompare(y);
    return down ? -order : order;
  });
  [...head.children].forEach((th, i) =>
    i === by ? th.setAttribute("aria-sort", down ? "descending" : "ascending") : th.removeAttribute("aria-sort"));
  body.replaceChildren(...rows.map((row) => {
    const tr = document.createElement("tr");
    tr.className = (row[OURS] ? "ours " : "") + (row[4] !== "ok" ? "bad" : "");
    tr.title = [row[SHAPE], row[REASON]].filter(Boolean).join("\\n");
    names.forEach((_, i) => {
      const td = document.createElement("td"), value = row[i];
      td.textContent = value === null ? "" : typeof value !== "number" ? value
        : i === 16 ? value.toExponential(1) : Number(value.toPrecision(4));
      if (i > 4) td.className = "n"; tr.append(td);
    });
    return tr;
  }));
  $("count").textContent = rows.length + " of " + data.length;
}
for (const id of ["words", "device", "op", "ours", "timed"]) $(id).oninput = show;
show();
</script></body></html>
"""
