"""The fused solver step against its equations in plain Python, and what it refuses."""

import itertools

import pytest
import torch
from tubelet.kernels.dispatch import engaged, reset_engaged
from tubelet.kernels.guidance import guided_step

IMPLEMENTATIONS = ["torch", "reference"]
# A few roundings of the computation, and one of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
COEFFICIENTS = [(1.0, -0.7, 0.6, 0.55, -0.15), (1.6, -1.2, 0.8, 0.1, 0.0), (0.5, -0.9, 0.0, 1.0, 0.0)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(x, cond, uncond, x0_prev, coefficients, guidance, known):
    """One channel of one token at a time, on Python floats; coefficients, guidance and known per token."""
    x_next, clean = torch.empty(x.shape, dtype=torch.float64), torch.empty(x.shape, dtype=torch.float64)
    for i, j in itertools.product(range(x.shape[0]), range(x.shape[1])):
        p, q, a, b, c = (float(value) for value in coefficients[i])
        here, output = float(x[i, j]), float(cond[i, j])
        if uncond is not None:
            output = float(uncond[i, j]) + float(guidance[i]) * (output - float(uncond[i, j]))
        x0 = p * here + q * output
        then = a * here + b * x0 + (c * float(x0_prev[i, j]) if x0_prev is not None else 0.0)
        x_next[i, j], clean[i, j] = (here, here) if known is not None and known[i] else (then, x0)
    return x_next, clean


def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("with_guidance, with_previous, with_known", list(itertools.product([False, True], repeat=3)))
def test_equations(implementation, dtype, with_guidance, with_previous, with_known):
    tokens, channels = 7, 5
    x, cond, uncond, x0_prev = (random(tokens, channels, dtype=dtype, seed=seed) for seed in range(4))
    uncond = uncond if with_guidance else None
    x0_prev = x0_prev if with_previous else None
    known = torch.tensor([False, True, False, False, True, False, False]) if with_known else None
    coefficients = torch.tensor(COEFFICIENTS[0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = guided_step(
        x, cond, uncond, x0_prev, coefficients, guidance=3.5 if with_guidance else None, known=known, implementation=implementation
    )
    want = by_hand(x, cond, uncond, x0_prev, coefficients.expand(tokens, 5), [3.5] * tokens, known)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == dtype
        assert error(value, expected) < TOLERANCE[dtype]
    if with_known:
        assert torch.equal(got[0][known], x[known])
        assert torch.equal(got[1][known], x[known])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_pack(implementation):
    """Requests with their own coefficients and scales in one pack: each token follows its own row, bit for bit as alone."""
    tokens, channels = 9, 4
    x, cond, uncond, x0_prev = (random(tokens, channels, seed=seed) for seed in range(4))
    rows = torch.tensor([0, 0, 2, 1, 1, 1, 2, 0, 2], dtype=torch.int32)
    table, scales = torch.tensor(COEFFICIENTS), torch.tensor([1.0, 7.5, 2.0])
    got = guided_step(x, cond, uncond, x0_prev, table, guidance=scales, rows=rows, implementation=implementation)
    want = by_hand(x, cond, uncond, x0_prev, table[rows], scales[rows], None)
    assert error(got[0], want[0]) < TOLERANCE[torch.float32]
    assert error(got[1], want[1]) < TOLERANCE[torch.float32]
    for row in range(3):
        mine = rows == row
        alone = guided_step(
            x[mine], cond[mine], uncond[mine], x0_prev[mine], table[row], guidance=float(scales[row]), implementation=implementation
        )
        assert torch.equal(got[0][mine], alone[0])
        assert torch.equal(got[1][mine], alone[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_table_with_rows_beside_one_without(implementation):
    x, cond, uncond = (random(4, 3, seed=seed) for seed in range(3))
    rows = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    single, scales = torch.tensor(COEFFICIENTS[1]), torch.tensor([2.0, 5.0])
    scaled = guided_step(x, cond, uncond, None, single, guidance=scales, rows=rows, implementation=implementation)
    table = torch.tensor(COEFFICIENTS[:2])
    tabled = guided_step(x, cond, uncond, None, table, guidance=2.0, rows=rows, implementation=implementation)
    assert error(scaled[0], by_hand(x, cond, uncond, None, single.expand(4, 5), scales[rows], None)[0]) < TOLERANCE[torch.float32]
    assert error(tabled[0], by_hand(x, cond, uncond, None, table[rows], [2.0] * 4, None)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_of_known_and_of_neighbours_stays_where_it_is(implementation):
    x, cond = random(6, 3), random(6, 3, seed=1)
    clean = guided_step(x, cond, None, None, torch.tensor(COEFFICIENTS[0]), implementation=implementation)
    cond = cond.clone()
    cond[1] = cond[4] = torch.nan
    known = torch.tensor([False, True, False, False, False, False])
    dirty = guided_step(x, cond, None, None, torch.tensor(COEFFICIENTS[0]), known=known, implementation=implementation)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(after[1], x[1])
        assert after[4].isnan().all()
        assert torch.equal(after[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mixed_dtypes_views_and_no_tokens(implementation):
    """A float32 state with the bfloat16 outputs of a model, and views into larger tensors."""
    wide = random(5, 12)
    x, cond, uncond = wide[:, :4], random(5, 4, dtype=torch.bfloat16, seed=1), random(4, 5, dtype=torch.bfloat16, seed=2).T
    coefficients = torch.tensor(COEFFICIENTS[0])
    got = guided_step(x, cond, uncond, None, coefficients, guidance=2, implementation=implementation)
    want = by_hand(x, cond, uncond, None, coefficients.expand(5, 5), [2.0] * 5, None)
    assert got[0].dtype == torch.float32
    assert error(got[0], want[0]) < TOLERANCE[torch.float32]
    lower = guided_step(x, cond, uncond, None, coefficients, guidance=2, out_dtype=torch.bfloat16, implementation=implementation)
    assert torch.equal(lower[0], got[0].bfloat16())
    assert torch.equal(lower[1], got[1].bfloat16())
    empty = guided_step(x[:0], cond[:0], None, None, coefficients, implementation=implementation)
    assert empty[0].shape == (0, 4)


def test_scale_one_is_the_conditional_output():
    x, cond, uncond = (random(50, 3, seed=seed) for seed in range(3))
    coefficients = torch.tensor(COEFFICIENTS[0])
    guided = guided_step(x, cond, 1e6 * uncond, None, coefficients, guidance=1.0)
    assert torch.equal(guided[0], guided_step(x, cond, None, None, coefficients)[0])


def test_gradients():
    x, cond, uncond, x0_prev = (random(3, 2, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(4))
    coefficients = torch.tensor(COEFFICIENTS[0], dtype=torch.float64)
    known = torch.tensor([False, True, False])
    assert torch.autograd.gradcheck(
        lambda *tensors: guided_step(*tensors, coefficients, guidance=2.5, known=known), (x, cond, uncond, x0_prev)
    )


def test_engagement():
    reset_engaged()
    x = random(2, 2)
    guided_step(x, x, None, None, torch.tensor(COEFFICIENTS[0]))
    assert engaged()["guided_step"]["torch"].calls == 1
    with pytest.raises(ValueError, match=r"guided_step cannot run as 'triton': .*float64"):
        guided_step(x.double(), x, None, None, torch.tensor(COEFFICIENTS[0]), implementation="triton")


X, FIVE, TABLE, ROWS = torch.zeros(4, 3), torch.zeros(5), torch.zeros(2, 5), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, exception, message",
    [
        ((X.int(), X, None, None, FIVE), {}, TypeError, "x: expected a floating tensor, got a tensor of torch.int32"),
        ((X[0], X, None, None, FIVE), {}, ValueError, r"x: expected shape \(tokens, channels\), got \(3,\)"),
        ((X, None, None, None, FIVE), {}, TypeError, "cond: expected a floating tensor, got None"),
        ((X, X[:2], None, None, FIVE), {}, ValueError, r"cond: expected shape \(4, 3\), got \(2, 3\)"),
        ((X, X, None, X[:, :1], FIVE), {}, ValueError, r"x0_prev: expected shape \(4, 3\), got \(4, 1\)"),
        ((X, X, X.to("meta"), None, FIVE), {"guidance": 2.0}, ValueError, "uncond: expected on cpu as x is, got meta"),
        ((X, X, X, None, FIVE), {}, ValueError, "guidance: expected together with uncond, got None"),
        ((X, X, None, None, FIVE), {"guidance": 2.0}, ValueError, "uncond: expected together with guidance, got None"),
        ((X, X, X, None, FIVE), {"guidance": "2"}, TypeError, "guidance: expected a number or a float32 tensor"),
        ((X, X, X, None, FIVE), {"guidance": torch.zeros(1, 1), "rows": ROWS}, ValueError, r"guidance: expected shape \(rows,\)"),
        ((X, X, X, None, TABLE), {"guidance": torch.zeros(3), "rows": ROWS}, ValueError, "guidance: expected one scale for each of the 2"),
        ((X, X, X, None, FIVE), {"guidance": torch.zeros(3)}, ValueError, "rows: expected the row of each token"),
        ((X, X, None, None, TABLE), {}, ValueError, "rows: expected the row of each token"),
        (
            (X, X, None, None, TABLE),
            {"rows": ROWS.long()},
            TypeError,
            "rows: expected a tensor of torch.int32, got",
        ),
        ((X, X, None, None, TABLE), {"rows": ROWS[:3]}, ValueError, r"rows: expected shape \(4,\), got \(3,\)"),
        (
            (X, X, None, None, FIVE.double()),
            {},
            TypeError,
            "coefficients: expected a tensor of torch.float32, got",
        ),
        ((X, X, None, None, (1, 0, 0, 1, 0)), {}, TypeError, "coefficients: expected a tensor of torch.float32"),
        ((X, X, None, None, FIVE[:4]), {}, ValueError, r"coefficients: expected shape \(5,\) or \(rows, 5\), got \(4,\)"),
        ((X, X, None, None, FIVE), {"known": ROWS}, TypeError, "known: expected a tensor of torch.bool"),
        ((X, X, None, None, FIVE), {"out_dtype": torch.int8}, TypeError, "out_dtype: expected a floating torch.dtype"),
        ((X, X, None, None, FIVE), {"implementation": "cuda"}, ValueError, "implementation: expected one of"),
    ],
)
def test_refuses(arguments, options, exception, message):
    with pytest.raises(exception, match=message):
        guided_step(*arguments, **options)
