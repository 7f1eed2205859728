"""What `tubelet.kernels.launch` gives to a driver, beside what Triton itself gives to it: a script for test_dispatch.py, which has
to run where nothing is interpreted. There is no GPU: the driver writes down what it is to launch.
"""

import json
from itertools import count
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from codegen import _Device
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tubelet.kernels import engaged
from tubelet.kernels.launch import launch


class Part(NamedTuple):
    """As kernels take what belongs together."""

    ptr: torch.Tensor | None
    stride: int
    flag: tl.constexpr


class Driver(_Device):
    """Of an H100."""

    def __init__(self):
        super().__init__("sm_90")
        self.utils, self.handles, self.launches = self, count(), []

    def load_binary(self, name, kernel, shared, device):
        return self, next(self.handles), 32, 0, 1024

    def get_device_properties(self, device) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def get_current_device(self) -> int:
        return 0

    def launcher_cls(self, src, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append((x, y, z, function, repr([_seen(a) for a in arguments])))

        return run


def _seen(x):
    """Of an argument, what tells it from others."""
    return [_seen(each) for each in x] if isinstance(x, tuple) else x.data_ptr() if isinstance(x, torch.Tensor) else x


@triton.jit(do_not_specialize=["n"])
def kernel(out_ptr, x_ptr, other_ptr, part, numbers, stride, n, factor, FLAG: tl.constexpr, DIMS, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < n)
    if other_ptr is not None:
        x += tl.load(other_ptr + at)
    if part.ptr is not None:
        x += tl.load(part.ptr + at * part.stride)
    if part.flag:
        x += 1.0
    if FLAG:
        x *= factor
    tl.store(out_ptr + at + numbers[0] + numbers[1] * DIMS[0], x)


def main() -> None:
    driver.set_active(gpu := Driver())
    x, small = torch.zeros(64), torch.zeros(64, dtype=torch.float16)
    base = {"x": x, "other": None, "part": Part(None, 3, tl.constexpr(False)), "numbers": (3, 5), "stride": 3, "n": 7, "factor": 0.5}
    base |= {"FLAG": True, "DIMS": (2, 4), "BLOCK": 16, "num_warps": 4}
    off, on = tl.constexpr(False), tl.constexpr(True)
    parts = [Part(x, 3, off), Part(x[1:], 3, off), Part(x, 16, off), Part(None, 3, on), Part(None, 3, tl.constexpr(1))]
    others = [
        {"x": x[1:]}, {"x": small}, {"x": small[8:]}, {"other": x}, {"other": x[1:]}, *({"part": part} for part in parts),
        {"numbers": (1, 16)}, {"numbers": (2**40 + 1, 5)}, {"stride": 1}, {"stride": 16}, {"stride": 48}, {"stride": 0}, {"stride": -5},
        {"stride": 2**31}, {"stride": 2**31 - 1}, {"stride": -(2**31) - 1}, {"n": 1}, {"n": 16}, {"n": 2**33}, {"factor": 1.0},
        {"factor": 2}, {"FLAG": False}, {"DIMS": (3, 4)}, {"BLOCK": 32}, {"num_warps": 8},
    ]  # fmt: skip
    found, ours = [], 0
    for change in [{}, *others, {}]:
        given = base | change
        arguments = [torch.empty(999), *(given[name] for name in ("x", "other", "part", "numbers", "stride", "n", "factor"))]
        constants = {name: given[name] for name in ("num_warps", "DIMS", "BLOCK", "FLAG")}
        gpu.launches.clear()
        launch("op", kernel, 4, *arguments, **constants)
        run, JITFunction.run = JITFunction.run, None
        try:
            launch("op", kernel, 4, *arguments, **constants)  # without Triton's way
        finally:
            JITFunction.run = run
        plain = constants | {"DIMS": tuple(map(tl.constexpr, given["DIMS"]))}
        kernel[(4,)](*arguments, enable_fp_fusion=False, **plain)
        found.append([len(gpu.launches), len(set(gpu.launches))])
        ours = max(ours, gpu.launches[-1][3] + 1)
    print(json.dumps({"launches": found, "kernels": ours, "engaged": engaged()["op"]["triton"].kernels}))


if __name__ == "__main__":
    main()
