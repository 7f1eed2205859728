"""The Triton kernels of norms and gated residuals against their equations in float64, forwards and backwards; interpreted on a CPU,
compiled on a GPU (-m gpu).
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_norms import gated_by_hand, modulated_by_hand, norm_by_hand, randn, rows_of
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from tubelet.kernels import Modulation, engaged, gated_residual, modulated_norm, quantize_rows, reset_engaged
from tubelet.kernels.fp8 import FP8

fused = pytest.importorskip("tubelet.kernels.norms.fused", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
EXACT_SHARE = 0.999
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
KINDS = ["layer", "rms"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_device(*shape, **options):
    return randn(*shape, **options).to(DEVICE)


def inputs_of(tokens, channels, count, dtype=torch.float32, table=None, names=("x", "y", "gate", "shift", "scale", "weight")):
    """Fresh random numbers by name."""
    shapes = {"x": (tokens, channels), "y": (tokens, channels), "weight": (channels,), "bias": (channels,)}
    return {
        name: on_device(*shapes.get(name, (count, channels)), dtype=dtype if name in "xy" else table or dtype, seed=20 + i)
        for i, name in enumerate(names)
    }


def residual(rows, kind="layer", eps=1e-6, implementation="triton", **options):
    """x' and its norm as a function of tensors by name, those of `inputs_of` or fewer."""

    def run(x, y, gate=None, shift=None, scale=None, weight=None, bias=None):
        norm = Modulation(shift, scale, kind, weight, bias, eps)
        return gated_residual(x, y, gate, rows, norm=norm, implementation=implementation, **options)

    return run


def residual_by_hand(rows, kind="layer", eps=1e-6, tanh_gate=False):
    def run(x, y, gate=None, shift=None, scale=None, weight=None, bias=None):
        ones, zeros = (torch.full((int(rows.max()) + 1, x.shape[1]), value, dtype=x.dtype, device=x.device) for value in (1, 0))
        gate = ones if gate is None else gate.tanh() if tanh_gate else gate
        out = gated_by_hand(x, y, gate, rows)
        normed = norm_by_hand(out, kind, weight, bias, eps)
        return out, modulated_by_hand(normed, zeros if shift is None else shift, zeros if scale is None else scale, rows)

    return run


def check(op, by_hand, tensors, gradients=None, grad_dtype=None):
    """The results of `op` and its gradients, those named or all, against `by_hand` on the same numbers in float64."""
    mine = {name: x.detach().clone().requires_grad_(gradients is None or name in gradients) for name, x in tensors.items()}
    wanted = {name: x.detach().double().requires_grad_(mine[name].requires_grad) for name, x in tensors.items()}
    outs, references = (out if isinstance(out, tuple) else (out,) for out in (op(**mine), by_hand(**wanted)))
    for out, reference in zip(outs, references, strict=True):
        assert_close(out, reference, tensors["x"].dtype)
    directions = [on_device(*out.shape, dtype=out.dtype, seed=90 + i) for i, out in enumerate(outs)]
    for results, ways in ((outs, directions), (references, [direction.double() for direction in directions])):
        torch.autograd.backward(*zip(*((x, way) for x, way in zip(results, ways, strict=True) if x.requires_grad), strict=True))
    for name, x in mine.items():
        if x.requires_grad:
            assert_close(x.grad.to(grad_dtype or x.dtype), wanted[name].grad, grad_dtype or x.dtype)
        else:
            assert x.grad is None


@every_kind
@every_dtype
@pytest.mark.parametrize("shape", [(1, 8, 1), (7, 33, 3), (37, 72, 4), (5, 129, 8), (3, 1, 2)], ids=str)
def test_modulated_norm(shape, dtype, kind):
    tokens, channels, count = shape
    rows = rows_of(tokens, count).to(DEVICE)
    check(
        lambda x, shift, scale: modulated_norm(x, shift, scale, rows, kind=kind, implementation="triton"),
        lambda x, shift, scale: modulated_by_hand(norm_by_hand(x, kind), shift, scale, rows),
        inputs_of(tokens, channels, count, dtype, names=("x", "shift", "scale")),
        gradients=("shift", "scale") if channels == 1 else None,  # the norm of one channel hardly depends on it
    )


