"""What Triton's compiler makes of the kernels, without a GPU: `python tests/codegen.py` writes the ledger that test_codegen.py reads.

For each kernel, head dim, mask and GPU: registers, bytes of stack (spills), bytes of shared memory, and counts of the instructions that
matter: products of warps (mma), of warp groups (wgmma) and of a block (tcgen05), those of FP8 among them (e4m3), loads by TMA, changes of
the number of registers (setmaxnreg: warps specialise), and other loads of 16 bytes. And a digest of the sources that this is of.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from codegen_calls import CALLS

LEDGER = Path(__file__).with_suffix(".json")
KERNELS = ("block_forward", "block_backward_queries", "block_backward_keys")
HOPPER = "hopper_forward"
TEMPORAL = ("temporal_forward", "temporal_backward")
INPUTS = ("q_ptr", "k_ptr", "v_ptr", "do_ptr")
RESULTS = ("out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
SUMS = ("lse_ptr", "delta_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""What a block of threads may have, in bytes."""


@dataclass(frozen=True)
class Case:
    kernel: str
    gpu: str
    head_dim: int
    mask: str = "FrameCausal()"
    known: bool = False
    dtype: str = "bf16"
    rows: int = 0
    text: bool = False
    lengths: bool = False

    def __str__(self) -> str:
        rest = (" known" if self.known else "") + ("" if self.dtype == "bf16" else f" {self.dtype}")
        rest += (f" {self.rows} rows" if self.rows else "") + (" text" if self.text else "")
        rest += " text_lengths" if self.lengths else ""
        return f"{self.gpu} {self.kernel} {self.head_dim} {self.mask}{rest}"


CASES = [
    *(Case(kernel, "sm_90", dim) for kernel in KERNELS for dim in (64, 72, 96, 112, 128, 256)),
    *(Case(kernel, gpu, dim) for kernel in KERNELS for gpu in ("sm_80", "sm_100", "gfx942") for dim in (64, 128)),
    *(Case("block_forward", "sm_90", 128, mask) for mask in ("Full()", "Spatial()", "Temporal()")),
    *(Case(kernel, "sm_90", 128, "FrameCausal(chunk=3, window=4, sink=1)", True) for kernel in KERNELS),
    *(Case(kernel, "sm_90", dim, "Full()", lengths=True) for kernel in KERNELS for dim in (64, 128)),
    *(Case(KERNELS[0], gpu, dim, dtype="fp8e4nv") for gpu, dim in (("sm_90", 64), ("sm_90", 72), ("sm_90", 128), ("sm_100", 128))),
    *(Case(kernel, "sm_90", 64, dtype="fp32") for kernel in KERNELS),
    Case(TEMPORAL[0], "sm_90", 64, "Temporal()", dtype="fp32", rows=64),
    *(Case(HOPPER, "sm_90", dim) for dim in (64, 128)),
    *(Case(TEMPORAL[0], "sm_90", dim, "Temporal()", rows=64) for dim in (64, 72, 128, 256)),
    *(Case(TEMPORAL[0], "sm_90", dim, "Temporal()", rows=128) for dim in (64, 72, 128)),
    *(Case(TEMPORAL[1], "sm_90", dim, "Temporal()", rows=64) for dim in (64, 72, 128)),
    *(Case(TEMPORAL[0], gpu, dim, "Temporal()", rows=64) for gpu in ("sm_80", "sm_100", "gfx942") for dim in (64, 128)),
    *(Case(TEMPORAL[1], gpu, dim, "Temporal()", rows=64) for gpu in ("sm_80", "sm_100") for dim in (64, 128)),
    *(Case(kernel, "sm_90", 128, "Temporal(window=4)", known=True, rows=64, text=True) for kernel in TEMPORAL),
    *(Case(HOPPER, "sm_90", 128, mask) for mask in ("Full()", "Spatial()", "FrameCausal(chunk=3, window=4, sink=1)")),
]


