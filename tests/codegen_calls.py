"""The calls beside attention whose kernels are in the ledger of codegen.py, with the widths of real models.

A call is made with tensors that have a shape and no storage (device "meta"), on the function that launches the kernels; each launch is
compiled for a GPU as it would be there, and not run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_FP8 = ("sm_90", "sm_100")
"""Of those with E4M3: gfx942 has another format of eight bits."""


@dataclass(frozen=True)
class Call:
    """run: makes the call. gpus: those to compile it for. narrow: its kernels that neither read nor write enough for 16 bytes at once."""

    run: Callable[[], object]
    gpus: tuple[str, ...] = GPUS
    narrow: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS: dict[str, Call] = {}
