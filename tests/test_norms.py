"""Modulated norms and gated residuals against their equations in float64, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close
from tubelet.kernels import Capacity, Modulation, VideoLayout, gated_residual, modulated_norm, quantize_rows

IMPLEMENTATIONS = ["torch"]
SHAPES = [(1, 8, 1), (7, 33, 3), (20, 72, 4), (24, 72, 5), (40, 33, 3), (5, 129, 8)]  # tokens, channels, rows of the table
KINDS = ["layer", "rms"]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(tokens, rows, dtype=torch.int32):
    """Out of order, and every row used where there are enough tokens; in stretches of six, as of frames, if these are whole; of 40 tokens
    in stretches of 17, 17 and 6.
    """
    stretch = 6 if tokens % 6 == 0 else 17 if tokens == 40 else 1
    return ((torch.arange(tokens) // stretch * 7 + 3) % rows).to(dtype)


def norm_by_hand(x, kind="layer", weight=None, bias=None, eps=1e-6):
    """The equations of Ba et al. 2016 and of Zhang & Sennrich 2019, one token at a time."""
    out = []
    for token in x:
        centred = token - token.sum() / token.numel() if kind == "layer" else token
        y = centred / ((centred**2).sum() / token.numel() + eps) ** 0.5
        y = y if weight is None else y * weight
        out.append(y if bias is None else y + bias)
    return torch.stack(out)


def modulated_by_hand(y, shift, scale, rows):
    """One token at a time, each finding its row."""
    return torch.stack([token * (1 + scale[row]) + shift[row] for token, row in zip(y, rows.tolist(), strict=True)])


def gated_by_hand(x, y, gate, rows):
    return torch.stack([x[i] + gate[row] * y[i] for i, row in enumerate(rows.tolist())])


def check(op, by_hand, dtype, **tensors):
    """The results of `op` and their gradients, against `by_hand` on the same numbers in float64."""
    mine = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    wanted = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    outs, references = (out if isinstance(out, tuple) else (out,) for out in (op(**mine), by_hand(**wanted)))
    for out, reference in zip(outs, references, strict=True):
        assert_close(out, reference, dtype)
    directions = [randn(*out.shape, dtype=dtype, seed=90 + i) for i, out in enumerate(outs)]
    torch.autograd.backward(outs, directions)
    torch.autograd.backward(references, [direction.double() for direction in directions])
    for name, x in mine.items():
        assert_close(x.grad, wanted[name].grad, x.dtype)


def table(rows, channels, *names, dtype):
    return {name: randn(rows, channels, dtype=dtype, seed=10 + i) for i, name in enumerate(names)}


everywhere = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@everywhere
@every_kind
@every_dtype
@every_shape
def test_modulated_norm(shape, dtype, kind, implementation):
    tokens, channels, count = shape
    rows = rows_of(tokens, count)
    check(
        lambda x, shift, scale: modulated_norm(x, shift, scale, rows, kind=kind, implementation=implementation),
        lambda x, shift, scale: modulated_by_hand(norm_by_hand(x, kind), shift, scale, rows),
        dtype,
        x=randn(tokens, channels, dtype=dtype),
        **table(count, channels, "shift", "scale", dtype=dtype),
    )


@everywhere
@every_dtype
def test_norm_with_its_own_weight_and_bias(dtype, implementation):
    x, parameters = randn(6, 40, dtype=dtype), {"weight": randn(40, dtype=dtype, seed=1), "bias": randn(40, dtype=dtype, seed=2)}
    check(lambda **given: modulated_norm(**given, implementation=implementation), norm_by_hand, dtype, x=x, **parameters)
    del parameters["bias"]
    for kind in KINDS:
        check(
            lambda kind=kind, **given: modulated_norm(**given, kind=kind, eps=1e-2, implementation=implementation),
            lambda kind=kind, **given: norm_by_hand(**given, kind=kind, eps=1e-2),
            dtype,
            x=x,
            **parameters,
        )


@everywhere
@every_kind
def test_shift_or_scale_alone(kind, implementation):
    x, rows, none = randn(6, 24), rows_of(6, 3), torch.zeros(3, 24, dtype=torch.float64)
    tables = table(3, 24, "shift", "scale", dtype=torch.float32)
    for name, rest in (("shift", "scale"), ("scale", "shift")):
        check(
            lambda x, **given: modulated_norm(x, **given, rows=rows, kind=kind, implementation=implementation),
            lambda x, rest=rest, **given: modulated_by_hand(norm_by_hand(x, kind), **given, **{rest: none}, rows=rows),
            torch.float32,
            x=x,
            **{name: tables[name]},
        )


@everywhere
@every_dtype
@every_shape
def test_gated_residual(shape, dtype, implementation):
    tokens, channels, count = shape
    rows = rows_of(tokens, count)
    inputs = {"x": randn(tokens, channels, dtype=dtype), "y": randn(tokens, channels, dtype=dtype, seed=1)}
    check(
        lambda x, y, gate: gated_residual(x, y, gate, rows, implementation=implementation),
        lambda x, y, gate: gated_by_hand(x, y, gate, rows),
        dtype,
        **inputs,
        **table(count, channels, "gate", dtype=dtype),
    )
    check(lambda x, y: gated_residual(x, y, implementation=implementation), lambda x, y: x + y, dtype, **inputs)


@everywhere
@every_kind
@every_dtype
def test_gated_residual_and_the_norm_that_follows(dtype, kind, implementation):
    tokens, channels, count = 12, 48, 5
    rows = rows_of(tokens, count)

    def by_hand(x, y, gate, shift, scale, weight):
        out = gated_by_hand(x, y, gate, rows)
        return out, modulated_by_hand(norm_by_hand(out, kind, weight, eps=1e-5), shift, scale, rows)

    check(
        lambda x, y, gate, shift, scale, weight: gated_residual(
            x, y, gate, rows, norm=Modulation(shift, scale, kind, weight, eps=1e-5), implementation=implementation
        ),
        by_hand,
        dtype,
        x=randn(tokens, channels, dtype=dtype),
        y=randn(tokens, channels, dtype=dtype, seed=1),
        weight=randn(channels, dtype=dtype, seed=2),
        **table(count, channels, "gate", "shift", "scale", dtype=dtype),
    )
    check(
        lambda x, y: gated_residual(x, y, norm=Modulation(None, None, kind), implementation=implementation),
        lambda x, y: (x + y, norm_by_hand(x + y, kind)),
        dtype,
        x=randn(tokens, channels, dtype=dtype),
        y=randn(tokens, channels, dtype=dtype, seed=1),
    )


@everywhere
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_of_half_precision_tokens(dtype, kind, implementation):
    """As a model has them whose parameters stay in float32."""
    rows = rows_of(9, 4)
    x, y, weight = randn(9, 32, dtype=dtype), randn(9, 32, dtype=dtype, seed=1), randn(32, seed=2)
    gate, shift, scale = table(4, 32, "gate", "shift", "scale", dtype=torch.float32).values()
    out, normed = gated_residual(x, y, gate, rows, norm=Modulation(shift, scale, kind, weight), implementation=implementation)
    wanted = gated_by_hand(x.double(), y.double(), gate.double(), rows)
    assert_close(out, wanted, dtype)
    assert_close(normed, modulated_by_hand(norm_by_hand(wanted, kind, weight.double()), shift.double(), scale.double(), rows), dtype)


@everywhere
@every_dtype
def test_tanh_of_the_gate(dtype, implementation):
    rows = rows_of(7, 3)
    check(
        lambda x, y, gate: gated_residual(x, y, gate, rows, tanh_gate=True, implementation=implementation),
        lambda x, y, gate: gated_by_hand(x, y, gate.tanh(), rows),
        dtype,
        x=randn(7, 24, dtype=dtype),
        y=randn(7, 24, dtype=dtype, seed=1),
        **table(3, 24, "gate", dtype=dtype),
    )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=str)
def test_exact_mode(parameters, dtype, kind):
    """Bit for bit the plain expression, which the default may not be."""
    rows, x, y = rows_of(30, 4), randn(30, 96, dtype=dtype), randn(30, 96, dtype=dtype, seed=1)
    gate, shift, scale = table(4, 96, "gate", "shift", "scale", dtype=parameters or dtype).values()
    i = rows.long()
    norm = {"layer": F.layer_norm, "rms": F.rms_norm}[kind]
    for weight in (None, randn(96, seed=2).to(dtype)):
        out, normed = gated_residual(x, y, gate, rows, norm=Modulation(shift, scale, kind, weight), exact=True, implementation="torch")
        wanted = (x + gate[i] * y).to(dtype)
        assert torch.equal(out, wanted)
        wanted = (norm(wanted, (96,), weight, eps=1e-6) * (1 + scale[i]) + shift[i]).to(dtype)
        assert (normed == wanted).double().mean() >= 0.999  # in float16 the library's norm with a weight may sum in another order
        assert torch.equal(modulated_norm(out, shift, scale, rows, kind=kind, weight=weight, exact=True, implementation="torch"), normed)


@everywhere
@every_kind
@every_dtype
def test_fp8(dtype, kind, implementation):
    """What `quantize_rows` makes of the norm before it is rounded to x's dtype."""
    rows, x, y = rows_of(9, 4), randn(9, 40, dtype=dtype), randn(9, 40, dtype=dtype, seed=1)
    gate, shift, scale = table(4, 40, "gate", "shift", "scale", dtype=dtype).values()
    out, (y8, scales) = gated_residual(x, y, gate, rows, norm=Modulation(shift, scale, kind), fp8=True, implementation=implementation)
    assert torch.equal(out, gated_residual(x, y, gate, rows, implementation=implementation))
    alone8, alone = modulated_norm(out, shift, scale, rows, kind=kind, fp8=True, implementation=implementation)
    reference = modulated_by_hand(norm_by_hand(out.double(), kind), shift.double(), scale.double(), rows)
    for found8, found in ((y8, scales), (alone8, alone)):
        wanted8, wanted = quantize_rows(reference, implementation="reference")
        assert found8.dtype == wanted8.dtype and found.dtype == torch.float32
        assert_close(found.to(dtype), wanted.double(), dtype)
        assert (found8.float() != wanted8.float()).double().mean() <= (0.1 if found is scales and dtype.itemsize < 4 else 0.01)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_dtype