def compile_case(case: Case) -> dict[str, int]:
    """Compile a case for tensors that are aligned as torch aligns them, and count."""
    import torch
    import triton
    from triton.compiler import ASTSource
    from tubelet import kernels
    from tubelet.kernels.attention import block, configs, hopper, temporal

    dtype = {"fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    if case.kernel == HOPPER:
        function, config = hopper.hopper_forward, hopper.default_config(case.head_dim)
    elif case.kernel in TEMPORAL:
        function = getattr(temporal, case.kernel)
        config = temporal.config(case.rows, backward=case.kernel == TEMPORAL[1])
    else:
        function = getattr(block, case.kernel)
        room = {"shared_memory": SHARED_MEMORY[case.gpu], "amd": case.gpu.startswith("gfx"), "hopper": case.gpu == "sm_90"}
        rule = configs.default_configs(case.head_dim, dtype, configs.kind_of(eval(case.mask, vars(kernels))), **room)
        config = rule[KERNELS.index(case.kernel)]
    mask = eval(case.mask, vars(kernels))
    constants = {"GROUP": 1, "SITE": mask.same_site, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "HEAD_DIM": case.head_dim}
    constants |= {"HAS_TEXT": case.text, "UNIT": 1 if case.head_dim % 16 == 0 else 16 // dtype.itemsize, "q_turn": None, "k_turn": None}
    dims = case.head_dim, *configs.split_head_dim(case.head_dim, dtype)
    tuples = {"RULE": mask.as_rule()._replace(sees_known=case.known), "DIMS": dims}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        elif name in tuples:
            signature[name] = ("constexpr",) * len(tuples[name])
            constexprs |= {(i, j): value for j, value in enumerate(tuples[name])}
        elif (name.endswith("_scale_ptr") and case.dtype != "fp8e4nv") or (name == "text_lengths_ptr" and not case.lengths):
            signature[name], constexprs[i,] = "constexpr", None
        elif name.endswith("_ptr"):
            result = "bf16" if case.dtype == "fp8e4nv" else case.dtype
            signature[name] = (
                f"*{case.dtype}" if name in INPUTS else f"*{result}" if name in RESULTS else "*fp32" if name in SUMS else "*i32"
            )
            attributes[i,] = [["tt.divisibility", 16]]
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned = name.endswith("t") or case.head_dim // constants["UNIT"] % 16 == 0  # as a launch finds it of 16 heads
            if name.startswith("stride") and name != "stride_lh" and not name.endswith(("st", "sh")) and aligned:
                attributes[i,] = [["tt.divisibility", 16]]
    target = _target(case.gpu)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(function, signature, constexprs, attributes), target=target, options=options)
    counts = _amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
    return asdict(config) | {"shared": compiled.metadata.shared} | counts


def compile_call(name: str, gpu: str) -> dict[str, dict[str, int]]:
    """Make a call of `CALLS`, compile what it launches, and count, kernel by kernel."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = {}

    def run(kernel, *arguments, grid, warmup, **options):
        name = kernel.fn.__name__
        name += f" {sum(other.split()[0] == name for other in compiled) + 1}" if name in compiled else ""
        made = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        counts = _amd(made.asm["amdgcn"]) if gpu.startswith("gfx") else _nvidia(made.asm["ptx"], made.asm["cubin"])
        compiled[name] = {"num_warps": made.metadata.num_warps, "shared": made.metadata.shared} | counts

    launch, JITFunction.run = JITFunction.run, run
    driver.set_active(_Device(gpu))
    try:
        CALLS[name].run()
    finally:
        JITFunction.run = launch
    return {f"{gpu} {name}: {kernel}": figures for kernel, figures in compiled.items()}


class _Device:
    """What Triton asks of a GPU's driver in order to compile."""

    def __init__(self, gpu: str):
        self.target = _target(gpu)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.target.arch  # what is compiled is kept for a device

    def get_current_stream(self, device) -> int:
        return 0


def _target(gpu: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", gpu, 64) if gpu.startswith("gfx") else GPUTarget("cuda", int(gpu[3:]), 32)


def _nvidia(ptx: str, cubin: bytes) -> dict[str, int]:
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "e4m3": len(re.findall(r"wgmma.mma_async\S*\.e4m3|tcgen05.mma\S*f8f6f4", ptx)),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "setmaxnreg": ptx.count("setmaxnreg"),
        "loads of 16 bytes": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* .*, 0x10|cp\.async\.c[ag]", ptx)),
        "stores of 16 bytes": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    }


def _amd(assembly: str) -> dict[str, int]:
    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": figure("vgpr_count"),
        "stack": figure("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma", assembly)),
        "loads of 16 bytes": len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", assembly)),
        "stores of 16 bytes": len(re.findall(r"global_store_dwordx4|buffer_store_dwordx4", assembly)),
    }


def keys() -> list[tuple[str, str]]:
    """What is compiled: a case by its name, of a call its name and a GPU."""
    return [(str(case), "") for case in CASES] + [(name, gpu) for name, call in CALLS.items() for gpu in call.gpus]


def compile_key(key: tuple[str, str]) -> dict[str, dict[str, int]]:
    name, gpu = key
    return compile_call(name, gpu) if gpu else {name: compile_case(next(case for case in CASES if str(case) == name))}


def sources() -> str:
    """A digest of all that is compiled, and of how."""
    files = [*Path(__file__).parent.glob("codegen*.py"), *(Path(__file__).parent.parent / "kernels").rglob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def compiler() -> str:
    import triton

    return triton.__version__


def ledger(sample: int = 1) -> dict:
    """Compile one of so many of all that there is, on all cores; which, the sources tell."""
    digest, cases = sources(), {}
    chosen = keys()[int(digest, 16) % sample :: sample]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for figures in pool.map(compile_key, chosen):
            cases |= figures
    return {"triton": compiler(), "sources": digest, "cases": cases}


def text(ledger: dict) -> str:
    """JSON with a line for each case."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in ledger["cases"].items())
    return f'{{"triton": {json.dumps(ledger["triton"])}, "sources": {json.dumps(ledger["sources"])}, "cases": {{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    if len(sys.argv) > 2:  # for a look at one: python tests/codegen.py CALL GPU
        print(json.dumps(compile_call(sys.argv[1], sys.argv[2]), indent=1))
    elif sys.argv[1:]:  # python tests/codegen.py SAMPLE
        print(text(ledger(int(sys.argv[1]))))
    else:
        LEDGER.write_text(text(ledger()))
