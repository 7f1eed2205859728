"""What must hold for every model that `accelerate` knows: `AdapterTests`, which the files test_adapters_*.py run on small ones of theirs.

Such a file has MODELS, a dict of `Tiny` models by name, and `class TestModels(AdapterTests)`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from tubelet import kernels
from tubelet.engine.adapters import accelerate, ops
from tubelet.engine.adapters.swaps import Processor
from tubelet.kernels import engaged, reset_engaged

SAME = 1e-5
"""The relative error, norm-wise, that is allowed in float32."""


def noise(*shape: int) -> torch.Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Tiny:
    """A small model with random weights, and what to call it with.

    build: makes the model, on the CPU in float32. inputs: keyword arguments of forward, one dict for each case, by name. outputs: what of a
    result is compared, one tensor or several (of padded texts, what is there alone). ops: of `tubelet.kernels`, what has to run in a
    forward pass.
    """

    build: Callable[[], torch.nn.Module]
    inputs: dict[str, dict[str, Any]]
    ops: frozenset[str]
    outputs: Callable[[Any], Any] = lambda out: out[0]


def make(tiny: Tiny) -> torch.nn.Module:
    """The model, all of its weights random: what is initialised to zero would hide what is wrong."""
    torch.manual_seed(0)
    model = tiny.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.count_nonzero():
                parameter.normal_(std=0.02)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model: torch.nn.Module, tiny: Tiny, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What is compared of a forward pass."""
    out = tiny.outputs(model(**copy.copy(inputs), return_dict=False))
    return list(out) if isinstance(out, tuple | list) else [out]


def outputs(model: torch.nn.Module, tiny: Tiny) -> list[torch.Tensor]:
    """What is compared of a forward pass with each of the inputs."""
    with torch.no_grad():
        return [out for inputs in tiny.inputs.values() for out in run(model, tiny, inputs)]


def with_processors(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The attention modules whose processor is tubelet's, with their names."""
    return [(where, module) for where, module in model.named_modules() if isinstance(getattr(module, "processor", None), Processor)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], allowed: float = SAME) -> None:
    """Norm-wise, relative; NaN fails."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert b.isfinite().all() and b.count_nonzero()
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error <= allowed, f"relative error {error:.2e}, allowed: {allowed:.2e}"


class Ops(TorchDispatchMode):
    """What torch computes: the names of ops, each with the shapes of the tensors that come out."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        outs = out if isinstance(out, tuple | list) else (out,)
        self.found.append((func.overloadpacket.__name__, [tuple(each.shape) for each in outs if isinstance(each, torch.Tensor)]))
        return out

    def shapes(self, *names: str) -> list[tuple[int, ...]]:
        """Of what comes out of the ops of these names, or of all."""
        return [shape for name, shapes in self.found if name in names or not names for shape in shapes]

    def copies(self, least: int) -> list[tuple[int, ...]]:
        """Of tensors of so many numbers or more."""
        copying = ("clone", "_to_copy", "cat", "repeat", "index", "index_select", "gather")
        return [shape for shape in self.shapes(*copying) if math.prod(shape) >= least]


def logged(tiny: Tiny, case: str, model: torch.nn.Module | None = None) -> Ops:
    """What torch computes in an accelerated model's call that is not the first; the host has to wait for none of it."""
    if model is None:
        model = make(tiny)
        accelerate(model)
    with torch.no_grad():
        model(**tiny.inputs[case])  # what is computed once
        with Ops() as log:
            model(**tiny.inputs[case])
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & {name for name, _ in log.found}
    return log


