"""What a transformer computes in: float32, bfloat16, or bfloat16 with the products of its blocks in E4M3 (FP8).

A weight is quantised once, with a scale for each output channel. Activations come with a scale for each token from the op that makes them:
the norm before a projection, the GELU between the two of an MLP. Only what attention gives, and the text, take a pass of their own. The
embedding, the condition, the modulation, the last projection and convolutions stay in bfloat16: they cost little, and nothing after them
makes up for what they err.
"""

import torch
from torch import Tensor, nn
from tubelet.kernels import fp8_linear, gelu_quantize_rows, quantize_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of the parameters that are not quantised, by precision."""

Rows = Tensor | tuple[Tensor, Tensor]
"""Activations (tokens, channels), or their E4M3 with the float32 scales (tokens,)."""


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that there is not."""
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}, got {precision!r}")


class FP8Linear(nn.Module):
    """A linear layer in E4M3, made from one with a bias, whose dtype is that of the result. It has no gradients.

    The weight is kept as bits: as numbers, `module.to(dtype)` would round them.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight8, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight_bits", weight8.view(torch.uint8))
        self.register_buffer("scale_bits", scale.view(torch.int32))
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.eval()

    def forward(self, x: Rows) -> Tensor:
        """(tokens, in), quantised here if it is not yet, to (tokens, out)."""
        x, scale = x if isinstance(x, tuple) else (x, None)
        weight8, weight_scale = self.weight_bits.view(torch.float8_e4m3fn), self.scale_bits.view(torch.float32)
        return fp8_linear(x, weight8, weight_scale, self.bias, x_scale=scale, out_dtype=self.bias.dtype)

    def train(self, mode: bool = True) -> "FP8Linear":
        """Raises ValueError for mode True."""
        if mode:
            raise ValueError("precision: expected fp32 or bf16 to train in, got fp8, which has no gradients")
        return super().train(False)


class FP8GELU(nn.Module):
    """GELU between two linears in E4M3: its numbers go on as such, with their scales."""

    def __init__(self, gelu: nn.GELU):
        super().__init__()
        self.approximate = gelu.approximate

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_quantize_rows(x, self.approximate)


FP8_OF = {nn.Linear: FP8Linear, nn.GELU: FP8GELU}


def quantise(module: nn.Module) -> None:
    """Put every linear within a module, and every GELU (which is to stand before one), in E4M3, in place."""
    for name, child in module.named_children():
        if type(child) in FP8_OF:
            setattr(module, name, FP8_OF[type(child)](child))
        else:
            quantise(child)