def test_gradient_of_a_row_that_many_tokens_share(dtype, implementation):
    """A sum over 2000 tokens, which stalls if it is kept in bfloat16."""
    rows, x, y = rows_of(4000, 2), randn(4000, 16, dtype=dtype), randn(4000, 16, dtype=dtype, seed=1)
    check(
        lambda gate: gated_residual(x, y, gate, rows, implementation=implementation),
        lambda gate: x.double() + gate[rows.long()] * y.double(),
        dtype,
        **table(2, 16, "gate", dtype=dtype),
    )
    normed = norm_by_hand(x.double())
    check(
        lambda shift, scale: modulated_norm(x, shift, scale, rows, implementation=implementation),
        lambda shift, scale: normed * (1 + scale[rows.long()]) + shift[rows.long()],
        dtype,
        **table(2, 16, "shift", "scale", dtype=dtype),
    )


@everywhere
@every_kind
@every_dtype
def test_strides_and_row_dtypes(dtype, kind, implementation):
    """Columns of a wider tensor, with rows of either integer type, give bit for bit what contiguous tensors give."""
    wide = randn(10, 3 * 40, dtype=dtype)
    tables = randn(4, 3 * 40, dtype=dtype, seed=1)
    x, y, _ = wide.chunk(3, dim=1)
    gate, shift, scale = tables.chunk(3, dim=1)
    assert not x.is_contiguous() and not gate.is_contiguous()
    outs = []
    for index, form in ((torch.int32, lambda t: t), (torch.int64, lambda t: t), (torch.int32, torch.Tensor.contiguous)):
        rows = rows_of(10, 4, index)
        norm = Modulation(form(shift), form(scale), kind)
        outs.append(gated_residual(form(x), form(y), form(gate), rows, norm=norm, implementation=implementation))
    for out in outs[1:]:
        assert torch.equal(out[0], outs[0][0]) and torch.equal(out[1], outs[0][1])
    wanted = gated_by_hand(x.double(), y.double(), gate.double(), rows_of(10, 4))
    assert_close(outs[0][1], modulated_by_hand(norm_by_hand(wanted, kind), shift.double(), scale.double(), rows_of(10, 4)), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_kind
def test_the_rows_of_a_layout(kind, implementation):
    """One row a frame and one for each text, or one row a clip; tokens past the end read row 0 and reach nobody."""
    layout = VideoLayout.pack([(3, 2, 2), (1, 1, 3)], text=[2, 0], capacity=Capacity(clips=4, frames=6, tokens=30))
    x = randn(30, 16)
    x[layout.used_tokens :] = torch.nan
    for per, count in (("frame", layout.num_frames + layout.num_clips), ("clip", layout.num_clips)):
        rows = layout.rows(per)
        shift, scale = table(count, 16, "shift", "scale", dtype=torch.float32).values()
        used = slice(0, layout.used_tokens)
        out = modulated_norm(x, shift, scale, rows, kind=kind, implementation=implementation)
        wanted = modulated_by_hand(norm_by_hand(x[used].double(), kind), shift.double(), scale.double(), rows[used])
        assert_close(out[used], wanted, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    channels=st.integers(2, 80),
    count=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(TOLERANCE)),
    poison=st.sampled_from([float("nan"), float("inf")]),
    data=st.data(),
)
def test_a_token_depends_on_nothing_but_itself(implementation, tokens, channels, count, kind, dtype, poison, data):
    """Bit for bit: a part of the tokens alone gives what it gives among the others, also where these are not finite."""
    rows = rows_of(tokens, count)
    x, y = randn(tokens, channels, dtype=dtype), randn(tokens, channels, dtype=dtype, seed=1)
    gate, shift, scale = table(count, channels, "gate", "shift", "scale", dtype=dtype).values()
    norm = Modulation(shift, scale, kind)
    whole = gated_residual(x, y, gate, rows, norm=norm, implementation=implementation)
    start = data.draw(st.integers(0, tokens - 1))
    part = slice(start, data.draw(st.integers(start + 1, tokens)))
    alone = gated_residual(x[part], y[part], gate, rows[part], norm=norm, implementation=implementation)
    others = torch.ones(tokens, dtype=torch.bool)
    others[part] = False
    spoiled = gated_residual(x.masked_fill(others[:, None], poison), y, gate, rows, norm=norm, implementation=implementation)
    for out, one, beside in zip(whole, alone, spoiled, strict=True):
        assert torch.equal(out[part], one) and torch.equal(out[part], beside[part])


