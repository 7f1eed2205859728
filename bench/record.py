"""Results on disk: one JSON file for each run, whole at any time, never written over by another run.

A file holds what ran where (device, driver, versions, commit, date, clocks), the ceilings measured in that run, and a list of
measurements. What is read is checked against the dataclasses below: unknown, missing or mistyped fields are errors that name them.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
KINDS, LEVELS = ("cuda", "cpu"), ("quick", "default", "full")
FOLDER = Path(__file__).parent / "results"
"""Of the committed results."""
VARIABLE = "TUBELET_COMMIT"
"""Names the commit where there is no repository around this code."""
STATUSES = ("ok", "wrong", "failed", "missing", "unsupported", "out of memory", "timed out", "not run")
PEERS = ("diffusers", "xformers", "flash-attn", "flash-attn-4", "liger-kernel", "sageattention", "torchao")
VERSIONS = ("tubelet", "torch", "triton", *PEERS, "numpy")


@dataclass
class Measurement:
    """One implementation of one case. Times in milliseconds: `ms` is the median of single calls, `low` and `high` its quartiles, `graph_ms`
    the median in a CUDA graph, where the call is so short that the host would be timed, `graph_low` and `graph_high` its quartiles,
    `host_ms` the median until a call on a GPU returns to the host, which then can launch the next. seconds: that it took in all; with the
    first of a case, setup_seconds, those that the case and its reference took. peak_bytes: allocated at the peak of a call beyond
    what was there; workspace_bytes: the part of it that is not output. error, allowed: of the norm, of the largest element. An empty
    `implementation` stands for the case: it could not be made, or, "not run", the time of the run was over before.
    """

    op: str
    case: str
    implementation: str
    status: str
    ours: bool = False
    comparable: bool = True
    series: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    graph_ms: float | None = None
    graph_low: float | None = None
    graph_high: float | None = None
    host_ms: float | None = None
    flops: float | None = None
    bytes: float | None = None
    peak_bytes: int | None = None
    workspace_bytes: int | None = None
    error: list[float] | None = None
    allowed: list[float] | None = None
    engaged: dict[str, Any] | None = None
    reason: str | None = None
    where: str | None = None
    seconds: float | None = None
    setup_seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.case, self.implementation

    def times(self, in_graph: bool) -> "Times":
        """Of calls in a CUDA graph or of single ones; where quartiles in a graph were not kept, they are the median."""
        if in_graph:
            return Times(self.graph_low or self.graph_ms, self.graph_ms, self.graph_high or self.graph_ms)
        return Times(self.low, self.ms, self.high)


class Times(NamedTuple):
    """Milliseconds: the quartiles and the median."""

    low: float
    median: float
    high: float


MARGIN = 0.05


def beyond_noise(a: Times, b: Times, margin: float = MARGIN) -> bool:
    """Whether b is slower than a: if their quartiles do not overlap and the medians differ by more than a margin. Quartiles are the noise
    from call to call, the margin that from run to run, and from one implementation to the next: of clocks, and of where memory lies.
    """
    return b.low > a.high and b.median > a.median * (1 + margin)


@dataclass
class Ceilings:
    """What the device reached in this run: bytes a second of a copy (read and written), FLOP/s of a large square matrix product by
    dtype. copies: the milliseconds that a copy takes of so many bytes (read and written), small ones too.
    """

    copy: float | None = None
    matmul: dict[str, float] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """A file. only: the words that its cases were chosen by. budget: the seconds that it might take. clocks: of the GPU while the run
    went on, MHz, W and degrees Celsius, lowest, median and highest. complete: False for a run that was interrupted, or whose time was over
    before its last case.
    """

    device: str
    kind: str
    date: str
    level: str
    only: list[str] = field(default_factory=list)
    budget: float | None = None
    commit: str | None = None
    dirty: bool | None = None
    driver: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    clocks: dict[str, Any] | None = None
    ceilings: Ceilings = field(default_factory=Ceilings)
    measurements: list[Measurement] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def named(self) -> dict[tuple[str, str, str], Measurement]:
        return {each.key: each for each in self.measurements}


def begin(device: str, kind: str, level: str, only: Sequence[str] = (), budget: float | None = None) -> Run:
    """A run that starts now, on this machine."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _commit()
    return Run(
        device=device,
        kind=kind,
        date=datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
        level=level,
        only=list(only),
        budget=budget,
        commit=commit,
        dirty=dirty,
        driver=_driver() if kind == "cuda" else None,
        versions=versions | _of_libraries() | {"python": platform.python_version()},
        host={"system": platform.system(), "machine": platform.machine(), "processors": os.cpu_count(), "load": _load()},
    )


