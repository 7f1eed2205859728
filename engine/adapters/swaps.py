"""Putting other functions in the place of a model's, object by object, so that nothing but that model changes, and taking them out again.

A function goes in as an attribute of the module, which hides the method of its class. A module whose `forward` was replaced before, by the
hooks of offloading or caching for instance, is left alone, since these hooks hold what they wrap: call `accelerate` before they are added.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from . import fp8, ops
from .report import Site

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
SERVED = "_tubelet_serves_this"
"""Set on modules whose forward was replaced, which hooks that wrap it later do not change; a method that replaces it is no such hook."""
BLOCK = {"norms, modulation, gates": ("modulated_norm", "gated_residual")}
PASSES_ON = "a block, or its attention, is not served"
ONCE = "computed once a step, on few tokens"


class Swaps:
    """The sites of a model as an adapter goes through them.

    implementation: of the ops of `tubelet.kernels`. precision: "fp8" for linears in E4M3, else None.
    """

    def __init__(self, model: nn.Module, implementation: str = "auto", precision: str | None = None):
        self.model, self.implementation, self.precision = model, implementation, precision
        self.sites: list[Site] = []
        self.notes: list[str] = []
        self.undo: list[Callable[[], None]] = []

    def module(self, where: str) -> nn.Module:
        """The module of a name."""
        return self.model.get_submodule(where)

    def named(self, *kinds: type) -> Iterator[tuple[str, nn.Module]]:
        """The model's modules of exactly these classes, which an adapter was written for, with their names."""
        return ((name, module) for name, module in self.model.named_modules() if _kind(module) in kinds)

    def refusal(self, module: nn.Module, *weights: str) -> str | None:
        """Why `forward` of a module cannot be replaced, or its `weights` not be read, if so."""
        if "forward" in vars(module):
            return "its forward is replaced already (hooks of offloading or caching?): call accelerate before"
        for name in weights:
            weight = getattr(module, name, None)
            if weight is not None and type(weight) not in (torch.Tensor, nn.Parameter) and not self._is_gathered(module, weight):
                return f"its {name} is a {type(weight).__name__}"
            if weight is not None and weight.is_meta:
                return f"its {name} is kept elsewhere (offloading of single layers)"
        return None

    def _is_gathered(self, module: nn.Module, weight: torch.Tensor) -> bool:
        """Whether a weight is in shards that FSDP2 puts together before the module, or one around it, is called."""
        if type(weight).__name__ != "DTensor" or weight.device_mesh.ndim != 1:
            return False
        return any(_kind(each) is not type(each) and module in each.modules() for each in self.model.modules())

    def serve(self, op: str, where: str, *served_by: str) -> None:
        """Write down that ops serve a site now."""
        self.sites.append(Site(op, where, served_by))

    def leave(self, op: str, where: str, reason: str, servable: bool = False) -> None:
        """Write down why a site was left alone."""
        self.sites.append(Site(op, where, (), reason, servable))

    def set(self, target: Any, name: str, value: Any) -> None:
        """target.name = value, until it is undone."""
        self.undo.append(Undo(target, name, value, vars(target).get(name, MISSING)))
        setattr(target, name, value)

    def forward(
        self,
        where: str,
        function: Callable,
        sites: Mapping[str, tuple[str, ...]],
        *weights: str,
        kind: type | None = None,
        norms: tuple[str, ...] = (),
        passes_on: bool = True,
    ) -> bool:
        """Let function(module, *args, swaps=self, **kwargs) be the forward of a module; whether that could be done.

        sites: the sites in it that are served then, op -> ops of `tubelet.kernels`. weights: what the function reads of the module by
        itself. kind: the class that the function was written for. norms: names of norms in it whose weights the function reads. passes_on:
        whether all modules that these sites are passed on to are served; else the function does without.
        """
        module = self.module(where)
        reason = self.refusal(module, *weights)
        for name in norms:
            reason = reason or self.refusal(module.get_submodule(name), "weight", "bias")
        if reason is None and kind is not None and type(module).forward is not kind.forward:  # FSDP2's classes have that of theirs
            reason = f"{type(module).__name__} has not the forward of {kind.__name__}"
        for op, served_by in sites.items():
            why = reason or (None if passes_on else PASSES_ON)
            self.leave(op, where, why, servable=True) if why else self.serve(op, where, *served_by)
        if reason is None:
            self.set(module, "forward", partial(function, module, swaps=self))
            self.set(module, SERVED, True)
        return reason is None

    def block(self, where: str, function: Callable, kind: type, *norms: str) -> bool:
        """Let function be the forward of a block, `kind` or of its forward, with its modulations, its gates and its norms of these names;
        whether that could be done.
        """
        module = self.module(where)
        norms = tuple(name for name in norms if not isinstance(module.get_submodule(name), nn.Identity))
        served = self.forward(where, function, BLOCK, kind=kind, norms=norms)
        reason = self.sites[-1].reason
        for name in norms:
            self.serve("norm", f"{where}.{name}", "modulated_norm") if served else self.leave("norm", f"{where}.{name}", reason)
        return served

    def processor(
        self,
        where: str,
        function: Callable,
        kind: type | tuple[type, ...],
        *served_by: str,
        norms: tuple[str, ...] = (),
        takes_backend: bool = False,
    ) -> bool:
        """Let function(attn, *args, swaps=self, **kwargs) be the processor of an attention module whose own is a `kind`; whether that could
        be done. norms: names of its norms whose weights the function reads. takes_backend: whether it heeds a backend of the library's
        that is set later, which else is refused.
        """
        module = self.module(where)
        reason, own = None, getattr(module, "processor", None)
        if type(own) not in (kind if isinstance(kind, tuple) else (kind,)):
            reason = f"its processor is a {type(own).__name__}, not the model's own"
        for name in norms:
            norm = getattr(module, name, None)
            if reason is None and isinstance(norm, nn.Module):
                reason = self.refusal(norm, "weight", "bias")
        if reason:
            self.leave("attention", where, reason, servable=True)
            return False
        self.serve("attention", where, *(served_by or ("attention",)))
        for name in norms:
            if isinstance(getattr(module, name, None), nn.Module) and not isinstance(getattr(module, name), nn.Identity):
                self.serve("norm", f"{where}.{name}", "qk_norm_rope")
        self.set(module, "processor", Processor(function, self, own, takes_backend))
        return True

    def patches(self, where: str) -> bool:
        """The convolution that makes tokens of patches; whether `patch_embed` serves it."""
        if not ops.is_patching(self.module(where)):
            self.leave("patch embedding", where, "it is no product of patches that lie side by side", servable=True)
            return False
        return self.forward(where, ops.embed, {"patch embedding": ("patch_embed",)}, "weight", "bias")

    def last_layer(self, norm: str, linear: str) -> None:
        """The last norm and projection, which the model's forward gives to `ops.project`."""
        reason = self.refusal(self.module(linear), "weight", "bias")
        reason = reason or (None if type(self.module(linear)) is nn.Linear else f"it is a {type(self.module(linear)).__name__}")
        self.serve("norm", norm, "modulated_norm" if reason else "final_layer")
        self.leave("linear", linear, reason) if reason else self.serve("linear", linear, "final_layer")

    def feed_forward(self, where: str) -> None:
        """A FeedForward of diffusers; its linears are to be swapped before."""
        module = self.module(where)
        if self.precision == "fp8" and type(module.net[0]).__name__ == "GELU":
            self.forward(where, fp8.feed_forward, {"GELU": ("gelu_quantize_rows",)})

    def linears(self, where: str, *keep: str) -> None:
        """The linears under a module, in E4M3 if that is asked for; not those whose names, as seen from there, begin with one of `keep`."""
        root = self.module(where)
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear):
                full = ".".join(part for part in (where, name) if part)
                reason = None
                if self.precision != "fp8":
                    reason = "the library's product; precision='fp8' serves it"
                elif any(name == kept or name.startswith(kept + ".") for kept in keep):
                    reason = "kept in the model's precision"
                else:
                    reason = self.refusal(module, "weight", "bias") or fp8.unavailable(module)
                if reason:
                    self.leave("linear", full, reason, servable=self.precision == "fp8" and reason != "kept in the model's precision")
                    continue
                fp8.swap(self, module)
                self.serve("linear", full, "quantize_rows", "fp8_linear")

    def sweep(self) -> None:
        """Write down what no adapter spoke of: no site is silent."""
        spoken_of = {site.where for site in self.sites}
        for name, module in self.model.named_modules():
            if name in spoken_of:
                continue
            if isinstance(module, nn.Linear):
                self.leave("linear", name, "kept in the model's precision" if self.precision else "the library's product")
            elif isinstance(module, NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
                self.leave("norm", name, ONCE)
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                self.leave("convolution", name, "no patch embedding of the tokens")
            elif hasattr(module, "processor"):
                self.leave("attention", name, "not known to the adapter", servable=True)


def are_served(modules: Iterable[nn.Module]) -> bool:
    """Whether the forward of all of these is tubelet's, so that they take what the library's would not."""
    return all(getattr(module, SERVED, False) and not isinstance(vars(module).get("forward"), MethodType) for module in modules)


def takes_fp8(attn: nn.Module, *linears: nn.Module) -> bool:
    """Whether an attention module takes E4M3: its processor is tubelet's, and all `linears` that read its input take them."""
    return isinstance(attn.processor, Processor) and fp8.takes(attn, *linears)


def _kind(module: nn.Module) -> type:
    """The class of a module before FSDP2 derived one of its own from it."""
    kind = type(module)
    sharded = any(base.__name__ == "FSDPModule" for base in kind.__bases__)
    return next(base for base in kind.__bases__ if base.__name__ != "FSDPModule") if sharded else kind


MISSING = object()


@dataclass(frozen=True)
class Undo:
    """Gives an attribute back its value `before`, MISSING if it had none of its own."""

    target: Any
    name: str
    value: Any
    before: Any

    def check(self) -> None:
        """Raises ValueError if hooks have wrapped the function since, which would be lost."""
        if self.name == "forward" and not self._is_there:
            owner = type(self.target).__name__
            raise ValueError(
                f"restore: the forward of a {owner} was wrapped after accelerate (offloading, caching?): remove these hooks first"
            )

    def __call__(self) -> None:
        if self._is_there:  # a processor that was set since is one's own choice
            delattr(self.target, self.name) if self.before is MISSING else setattr(self.target, self.name, self.before)

    @property
    def _is_there(self) -> bool:
        return vars(self.target).get(self.name, MISSING) is self.value


class Processor:
    """Stands in an attention module for its own processor, which it remembers."""

    def __init__(self, function: Callable, swaps: Swaps, own: Any, takes_backend: bool = False):
        self.function, self.swaps, self.own = function, swaps, own
        # What the library sets on processors for its own backends; refused where it would be ignored.
        self._attention_backend, self._parallel_config = None, None
        self.takes_backend = takes_backend

    def __call__(
        self,
        attn: nn.Module,
        *args,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        perturbation_mask: Any = None,
        all_perturbed: Any = None,
        **kwargs,
    ):
        named = {"image_rotary_emb": image_rotary_emb, "rotary_emb": rotary_emb}
        named |= {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        for name, value in named.items():
            if value is not None:  # named, since the library's attention modules drop keyword arguments that a processor does not name
                kwargs[name] = value
        if self._parallel_config is not None:
            raise ValueError("model: expected no context parallelism, which these kernels do not know; call report.restore() first")
        if self._attention_backend is not None and not self.takes_backend:
            raise ValueError(
                f"model: expected no attention backend after accelerate, got {self._attention_backend!r}; call report.restore() first"
            )
        return self.function(attn, *args, swaps=self.swaps, **kwargs)
