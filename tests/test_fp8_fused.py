"""The Triton kernels of E4M3: rows, and rows of a GELU, against plain torch bit for bit or nearly; the product against its definition in
float64 on the same numbers. Interpreted on a CPU, compiled on a GPU (-m gpu).
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import FP8_SUMS, assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from tubelet.kernels import engaged, fp8_linear, gelu_quantize_rows, quantize_rows, reset_engaged
from tubelet.kernels.fp8 import FP8, dequantize_rows

fused = pytest.importorskip("tubelet.kernels.fp8.fused", reason="triton is not installed")
linear = pytest.importorskip("tubelet.kernels.fp8.linear")
tl = pytest.importorskip("triton.language")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def as_compiled():
    """The division that is compiled; conftest.py makes the interpreter's `fma` round once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FUSES", tl.constexpr(True))
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).to(DEVICE)


def same(a, b):
    """Bit for bit, NaN of any kind being one."""
    return all(torch.equal(*(each.float().nan_to_num(12345.0) for each in pair)) for pair in zip(a, b, strict=True))


def rows_agree(x):
    found = quantize_rows(x, implementation="triton")
    wanted = quantize_rows(x, implementation="torch")
    assert found[0].dtype == FP8 and found[1].dtype == torch.float32 and found[1].stride() == wanted[1].stride()
    assert same(found, wanted) and torch.equal(found[0].view(torch.uint8) == 0x80, wanted[0].view(torch.uint8) == 0x80)


