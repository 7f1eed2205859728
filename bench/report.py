"""Results as tables: for the terminal, the README and a page in Markdown, which shows the pictures, and beside which lies one in HTML."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from .analysis import exponents, is_busy, outcome, packing, rows
from .page import page
from .pictures import draw
from .record import Run

BEGIN, END = "<!-- speed: written by `tubelet bench report --readme` -->", "<!-- end of speed -->"


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
    pictures = {path: draw(path, run, out) for path, run in runs}
    markdown, html = out / "report.md", out / "report.html"
    markdown.write_text(_markdown(runs, pictures))
    html.write_text(page(runs, pictures, [_heading(run) for _, run in runs]))
    return [markdown, html, *(path for each in pictures.values() for path in each.values())]


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
