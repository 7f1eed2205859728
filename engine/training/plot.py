"""A picture of a run: every quantity of its log against the steps."""

import io
import json
from pathlib import Path

from ..pretrained import write_whole


def plot_log(folder: str | Path) -> Path:
    """Draw FOLDER/log.jsonl to FOLDER/log.png, and return that path. Raises FileNotFoundError without a log, ImportError without
    matplotlib (which the extra "train" installs).
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    if not (folder / "log.jsonl").is_file():
        raise FileNotFoundError(f"{folder / 'log.jsonl'}: no such file")
    # A run that was stopped between two checkpoints logs some steps again: the later line counts.
    lines = {line["step"]: line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}
    steps = sorted(lines)
    names = [name for name in lines[steps[-1]] if name not in ("step", "seconds")] if steps else []
    figure = Figure(figsize=(8, 2.2 * max(len(names), 1)), layout="constrained")
    axes = figure.subplots(max(len(names), 1), sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=False):
        axis.plot(steps, [lines[step].get(name) for step in steps], linewidth=1)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_whole(folder / "log.png", picture.getvalue())
    return folder / "log.png"
