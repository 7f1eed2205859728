"""The Triton kernel of the solver step against its definition in float64; interpreted on a CPU, compiled on a GPU (-m gpu)."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from tubelet.kernels import engaged, guided_step, reset_engaged
from tubelet.kernels.guidance.reference import guided_step_reference

fused = pytest.importorskip("tubelet.kernels.guidance.fused", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on NaN that is meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TABLE = [(1.0, -0.7, 0.6, 0.55, -0.15), (1.6, -1.2, 0.8, 0.1, 0.0), (0.5, -0.9, 0.0, 1.0, 0.3)]
step = partial(guided_step, implementation="triton")


def randn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(DEVICE)


def four(tokens, channels, dtype=torch.float32):
    """x, cond, uncond and x0_prev."""
    return [randn(tokens, channels, dtype=dtype, seed=seed) for seed in range(4)]


def table_of(values=TABLE):
    return torch.tensor(values, device=DEVICE)


def rows_of(tokens, count=3):
    return torch.randint(0, count, (tokens,), generator=torch.Generator().manual_seed(7)).int().to(DEVICE)


def check(x, cond, uncond, x0_prev, coefficients, guidance=None, rows=None, known=None, out_dtype=None):
    found = step(x, cond, uncond, x0_prev, coefficients, guidance=guidance, rows=rows, known=known, out_dtype=out_dtype)
    tensors = [None if each is None else each.double() for each in (x, cond, uncond, x0_prev, coefficients)]
    guidance = guidance.double() if isinstance(guidance, torch.Tensor) else guidance
    for a, b in zip(found, guided_step_reference(*tensors, guidance, rows, known), strict=True):
        assert_close(a, b, out_dtype or x.dtype)
    if known is not None:
        assert all(torch.equal(each[known], x[known].to(each.dtype)) for each in found)


@every_dtype
@pytest.mark.parametrize("with_uncond, with_previous, with_known, tabled", list(itertools.product([False, True], repeat=4)))
def test_every_combination(with_uncond, with_previous, with_known, tabled, dtype):
    tokens, channels = 43, 24
    x, cond, uncond, x0_prev = four(tokens, channels, dtype)
    rows = rows_of(tokens)
    scales = [7.5, 0, torch.tensor([1.0, 7.5, 0.3], device=DEVICE)] if with_uncond else [None]
    for guidance in scales:
        check(
            x,
            cond,
            uncond if with_uncond else None,
            x0_prev if with_previous else None,
            table_of() if tabled else table_of(TABLE[0]),
            guidance,
            rows if tabled or isinstance(guidance, torch.Tensor) else None,
            rows == 1 if with_known else None,
        )


@pytest.mark.parametrize("channels", [1, 5, 16, 64, 72, 192, 300, 1152])
def test_widths(channels):
    check(*four(11, channels), table_of(), 3.5, rows_of(11), rows_of(11) == 2)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_mixed_dtypes(out_dtype):
    """A float32 state with the outputs of a model in half precision."""
    x, cond, uncond, x0_prev = four(9, 40)
    check(x, cond.bfloat16(), uncond.half(), x0_prev.bfloat16(), table_of(TABLE[0]), 2.0, out_dtype=out_dtype)
    check(x.bfloat16(), cond, uncond, x0_prev, table_of(TABLE[0]), 2.0, out_dtype=out_dtype)


def test_strides():
    """Columns and every second token of wider tensors, tables that are views and transposed: bit for bit as of contiguous ones."""
    wide = torch.full((4, 26, 64), torch.nan, device=DEVICE)
    tensors, rows = four(13, 40), rows_of(13)
    for i, each in enumerate(tensors):
        wide[i, ::2, 8:48] = each
    coefficients = torch.full((5, 6), torch.nan, device=DEVICE)
    coefficients[:, ::2] = table_of().T
    scales = torch.tensor([1.0, 9.0, 3.0, 9.0, 2.0], device=DEVICE)[::2]
    known = torch.stack([rows == 1, rows == 0], dim=1)[:, 0]
    both = torch.stack([rows, rows + 9], dim=1)
    found = step(*(each[::2, 8:48] for each in wide), coefficients.T[::2], guidance=scales, rows=both[:, 0], known=known)
    wanted = step(*tensors, table_of(), guidance=scales.clone(), rows=rows, known=known.clone())
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_scale_one_is_the_conditional_output():
    x, cond, uncond, _ = four(50, 24)
    rows, scales = rows_of(50), torch.ones(3, device=DEVICE)
    wanted = step(x, cond, None, None, table_of(), rows=rows)
    for guidance in (1, 1.0, scales):
        found = step(x, cond, 1e6 * uncond, None, table_of(), guidance=guidance, rows=rows)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_dtype
def test_a_token_depends_on_nothing_but_itself(dtype):
    """Alone, in a pack, beside NaN; known, whatever the model says of it."""
    x, cond, uncond, x0_prev = four(150, 24, dtype)
    rows, guidance = rows_of(150), torch.tensor([1.0, 7.5, 0.3], device=DEVICE)
    known = rows == 1
    clean = step(x, cond, uncond, x0_prev, table_of(), guidance=guidance, rows=rows, known=known)
    some = slice(101, 120)
    alone = step(x[some], cond[some], uncond[some], x0_prev[some], table_of(), guidance=guidance, rows=rows[some], known=known[some])
    assert all(torch.equal(a[some], b) for a, b in zip(clean, alone, strict=True))
    sick = torch.arange(150, device=DEVICE) % 3 == 0
    for each in (cond, uncond, x0_prev):
        each[sick] = torch.nan
    found = step(x, cond, uncond, x0_prev, table_of(), guidance=guidance, rows=rows, known=known)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[~sick], b[~sick]) and torch.equal(a[sick & known], x[sick & known]) and a[sick & ~known].isnan().all()


def test_no_tokens():
    x = torch.zeros(0, 8, device=DEVICE)
    assert [each.shape for each in step(x, x, None, None, table_of(TABLE[0]))] == [(0, 8)] * 2


def test_registered_as_it_should_be():
    x, cond, uncond, x0_prev = four(5, 24)
    scales, rows = torch.tensor([1.0, 7.5, 0.3], device=DEVICE), rows_of(5)
    run = partial(torch.library.opcheck, torch.ops.tubelet.guided_step)
    run((x, cond, uncond, x0_prev, table_of(), scales, rows, rows == 1, torch.bfloat16, "triton"))
    run((x, cond, uncond, None, table_of(TABLE[0]), torch.tensor(3.5), None, None, torch.float32, "triton"))
    run((x, cond, None, None, table_of(TABLE[0]), None, None, None, torch.float32, "triton"))


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_a_graph_without_a_break_compiled_once(backend):
    """For other numbers of tokens and rows, scales from a table, other coefficients."""

    def block(x, cond, uncond, x0_prev, table, scales, rows):
        x, x0 = step(x * 2, cond, uncond, x0_prev, table, guidance=scales, rows=rows, known=rows == 1)
        return step(x, cond, None, x0, table, rows=rows)[0] + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for tokens, count in ((7, 3), (17, 4), (40, 2), (6, 9)):  # five is the length of a row of the table
        arguments = *four(tokens, 24), randn(count, 5, seed=8), randn(count, seed=9), rows_of(tokens, count)
        results = []
        for function in (block, compiled):
            reset_engaged()
            results.append(function(*arguments))
            assert engaged()["guided_step"]["triton"].calls == 2
        assert torch.equal(*results)
    assert counter.frame_count == 1


def test_another_scale_compiles_nothing():
    """Neither the kernel nor, after the second, a graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, cond, uncond, table, g: step(x, cond, uncond, None, table, guidance=g), fullgraph=True, dynamic=True, backend=counter
    )
    x, cond, uncond, _ = four(7, 24)
    for g in (3.5, 7.0, 2.25, 6.5):
        found, wanted = compiled(x, cond, uncond, table_of(TABLE[0]), g), step(x, cond, uncond, None, table_of(TABLE[0]), guidance=g)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count <= 2
    if DEVICE == "cuda":
        caches = len(fused.guided_step_forward.device_caches[torch.cuda.current_device()][0])
        for g in (1, 16, 1.5, 0):
            step(x, cond, uncond, None, table_of(TABLE[0]), guidance=g)
        assert len(fused.guided_step_forward.device_caches[torch.cuda.current_device()][0]) == caches