def test_no_tokens():
    nothing, rows = torch.empty(0, 8), torch.empty(0, dtype=torch.int32)
    out, normed = gated_residual(nothing, nothing, torch.ones(2, 8), rows, norm=Modulation(torch.ones(2, 8), None))
    assert out.shape == normed.shape == (0, 8)


X, TABLE, ROWS = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: modulated_norm(X[0]), ValueError, r"x: expected \(tokens, channels\), got shape \(8,\)"),
        (lambda: modulated_norm(X.int()), TypeError, "x: expected a floating point dtype, got torch.int32"),
        (lambda: modulated_norm(X, TABLE[:, :7], None, ROWS), ValueError, r"shift: expected \(rows, 8\), got shape \(2, 7\)"),
        (lambda: modulated_norm(X, None, TABLE[0], ROWS), ValueError, r"scale: expected \(rows, 8\), got shape \(8,\)"),
        (lambda: modulated_norm(X, TABLE.to("meta"), None, ROWS), ValueError, "shift: expected a tensor on cpu, got meta"),
        (
            lambda: modulated_norm(X, TABLE, TABLE),
            ValueError,
            "rows: expected the table row of each token along with shift and scale, got None",
        ),
        (lambda: modulated_norm(X, TABLE, None, ROWS[:3]), ValueError, r"rows: expected \(4,\), one for each token, got shape \(3,\)"),
        (lambda: modulated_norm(X, TABLE, None, ROWS.float()), TypeError, "rows: expected int32 or int64, got torch.float32"),
        (lambda: modulated_norm(X, kind="batch"), ValueError, "kind: expected 'layer' or 'rms', got 'batch'"),
        (lambda: modulated_norm(X, weight=X), ValueError, r"weight: expected \(8,\), got shape \(4, 8\)"),
        (lambda: modulated_norm(X, bias=X[0, :5]), ValueError, r"bias: expected \(8,\), got shape \(5,\)"),
        (lambda: modulated_norm(X, kind="rms", bias=X[0]), ValueError, "bias: expected None, since an RMS norm has no bias"),
        (lambda: gated_residual(X[0], X[0]), ValueError, r"x: expected \(tokens, channels\), got shape \(8,\)"),
        (lambda: gated_residual(X, X[:3]), ValueError, r"y: expected the shape of x, \(4, 8\), got \(3, 8\)"),
        (lambda: gated_residual(X, X, TABLE), ValueError, "rows: expected the table row of each token along with gate, got None"),
        (lambda: gated_residual(X, X, TABLE[:, :3], ROWS), ValueError, r"gate: expected \(rows, 8\), got shape \(2, 3\)"),
        (lambda: gated_residual(X, X, norm=Modulation(TABLE, None)), ValueError, "rows: expected .* along with shift, got None"),
        (lambda: gated_residual(X, X.to("meta")), ValueError, "y: expected a tensor on cpu, got meta"),
        (lambda: modulated_norm(X, weight=X[0].to("meta")), ValueError, "weight: expected a tensor on cpu, got meta"),
        (lambda: modulated_norm(X, TABLE, None, ROWS.to("meta")), ValueError, "rows: expected a tensor on cpu, got meta"),
        (lambda: gated_residual(X, X, tanh_gate=True), ValueError, "tanh_gate: expected False without a gate, got True"),
        (lambda: gated_residual(X, X, fp8=True), ValueError, "fp8: expected False without a norm, which is what it concerns, got True"),
        (
            lambda: modulated_norm(X, TABLE.clone().requires_grad_(), None, ROWS, fp8=True),
            ValueError,
            "fp8: expected no gradient to be required, since there is none, got shift with requires_grad",
        ),
        (
            lambda: gated_residual(X, X.clone().requires_grad_(), norm=Modulation(None, None), fp8=True),
            ValueError,
            "fp8: expected no gradient to be required, since there is none, got y with requires_grad",
        ),
        (lambda: gated_residual(X, X, norm=Modulation(None, None, "batch")), ValueError, "kind: expected 'layer' or 'rms', got 'batch'"),
        (
            lambda: modulated_norm(X, TABLE, TABLE.repeat(2, 1), ROWS),
            ValueError,
            rf"scale: expected {len(TABLE)} rows as shift has, got shape \({2 * len(TABLE)}, ",
        ),
        (
            lambda: gated_residual(X, X, TABLE, ROWS, norm=Modulation(TABLE.repeat(2, 1), TABLE.repeat(2, 1))),
            ValueError,
            rf"shift: expected {len(TABLE)} rows as gate has, got shape \({2 * len(TABLE)}, ",
        ),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