@pytest.mark.parametrize("channels", [96, 640, 1152, 1920, 3072, 5120, 8200])
def test_widths(channels):
    """Of several parts, with and without a rest, for one program of each number of tokens and warps."""
    rows = rows_of(3, 2).to(DEVICE)
    check(residual(rows), residual_by_hand(rows), inputs_of(3, channels, 2))


@every_kind
@every_dtype
def test_gate_residual_and_norm(dtype, kind):
    rows = rows_of(23, 5, torch.int64).to(DEVICE)
    tensors = inputs_of(23, 80, 5, dtype)
    check(residual(rows, kind, 1e-5), residual_by_hand(rows, kind, 1e-5), tensors)
    check(residual(rows, kind), residual_by_hand(rows, kind), {name: tensors[name] for name in ("x", "y")})  # no tables
    check(
        lambda x, y, gate: gated_residual(x, y, gate, rows, implementation="triton"),
        lambda x, y, gate: gated_by_hand(x, y, gate, rows),
        {name: tensors[name] for name in ("x", "y", "gate")},
    )
    check(lambda x, y: gated_residual(x, y, implementation="triton"), lambda x, y: x + y, {name: tensors[name] for name in ("x", "y")})


@pytest.mark.parametrize("name", ["x", "y", "gate", "shift", "scale", "weight", "bias"])
def test_each_gradient_alone(name):
    rows, names = rows_of(9, 3).to(DEVICE), ("x", "y", "gate", "shift", "scale", "weight", "bias")
    check(residual(rows), residual_by_hand(rows), inputs_of(9, 48, 3, names=names), gradients=[name])


def test_a_result_that_is_not_used():
    """Its gradient is None, or not there."""
    rows, tensors = rows_of(9, 3).to(DEVICE), inputs_of(9, 48, 3)
    for nth in (0, 1):
        used = [name for name in tensors if nth or name in ("x", "y", "gate")]
        check(
            lambda nth=nth, **given: residual(rows)(**given)[nth],
            lambda nth=nth, **given: residual_by_hand(rows)(**given)[nth],
            tensors,
            gradients=used,
        )


@every_kind
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_tables_of_half_precision_tokens(dtype, kind):
    """Their gradients come in float32, as exact as the half precision of what they are of allows."""
    rows = rows_of(9, 4).to(DEVICE)
    check(residual(rows, kind), residual_by_hand(rows, kind), inputs_of(9, 80, 4, dtype, torch.float32), grad_dtype=dtype)


def test_of_two_half_precisions():
    rows = rows_of(9, 4).to(DEVICE)
    tensors = inputs_of(9, 40, 4, torch.bfloat16, torch.float16) | {"y": on_device(9, 40, dtype=torch.float32, seed=3)}
    check(residual(rows), residual_by_hand(rows), tensors, grad_dtype=torch.bfloat16)


def test_weight_and_bias_over_many_tokens():
    """Chunks of tokens without rows, of which there are at most so many."""
    tensors = inputs_of(700, 24, 1, names=("x", "weight", "bias"))
    with mock.patch.object(fused, "MOST_CHUNKS", 1):
        check(partial(modulated_norm, implementation="triton"), norm_by_hand, tensors)
    check(partial(modulated_norm, implementation="triton"), norm_by_hand, inputs_of(1500, 8, 1, names=("x", "weight", "bias")))


