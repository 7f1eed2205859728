"""Results as pictures: of each run the ratios to the best peers, the roofline, time against length, packing, and CUDA graphs."""

import math
from collections.abc import Sequence
from pathlib import Path

from .analysis import Served, exponents, packing, rows, verdict
from .record import Run

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


def draw(of: Path, run: Run, out: Path) -> dict[str, Path]:
    """In a folder; title -> file. None without matplotlib."""
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
        for name, title, figure_of in (
            ("ratio", "Times as fast as the best peer", _draw_ratio),
            ("roofline", "Roofline", _draw_roofline),
            ("length", "Time against length", _draw_length),
            ("packing", "Packing", _draw_packing),
            ("graph", "CUDA graphs", _draw_graph),
        ):
            figure = figure_of(run, pyplot)
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
        colour = {"faster": OURS, "slower": BAD}.get(verdict(row), PEER)
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
