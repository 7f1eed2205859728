"""What Triton's compiler makes of the kernels, without a GPU: `python tests/codegen.py` writes the ledger that test_codegen.py reads.

For each kernel, head dim, mask and GPU: registers, bytes of stack (spills), bytes of shared memory, and counts of the instructions that
matter: products of warps (mma) and of warp groups (wgmma), and loads of 16 bytes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

LEDGER = Path(__file__).with_suffix(".json")
KERNELS = ("block_forward", "block_backward_queries", "block_backward_keys")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""What a block of threads may have, in bytes."""


@dataclass(frozen=True)
class Case:
    kernel: str
    gpu: str
    head_dim: int
    mask: str = "FrameCausal()"
    known: bool = False

    def __str__(self) -> str:
        return f"{self.gpu} {self.kernel} {self.head_dim} {self.mask}" + (" known" if self.known else "")


CASES = [
    *(Case(kernel, "sm_90", dim) for kernel in KERNELS for dim in (64, 72, 96, 128, 256)),
    *(Case(kernel, gpu, dim) for kernel in KERNELS for gpu in ("sm_80", "sm_100", "gfx942") for dim in (64, 128)),
    *(Case("block_forward", "sm_90", 128, mask) for mask in ("Full()", "Spatial()", "Temporal()")),
    *(Case(kernel, "sm_90", 128, "FrameCausal(chunk=3, window=4, sink=1)", True) for kernel in KERNELS),
]


def compile_case(case: Case) -> dict[str, int]:
    """Compile a case for bfloat16 tensors, aligned as torch aligns them, and count."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from tubelet import kernels
    from tubelet.kernels.attention import block

    configs = block.default_configs(case.head_dim, torch.bfloat16, SHARED_MEMORY[case.gpu], amd=case.gpu.startswith("gfx"))
    config = configs[KERNELS.index(case.kernel)]
    mask = eval(case.mask, vars(kernels))
    constants = {"GROUP": 1, "SITE": mask.same_site, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    tuples = {"RULE": mask.as_rule()._replace(sees_known=case.known), "DIMS": (case.head_dim, *block.split_head_dim(case.head_dim))}
    function = getattr(block, case.kernel)
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        elif name in tuples:
            signature[name] = ("constexpr",) * len(tuples[name])
            constexprs |= {(i, j): value for j, value in enumerate(tuples[name])}
        elif name.endswith("_ptr"):
            tensor = name.removesuffix("_ptr") in ("q", "k", "v", "out", "do", "dq", "dk", "dv")
            signature[name] = "*bf16" if tensor else "*fp32" if name in ("lse_ptr", "delta_ptr") else "*i32"
            attributes[i,] = [["tt.divisibility", 16]]
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride") and name != "stride_lh":
                attributes[i,] = [["tt.divisibility", 16 if case.head_dim % 16 == 0 else 8]]
    target = GPUTarget("hip", case.gpu, 64) if case.gpu.startswith("gfx") else GPUTarget("cuda", int(case.gpu[3:]), 32)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(ASTSource(function, signature, constexprs, attributes), target=target, options=options)
    counts = _amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
    return asdict(config) | {"shared": compiled.metadata.shared} | counts


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
        "loads of 16 bytes": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* .*, 0x10|cp\.async\.c[ag]", ptx)),
    }


def _amd(assembly: str) -> dict[str, int]:
    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": figure("vgpr_count"),
        "stack": figure("vgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma", assembly)),
        "loads of 16 bytes": len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", assembly)),
    }


def ledger() -> dict:
    """Compile all cases, on all cores."""
    import triton

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return {"triton": triton.__version__, "cases": dict(zip(map(str, CASES), pool.map(compile_case, CASES), strict=True))}


def text(ledger: dict) -> str:
    """JSON with a line for each case."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in ledger["cases"].items())
    return f'{{"triton": {json.dumps(ledger["triton"])}, "cases": {{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    written = text(ledger())
    if sys.argv[1:] == ["-"]:
        print(written)
    else:
        LEDGER.write_text(written)