def path_of(run: Run, folder: Path) -> Path:
    """A new name in a folder: the device, the date and the commit; with a number behind it if the name is taken."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.device.lower()).strip("-")
    when = re.sub(r"[^0-9T]", "", run.date.partition("+")[0])
    stem = "-".join(filter(None, (slug, when, (run.commit or "")[:8])))
    for number in range(1, 1000):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists():
            return path
    raise FileExistsError(f"{folder}: a thousand results of the name {stem}")


def write(run: Run, path: Path) -> None:
    """Whole or not at all."""
    text = json.dumps(dataclasses.asdict(run), indent=1, allow_nan=False, default=str)
    text = re.sub(r"\[\s+([^\[\]{}]{0,120}?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)  # short lists on one line
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def plain(measurement: Measurement) -> Measurement:
    """Without NaN and infinity, which JSON has not."""
    if measurement.error is not None:
        measurement.error = [x if math.isfinite(x) else 1e30 for x in measurement.error]
    return measurement


def read(path: Path) -> Run:
    """A file of results. Raises FileNotFoundError, or ValueError naming the file and the field."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    try:
        run = _checked(Run, content, "the file")
        for name, wanted in (("schema", (SCHEMA,)), ("kind", KINDS), ("level", LEVELS)):
            if getattr(run, name) not in wanted:
                raise ValueError(f"{name}: expected {' or '.join(map(str, wanted))}, got {getattr(run, name)!r}")
        for i, each in enumerate(run.measurements):
            where = f"measurements[{i}]"
            if each.status not in STATUSES:
                raise ValueError(f"{where}: status: expected one of {', '.join(STATUSES)}, got {each.status!r}")
            if each.status == "ok" and not (each.ms and each.ms > 0 and each.low is not None and each.high is not None):
                raise ValueError(f"{where}: ms: expected a time above 0 and its quartiles, as its status is ok, got {each.ms!r}")
            if each.status == "wrong" and each.ms is not None:
                raise ValueError(f"{where}: ms: expected none of a wrong result, got {each.ms!r}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return run


def committed(folder: Path = FOLDER) -> list[tuple[Path, Run]]:
    """All results of a folder, in order of date."""
    return sorted(((path, read(path)) for path in sorted(Path(folder).glob("*.json"))), key=lambda each: each[1].date)


def _checked(kind: type, value: Any, where: str) -> Any:
    """A dataclass, or what its fields hold, from JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _checked(next(each for each in arguments if each is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        hints, fields = typing.get_type_hints(kind), {each.name: each for each in dataclasses.fields(kind)}
        for name in value:
            if name not in fields:
                raise ValueError(f"{where}: unknown field {name!r}")
        for name, each in fields.items():
            required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
            if required and name not in value:
                raise ValueError(f"{where}: expected a field {name!r}, got none")
        return kind(**{name: _checked(hints[name], each, f"{where}: {name}") for name, each in value.items()})
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return [_checked(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        return {name: _checked(arguments[1], each, f"{where}: {name}") for name, each in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _of_libraries() -> dict[str, str]:
    """The versions of what torch brings along."""
    import torch

    found = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return {name: version for name, version in found.items() if version}


def _load() -> float | None:
    """Processes that wanted a processor in the minute before."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _commit() -> tuple[str | None, bool | None]:
    """(the commit that this code is of, whether it was changed since), None each if that is not known."""
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE], None
    folder = str(Path(__file__).resolve().parent.parent)
    try:
        top = _run("git", "-C", folder, "rev-parse", "--show-toplevel")
        if top is None or Path(top).resolve() != Path(folder):  # installed inside of somebody else's repository
            return None, None
        changed = _run("git", "-C", folder, "status", "--porcelain", "--", "kernels", "engine", "bench")
        return _run("git", "-C", folder, "rev-parse", "HEAD"), None if changed is None else bool(changed)
    except OSError:
        return None, None


def _driver() -> str | None:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _run(*command: str) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
