"""Results as one HTML page without any other file, whose table can be sorted and filtered."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from .analysis import Row, in_order, rows
from .record import Run


def page(runs: Sequence[tuple[Path, Run]], pictures: dict[Path, dict[str, Path]], headings: Sequence[Sequence[str]]) -> str:
    """Of runs, the pictures of each (title -> file), and the lines that stand over it."""
    data = []
    for _, run in runs:
        best = {(row.op, row.case): row for row in rows(run)}
        for each in sorted(run.measurements, key=in_order(run)):
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
    for (path, run), heading in zip(runs, headings, strict=True):
        images = "".join(
            f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"></figure>'
            for title, picture in pictures[path].items()
        )
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in heading)
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
