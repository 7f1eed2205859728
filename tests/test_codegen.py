"""The ledger of what the kernels compile to: nothing spills that was not measured to be fast all the same, everything fits, the
tensor cores are used. No GPU is needed. Compiling all takes minutes: where the ledger is of these sources and of this compiler, it is only
compared with a sample.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import codegen
from codegen_calls import CALLS

MEASURED = 96
"""Bytes that the block kernels may spill on Hopper at head dims up to 128, where settings are not the largest that spill nothing, but the
fastest of an H100 and an H200; the ledger holds how many each does.
"""


BESIDE = {"tokens_to_clips": 80}
"""Bytes that other kernels may spill on Hopper beside their loop, for two programs to fit a multiprocessor."""
SAMPLE = 12
WRITTEN = json.loads(codegen.LEDGER.read_text())
KNOWN = (WRITTEN["triton"], WRITTEN.get("sources")) == (codegen.compiler(), codegen.sources())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Compiled anew, in a process that does not interpret: all, or a sample."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, codegen.__file__, str(SAMPLE if KNOWN else 1)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture
def compiled(made):
    """All figures: but for the sample those of the ledger, where it is of these sources."""
    return {"cases": WRITTEN["cases"] | made["cases"]} if KNOWN else made


def test_the_ledger_is_what_the_compiler_makes(made):
    """After a change that is meant: `python tests/codegen.py`, and look at the difference."""
    if WRITTEN["triton"] != made["triton"]:
        pytest.skip(f"the ledger is of triton {WRITTEN['triton']}, this is {made['triton']}")
    names = made["cases"] if KNOWN else WRITTEN["cases"]
    assert made["cases"] and made["cases"] == {name: WRITTEN["cases"].get(name) for name in names}


@pytest.mark.parametrize("case", codegen.CASES, ids=str)
def test_a_kernel_fits_and_uses_the_tensor_cores(compiled, case):
    figures = compiled["cases"][str(case)]
    measured = case.gpu == "sm_90" and case.kernel in codegen.KERNELS and case.dtype == "bf16" and case.head_dim <= 128
    assert figures["stack"] <= (MEASURED if measured else 0), "registers are spilled"
    assert figures["shared"] <= codegen.SHARED_MEMORY[case.gpu]
    if case.kernel == codegen.HOPPER:
        assert figures["wgmma"] > 0 and figures["tma"] > 0 and figures["setmaxnreg"] > 0
        return
    assert figures["loads of 16 bytes"] > 0
    if case.kernel in codegen.TEMPORAL:
        assert figures["stores of 16 bytes"] > 0 or case.gpu == "gfx942"  # whose stores are narrower
    if case.dtype == "fp8e4nv":
        assert figures["e4m3"] == figures["wgmma"] + figures["tcgen05"] > 0
    elif case.dtype == "fp32":  # some tiles are too small for warp groups
        assert figures["mma"] + figures["wgmma"] > 0
    elif case.gpu == "sm_90" and not (case.kernel == "block_backward_keys" and case.head_dim > 128):  # whose tiles are too small for it
        assert figures["wgmma"] > 0 and figures["mma"] == 0
    elif case.gpu == "sm_100":
        assert figures["mma"] + figures["tcgen05"] > 0
    else:
        assert figures["mma"] > 0


@pytest.mark.parametrize(("name", "gpu"), [(name, gpu) for name, call in CALLS.items() for gpu in call.gpus])
def test_the_kernels_of_a_call_fit_and_read_widely(compiled, name, gpu):
    """And write so, apart from gfx942's, whose stores are narrower, and kernels that the call calls narrow."""
    kernels = {key.split(": ")[1]: figures for key, figures in compiled["cases"].items() if key.startswith(f"{gpu} {name}: ")}
    assert kernels
    for kernel, figures in kernels.items():
        assert figures["stack"] <= (BESIDE.get(kernel, 0) if gpu == "sm_90" else 0), f"{kernel}: registers are spilled"
        assert figures["shared"] <= codegen.SHARED_MEMORY[gpu], kernel
        if kernel.split()[0] not in CALLS[name].narrow:
            assert figures["loads of 16 bytes"] > 0, kernel
            assert figures["stores of 16 bytes"] > 0 or gpu == "gfx942", kernel