class Recorder:
    """Notes the launches of a kernel as they are made, each of which makes it again; the first has been run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(partial(self.kernel[grid], *arguments, **options))
            self.launches[-1]()

        return launch


def test_one_graph_serves_each_step():
    """A launch made again as it was, once the table of coefficients and all else has other contents: as a CUDA graph does."""
    tensors, rows = four(43, 24), rows_of(43)
    table, scales, known = table_of(), torch.tensor([1.0, 7.5, 0.3], device=DEVICE), rows == 1

    def call():
        return fused.guided_step_fused(*tensors, table, scales, rows, known, torch.float32)

    call()  # compiled before the capture
    launches = []
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
    else:
        with mock.patch.object(fused, "guided_step_forward", Recorder(fused.guided_step_forward, launches)):
            results = call()
        assert len(launches) == 1
    for i in range(3):
        for nth, each in enumerate((*tensors, table, scales)):
            each.copy_(randn(*each.shape, seed=100 * i + nth))
        rows.copy_(torch.randint(0, 3, (43,), generator=torch.Generator().manual_seed(i)))
        known.copy_(rows == i)
        graph.replay() if DEVICE == "cuda" else [launch() for launch in launches]
        assert all(torch.equal(a, b) for a, b in zip(results, call(), strict=True))


def test_the_public_op_runs_it():
    """When asked, and on a GPU also when not; not where a gradient is required."""
    x, cond, _, _ = four(5, 24)
    reset_engaged()
    step(x, cond, None, None, table_of(TABLE[0]))
    guided_step(x, cond, None, None, table_of(TABLE[0]))
    record = engaged()["guided_step"]
    assert record["triton"].calls == (2 if DEVICE == "cuda" else 1)
    assert record["triton"].kernels == {"guided_step_forward": record["triton"].calls}
    reset_engaged()
    for tensors in ((x.clone().requires_grad_(), cond), (x, cond.clone().requires_grad_())):
        guided_step(*tensors, None, None, table_of(TABLE[0]))[0].sum().backward()
        assert any(each.grad is not None for each in tensors)
        with torch.no_grad():
            step(*tensors, None, None, table_of(TABLE[0]))
    assert engaged()["guided_step"]["torch"].calls == 2


X, FIVE = torch.zeros(4, 8, device=DEVICE), torch.zeros(5, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(guided_step, X.double(), X, None, None, FIVE), "float64"),
        (partial(guided_step, X, X.double(), None, None, FIVE), "cond is torch.float64"),
        (partial(guided_step, X, X, X.T.contiguous().T, None, FIVE, guidance=2), "the channels of uncond are 4 numbers apart, not one"),
        (partial(guided_step, X, X, None, None, FIVE, out_dtype=torch.float64), "out_dtype is torch.float64"),
        (partial(guided_step, X, X, None, X.clone().requires_grad_(), FIVE), "a gradient is required"),
        (partial(guided_step, X, X, None, None, FIVE.clone().requires_grad_()), "a gradient is required"),
    ],
)
def test_what_it_cannot_do_is_said(call, why):
    with pytest.raises(ValueError, match=f"cannot run as 'triton': the Triton kernel: .*{why}"):
        call(implementation="triton")
    reset_engaged()
    call()
    (record,) = engaged().values()
    assert why in record["torch"].passed_over["triton"]
