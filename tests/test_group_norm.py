"""Group norm of frames with SiLU against its equations in float64, forwards and backwards; the Triton kernels interpreted on a CPU,
compiled on a GPU (-m gpu).
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from tubelet.kernels import engaged, group_norm_silu, reset_engaged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on NaN that is meant, and on large exponentials
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
try:
    from tubelet.kernels.group_norm import fused

    IMPLEMENTATIONS = ["torch", "triton"]
except ModuleNotFoundError:
    IMPLEMENTATIONS = ["torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_format = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
needs_triton = pytest.mark.skipif(len(IMPLEMENTATIONS) == 1, reason="triton is not installed")
run = partial(group_norm_silu, implementation="triton")


def randn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(DEVICE)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def inputs_of(shape, dtype=torch.float32, last=False, parameters=None):
    """x, of groups of other means and sizes, weight and bias."""
    x = randn(*shape, dtype=torch.float64)
    bend = torch.linspace(-1, 1, shape[1], dtype=torch.float64, device=DEVICE).view(-1, *[1] * (len(shape) - 2))
    x = ((x + bend) * bend.exp()).to(dtype)
    parameters = parameters or dtype
    return channels_last(x) if last else x, 1 + randn(shape[1], dtype=parameters, seed=1) / 4, randn(shape[1], dtype=parameters, seed=2) / 4


def by_hand(x, weight, bias, groups, eps=1e-6, silu=True):
    """Frame by frame, group by group."""
    if x.dim() == 5:
        return torch.stack([by_hand(frame, weight, bias, groups, eps, silu) for frame in x.unbind(2)], dim=2)
    parts = []
    for part in x.chunk(groups, dim=1):
        mean = part.mean((1, 2, 3), keepdim=True)
        parts.append((part - mean) / (part.var((1, 2, 3), correction=0, keepdim=True) + eps).sqrt())
    y = torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]
    return F.silu(y) if silu else y


def check(x, weight, bias, groups, implementation="triton", **options):
    leaves = [each.detach().clone(memory_format=torch.preserve_format).requires_grad_() for each in (x, weight, bias)]
    exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    out, wanted = group_norm_silu(*leaves, groups, implementation=implementation, **options), by_hand(*exact, groups, **options)
    assert_close(out, wanted, x.dtype)
    direction = randn(*x.shape, dtype=x.dtype, seed=9)
    out.backward(direction)
    wanted.backward(direction.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        if implementation == "triton" or ours.dtype == torch.float32:
            assert_close(ours.grad, theirs.grad, ours.dtype)
    return out


SHAPES = [
    ((2, 8, 3, 5, 7), 2),
    ((1, 24, 2, 9, 4), 2),  # 12 channels a group, filled up to 16
    ((2, 6, 8, 8), 3),
    ((1, 64, 2, 12, 11), 32),
    ((1, 32, 1, 33, 32), 1),  # a group of many tiles
    ((1, 96, 2, 6, 6), 32),
    ((1, 272, 1, 7, 8), 2),  # a group of more channels than a tile
    ((2, 12, 40, 31), 4),
    ((3, 16, 2, 2, 1), 4),
    ((2, 20, 3, 1, 3), 5),
    ((1, 4, 2, 30, 40), 4),
]


@every_format
@every_implementation
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_equations(shape, groups, implementation, last):
    x, weight, bias = inputs_of(shape, last=last)
    out = check(x, weight, bias, groups, implementation)
    assert [step for step, size in zip(out.stride(), x.shape, strict=True) if size > 1] == [
        step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1
    ]


@every_format
@every_dtype
@every_implementation
def test_dtypes(implementation, dtype, last):
    for silu, eps, parameters in ((True, 1e-6, None), (False, 1e-3, None), (True, 1e-6, torch.float32)):
        check(*inputs_of((2, 16, 2, 6, 8), dtype, last, parameters), 4, implementation, silu=silu, eps=eps)


def test_reference():
    x, weight, bias = inputs_of((2, 8, 3, 5, 7), torch.float64)
    for each in (x, x[:, :, 0]):
        assert_close(group_norm_silu(each, weight, bias, 2, implementation="reference"), by_hand(each, weight, bias, 2), torch.float64)
        assert_close(group_norm_silu(each, weight, bias, 2), by_hand(each, weight, bias, 2), torch.float64)


@every_format
@needs_triton
@pytest.mark.parametrize("mean", [1000.0, -30000.0])
def test_a_large_mean(mean, last):
    """With a standard deviation of one, within the bounds of float32: neither a square nor a mean that is rounded cancels."""
    x = randn(1, 16, 2, 40, 33) + mean
    _, weight, bias = inputs_of((1, 16, 1, 1))
    check(channels_last(x) if last else x, weight, bias, 4)


@every_format
@needs_triton
def test_constant_groups(last):
    """Have a variance of zero, and only the bias is left."""
    x, weight, bias = inputs_of((1, 8, 2, 6, 8), last=last)
    x[:, 2:4] = 1000.1
    out = run(x, weight, bias, 4)
    assert_close(out[:, 2:4], F.silu(bias[2:4].double())[None, :, None, None, None].expand(1, 2, 2, 6, 8), torch.float32)


@every_format
@needs_triton
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        (shape, groups, dtype)
        for shape, groups in (((2, 16, 5, 6, 8), 4), ((1, 24, 5, 9, 5), 2), ((1, 8, 5, 37, 40), 2), ((1, 8, 5, 1, 1), 4))
        for dtype in (DTYPES if DEVICE == "cuda" or shape == (1, 24, 5, 9, 5) else DTYPES[:1])
    ],
    ids=str,
)
def test_frames_are_alone(shape, groups, dtype, last):
    """Bit for bit: in chunks, one by one, as images, as views, in another batch, beside frames that are NaN; gradients too."""
    x, weight, bias = inputs_of(shape, dtype, last)
    direction = randn(*shape, dtype=dtype, seed=3)

    def both(x, direction):
        leaf = x.detach().requires_grad_()
        out = run(leaf, weight, bias, groups)
        return out.detach(), torch.autograd.grad(out, leaf, direction)[0]

    whole = both(x, direction)
    form = channels_last if last else torch.Tensor.contiguous
    for chunk in (slice(0, 1), slice(1, 3), slice(4, 5)):
        piece, its_direction = x[:, :, chunk], direction[:, :, chunk]
        for view in (piece, form(piece)):
            for a, b in zip(both(view, its_direction), whole, strict=True):
                assert torch.equal(a, b[:, :, chunk])
    for a, b in zip(both(x[:, :, 2], direction[:, :, 2]), whole, strict=True):
        assert torch.equal(a, b[:, :, 2])
    for a, b in zip(both(form(x[-1:]), direction[-1:]), whole, strict=True):
        assert torch.equal(a, b[-1:])
    sick = x.clone(memory_format=torch.preserve_format)
    sick[:, 0, 3] = torch.nan  # a channel of the first group
    first = shape[1] // groups
    for a, b in zip(both(sick, direction), whole, strict=True):
        assert torch.equal(a[:, :, [0, 1, 2, 4]], b[:, :, [0, 1, 2, 4]]) and torch.equal(a[:, first:], b[:, first:])
        assert a[:, :first, 3].isnan().all()


@every_format
@needs_triton
def test_strides(last):
    """Channels, frames and pixels of a larger tensor whose other numbers are NaN, and gradients in any format."""
    x, weight, bias = inputs_of((2, 16, 3, 6, 8))
    wide = torch.full((2, 40, 7, 6, 8), torch.nan, device=DEVICE)
    wide = channels_last(wide) if last else wide
    view = wide[:, 8:24, 1::2]
    view.copy_(x)
    x, view = (channels_last(x) if last else x).requires_grad_(), view.requires_grad_()
    out, wanted = run(view, weight, bias, 4), run(x, weight, bias, 4)
    assert torch.equal(out, wanted)
    direction = randn(2, 16, 3, 6, 8, seed=5)
    (dx,) = torch.autograd.grad(wanted, x, direction, retain_graph=True)
    for other in (direction, channels_last(direction), direction.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)):
        assert torch.equal(torch.autograd.grad(out, view, other, retain_graph=True)[0], dx)
    ones = torch.ones((), device=DEVICE).expand(2, 16, 3, 6, 8)
    assert torch.equal(*(torch.autograd.grad(run(x, weight, bias, 4), x, each)[0] for each in (ones, ones.contiguous())))


@needs_triton
def test_each_gradient_alone():
    tensors = inputs_of((2, 8, 2, 5, 6))
    direction = randn(2, 8, 2, 5, 6, seed=4)
    leaves = [each.clone().requires_grad_() for each in tensors]
    wanted = torch.autograd.grad(run(*leaves, 2), leaves, direction)
    for i in range(3):
        alone = [each.clone().requires_grad_(nth == i) for nth, each in enumerate(tensors)]
        assert torch.equal(torch.autograd.grad(run(*alone, 2), alone[i], direction)[0], wanted[i])


@needs_triton
def test_nothing_there():
    """No clip, no frame or no pixel."""
    for shape in ((0, 8, 2, 3, 3), (2, 8, 0, 3, 3), (2, 8, 2, 0, 3)):
        x, weight, bias = (torch.zeros(size, device=DEVICE, requires_grad=True) for size in (shape, 8, 8))
        out = run(x, weight, bias, 2)
        grads = torch.autograd.grad(out, (x, weight, bias), out)
        assert out.shape == grads[0].shape == shape and not any(grad.any() for grad in grads)


@needs_triton
def test_registered_as_it_should_be():
    for x, weight, bias in (inputs_of((2, 8, 2, 5, 6)), inputs_of((2, 8, 5, 6), last=True)):
        leaves = [each.requires_grad_() for each in (x, weight, bias)]
        torch.library.opcheck(torch.ops.tubelet.group_norm_silu, (*leaves, 2, 1e-6, True, "triton"))
        x, weight, bias = (each.detach() for each in leaves)
        out, statistics = torch.ops.tubelet.group_norm_silu(x, weight, bias, 2, 1e-6, True, "triton")
        for wanted in ([True] * 3, [False, True, False]):
            torch.library.opcheck(torch.ops.tubelet.group_norm_silu_backward, (out, x, weight, bias, statistics, 2, True, wanted))


@needs_triton
@pytest.mark.parametrize("last", [False, True] if DEVICE == "cuda" else [True], ids=lambda last: "channels last" if last else "contiguous")
@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_a_graph_without_a_break_compiled_once(backend, last):
    """For other batches, frames and sizes; what ran in the graph is recorded."""

    def block(x, weight, bias):
        return run(run(x * 2, weight, bias, 2), weight, bias, 4, silu=False) + 1

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend(backend), set()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for batch, frames, height, width in ((2, 3, 5, 7), (4, 6, 11, 13), (3, 2, 9, 10)):
        tensors = [each.requires_grad_() for each in inputs_of((batch, 8, frames, height, width), last=last)]
        results = []
        for function in (block, compiled):
            reset_engaged()
            out = function(*tensors)
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
            assert engaged()["group_norm_silu"]["triton"].calls == 2
        for a, b in zip(*results, strict=True):
            assert_close(a.detach(), b.detach().double(), torch.float32)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # torch starts the first compilation twice, for a float among the arguments


class Recorder:
    """Notes the launches of a kernel as they are made, each of which makes it again; the first has been run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(partial(self.kernel[grid], *arguments, **options))
            self.launches[-1]()

        return launch


