"""How the kernels of attention are launched: by what was measured on this GPU for this class of shapes, or by a rule."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from .. import tuned
from ..masks import Mask, Spatial

KERNELS = tuned.KERNELS["attention"]
SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have on a datacenter GPU since Hopper; taken for granted off a GPU."""


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: tile sizes of queries and keys, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """Those of the three kernels, and whether the forward one is the specialised kernel of the GPU."""

    forward: Config
    queries: Config
    keys: Config
    specialised: bool = False


def configs_for(q: torch.Tensor, mask: Mask) -> Configs:
    """Those tuned for the class of q and mask on this GPU, else those of the rule. Raises ValueError for a malformed file of settings."""
    kind = kind_of(mask)
    entry = tuned.settings(q.device, "attention", shape_class(q.shape[2], q.dtype, kind))
    if entry is None:
        return default_configs(q.shape[2], q.dtype, kind, **limits(q.device))
    return Configs(*(Config(**entry[kernel]) for kernel in KERNELS), entry["specialised"])


def shape_class(head_dim: int, dtype: torch.dtype, kind: str) -> str:
    """What settings are kept for: "128 bfloat16 video". Lengths are no part of it, nor what else is in a pack (see `tuned`)."""
    return f"{head_dim} {str(dtype).removeprefix('torch.')} {kind}"


def kind_of(mask: Mask) -> str:
    """What a query sees much of: its "video" (Full, FrameCausal), its "frame" (Spatial) or its "site" (Temporal)."""
    return "site" if mask.same_site else "frame" if mask.as_rule() == Spatial().as_rule() else "video"


@lru_cache
def default_configs(
    head_dim: int,
    dtype: torch.dtype,
    kind: str = "video",
    *,
    shared_memory: int = SHARED_MEMORY,
    amd: bool = False,
    hopper: bool = False,
) -> Configs:
    """A rule: for Hopper what was the fastest on an H200, and before on an H100, at head dims 64, 72, 96 and 128, of each kind of mask on
    8,192 to 51,000 tokens; else, where nothing was measured, large tiles that compile without spills (tests/codegen.json). With as many
    stages as `shared_memory`, in bytes a block, has room for.
    """
    if dtype.itemsize > 2:  # above 64, float32 spills a little in spite of its small tiles
        small = Config(32, 32, 4, 1) if head_dim <= 64 else Config(32, 32, 8, 1) if head_dim <= 128 else Config(16, 16, 8, 1)
        configs = Configs(Config(64, 32, 4, 2) if head_dim <= 64 else small, small, small)
    elif head_dim > 128:
        configs = Configs(Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1))
    elif amd and head_dim > 64:
        configs = Configs(Config(64, 64, 4, 1), Config(64, 32, 8, 1), Config(16, 64, 8, 1))
    elif amd:
        configs = Configs(Config(128, 64, 4, 1), Config(64, 64, 8, 1), Config(32, 64, 8, 1))
    elif dtype.itemsize == 1:
        configs = Configs(Config(128, 64 if head_dim <= 64 else 32, 8, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2))
    elif hopper:
        forward = Config(128, 64, 4, 3) if head_dim <= 96 else Config(64, 64, 4, 3) if kind == "frame" else Config(128, 64, 8, 3)
        keys = Config(128, 64, 4, 1) if head_dim <= 64 else Config(64, 128, 8, 1)
        configs = Configs(forward, Config(64, 64, 4, 3 if head_dim <= 64 else 2), keys)
    elif head_dim > 64:
        configs = Configs(Config(128, 32, 8, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2))
    else:
        keys = Config(64, 64, 8, 2) if shared_memory >= SHARED_MEMORY else Config(32, 64, 8, 2)  # wgmma needs fewer registers than mma
        configs = Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 2), keys)
    return Configs(*(fitted(kernel, getattr(configs, kernel), head_dim, dtype, shared_memory) for kernel in KERNELS))


def fitted(kernel: str, config: Config, head_dim: int, dtype: torch.dtype, shared_memory: int) -> Config:
    """`config`, with no more stages than `shared_memory`, in bytes a block, has room for."""
    m, n = config.block_m, config.block_n
    # The rows of the tiles that stay, and of each of the two that stream: q against k and v; q and do against k and v; k and v against q
    # and do.
    stay, stream = {"forward": (m, n), "queries": (2 * m, n), "keys": (2 * n, m)}[kernel]
    row = sum(split_head_dim(head_dim, dtype)) * dtype.itemsize
    return replace(config, num_stages=max(1, min(config.num_stages, (shared_memory // row - stay) // (2 * stream))))


@lru_cache
def split_head_dim(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int, int]:
    """Three powers of two that cover head_dim, the last ones 0 where fewer do as well. Of float32 always one: its products are three each,
    and in parts its gradients spilled kilobytes.
    """
    least = 32 if dtype.itemsize == 1 else 16  # that a matrix product may sum over
    whole = max(least, triton.next_power_of_2(head_dim))
    parts, rest = [], -(-head_dim // least) * least
    while rest > 0 and len(parts) < 2:
        parts.append(1 << (rest.bit_length() - 1))
        rest -= parts[-1]
    parts.append(triton.next_power_of_2(rest) if rest else 0)
    return (*parts, 0, 0)[:3] if sum(parts) < whole and dtype.itemsize <= 2 else (whole, 0, 0)


@lru_cache
def limits(device: torch.device) -> dict:
    """The last arguments of `default_configs`."""
    if device.type != "cuda":
        return {"shared_memory": SHARED_MEMORY, "amd": False, "hopper": False}
    amd = torch.version.hip is not None
    hopper = not amd and torch.cuda.get_device_capability(device) == (9, 0)
    shared_memory = 64 * 1024 if amd else torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return {"shared_memory": shared_memory, "amd": amd, "hopper": hopper}
