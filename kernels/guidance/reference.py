"""One solver step with guidance: the definition, and plain torch."""

import torch


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_token(coefficients, guidance, rows, dtype):
    """(p, q, a, b, c) and g in the dtype of the computation, each broadcastable against (tokens, channels)."""
    table = coefficients[rows] if coefficients.dim() == 2 else coefficients[None]
    g = guidance[rows][:, None].to(dtype) if isinstance(guidance, torch.Tensor) else guidance
    return table.to(dtype).split(1, dim=1), g


def guided_step_torch(x, cond, uncond, x0_prev, coefficients, guidance, rows, known, out_dtype):
    dtype, out_dtype = _compute_dtype(x), out_dtype or x.dtype
    (p, q, a, b, c), g = _per_token(coefficients, guidance, rows, dtype)
    state, o = x.to(dtype), cond.to(dtype)
    if uncond is not None:
        o = torch.lerp(uncond.to(dtype), o, g)
    x0 = torch.addcmul(p * state, q, o)
    x_next = torch.addcmul(a * state, b, x0)
    if x0_prev is not None:
        x_next = torch.addcmul(x_next, c, x0_prev.to(dtype))
    if known is not None:
        x_next, x0 = (torch.where(known[:, None], state, value) for value in (x_next, x0))
    return x_next.to(out_dtype), x0.to(out_dtype)


def guided_step_reference(x, cond, uncond, x0_prev, coefficients, guidance=None, rows=None, known=None, out_dtype=None):
    """The definition, as the equations at the head of the package read; arguments as in `guided_step`, unchecked."""
    dtype, out_dtype = _compute_dtype(x), out_dtype or x.dtype
    (p, q, a, b, c), g = _per_token(coefficients, guidance, rows, dtype)
    x, o = x.to(dtype), cond.to(dtype)
    if uncond is not None:
        uncond = uncond.to(dtype)
        o = uncond + g * (o - uncond)
    x0 = p * x + q * o
    x_next = a * x + b * x0
    if x0_prev is not None:
        x_next = x_next + c * x0_prev.to(dtype)
    if known is not None:
        x0 = torch.where(known[:, None], x, x0)
        x_next = torch.where(known[:, None], x, x_next)
    return x_next.to(out_dtype), x0.to(out_dtype)