@every_dtype
@pytest.mark.parametrize("shape", [(8,), (1, 1), (7, 33), (37, 128), (5, 3, 72), (2, 3, 5, 24), (3, 1152), (2, 5120), (1, 16384)], ids=str)
def test_rows(shape, dtype):
    scale = 10 ** (4 * randn(*shape[:-1], 1, dtype=torch.float64, seed=1))
    rows_agree((randn(*shape, dtype=torch.float64) * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(dtype):
    """Numbers of few bits, over scales of which many are a small fraction: quotients on and beside the middle between two of E4M3."""
    x = torch.randint(-1000, 1000, (300, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[x.abs() < 16] = 0  # of which 2^-130 is a normal number
    rows_agree(x.to(DEVICE))
    least = -130 if dtype == torch.bfloat16 else -160  # the interpreter widens what is below the normal numbers of bfloat16 wrongly
    exponents = torch.randint(least, 100, (300, 1), generator=torch.Generator().manual_seed(1))
    x = torch.ldexp(x.double(), exponents).to(dtype)
    rows_agree(x[x.isfinite().all(dim=1)].to(DEVICE))


def test_rows_that_are_special():
    tiny = torch.finfo(torch.float32).smallest_normal
    zeros, nan, infinite = [[0.0, -0.0], [1e-45, 0.0]], [[1.0, torch.nan]], [[torch.inf, 1.0], [-torch.inf, 3.0]]
    x = torch.tensor([*zeros, *nan, *infinite, [-448.0, 448.0], [tiny, -tiny / 8], [3e38, -0.0]], device=DEVICE)
    x8, scale = quantize_rows(x, implementation="triton")
    back = dequantize_rows(x8, scale)
    assert not back[:2].any() and (scale[:2] == 1).all() and back[5].tolist() == [-448, 448]
    assert not back[2:5].isfinite().any() and back[5:].isfinite().all()
    rows_agree(x)
    assert quantize_rows(torch.zeros(0, 3, 8, device=DEVICE), implementation="triton")[1].shape == (0, 3)


def test_strides():
    """Views of a fused tensor whose other numbers are NaN; axes in any order; rows that are one."""
    qkv = torch.full((6, 3, 2, 24), torch.nan, device=DEVICE)
    qkv[:, 1] = randn(6, 2, 24)
    rows_agree(qkv[:, 1])
    rows_agree(randn(3, 2, 4, 5, 16).permute(2, 0, 3, 1, 4))
    rows_agree(randn(6, 40)[::2, 3:20])
    rows_agree(randn(5, 1, 16).expand(5, 4, 16))
    rows_agree(randn(2, 3, 4, 16)[:, ::2, ::3])


@every_dtype
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 640), (1, 8960)])
def test_gelu(shape, approximate, dtype):
    """In float32, from x in `dtype`: at most ties are decided otherwise than in float64."""
    x = (3 * randn(*shape, dtype=torch.float64)).to(dtype)
    x8, scale = gelu_quantize_rows(x, approximate, implementation="triton")
    wanted8, wanted = gelu_quantize_rows(x, approximate, implementation="reference")
    assert_close(scale, wanted.double(), torch.float32)
    assert (x8.view(torch.uint8) != wanted8.view(torch.uint8)).float().mean() <= 2e-3
    exact = F.gelu(x.double(), approximate=approximate)
    largest = exact.abs().amax(dim=-1, keepdim=True)
    error = (dequantize_rows(x8, scale, torch.float64) - exact).abs()
    # Half a step of E4M3, and what float32 leaves of 1 + erf or 1 + tanh, which cancel far below zero.
    allowed = torch.maximum(exact.abs() * 2**-4, largest / 448 * 2**-10) * 1.00001 + x.double().abs() * 2**-22
    assert (error <= allowed).all()


def test_gelu_of_special_numbers():
    x = torch.tensor([[-1e30, 3.0, -0.0], [torch.nan, 1.0, 1.0], [1e30, -5.0, 2.0], [-30.0, -20.0, 0.0]], device=DEVICE)
    for approximate in ("tanh", "none"):
        x8, scale = gelu_quantize_rows(x, approximate, implementation="triton")
        back = dequantize_rows(x8, scale)
        assert back[1].isnan().all() and back[[0, 2, 3]].isfinite().all() and back[0, 0] == 0 and back[2, 0] == scale[2] * 448


@every_dtype
def test_a_row_depends_on_nothing_but_itself(dtype):
    x = randn(40, 72, dtype=dtype)
    for op in (quantize_rows, gelu_quantize_rows):
        clean = op(x, implementation="triton")
        sick = x.clone()
        sick[17, 3] = torch.nan
        found = op(sick, implementation="triton")
        others = torch.arange(40, device=DEVICE) != 17
        assert same([each[others] for each in found], [each[others] for each in clean]) and found[0][17].isnan().all()
        assert same(op(x[23:29], implementation="triton"), [each[23:29] for each in clean])


# ------------------------------------------------------------------------------------------------------------------------ the product


def inputs_of(tokens, inner, out, seed=0):
    """x8, x_scale, weight8, weight_scale and bias, of rows and columns of very different size."""
    x = randn(tokens, inner, seed=seed) * torch.linspace(-3, 3, tokens, device=DEVICE).exp()[:, None]
    weight = randn(out, inner, seed=seed + 1) * torch.linspace(1, -1, out, device=DEVICE).exp()[:, None]
    return *quantize_rows(x, implementation="torch"), *quantize_rows(weight, implementation="torch"), randn(out, seed=seed + 2)


def by_hand(x8, x_scale, weight8, weight_scale, bias=None):
    out = dequantize_rows(x8, x_scale, torch.float64) @ dequantize_rows(weight8, weight_scale, torch.float64).T
    return out if bias is None else out + bias.double()


@every_dtype
@pytest.mark.parametrize("implementation", ["torch", "reference", "triton"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (130, 48, 144), (33, 200, 129), (5, 131, 7), (140, 272, 40), (17, 8192, 32)], ids=str)
def test_product(shape, implementation, dtype):
    x8, x_scale, weight8, weight_scale, bias = inputs_of(*shape)
    allowed = FP8_SUMS if DEVICE == "cuda" and implementation == "triton" and dtype == torch.float32 else None
    for b in (None, bias, bias.bfloat16()):
        out = fp8_linear(x8, weight8, weight_scale, b, x_scale=x_scale, out_dtype=dtype, implementation=implementation)
        wanted = by_hand(x8, x_scale, weight8, weight_scale, b)
        for rows in torch.arange(shape[0]).split(16):  # they differ in size
            assert_close(out[rows], wanted[rows], dtype, allowed)


@pytest.mark.parametrize("implementation", ["torch", "reference", "triton"])
def test_product_of_what_it_quantises(implementation):
    """Of any leading shape, or none."""
    weight8, weight_scale = quantize_rows(randn(24, 48, seed=3))
    for shape in ((48,), (7, 48), (2, 3, 48), (0, 48)):
        x = randn(*shape, dtype=torch.bfloat16)
        out = fp8_linear(x, weight8, weight_scale, implementation=implementation)
        assert out.shape == (*shape[:-1], 24) and out.dtype == torch.bfloat16
        x8, x_scale = quantize_rows(x)
        assert torch.equal(out, fp8_linear(x8, weight8, weight_scale, x_scale=x_scale, implementation=implementation))
        if x.numel():
            assert_close(out, by_hand(x8, x_scale, weight8, weight_scale), torch.bfloat16)


def test_views_and_poison():
    """Rows of wider tensors, NaN around them; a token of NaN, and others that are not there, change nothing beside it."""
    x8, x_scale, weight8, weight_scale, bias = inputs_of(37, 48, 40)
    wide = torch.full((2, 60, 80), 127, dtype=torch.uint8, device=DEVICE).view(FP8)  # NaN
    wide[0, :37, 16:64], wide[1, :40, 16:64] = x8, weight8
    call = partial(fp8_linear, implementation="triton")
    clean = call(x8, weight8, weight_scale, bias, x_scale=x_scale)
    found = call(wide[0, :37, 16:64], wide[1, :40, 16:64], weight_scale, bias, x_scale=x_scale)
    assert torch.equal(found, clean)
    sick = x8.clone()
    sick.view(torch.uint8)[20, 5] = 127
    out = call(sick, weight8, weight_scale, bias, x_scale=x_scale)
    others = torch.arange(37, device=DEVICE) != 20
    assert torch.equal(out[others], clean[others]) and out[20].isnan().all()
    assert torch.equal(call(x8[21:30], weight8, weight_scale, bias, x_scale=x_scale[21:30]), clean[21:30])


def test_operations_are_counted():
    x8, x_scale, weight8, weight_scale, _ = inputs_of(5, 48, 40)
    with FlopCounterMode(display=False) as counter:
        fp8_linear(x8, weight8, weight_scale, x_scale=x_scale, implementation="triton")
    assert counter.get_total_flops() == 2 * 5 * 48 * 40


# ------------------------------------------------------------------------------------------------------------------------ as operators


def test_registered_as_they_should_be():
    x = randn(5, 3, 24, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tubelet.quantize_rows, (x, "triton"))
    torch.library.opcheck(torch.ops.tubelet.gelu_quantize_rows, (x[0], "tanh", "triton"))
    x8, x_scale, weight8, weight_scale, bias = inputs_of(5, 48, 40)
    for b in (bias, None):
        arguments = x8, x_scale, weight8, weight_scale, b, torch.bfloat16, "triton"
        # the others compare inputs before and after, which torch cannot in E4M3
        torch.library.opcheck(torch.ops.tubelet.fp8_linear, arguments, test_utils=("test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if DEVICE == "cuda" else [])])
def test_a_graph_without_a_break_compiled_once(backend):
    weight8, weight_scale = quantize_rows(randn(40, 48, seed=1))
    second8, second_scale = quantize_rows(randn(16, 40, seed=2))

    def mlp(x):
        h = fp8_linear(x * 2, weight8, weight_scale, implementation="triton")
        h8, h_scale = gelu_quantize_rows(h, implementation="triton")
        return fp8_linear(h8, second8, second_scale, x_scale=h_scale, implementation="triton") + 1

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 17, 130, 6):
        x = randn(tokens, 48, dtype=torch.bfloat16)
        results = []
        for function in (mlp, compiled):
            reset_engaged()
            results.append(function(x))
            assert [engaged()[op]["triton"].calls for op in ("quantize_rows", "gelu_quantize_rows", "fp8_linear")] == [1, 1, 2]
        assert torch.equal(*results)
    assert counter.frame_count == 1


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
    """The launches of calls made again as they were, once tensors have other contents: as a CUDA graph does."""
    x = randn(9, 48, dtype=torch.bfloat16)
    weight8, weight_scale = quantize_rows(randn(40, 48, seed=1))

    def call():
        x8, x_scale = fused.quantize_fused("quantize_rows", x, None)
        h = linear.linear_fused(x8, x_scale, weight8, weight_scale, None, torch.bfloat16)
        return *fused.quantize_fused("gelu_quantize_rows", h, "tanh"), h

    call()  # compiled before the capture
    launches = []
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
    else:
        with (
            mock.patch.object(fused, "quantize_forward", Recorder(fused.quantize_forward, launches)),
            mock.patch.object(linear, "linear_forward", Recorder(linear.linear_forward, launches)),
        ):
            results = call()
        assert len(launches) == 3
    for i in range(3):
        x.copy_(randn(9, 48, seed=10 + i))
        graph.replay() if DEVICE == "cuda" else [launch() for launch in launches]
        assert same(results, call())


def test_a_call_without_a_name_runs_what_is_preferred():
    """On Hopper and Blackwell the library's product where it serves; Triton's on other GPUs; torch's on a CPU."""
    x8, x_scale, weight8, weight_scale, _ = inputs_of(5, 48, 32)
    reset_engaged()
    fp8_linear(x8, weight8, weight_scale, x_scale=x_scale)
    fp8_linear(x8, weight8, weight_scale, x_scale=x_scale, out_dtype=torch.float32)
    record = {name: engagement.calls for name, engagement in engaged()["fp8_linear"].items()}
    library = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10)
    assert record == ({"torch": 2} if DEVICE == "cpu" else {"torch": 1, "triton": 1} if library else {"triton": 2})


X = torch.zeros(4, 8, device=DEVICE)
X8 = X.to(FP8)
W8, WS = torch.zeros(6, 8, device=DEVICE).to(FP8), torch.ones(6, device=DEVICE)
GRADIENT = torch.zeros(4, 8, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(gelu_quantize_rows, [1.0]), TypeError, "x: expected a tensor of float16, .* got list"),
        (partial(gelu_quantize_rows, X.int()), TypeError, "x: expected a tensor of float16, .* got torch.int32"),
        (partial(gelu_quantize_rows, X, "erf"), ValueError, "approximate: expected 'tanh' or 'none', got 'erf'"),
        (partial(gelu_quantize_rows, GRADIENT), ValueError, "x: expected no gradient to be required, since gelu_quantize_rows has none"),
        (partial(fp8_linear, GRADIENT, W8, WS), ValueError, "x: expected no gradient to be required, since fp8_linear has none"),
        (partial(fp8_linear, X, W8, WS, GRADIENT[0, :6]), ValueError, "bias: expected no gradient to be required"),
        (partial(fp8_linear, X.int(), W8, WS), TypeError, "x: expected a tensor of .*float64 or torch.float8_e4m3fn, got torch.int32"),
        (partial(fp8_linear, X8, W8, WS), ValueError, "x_scale: expected the scales of x, .* got None"),
        (partial(fp8_linear, X, W8, WS, x_scale=X[:, 0]), ValueError, "x_scale: expected None for x of torch.float32"),
        (partial(fp8_linear, X8, W8, WS, x_scale=X[:3, 0]), ValueError, r"x_scale: expected \(4,\), one for each row, got shape \(3,\)"),
        (partial(fp8_linear, X8, W8, WS, x_scale=X[:, 0].half()), TypeError, "x_scale: expected a tensor of torch.float32, got"),
        (partial(fp8_linear, X, X, WS), TypeError, "weight8: expected a tensor of torch.float8_e4m3fn, got torch.float32"),
        (partial(fp8_linear, X, W8[0], WS), ValueError, r"weight8: expected \(out, in\), got shape \(8,\)"),
        (partial(fp8_linear, X[:, :7], W8, WS), ValueError, r"x: expected \(..., 8\) as weight8 has so many inputs, got shape \(4, 7\)"),
        (partial(fp8_linear, X, W8, WS[:5]), ValueError, r"weight_scale: expected \(6,\), one for each row, got shape \(5,\)"),
        (partial(fp8_linear, X, W8, None), TypeError, "weight_scale: expected a tensor of torch.float32, got NoneType"),
        (partial(fp8_linear, X, W8, WS, WS[:5]), ValueError, r"bias: expected \(6,\), got shape \(5,\)"),
        (partial(fp8_linear, X, W8, WS, WS.int()), TypeError, "bias: expected a floating point tensor or None, got torch.int32"),
        (partial(fp8_linear, X, W8.to("meta"), WS), ValueError, f"weight8: expected a tensor on {DEVICE}.*, got meta"),
        (partial(fp8_linear, X, W8, WS, out_dtype=torch.int8), TypeError, "out_dtype: expected a floating point torch.dtype, got"),
        (partial(fp8_linear, X, W8, WS, implementation="cuda"), ValueError, "implementation: expected one of auto, .* got 'cuda'"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (partial(quantize_rows, X.double()), "float64"),
        (partial(quantize_rows, X.T.contiguous().T), "the channels of x are 4 numbers apart, not one"),
        (partial(quantize_rows, torch.zeros(2, 16385, device=DEVICE)), "16385 channels are not from 1 to 16384"),
        (partial(quantize_rows, GRADIENT), "x requires a gradient"),
        (partial(gelu_quantize_rows, X.double()), "float64"),
        (partial(fp8_linear, X8, W8.T.contiguous().T, WS, x_scale=X[:, 0]), "the channels of weight8 are 6 numbers apart"),
        (partial(fp8_linear, X8, W8, WS, x_scale=X[:, 0], out_dtype=torch.float64), "out_dtype is torch.float64"),
    ],
)
def test_what_it_cannot_do_is_said(call, why):
    with pytest.raises(ValueError, match=f"cannot run as 'triton': the Triton kernel: .*{why}"):
        call(implementation="triton")
    reset_engaged()
    call()
    (record,) = engaged().values()
    assert why in record["torch"].passed_over["triton"]
