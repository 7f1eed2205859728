"""One step of a diffusion solver, with classifier-free guidance, in one pass over the tokens.

    o      = uncond + g (cond - uncond)          classifier-free guidance (Ho & Salimans 2022); o = cond where there is no uncond
    x0     = p x + q o                           the clean sample that the model's output implies
    x_next = a x + b x0 + c x0_prev              the solver; x0_prev is the x0 of the evaluation before
    known tokens keep x, in x_next and in x0

Euler, Heun, DPM-Solver++(2M) and DDIM, on models that predict a velocity, the noise or v, are all this update and differ in the five
numbers (p, q, a, b, c) alone. A table of them with one row per request lets requests with different solvers, step counts and scales
share a pack.

What fusing saves: op by op, each sum and product above writes a tensor as large as x, which the next one reads back. FLOPs: 11 per
element. Bytes: x, cond, uncond and x0_prev are read once, x_next and x0 written once, so the step is bound by memory bandwidth: of 32,760
tokens of 64 channels, x and both x0 in float32 and the model's outputs in bfloat16, 42 MB, 13 us at 3.35 TB/s. Only the torch
implementation has gradients, and "auto" takes it where one is required.
"""

import torch

from ..dispatch import HAS_TRITON, choose, select, with_triton
from .reference import guided_step_reference, guided_step_torch

if HAS_TRITON:
    from . import fused


def guided_step(
    x: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    x0_prev: torch.Tensor | None,
    coefficients: torch.Tensor,
    *,
    guidance: float | torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_next, x0), each (tokens, channels) in out_dtype (None: the dtype of x); computed in float32, in float64 if x is float64.

    x, cond, uncond, x0_prev: (tokens, channels), floating dtypes. uncond and guidance are given together or not at all. x0_prev None
    counts as zeros: right wherever c is 0, as on a first step.
    coefficients: (p, q, a, b, c) on the device of x, (5,), or (R, 5) with one row per request; float32, or float64 if x is.
    guidance: the scale g, a number, or a tensor (R,) like coefficients with one scale per request.
    rows: (tokens,) int32, the row of each token; needed where coefficients or guidance has rows. Its values are not checked, as that
    would wait for the device.
    known: (tokens,) bool, the tokens to keep as they are, whatever the model says of them (NaN too).

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device, combination or implementation.
    """
    _check(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype)
    out_dtype = out_dtype or x.dtype
    available = {"torch": guided_step_torch, "reference": guided_step_reference}
    if HAS_TRITON:
        tables = [each for each in (coefficients, guidance) if isinstance(each, torch.Tensor)]
        reason = fused.unavailable(tables, out_dtype, x=x, cond=cond, uncond=uncond, x0_prev=x0_prev)
        available = with_triton(x, available, fused.guided_step, reason)
    else:
        available = with_triton(x, available)
    if choose("guided_step", implementation, *available) == "triton":
        if guidance is not None and not isinstance(guidance, torch.Tensor):
            guidance = torch.ones((), dtype=torch.float32, device="cpu") * guidance  # of an operation torch.compile takes any number
        return fused.guided_step(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype, implementation)
    run = select("guided_step", implementation, *available)
    return run(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype)


def _check(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype) -> None:
    _check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (tokens, channels), got {tuple(x.shape)}")
    for name, value in (("cond", cond), ("uncond", uncond), ("x0_prev", x0_prev)):
        if value is None and name != "cond":
            continue
        _check_floating(name, value)
        _check_place(name, value, tuple(x.shape), x)
    if (uncond is None) != (guidance is None):
        given, missing = ("uncond", "guidance") if guidance is None else ("guidance", "uncond")
        raise ValueError(f"{missing}: expected together with {given}, got None")

    tables = {"coefficients": coefficients}
    if isinstance(guidance, torch.Tensor):
        tables["guidance"] = guidance
    elif guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, int | float)):
        raise TypeError(f"guidance: expected a number or a float32 tensor (rows,), got {_describe(guidance)}")
    accepted = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    for name, table in tables.items():
        if not isinstance(table, torch.Tensor) or table.dtype not in accepted:
            raise TypeError(f"{name}: expected a tensor of {' or '.join(map(str, accepted))}, got {_describe(table)}")
        _check_place(name, table, tuple(table.shape), x)
    if coefficients.dim() not in (1, 2) or coefficients.shape[-1] != 5:
        raise ValueError(f"coefficients: expected shape (5,) or (rows, 5), got {tuple(coefficients.shape)}")
    if "guidance" in tables and guidance.dim() != 1:
        raise ValueError(f"guidance: expected shape (rows,), got {tuple(guidance.shape)}")
    if "guidance" in tables and coefficients.dim() == 2 and len(guidance) != len(coefficients):
        raise ValueError(f"guidance: expected one scale for each of the {len(coefficients)} rows of coefficients, got {len(guidance)}")

    if rows is None and (coefficients.dim() == 2 or "guidance" in tables):
        raise ValueError("rows: expected the row of each token, as coefficients or guidance has rows, got None")
    for name, value, dtype in (("rows", rows, torch.int32), ("known", known, torch.bool)):
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dtype != dtype:
            raise TypeError(f"{name}: expected a tensor of {dtype}, got {_describe(value)}")
        _check_place(name, value, (x.shape[0],), x)
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype: expected a floating torch.dtype or None, got {out_dtype!r}")


def _check_floating(name: str, value) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {_describe(value)}")


def _check_place(name: str, value: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} as x is, got {value.device}")


def _describe(value) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
