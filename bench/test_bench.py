"""The cases for `pytest bench/`, timed as `tubelet bench` times them and reported by pytest-benchmark. TUBELET_BENCH: quick (if it is not
set), default or full.
"""

import os

import pytest
import torch
from tubelet.bench import suite
from tubelet.bench.harness import Bench, Settings

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVEL = os.environ.get("TUBELET_BENCH", "quick")
CASES = suite.select(DEVICE, LEVEL)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Settings(torch.device(DEVICE), seconds=0.1, level=suite.LEVELS.index(LEVEL)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case, bench, benchmark):
    """The time of ours; those of the peers are with it in the extra information."""
    found, samples = {}, []
    for each in bench.measure(case):
        found[each.implementation] = each
        if each.implementation == "tubelet" and each.status == "ok":
            samples = list(bench.samples)
        benchmark.extra_info[each.implementation] = each.ms if each.status == "ok" else each.status
    wrong = {name: each.reason for name, each in found.items() if each.ours and each.status not in ("ok", "unsupported")}
    assert not wrong
    benchmark._mode = "on the device's clock"
    stats = benchmark._make_stats(1)  # what was measured already, on the device's clock: `benchmark(...)` would read that of the host
    for sample in samples:
        stats.update(sample / 1e3)