@every_dtype
def test_rows_of_many_chunks(dtype):
    """Whose sums would stall in bfloat16; and a row of no token has zeros."""
    rows = (torch.arange(2100, device=DEVICE) % 3 // 2 * 2).int()  # rows 0 and 2 of 4
    tensors = inputs_of(2100, 16, 4, dtype)
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    mine = {name: x.requires_grad_() for name, x in tensors.items()}
    outs = residual(rows)(**mine)
    x, y, gate, shift, scale, weight = exact.values()
    wanted = x + gate[rows.long()] * y
    wanted = wanted, F.layer_norm(wanted, (16,), weight, None, 1e-6) * (1 + scale[rows.long()]) + shift[rows.long()]
    directions = [on_device(2100, 16, dtype=dtype, seed=i) for i in range(2)]
    torch.autograd.backward(outs, directions)
    torch.autograd.backward(wanted, [direction.double() for direction in directions])
    for name, x in mine.items():
        assert_close(x.grad, exact[name].grad, dtype)
    assert not mine["shift"].grad[1].any() and not mine["gate"].grad[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tanh_of_the_gate(dtype):
    """Mochi's; near zero it keeps its relative precision."""
    rows, tensors = rows_of(11, 3).to(DEVICE), inputs_of(11, 40, 3, dtype)
    check(residual(rows, "rms", tanh_gate=True), residual_by_hand(rows, "rms", tanh_gate=True), tensors)
    gate = torch.cat([torch.logspace(-30, 1.5, 100), -torch.logspace(-30, 1.5, 100), torch.tensor([0.0, torch.inf])]).to(DEVICE)[None]
    zeros = torch.zeros_like(gate)
    out = gated_residual(zeros, zeros + 1, gate, rows[:1] * 0, tanh_gate=True, implementation="triton")
    torch.testing.assert_close(out, gate.double().tanh().float(), rtol=2**-20, atol=0)


@every_kind
@pytest.mark.parametrize("channels", [40, 33])
@every_dtype
def test_strides(dtype, channels, kind):
    """Columns of wider tensors, and tables that are views of (rows, 9, channels), with NaN around them, give bit for bit what contiguous
    tensors give, also where the results' memory was NaN.
    """
    wide = torch.full((3, 10, channels + 24), torch.nan, dtype=dtype, device=DEVICE)
    parts = torch.full((4, 9, channels), torch.nan, dtype=dtype, device=DEVICE)
    tensors = inputs_of(10, channels, 4, dtype)
    for i, name in enumerate(("x", "y")):
        wide[i, :, 8 : 8 + channels] = tensors[name]
    for i, name in enumerate(("gate", "shift", "scale")):
        parts[:, 2 * i + 1] = tensors[name]
    wide[2, :, 8 : 8 + channels] = on_device(10, channels, dtype=dtype, seed=70)
    x, y, direction = wide[..., 8 : 8 + channels]
    views = {"x": x, "y": y} | dict(zip(("gate", "shift", "scale"), parts[:, 1:6:2].unbind(1), strict=True)) | {"weight": tensors["weight"]}
    results = []
    for each in (views, tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in each.items()}
        with deterministic():
            outs = residual(rows_of(10, 4).to(DEVICE), kind, tanh_gate=True)(**leaves)
            grads = torch.autograd.grad(outs, list(leaves.values()), [direction, direction] if each is views else [direction.clone()] * 2)
        assert all(result.isfinite().all() for result in (*outs, *grads))
        results.append((*outs, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class deterministic:
    """Memory that nothing was written to is NaN, and what is not deterministic fails."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def test_nothing_is_written_past_the_end():
    """Of the results, the last rows of a tile being no tokens, and of what is between the kernels."""
    made = []

    def longer(x, *shape, dtype=None, **_):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        size = torch.Size(shape).numel()
        made.append(torch.full((size + 4096,), 7, device=DEVICE).to(dtype or x.dtype))
        made[-1][:size] = 0
        return made[-1][:size].view(shape)

    for channels in (33, 1100):
        rows, tensors = rows_of(5, 2).to(DEVICE), inputs_of(5, channels, 2, torch.bfloat16)
        leaves = [x.requires_grad_() for x in tensors.values()]
        with mock.patch.object(torch.Tensor, "new_empty", longer):
            outs = residual(rows)(*leaves)
            torch.autograd.grad(outs, leaves, [x.detach().clone() for x in outs])
            with torch.no_grad():
                residual(rows, fp8=True)(*leaves)
    assert len(made) >= 2 * 9 and all((x[-4096:].float() == 7).all() for x in made)


def test_gradients_of_any_strides():
    """As sum() gives them, and transposed."""
    rows, tensors = rows_of(6, 2).to(DEVICE), inputs_of(6, 24, 2)
    results = []
    for form in (lambda d: d, torch.Tensor.contiguous):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        outs = residual(rows)(*leaves)
        directions = [torch.ones((), device=DEVICE).expand(6, 24), on_device(24, 6).T]
        results.append(torch.autograd.grad(outs, leaves, [form(d) for d in directions]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_eps_of_zero():
    """Rows of a tile that are no tokens have no part in the sums, though their norm would be NaN."""
    rows = rows_of(5, 2).to(DEVICE)
    check(residual(rows, "layer", 0.0), residual_by_hand(rows, "layer", 0.0), inputs_of(5, 72, 2))


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    channels=st.sampled_from([8, 72, 200]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    poison=st.sampled_from([float("nan"), float("inf")]),
    order=st.randoms(use_true_random=False),
)
def test_a_clip_depends_on_nothing_but_itself(lengths, channels, kind, dtype, poison, order):
    """Bit for bit: its tokens, their gradients and those of its rows of the tables, alone and among others that are not finite, whose
    tokens lie between its own.
    """
    tokens, clips = sum(lengths), len(lengths)
    which = [clip for clip, length in enumerate(lengths) for _ in range(length)]
    order.shuffle(which)
    which = torch.tensor(which, device=DEVICE)
    rows = (2 * which + torch.arange(tokens, device=DEVICE) % 2).int()  # two rows a clip
    tensors = inputs_of(tokens, channels, 2 * clips, dtype, names=("x", "y", "gate", "shift", "scale"))
    clip = order.randrange(clips)
    mine = which == clip
    tensors["x"][~mine] = poison
    directions = [on_device(tokens, channels, dtype=dtype, seed=i) for i in range(2)]
    results = []
    for alone in (False, True):
        tokens_of, rows_of_clip = (mine, slice(2 * clip, 2 * clip + 2)) if alone else (slice(None), slice(None))
        leaves = [x[tokens_of if name in "xy" else rows_of_clip].clone().requires_grad_() for name, x in tensors.items()]
        with mock.patch.object(fused, "chunk_size", lambda at_once: 2 * at_once):  # so that rows have several
            outs = residual(rows[mine] - 2 * clip if alone else rows, kind)(*leaves)
            grads = torch.autograd.grad(outs, leaves, [direction[tokens_of] for direction in directions])
        each = [*outs, *grads]
        if not alone:
            each = [x[mine] for x in each[:4]] + [x[2 * clip : 2 * clip + 2] for x in each[4:]]
        results.append(each)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and b.isfinite().all()


def test_nan_stays_in_its_token():
    rows, tensors = rows_of(40, 4).to(DEVICE), inputs_of(40, 72, 4, torch.bfloat16)
    clean = residual(rows)(**tensors)
    tensors["x"][17, 3] = torch.nan
    others = torch.arange(40, device=DEVICE) != 17
    for a, b in zip(residual(rows)(**tensors), clean, strict=True):
        assert torch.equal(a[others], b[others])
    assert residual(rows)(**tensors)[1][17].isnan().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", [None, torch.float32], ids=str)
def test_exact_mode(table, dtype, kind):
    """Bit for bit what the plain expression gives: x' always; the norm but for elements where the last bits of float32 decide. On a GPU the
    library's own kernels may fuse products and sums in float32, which decides more of them.
    """
    rows, channels = rows_of(60, 5).to(DEVICE), 192
    x, y, gate, shift, scale, weight = inputs_of(60, channels, 5, dtype, table).values()
    i, weight = rows.long(), weight.to(dtype)
    norm = {"layer": F.layer_norm, "rms": F.rms_norm}[kind]

    def plain(x):
        return (norm(x, (channels,), weight, eps=1e-6) * (1 + scale[i]) + shift[i]).to(x.dtype)

    def share(found, wanted):
        return float((found == wanted).double().mean())

    out = (x + gate[i] * y).to(dtype)
    given = {"exact": True, "implementation": "triton"}
    assert share(modulated_norm(x, shift, scale, rows, kind=kind, weight=weight, **given), plain(x)) >= EXACT_SHARE
    found, normed = gated_residual(x, y, gate, rows, norm=Modulation(shift, scale, kind, weight), **given)
    assert torch.equal(found, out) and share(normed, plain(out)) >= EXACT_SHARE
    assert share(gated_residual(x, y, gate, rows, tanh_gate=True, **given), (x + gate.tanh()[i] * y).to(dtype)) >= EXACT_SHARE
    assert share(modulated_norm(x, shift, scale, rows, kind=kind, weight=weight, implementation="triton"), plain(x)) < 0.9


def test_exact_mode_has_gradients():
    rows = rows_of(9, 3).to(DEVICE)
    check(residual(rows, exact=True), residual_by_hand(rows), inputs_of(9, 48, 3))


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def same_rows(a, b, dtype):
    """Bit for bit; but of float32 a GPU's kernel with results of one byte has its threads side by side in another way than one with results
    of four, and sums in another order: then scales are a rounding apart, and ties are decided otherwise.
    """
    if DEVICE == "cpu" or dtype != torch.float32:
        return same(a, b)
    (x8, scales), (y8, wanted) = a, b
    ties = (x8.view(torch.uint8) != y8.view(torch.uint8)).double().mean()
    return bool(((scales / wanted - 1).abs() <= 1e-6).all()) and float(ties) < 2e-3


@every_kind
@every_dtype
@pytest.mark.parametrize("channels", [72, 33, 1152])
def test_fp8(channels, dtype, kind):
    """Bit for bit what `quantize_rows` makes of the norm in float32: of the same tokens in float32 it is not rounded."""
    rows = rows_of(7, 3).to(DEVICE)
    x, y, gate, shift, scale, weight = inputs_of(7, channels, 3, dtype).values()
    x = x * torch.logspace(-4, 3, 7, device=DEVICE).to(dtype)[:, None]
    given = {"kind": kind, "weight": weight, "implementation": "triton"}
    y8, scales = modulated_norm(x, shift, scale, rows, fp8=True, **given)
    assert y8.dtype == FP8 and y8.shape == x.shape and scales.dtype == torch.float32 and scales.shape == (7,)
    assert same_rows((y8, scales), quantize_rows(modulated_norm(x.float(), shift, scale, rows, **given), implementation="torch"), dtype)
    norm = Modulation(shift, scale, kind, weight)
    out, quantised = gated_residual(x, y, gate, rows, norm=norm, fp8=True, implementation="triton")
    wide = gated_residual(x.float(), y.float(), gate, rows, norm=norm, implementation="triton")
    assert torch.equal(out, wide[0].to(dtype)) and same_rows(quantised, quantize_rows(wide[1], implementation="torch"), dtype)
    if channels == 72:
        exact = modulated_norm(x, shift, scale, rows, fp8=True, exact=True, **given)
        assert same_rows(exact, quantize_rows(modulated_norm(x, shift, scale, rows, exact=True, **given), implementation="torch"), dtype)


def test_fp8_of_special_rows():
    """Zeros have a scale of one; rows with an infinity or NaN anywhere are NaN, and those beside them not."""
    x, shift = on_device(4, 24, seed=1), torch.zeros(4, 24, device=DEVICE)
    scale = torch.zeros_like(shift)
    scale[0] = -1
    shift[1, 5], shift[2, 7] = torch.nan, torch.inf
    rows = torch.arange(4, device=DEVICE).int()
    y8, scales = modulated_norm(x, shift, scale, rows, fp8=True, implementation="triton")
    wanted8, wanted = quantize_rows(modulated_norm(x, shift, scale, rows, implementation="triton"), implementation="torch")
    assert torch.equal(scales.isnan(), wanted.isnan()) and torch.equal(scales[[0, 2, 3]], wanted[[0, 2, 3]]) and scales[0] == 1
    back = y8.float() * scales[:, None]
    assert not back[0].any() and not back[1:3].isfinite().any() and back[3].isfinite().all()
    assert torch.equal(y8[[0, 3]].view(torch.uint8), wanted8[[0, 3]].view(torch.uint8))


def test_registered_as_it_should_be():
    rows = rows_of(5, 3).to(DEVICE)
    tensors = inputs_of(5, 24, 3, names=("x", "y", "gate", "shift", "scale", "weight", "bias"))
    x, y, gate, shift, scale, weight, bias = (each.requires_grad_() for each in tensors.values())
    rest = "layer", 1e-6
    torch.library.opcheck(torch.ops.tubelet.modulated_norm, (x, shift, scale, rows, weight, bias, *rest, False, False, "triton"))
    torch.library.opcheck(
        torch.ops.tubelet.gated_residual, (x, y, gate, rows, shift, scale, weight, bias, *rest, True, False, False, "triton")
    )
    x, y, gate, shift, scale, weight, bias = (each.detach() for each in tensors.values())
    torch.library.opcheck(torch.ops.tubelet.modulated_norm, (x, None, None, None, weight, None, "rms", 1e-6, True, True, "triton"))
    for wanted in ([True] * 7, [False, False, True, *[False] * 4]):
        torch.library.opcheck(
            torch.ops.tubelet.gated_residual_backward,
            (x, y, x, y, gate, rows, shift, scale, weight, bias, *rest, False, y.dtype, wanted, "gated_residual"),
        )


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_a_graph_without_a_break_compiled_once(backend):
    """Forwards and backwards, for other numbers of tokens and rows; what ran in the graph is recorded."""

    def block(x, y, gate, shift, scale, weight, rows):
        h = modulated_norm(x * 2, shift, scale, rows, weight=weight, implementation="triton")
        x, h = gated_residual(x, h + y, gate, rows, norm=Modulation(shift, scale, "rms"), implementation="triton")
        return gated_residual(x, h, gate, rows, tanh_gate=True, implementation="triton")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()  # torch begins anew once, since it takes the default of a NamedTuple, eps, for a number that changes
    for tokens, count in ((5, 3), (17, 4), (40, 2), (6, 5)):
        leaves = [x.requires_grad_() for x in inputs_of(tokens, 24, count).values()]
        results = []
        for function in (block, compiled):
            reset_engaged()
            out = function(*leaves, rows_of(tokens, count).to(DEVICE))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            assert (engaged()["modulated_norm"]["triton"].calls, engaged()["gated_residual"]["triton"].calls) == (1, 2)
        for a, b in zip(*results, strict=True):
            assert_close(a.detach(), b.detach().double(), torch.float32)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_a_graph_of_fp8():
    x, weight = inputs_of(5, 24, 1, torch.bfloat16, names=("x", "weight")).values()
    call = partial(modulated_norm, weight=weight, fp8=True, implementation="triton")
    assert same(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


class Recorder:
    """Notes the launches of a kernel as they are made, each of which makes it again; the first has been run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(partial(self.kernel[grid], *arguments, **options))
            self.launches[-1]()

        return launch


def test_replay_with_other_contents():
    """The launches of calls made again as they were, once tensors and rows have other contents: as a CUDA graph does. What sorts the rows
    is the library's, and is replayed on a GPU alone.
    """
    tokens, channels, count = 90, 72, 4
    tensors = inputs_of(tokens, channels, count, names=("x", "y", "gate", "shift", "scale"))
    x, y, gate, shift, scale = tensors.values()
    rows, directions = torch.zeros(tokens, dtype=torch.int32, device=DEVICE), (torch.empty_like(x), torch.empty_like(x))
    sums = DEVICE == "cuda"

    def call():
        parameters = gate, rows, shift, scale, None, None, "layer", 1e-6, False
        out, normed, _ = fused.norm_fused("gated_residual", x, y, *parameters, False, False)
        wanted = [True, True, sums, sums, sums, False, False]
        grads = fused.norm_fused_backward("gated_residual", *directions, out, y, *parameters, y.dtype, wanted)
        return [out, normed, *(grad for grad in grads if grad is not None)]

    call()  # compiled before the capture
    launches = []
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
    else:
        kernels = {name: Recorder(getattr(fused, name), launches) for name in ("norm_forward", "norm_backward")}
        with mock.patch.multiple(fused, **kernels):
            results = call()
        assert len(launches) == 2
    for i in range(3):
        for nth, each in enumerate((*tensors.values(), *directions)):
            each.copy_(randn(*each.shape, seed=100 * i + nth))
        rows.copy_(torch.randint(0, count, (tokens,), generator=torch.Generator().manual_seed(i)))
        graph.replay() if DEVICE == "cuda" else [launch() for launch in launches]
        for a, b in zip(results, call(), strict=True):
            assert torch.equal(a, b)


def test_the_public_ops_run_it_when_asked():
    reset_engaged()
    rows, tensors = rows_of(6, 2).to(DEVICE), inputs_of(6, 24, 2)
    leaves = [x.requires_grad_() for x in tensors.values()]
    sum(x.sum() for x in residual(rows)(*leaves)).backward()
    record = engaged()["gated_residual"]
    assert list(record) == ["triton"] and record["triton"].calls == 1
    assert record["triton"].kernels == {"norm_forward": 1, "norm_backward": 1, "sum_chunks": 1}


def test_no_tokens():
    tensors = inputs_of(0, 8, 2)
    leaves = [x.requires_grad_() for x in tensors.values()]
    out, normed = residual(torch.empty(0, dtype=torch.int32, device=DEVICE))(*leaves)
    assert out.shape == normed.shape == (0, 8)
    grads = torch.autograd.grad((out, normed), leaves, (out, normed))
    assert all(grad.shape == leaf.shape and not grad.any() for grad, leaf in zip(grads, leaves, strict=True))
    y8, scales = modulated_norm(leaves[0].detach(), fp8=True, implementation="triton")
    assert y8.shape == (0, 8) and scales.shape == (0,)


X = torch.zeros(4, 8, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(modulated_norm, X.double()), "float64"),
        (partial(modulated_norm, X.T.contiguous().T), "the channels of x are 4 numbers apart, not one"),
        (partial(modulated_norm, torch.zeros(2, 16385, device=DEVICE)), "16385 channels are not from 1 to 16384"),
        (partial(modulated_norm, X, weight=X[0].double()), "weight is torch.float64"),
        (partial(gated_residual, X, X.T.contiguous().T), "the channels of y are 4 numbers apart, not one"),
        (
            partial(gated_residual, X, X, X.double(), torch.zeros(4, dtype=torch.int32, device=DEVICE)),
            "gate is torch.float64",
        ),
    ],
)
def test_what_it_cannot_do_is_said(call, why):
    with pytest.raises(ValueError, match=f"cannot run as 'triton': the Triton kernel: .*{why}"):
        call(implementation="triton")
    reset_engaged()
    call()
    (record,) = engaged().values()
    assert why in record["torch"].passed_over["triton"]
