"""Norm and rotation of queries and keys against the equations, written for one pair of channels at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE, assert_close
from tubelet.kernels import Full, VideoLayout, attention, qk_norm_rope, rotary_table

IMPLEMENTATIONS = ["torch"]
NORMS = ["rms", "layer", None]

everywhere = pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
both_pairings = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def table_of(tokens, pairs, seed=7):
    angles = 3 * randn(tokens, pairs, dtype=torch.float64, seed=seed)
    return angles.cos().float(), angles.sin().float()


def rotated_by_hand(x, cos, sin, interleaved):
    """(a, b) -> (a cos - b sin, a sin + b cos), the pairs being neighbours or a half apart."""
    channels, pairs = list(x.unbind(-1)), cos.shape[1]
    for j in range(pairs):
        first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + pairs)
        a, b, c, s = channels[first], channels[second], cos[:, None, j].to(x.dtype), sin[:, None, j].to(x.dtype)
        channels[first], channels[second] = a * c - b * s, a * s + b * c
    return torch.stack(channels, dim=-1)


def by_hand(x, weight, cos, sin, norm, across_heads, interleaved, eps=1e-6):
    y = x.flatten(1) if across_heads else x
    if norm == "layer":
        y = y - y.sum(-1, keepdim=True) / y.shape[-1]
    if norm is not None:
        y = y * ((y * y).sum(-1, keepdim=True) / y.shape[-1] + eps) ** -0.5
    y = (y if weight is None else y * weight).reshape(x.shape)
    return y if cos is None else rotated_by_hand(y, cos, sin, interleaved)


# The table.


@pytest.mark.parametrize("dims, theta", [((8, 4, 4), 10000.0), ((4, 6, 2), (100.0, 10.0, 1e6)), ((0, 4, 4), 50.0), ((16, 0, 0), 10000.0)])
def test_table(dims, theta):
    positions = torch.tensor([[0, 0, 0], [1, 2, 3], [-4.5, 0.25, 7], [1000, 63, 51]])
    cos, sin = rotary_table(positions, dims, theta=theta)
    thetas = theta if isinstance(theta, tuple) else [theta] * 3
    angles = [
        [
            float(token[axis]) * base ** (-2 * j / dim)
            for axis, (dim, base) in enumerate(zip(dims, thetas, strict=True))
            for j in range(dim // 2)
        ]
        for token in positions
    ]
    assert_close(cos, torch.tensor([[math.cos(a) for a in row] for row in angles], dtype=torch.float64), torch.float32)
    assert_close(sin, torch.tensor([[math.sin(a) for a in row] for row in angles], dtype=torch.float64), torch.float32)


def test_far_positions_are_exact():
    """Angles are made in float64: in float32, frame 100003 would be wrong in its third digit."""
    cos, _ = rotary_table(torch.tensor([[100003.0]]), (2,))
    assert abs(float(cos) - math.cos(100003.0)) < 1e-7


def test_equal_coordinates_have_equal_angles_on_any_canvas():
    """Token (t, h, w) is turned alike in a small clip and in a large one, alone and in a pack, and in a chunk of a longer clip."""
    dims = (4, 6, 6)
    small, pack = VideoLayout.pack([(2, 2, 3)]), VideoLayout.pack([(1, 1, 1), (4, 5, 7)])
    chunk = VideoLayout.pack([(2, 2, 3)], first_frames=[2])
    tables = [torch.cat(rotary_table(layout.positions, dims), dim=1) for layout in (small, pack, chunk)]
    large = tables[1][1:].view(4, 5, 7, -1)
    assert torch.equal(tables[0].view(2, 2, 3, -1), large[:2, :2, :3])
    assert torch.equal(tables[2].view(2, 2, 3, -1), large[2:, :2, :3])


# The op.


@everywhere
@every_norm
@both_pairings
@every_dtype
@pytest.mark.parametrize("across_heads", [False, True], ids=["per head", "across heads"])
def test_against_the_equations(dtype, across_heads, interleaved, norm, implementation):
    """Results and gradients, on views of a fused tensor, with fewer heads of keys; a whole, a partial and no rotation."""
    tokens, heads, kv_heads, dim = 7, 4, 2, 24
    for pairs in (12, 5, None):
        cos, sin = (None, None) if pairs is None else table_of(tokens, pairs)
        fused = randn(tokens, heads + kv_heads, dim, dtype=dtype)
        weights = [randn((count if across_heads else 1) * dim, dtype=dtype, seed=count) if norm else None for count in (heads, kv_heads)]
        mine, wanted = fused.clone().requires_grad_(), fused.double().requires_grad_()
        q, k = mine.split([heads, kv_heads], dim=1)
        assert not q.is_contiguous()
        leaves = [None if w is None else w.clone().requires_grad_() for w in weights]
        options = {"norm": norm, "across_heads": across_heads, "interleaved": interleaved, "eps": 1e-5}
        outs = qk_norm_rope(q, k, *leaves, cos, sin, **options, implementation=implementation)
        leaves64 = [None if w is None else w.double().requires_grad_() for w in weights]
        references = [
            by_hand(x, weight, cos, sin, **options) for x, weight in zip(wanted.split([heads, kv_heads], dim=1), leaves64, strict=True)
        ]
        directions = [randn(*out.shape, dtype=dtype, seed=90 + i) for i, out in enumerate(outs)]
        for out, reference in zip(outs, references, strict=True):
            assert out.is_contiguous()
            assert_close(out, reference, dtype)
        torch.autograd.backward(outs, directions)
        torch.autograd.backward(references, [direction.double() for direction in directions])
        assert_close(mine.grad, wanted.grad, dtype)
        for leaf, leaf64 in zip(leaves, leaves64, strict=True):
            if leaf is not None:
                assert_close(leaf.grad, leaf64.grad, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_dtype
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradient_of_a_weight_that_many_tokens_share(norm, dtype, implementation):
    q, k = randn(1500, 2, 16, dtype=dtype), randn(1500, 2, 16, dtype=dtype, seed=1)
    weight, direction = randn(16, dtype=dtype, seed=2), randn(1500, 2, 16, dtype=dtype, seed=3)
    mine, wanted = weight.clone().requires_grad_(), weight.double().requires_grad_()
    qk_norm_rope(q, k, mine, norm=norm, implementation=implementation)[0].backward(direction)
    by_hand(q.double(), wanted, None, None, norm, False, True).backward(direction.double())
    assert_close(mine.grad, wanted.grad, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim", [16, 32, 64, 72, 80, 88, 96, 112, 128])
def test_head_dims(dim, implementation):
    q, k = randn(5, 3, dim), randn(5, 3, dim, seed=1)
    cos, sin = table_of(5, dim // 2)
    for out, x in zip(qk_norm_rope(q, k, None, None, cos, sin, implementation=implementation), (q, k), strict=True):
        assert_close(out, by_hand(x.double(), None, cos, sin, "rms", False, True), torch.float32)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_of_half_precision_heads(dtype, implementation):
    q, k, weight = randn(5, 2, 16, dtype=dtype), randn(5, 2, 16, dtype=dtype, seed=1), randn(16, seed=2)
    cos, sin = table_of(5, 8)
    for norm in ("rms", "layer"):
        out, _ = qk_norm_rope(q, k, weight, weight, cos, sin, norm=norm, implementation=implementation)
        assert_close(out, by_hand(q.double(), weight.double(), cos, sin, norm, False, True), dtype)


@everywhere
@both_pairings
def test_real_and_complex_forms_agree(interleaved, implementation):
    """R(angle) is the product with exp(i angle)."""
    x = randn(6, 2, 20, dtype=torch.float64)
    angles = randn(6, 10, dtype=torch.float64, seed=1)
    cos, sin = angles.cos().float(), angles.sin().float()
    pairs = x.unflatten(-1, (10, 2)) if interleaved else x.unflatten(-1, (2, 10)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.view_as_real(turned)
    wanted = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    out, _ = qk_norm_rope(x, x, None, None, cos, sin, norm=None, interleaved=interleaved, implementation=implementation)
    assert_close(out, wanted, torch.float64)


@everywhere
@both_pairings
def test_products_depend_on_differences_of_positions(interleaved, implementation):
    """q(p) . k(s) is the same wherever p - s is, on each of the three axes; and a turn keeps lengths."""
    dims, tokens = (8, 6, 6), 12
    q, k = randn(1, 1, 20).expand(tokens, 1, 20).contiguous(), randn(1, 1, 20, seed=1).expand(tokens, 1, 20).contiguous()
    where = torch.randint(0, 30, (tokens, 3), generator=torch.Generator().manual_seed(2)).float()
    gap = torch.tensor([3.0, -2.0, 5.0])
    options = {"norm": None, "interleaved": interleaved, "implementation": implementation}
    turned_q, _ = qk_norm_rope(q, q, None, None, *rotary_table(where + gap, dims), **options)
    _, turned_k = qk_norm_rope(k, k, None, None, *rotary_table(where, dims), **options)
    products = (turned_q * turned_k).sum(dim=(1, 2))
    assert (products - products[0]).abs().max() < 1e-5
    # Another difference on any one axis gives another product, so the above says something about each of them.
    for axis in range(3):
        other = gap.clone()
        other[axis] += 1
        moved, _ = qk_norm_rope(q, q, None, None, *rotary_table(where + other, dims), **options)
        assert ((moved * turned_k).sum(dim=(1, 2)) - products).abs().min() > 1e-3
    assert_close(turned_q.norm(dim=-1), q.double().norm(dim=-1), torch.float32)


@everywhere
def test_attention_does_not_see_a_shift_of_all_positions(implementation):
    grid = [(3, 2, 2)]
    layouts = VideoLayout.pack(grid), VideoLayout.pack(grid, positions=[[100, 101, 102]])
    q, k, v = (randn(12, 2, 16, seed=seed) for seed in range(3))
    outs = []
    for layout in layouts:
        turned = qk_norm_rope(q, k, None, None, *rotary_table(layout.positions, (8, 4, 4)), implementation=implementation)
        outs.append(attention(*turned, v, layout, Full()))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    pairs=st.integers(1, 12),
    spare=st.integers(0, 8),
    norm=st.sampled_from(NORMS),
    across_heads=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    poison=st.sampled_from([float("nan"), float("inf")]),
    data=st.data(),
)
def test_a_token_depends_on_nothing_but_itself(
    implementation, tokens, heads, pairs, spare, norm, across_heads, interleaved, dtype, poison, data
):
    """Bit for bit: a part of the tokens alone gives what it gives among the others, also where these are not finite."""
    q, k = (randn(tokens, count, 2 * pairs + spare, dtype=dtype, seed=i) for i, count in enumerate(heads))
    cos, sin = table_of(tokens, pairs)
    start = data.draw(st.integers(0, tokens - 1))
    part = slice(start, data.draw(st.integers(start + 1, tokens)))
    others = torch.ones(tokens, 1, 1, dtype=torch.bool)
    others[part] = False
    options = {"norm": norm, "across_heads": across_heads, "interleaved": interleaved, "implementation": implementation}
    whole = qk_norm_rope(q, k, None, None, cos, sin, **options)
    alone = qk_norm_rope(q[part], k[part], None, None, cos[part], sin[part], **options)
    spoiled = qk_norm_rope(q.masked_fill(others, poison), k.masked_fill(others, poison), None, None, cos, sin, **options)
    for out, one, beside in zip(whole, alone, spoiled, strict=True):
        assert torch.equal(out[part], one) and torch.equal(out[part], beside[part])


def test_no_tokens():
    q, k = qk_norm_rope(torch.empty(0, 2, 8), torch.empty(0, 1, 8), None, None, *rotary_table(torch.empty(0, 3), (4, 2, 2)))
    assert q.shape == (0, 2, 8) and k.shape == (0, 1, 8)


# What is refused.

Q, K, COS = torch.zeros(4, 2, 8), torch.zeros(4, 1, 8), torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: rotary_table(torch.zeros(4), (2,)), r"positions: expected \(tokens, 1\) for dims \(2,\), got \(4,\)"),
        (lambda: rotary_table(torch.zeros(4, 2), (2, 2, 2)), r"positions: expected \(tokens, 3\) for dims \(2, 2, 2\), got \(4, 2\)"),
        (lambda: rotary_table(torch.zeros(4, 2), (2, 2), theta=[10.0]), r"positions: expected .* got \(4, 2\), 1 thetas"),
        (lambda: rotary_table(torch.zeros(4, 2), (2, 3)), r"dims: expected even numbers of channels, got \(2, 3\)"),
        (lambda: qk_norm_rope(Q, K, norm="batch"), "norm: expected 'rms', 'layer' or None, got 'batch'"),
        (lambda: qk_norm_rope(Q, K, None, None, COS), "cos, sin: expected both or neither"),
        (lambda: qk_norm_rope(Q[0], K), r"q: expected \(tokens, heads, head_dim\) .* got \(2, 8\)"),
        (
            lambda: qk_norm_rope(Q, K[:3], None, None, COS, COS),
            r"k: expected .* of q's tokens and head_dim, got \(3, 1, 8\) \(q is \(4, 2, 8\)\)",
        ),
        (lambda: qk_norm_rope(Q, K[..., :6]), r"k: expected .* got \(4, 1, 6\)"),
        (lambda: qk_norm_rope(Q, K, torch.ones(16)), r"q_weight: expected \(8,\) and a norm, got shape \(16,\) with norm 'rms'"),
        (
            lambda: qk_norm_rope(Q, K, None, torch.ones(8), norm=None),
            r"k_weight: expected \(8,\) and a norm, got shape \(8,\) with norm None",
        ),
        (lambda: qk_norm_rope(Q, K, torch.ones(8), across_heads=True), r"q_weight: expected \(16,\) and a norm, got shape \(8,\)"),
        (
            lambda: qk_norm_rope(Q, K, None, None, COS[:3], COS[:3]),
            r"cos: expected \(4, at most 4\) or \(4, heads, the same\), got \(3, 3\)",
        ),
        (
            lambda: qk_norm_rope(Q, K, None, None, COS, torch.zeros(4, 5)),
            r"sin: expected \(4, at most 4\) or \(4, heads, the same\), got \(4, 5\)",
        ),
        (lambda: qk_norm_rope(Q, K, None, None, COS, COS[:, :2]), r"sin: expected the shape of cos, \(4, 3\), got \(4, 2\)"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
