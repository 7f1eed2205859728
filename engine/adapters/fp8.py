"""Linears of a model in E4M3: a scale for each row of the activations and for each output channel of the weight.

The quantised weight lies beside the module's own, which stays what it was, for the state dict and for `restore`. Both are kept as integers
of the same bits: `model.to(dtype)` would round numbers. Where the module's own weight has changed since, it is quantised again.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tubelet.kernels import fp8_linear, gelu_quantize_rows, quantize_rows

if TYPE_CHECKING:
    from .swaps import Swaps

WEIGHT, SCALE = "weight_e4m3_bits", "weight_scale_bits"
Rows = Tensor | tuple[Tensor, Tensor]
"""Activations (..., channels), or as E4M3 with the scales of their rows (...)."""


def unavailable(linear: nn.Module) -> str | None:
    """Why a linear cannot be computed in E4M3, if it cannot."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}"
    if linear.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its weight is of {linear.weight.dtype}"
    if linear.in_features % 16 or linear.out_features % 16:
        return f"{linear.in_features} to {linear.out_features} channels are no multiples of 16"
    return None


def swap(swaps: "Swaps", linear: nn.Linear) -> None:
    """Quantise the weight, and compute with it from now on."""
    for name, value in _quantised(linear):
        linear.register_buffer(name, value, persistent=False)
        swaps.undo.append(partial(delattr, linear, name))
    swaps.set(linear, "forward", partial(_forward, linear, swaps=swaps, of=_Weight(linear, swaps.model)))


@torch.no_grad()
def _quantised(linear: nn.Linear) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    weight8, scale = quantize_rows(linear.weight.detach())
    return (WEIGHT, weight8.view(torch.uint8)), (SCALE, scale.contiguous().view(torch.int32))


class _Weight:
    """Tells whether the weight of a linear changed since it was asked before: by its version, its memory, and by the low-rank adapters that
    were merged into it, which touches neither.
    """

    def __init__(self, linear: nn.Linear, model: nn.Module):
        self.linear, self.model, self.adapters, self.around = linear, model, None, []
        self.seen = self._state()

    def _state(self) -> tuple:
        adapters = tuple(getattr(self.model, "peft_config", None) or ())
        if adapters != self.adapters:
            self.adapters = adapters
            self.around = [module for module in self.model.modules() if adapters and getattr(module, "base_layer", None) is self.linear]
        weight = self.linear.weight
        version = None if weight.is_inference() else weight._version
        return version, weight.data_ptr(), *(tuple(getattr(module, "merged_adapters", ())) for module in self.around)

    def changed(self) -> bool:
        before, self.seen = self.seen, self._state()
        return before != self.seen


def serves(*linears: nn.Module) -> bool:
    """Whether all of these are computed in E4M3, so that they take rows that are quantised already."""
    return all(WEIGHT in getattr(linear, "_buffers", ()) for linear in linears)


def takes(module: nn.Module, *linears: nn.Module) -> bool:
    """Whether a module takes rows that are quantised already: these, which read them, do, and no hook, which would not, is in front."""
    forward = vars(module).get("forward")
    return serves(*linears) and (forward is None or "swaps" in getattr(forward, "keywords", ()))  # one of `Swaps.forward`


def rows(x: Rows, swaps: "Swaps") -> tuple[Tensor, Tensor]:
    """Activations in E4M3, if they are not yet."""
    return x if isinstance(x, tuple) else quantize_rows(x, implementation=swaps.implementation)


def feed_forward(module: nn.Module, x: Rows, *, swaps: "Swaps") -> Tensor:
    """The MLP of diffusers' `FeedForward`; where both of its products are in E4M3, what lies between them is one op."""
    gelu, dropout, last, *_ = module.net
    if serves(gelu.proj, last) and not (module.training and dropout.p):
        return last(gelu_quantize_rows(gelu.proj(x), gelu.approximate, implementation=swaps.implementation))
    for layer in module.net:
        x = layer(x)
    return x


def _forward(linear: nn.Linear, input: Rows, *, swaps: "Swaps", of: _Weight) -> Tensor:  # `input`, as nn.Linear: some models say it
    if not torch.compiler.is_compiling() and of.changed():
        for name, value in _quantised(linear):
            linear._buffers[name] = value
    dtype = linear.weight.dtype if isinstance(input, tuple) else input.dtype
    x8, scale = rows(input, swaps)
    weight8, weight_scale = getattr(linear, WEIGHT).view(torch.float8_e4m3fn), getattr(linear, SCALE).view(torch.float32)
    how = {"out_dtype": dtype, "implementation": swaps.implementation}
    return fp8_linear(x8, weight8, weight_scale, linear.bias, x_scale=scale, **how)
