"""Modulated norms and gated residuals against their equations in float64, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close
from tubelet.kernels import Capacity, Modulation, VideoLayout, gated_residual, modulated_norm

IMPLEMENTATIONS = ["torch"]
SHAPES = [(1, 1, 1), (1, 8, 1), (7, 33, 3), (20, 72, 4), (5, 129, 5)]  # tokens, channels, rows of the table
KINDS = ["layer", "rms"]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(tokens, rows, dtype=torch.int32):
    """Each row is used, in no order, if there are enough tokens."""
    return ((torch.arange(tokens) * 7 + 3) % rows).to(dtype)


def normed(x, kind, weight=None, bias=None, eps=1e-6):
    """The norm from its equation, one token at a time."""
    out = []
    for token in x:
        mean = token.sum() / token.numel() if kind == "layer" else 0
        variance = ((token - mean) ** 2).sum() / token.numel()
        out.append((token - mean) / (variance + eps) ** 0.5)
    out = torch.stack(out)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def modulated(y, shift, scale, rows):
    """One token at a time, each finding its row."""
    out = []
    for i, token in enumerate(y):
        token = token if scale is None else token * (1 + scale[int(rows[i])])
        out.append(token if shift is None else token + shift[int(rows[i])])
    return torch.stack(out)


def check(op, equation, tensors, dtype, direction_seed=9):
    """Results and gradients of `op` (low precision) against those of `equation` (float64) on the same numbers."""
    mine = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    wanted = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    outs, references = op(**mine), equation(**wanted)
    outs, references = (x if isinstance(x, tuple) else (x,) for x in (outs, references))
    directions = [randn(*out.shape, dtype=out.dtype, seed=direction_seed + i) for i, out in enumerate(outs)]
    for out, reference in zip(outs, references, strict=True):
        assert_close(out, reference.detach(), dtype)
    torch.autograd.backward(outs, directions)
    torch.autograd.backward(references, [x.double() for x in directions])
    for name, x in mine.items():
        assert_close(x.grad, wanted[name].grad, x.dtype)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1], ids=str)
def test_modulated_norm(shape, dtype, kind, implementation):
    tokens, channels, rows = shape
    tensors = {"x": randn(tokens, channels, dtype=dtype)}
    index = rows_of(tokens, rows)
    check(
        lambda x: modulated_norm(x, kind=kind, implementation=implementation),
        lambda x: normed(x, kind),
        tensors,
        dtype,
    )
    tensors |= {name: randn(rows, channels, dtype=dtype, seed=i) for i, name in enumerate(("shift", "scale"), 1)}
    check(
        lambda x, shift, scale: modulated_norm(x, shift, scale, index, kind=kind, implementation=implementation),
        lambda x, shift, scale: modulated(normed(x, kind), shift, scale, index),
        tensors,
        dtype,
    )
