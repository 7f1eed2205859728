"""`tubelet bench`: measure, report, compare. The engine's command line finds this as an entry point of the group `tubelet.commands`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    help="How fast each kernel and the engine are on this machine, against the roofline and against every peer that is installed.",
    pretty_exceptions_enable=False,
)
console = Console()

Out = Annotated[Path, typer.Option("--out", "-o", help="The folder that the results are added to.")]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="One case per op, under 90 s.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All cases; an hour or more.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A word of the cases to run, such as temporal; may be repeated.")] = None,
    out: Out = Path("bench-results"),
    show: Annotated[bool, typer.Option("--list", help="Show the cases, and measure nothing.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if there is one.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds after which the run ends, in the middle of a case if need be.")] = None,
) -> None:
    """Measure. Without a GPU, the paths of the CPU are measured, and called that."""
    if context.invoked_subcommand is not None:
        return
    import torch

    from .run import Plan, cases_of, run

    if quick and full:
        raise ValueError("--quick, --full: expected one of them")
    has_gpu = torch.cuda.is_available()
    device = device or ("cuda" if has_gpu else "cpu")
    if device not in ("cuda", "cpu") or (device == "cuda" and not has_gpu):
        raise ValueError(f"--device: expected cuda, where torch finds a GPU, or cpu, got {device!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget: expected seconds above 0, got {budget:g}")
    plan = Plan(device, "quick" if quick else "full" if full else "default", only or (), budget=budget)
    if show:
        _list(cases_of(plan))
        return
    _check_folder(out)
    cases_of(plan)  # a wrong word is told of before anything is written
    out.mkdir(exist_ok=True)
    if device == "cpu":
        console.print("No GPU is used: these are figures of the CPU, and say nothing of any GPU.", style="yellow")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    interrupted = False
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=console) as bar:
        task = bar.add_task("starting", total=None, left="")

        def tell(progress) -> None:
            left = (
                ""
                if progress.left is None
                else f"{progress.left / 60:.0f} min left"
                if progress.left > 90
                else f"{progress.left:.0f} s left"
            )
            name = f"{progress.case}: {progress.implementation}" if progress.implementation else progress.case
            bar.update(task, description=name[:60], completed=progress.done, total=progress.total, left=left)
            if progress.finished is not None:
                bar.console.print(_line(progress.finished), highlight=False, markup=False, soft_wrap=True)

        try:
            path, result = run(plan, out, tell)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        console.print(f"interrupted: what was measured is in {out}", style="yellow")
        raise typer.Exit(130)
    from .analysis import is_busy
    from .report import summary

    console.print(summary(result))
    if is_busy(result):
        console.print(f"The machine was busy (load {result.host['load']:g}): these figures are not to be trusted.", style="yellow")
    console.print(f"{path}: written{'' if result.complete else ', as far as the time went'}", highlight=False, soft_wrap=True)
    if any(each.ours and each.status == "wrong" for each in result.measurements):
        console.print("a result of tubelet's own is wrong", style="red")
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders of results; those that come with the package if not given.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of report.md, report.html and the pictures.")] = Path("bench-report"),
    readme: Annotated[Path | None, typer.Option(help="Also write the section on speed anew between its marks in this file.")] = None,
) -> None:
    """Draw tables and plots of results: Markdown, pictures and one HTML page."""
    from .analysis import latest, load
    from .report import update_readme, write_report

    runs = load(results)
    if readme is not None:
        update_readme(readme, latest(runs))
        console.print(f"{readme}: written", highlight=False, soft_wrap=True)
    if not runs:
        if readme is not None:
            return
        raise ValueError("report: there are no results; `tubelet bench` makes some")
    _check_folder(out)
    for path in write_report(latest(runs), out):
        console.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A file of results.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same device.")],
    margin: Annotated[float, typer.Option(help="The relative difference that is taken for noise in any case.")] = 0.05,
    peers: Annotated[bool, typer.Option(help="Also those of other libraries.")] = False,
) -> None:
    """What got faster or slower beyond the noise. Exit code 1 if anything of ours got slower, wrong or failed."""
    from .compare import compare as differences
    from .record import read

    a, b = read(before), read(after)
    if a.device != b.device:
        raise ValueError(f"compare: expected results of one device, got {a.device!r} and {b.device!r}")
    table, worse = Table("case", "implementation", "before, ms", "after, ms", "change", ""), False
    for each in differences(a, b, margin, peers):
        worse |= each.regression
        if each.verdict != "same":
            numbers = ["" if ms is None else f"{ms:.4g}" for ms in (each.before, each.after)]
            ratio = "" if each.ratio is None else f"{each.ratio - 1:+.1%}"
            table.add_row(each.case, each.implementation, *numbers, ratio, each.verdict, style="red" if each.regression else None)
    console.print(table if table.row_count else "no difference beyond the noise")
    if worse:
        raise typer.Exit(1)


def _check_folder(out: Path) -> None:
    """One that is there, or can be made."""
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {out}")


def _list(cases) -> None:
    from .record import LEVELS

    table = Table("op", "case", "level", "tokens")
    for case in cases:
        table.add_row(case.op, case.name, LEVELS[case.level], str(case.shape.get("tokens", "")))
    console.print(table)


def _line(each) -> str:
    if each.status != "ok":
        return f"{each.op}, {each.case}: {each.implementation}: {each.status}" + (f" ({(each.reason or '')[:90]})" if each.reason else "")
    graph = f", {each.graph_ms:.4g} ms in a graph" if each.graph_ms else ""
    return f"{each.op}, {each.case}: {each.implementation}: {each.ms:.4g} ms ({each.low:.4g} to {each.high:.4g}){graph}"


def main() -> None:
    """For `python -m tubelet.bench`."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