def look_from_outside(monkeypatch, *modules) -> None:
    """Let Ops not see what tubelet's ops, as these modules call them, do inside."""

    def outside(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for module in modules:
        for name in set(kernels.__all__) & set(vars(module)):
            if callable(getattr(module, name)) and not isinstance(getattr(module, name), type):
                monkeypatch.setattr(module, name, outside(getattr(module, name)))


def lengths_of_calls(monkeypatch) -> list[list[int] | None]:
    """The numbers of tokens of texts that attention is given from now on, call by call; it is not computed."""
    found = []

    def attention(q, k, v, *args, text_lengths=None, **how):
        with _disable_current_modes():
            found.append(None if text_lengths is None else text_lengths.tolist())
        return q.clone()

    monkeypatch.setattr(ops, "attention", attention)
    return found


class AdapterTests:
    """The checks. `tiny` comes from the file's MODELS."""

    def test_same_numbers(self, tiny: Tiny):
        model, other = make(tiny), make(tiny)
        with torch.no_grad():
            before = [run(model, tiny, inputs) for inputs in tiny.inputs.values()]
            reset_engaged()
            report = accelerate(model, strict=True)
            for name, inputs in tiny.inputs.items():
                assert_same(run(model, tiny, inputs), before[list(tiny.inputs).index(name)])
            assert set(report.engaged()) >= tiny.ops, report.engaged()
            assert_every_site_is_named(report, model)
            reset_engaged()
            run(other, tiny, next(iter(tiny.inputs.values())))
            assert not engaged()  # another model of the class is what it was
            report.restore()
            for inputs, outs in zip(tiny.inputs.values(), before, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(run(model, tiny, inputs), outs, strict=True))
            assert not engaged()

    def test_gradients(self, tiny: Tiny):
        model, inputs = make(tiny).train(), next(iter(tiny.inputs.values()))

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            sum((out * torch.randn(out.shape).to(out)).sum() for out in run(model, tiny, inputs)).backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        before = gradients()
        accelerate(model)
        ops._layout.cache_clear()
        with torch.inference_mode():  # what it keeps is for training, too
            run(model, tiny, inputs)
        after = gradients()
        assert before.keys() == after.keys()
        largest = max(grad.norm() for grad in before.values())
        for name, grad in before.items():  # those near zero carry the rounding of what cancelled in them
            error = (after[name] - grad).norm() / max(grad.norm(), 1e-3 * largest)
            assert error < 10 * SAME, f"{name}: relative error {error:.2e}"

    def test_compiled(self, tiny: Tiny, request):
        """For one size, and then for sizes that vary, which takes a compiler long: on a CPU with some models."""
        model, vary = make(tiny), torch.cuda.is_available() or request.node.callspec.id in ("Wan 2.1", "HunyuanVideo", "LTX-Video")
        with torch.no_grad():
            chosen = list(tiny.inputs.values())[: 1 + vary]
            before = [run(model, tiny, inputs) for inputs in chosen]
            accelerate(model)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for inputs, outs in zip(chosen, before, strict=True):
                assert_same(run(compiled, tiny, inputs), outs)

    def test_one_timestep_for_a_batch(self, tiny: Tiny):
        for inputs in tiny.inputs.values():
            ones = {name: x[:1] for name, x in inputs.items() if "timestep" in name and isinstance(x, torch.Tensor) and x.shape == (2,)}
            if ones:
                break
        else:
            pytest.skip("no input has one timestep for each of two clips")
        model = make(tiny)
        with torch.no_grad():
            try:
                before = run(model, tiny, inputs | ones)
            except RuntimeError:
                pytest.skip("the untouched model wants one for each clip")
            accelerate(model)
            assert_same(run(model, tiny, inputs | ones), before)

    def test_autocast(self, tiny: Tiny):
        """In bfloat16, with weights in float32: hidden states are of the untouched model's dtype, and as near to float32."""
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        with torch.no_grad():
            exact = run(model, tiny, inputs)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                untouched = run(model, tiny, inputs)
                accelerate(model)
                ours = run(model, tiny, inputs)
        for a, b, c in zip(ours, untouched, exact, strict=True):
            assert a.dtype == b.dtype
            assert (a - c).norm() <= 1.3 * (b - c).norm()

    def test_checkpoints(self, tiny: Tiny):
        """Gradient checkpoints call ops again, and change no gradient."""
        inputs, gradients, calls = next(iter(tiny.inputs.values())), [], []
        if not getattr(make(tiny), "_supports_gradient_checkpointing", False):
            pytest.skip("the untouched model has none")
        for ours, checkpoints in ((False, False), (True, False), (True, True)):
            model = make(tiny).train()
            if ours:
                accelerate(model)
            if checkpoints:
                model.enable_gradient_checkpointing()
            reset_engaged()
            sum(out.square().sum() for out in run(model, tiny, inputs)).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
            calls.append(sum(each.calls for implementations in engaged().values() for each in implementations.values()))
        assert calls[0] == 0 < calls[1] < calls[2]
        assert_same(gradients[1:], 2 * gradients[:1])

    @pytest.mark.parametrize("precision", [None, "fp8"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_processors_of_others(self, tiny: Tiny, when: str, precision: str | None):
        """Processors that are somebody's own are left alone, one for each kind of attention."""
        model = make(tiny)
        before = outputs(model, tiny)
        accelerate(model)
        served = {(type(module.processor.own), where.split(".")[-1]): where for where, module in with_processors(model)}
        for where in served.values():
            model = make(tiny)
            module = model.get_submodule(where)
            own = copy.copy(module.processor)
            own.__class__ = type("Own", (type(own),), {})
            if when == "before":
                module.processor = own
            report = accelerate(model, precision=precision)
            assert {site.where for site in report.left if site.servable} >= ({where} if when == "before" else set())
            module.processor = own
            assert_same(outputs(model, tiny), before, 0.15 if precision else SAME)

    def test_forwards_of_others(self, tiny: Tiny):
        """A module whose forward is hidden already is left alone, one for each class of those that are served."""
        model = make(tiny)
        before = outputs(model, tiny)
        accelerate(model)
        served = {type(module): where for where, module in model.named_modules() if "forward" in vars(module)}
        assert served
        for where in served.values():
            model = make(tiny)
            module = model.get_submodule(where)
            module.forward = module.forward
            report = accelerate(model)
            assert where in {site.where for site in report.left if site.servable}
            assert_same(outputs(model, tiny), before)

    def test_offloading_of_single_layers(self, tiny: Tiny):
        """Weights that are elsewhere until their layer is called: what reads them is refused, and the rest is served."""
        library = pytest.importorskip("accelerate")
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        with torch.no_grad():
            before = run(model, tiny, inputs)
            library.cpu_offload(model, execution_device=torch.device("cpu"))
            report = accelerate(model)
            assert any("offloading" in site.reason for site in report.left)
            assert_same(run(model, tiny, inputs), before)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled: test_in_bfloat16")
    def test_interpreted(self, tiny: Tiny):
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        with torch.no_grad():
            before = run(model, tiny, inputs)
            report = accelerate(model, implementation="triton")
            assert_same(run(model, tiny, inputs), before)
        assert all("triton" in report.engaged()[op] for op in tiny.ops), report.engaged()

    def test_fp8(self, tiny: Tiny):
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        with torch.no_grad():
            before, state = run(model, tiny, inputs), {name: value.clone() for name, value in model.state_dict().items()}
            report = accelerate(model, precision="fp8")
            after = run(model, tiny, inputs)
            assert "fp8_linear" in report.engaged()
            assert model.state_dict().keys() == state.keys()
            report.restore()
            assert all(torch.equal(a, b) for a, b in zip(run(model, tiny, inputs), before, strict=True))
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]
        assert all(1e-5 < error < 0.15 for error in errors), errors

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_in_bfloat16(self, tiny: Tiny, device: str):
        """As near to float32 as the untouched model, both as they are loaded."""
        model = make(tiny).to(device)
        inputs = move(next(iter(tiny.inputs.values())), device=device)
        half = move(inputs, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = run(model, tiny, inputs)
            model = model.to(torch.bfloat16)
            for name, module in model.named_modules():
                if name.split(".")[-1] in (getattr(model, "_keep_in_fp32_modules", None) or ()):
                    module.float()
            untouched = run(model, tiny, half)
            accelerate(model)
            ours = run(model, tiny, half)
        for a, b, c in zip(ours, untouched, exact, strict=True):
            assert a.isfinite().all()
            assert (a.float() - c).norm() <= 2 * (b.float() - c).norm()


def assert_every_site_is_named(report, model: torch.nn.Module) -> None:
    """No linear, norm, convolution or attention module is missing in a report."""
    spoken_of = {site.where for site in report.sites}
    for name, module in model.named_modules():
        known = isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.LayerNorm | torch.nn.RMSNorm)
        assert name in spoken_of or not (known or hasattr(module, "processor") or type(module).__name__.endswith("Norm")), name
    assert all(site.reason for site in report.left)
    assert str(report)


def move(value: Any, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The tensors of nested inputs, elsewhere, and those of floating point in another dtype."""
    if isinstance(value, dict):
        return {name: move(each, device, dtype) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(move(each, device, dtype) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device or value.device, dtype if dtype and value.is_floating_point() else value.dtype)
