"""The table of engine/adapters/README.md: what serves each model of the tests. `python tests/adapter_table.py` writes it anew."""

import importlib
import sys
from pathlib import Path

from tubelet.engine.adapters import accelerate
from tubelet.engine.adapters.swaps import ONCE

HERE = Path(__file__).parent
PAGE = HERE.parent / "engine" / "adapters" / "README.md"
BEGIN, END = "<!-- table: written by `python tests/adapter_table.py` -->", "<!-- end of table -->"
COLUMNS = {
    "attention": {"attention"},
    "QK norm, rotary": {"qk_norm_rope"},
    "norm, modulation, gate": {"modulated_norm", "gated_residual"},
    "patches": {"patch_embed"},
    "last layer": {"final_layer"},
    "FP8 linears": {"fp8_linear"},
}


def models() -> dict:
    """The small models of all test_adapters_*.py, by name."""
    found = {}
    for path in sorted(HERE.glob("test_adapters_*.py")):
        found |= getattr(importlib.import_module(path.stem), "MODELS", {})
    return found


def table() -> str:
    """Markdown: for each model which ops serve it, and what besides linears was left alone. Variants that are served alike share a row."""
    rows: dict[tuple, list[str]] = {}
    for name, tiny in models().items():
        reports = [accelerate(tiny.build()), accelerate(tiny.build(), precision="fp8")]
        served = {op for report in reports for site in report.served for op in site.served_by}
        cells = ["yes" if ops & served else "-" for ops in COLUMNS.values()]
        left = [f"{site.op}: {site.reason}" for site in reports[1].left if site.op != "linear" and site.reason != ONCE]
        rows.setdefault((name.split(",")[0], *cells, "; ".join(dict.fromkeys(left))), []).append(name)
    lines = ["| model | " + " | ".join(COLUMNS) + " | left alone |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (name, *cells), names in rows.items():
        shown = name if len(names) == 1 else f"{name} ({len(names)} variants)"
        lines.append("| " + " | ".join([shown, *cells]) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table in it."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    PAGE.write_text(page(PAGE.read_text()))
