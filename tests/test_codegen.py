"""The ledger of what the kernels compile to: nothing spills that was not measured to be fast all the same, everything fits, the
tensor cores are used. No GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import codegen
from codegen_calls import CALLS

MEASURED = 96
"""Bytes that the block kernels may spill on Hopper at head dims up to 128, where settings are not the largest that spill nothing, but the
fastest of an H100 and an H200; the ledger holds how many each does.
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiled anew, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(codegen.__file__)
    ran = subprocess.run([sys.executable, script, "-"], env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_ledger_is_what_the_compiler_makes(compiled):
    """After a change that is meant: `python tests/codegen.py`, and look at the difference."""
    written = json.loads(codegen.LEDGER.read_text())
    if written["triton"] != compiled["triton"]:
        pytest.skip(f"the ledger is of triton {written['triton']}, this is {compiled['triton']}")
    assert compiled == written


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
        assert figures["stack"] == 0, f"{kernel}: registers are spilled"
        assert figures["shared"] <= codegen.SHARED_MEMORY[gpu], kernel
        if kernel.split()[0] not in CALLS[name].narrow:
            assert figures["loads of 16 bytes"] > 0, kernel
            assert figures["stores of 16 bytes"] > 0 or gpu == "gfx942", kernel