@needs_triton
def test_replay_with_other_contents():
    """The launches of a call made again as they were, once tensors have other contents: as a CUDA graph does."""
    tensors = inputs_of((2, 8, 2, 17, 20))
    direction = randn(2, 8, 2, 17, 20, seed=3)

    def call():
        out, statistics = fused.group_norm_fused(*tensors, 2, 1e-6, True)
        return out, *fused.group_norm_fused_backward(direction, *tensors, statistics, 2, True, [True, DEVICE == "cuda", DEVICE == "cuda"])

    call()  # compiled before the capture
    launches = []
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
    else:
        names = ("group_statistics", "merge_statistics", "group_normalise", "group_gradient_sums", "merge_gradient_sums", "group_gradient")
        with mock.patch.multiple(fused, **{name: Recorder(getattr(fused, name), launches) for name in names}):
            results = call()
        assert len(launches) == len(names)
    for i in range(3):
        for nth, each in enumerate((*tensors, direction)):
            each.copy_(randn(*each.shape, seed=100 * i + nth))
        graph.replay() if DEVICE == "cuda" else [launch() for launch in launches]
        for a, b in zip(results, call(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@needs_triton
def test_the_public_op_runs_it():
    reset_engaged()
    x, weight, bias = (each.requires_grad_() for each in inputs_of((2, 8, 2, 5, 6)))
    run(x, weight, bias, 2).sum().backward()
    group_norm_silu(x, weight, bias, 2)
    record = engaged()["group_norm_silu"]
    assert record["triton"].calls == 1 + (DEVICE == "cuda") and record["triton"].kernels["group_gradient"] == 1
    if DEVICE == "cpu":
        assert record["torch"].calls == 1


X, W = torch.zeros(2, 6, 2, 3, 3, device=DEVICE), torch.zeros(6, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(group_norm_silu, [1.0], W, W, 2), TypeError, "x: expected a floating point tensor, got list"),
        (partial(group_norm_silu, X.int(), W, W, 2), TypeError, "x: expected a floating point tensor, got torch.int32"),
        (partial(group_norm_silu, X[0, 0], W, W, 2), ValueError, r"x: expected \(batch, channels, T, H, W\) or .*, got shape \(2, 3, 3\)"),
        (partial(group_norm_silu, X, None, W, 2), TypeError, "weight: expected a floating point tensor, got NoneType"),
        (partial(group_norm_silu, X, W[:5], W, 2), ValueError, r"weight: expected \(6,\), got shape \(5,\)"),
        (partial(group_norm_silu, X, W, W.to("meta"), 2), ValueError, f"bias: expected a tensor on {DEVICE}.*, got meta"),
        (partial(group_norm_silu, X, W, W, 2.0), TypeError, "groups: expected an integer, got 2.0"),
        (partial(group_norm_silu, X, W, W, 4), ValueError, "groups: expected a divisor of the 6 channels, got 4"),
        (partial(group_norm_silu, X, W, W, 0), ValueError, "groups: expected a divisor of the 6 channels, got 0"),
        (partial(group_norm_silu, X, W, W, 2, implementation="cuda"), ValueError, "implementation: expected one of auto, .* got 'cuda'"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@needs_triton
@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(group_norm_silu, X.double(), W, W, 2), "float64"),
        (partial(group_norm_silu, X, W.double(), W, 2), "weight is torch.float64"),
        (partial(group_norm_silu, X[..., ::2], W, W, 2), "neither channels nor pixels of x lie side by side"),
        (partial(group_norm_silu, X.transpose(3, 4), W, W, 2), "neither channels nor pixels of x lie side by side"),
    ],
)
def test_what_it_cannot_do_is_said(call, why):
    with pytest.raises(ValueError, match=f"cannot run as 'triton': the Triton kernel: .*{why}"):
        call(implementation="triton")
    reset_engaged()
    call()
    (record,) = engaged().values()
    assert why in record["torch"].passed_over["triton"]
