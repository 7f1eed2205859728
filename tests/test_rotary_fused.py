"""The Triton kernels of QK norm and rotary positions against the float64 definition; interpreted on a CPU, compiled on a GPU (-m gpu)."""

import pytest
import torch
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from tubelet.kernels import engaged, qk_norm_rope, quantize_rows, reset_engaged
from tubelet.kernels.rotary import norm_rope_reference

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def fused_qkv(tokens, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    """q and k as views of one tensor whose rest is NaN."""
    whole = torch.full((tokens, heads + 2 * kv_heads, dim + 8), float("nan"), device=DEVICE, dtype=dtype)
    whole[:, : heads + kv_heads, :dim] = randn(tokens, heads + kv_heads, dim, seed=seed, dtype=dtype)
    return whole[:, :heads, :dim], whole[:, heads : heads + kv_heads, :dim]


def table(rows, pairs, heads=None, seed=5):
    angle = 3 * randn(*((rows, pairs) if heads is None else (rows, heads, pairs)), seed=seed)
    return angle.cos(), angle.sin()


CASES = {
    "wan": dict(heads=5, dim=16, across_heads=True, pairs=8, weight=True),
    "hunyuan": dict(heads=3, dim=16, pairs=8, weight=True, rows=True),
    "cogvideox": dict(heads=3, dim=24, pairs=12, norm="layer", weight=True, bias=True, rows=True),
    "cosmos": dict(heads=3, dim=32, pairs=16, interleaved=False, weight=True),
    "allegro": dict(heads=3, dim=24, pairs=12, interleaved=False, axes=(8, 8, 8), norm=None),
    "mochi": dict(heads=3, dim=32, pairs=16, of_heads=True, weight=True),
    "ltx": dict(heads=4, dim=16, pairs=8, of_heads=True, across_heads=True, weight=True),
    "latte": dict(heads=2, dim=72, norm="rms"),
    "part of the channels": dict(heads=3, kv_heads=1, dim=88, pairs=10, weight=True),
    "part, halves": dict(heads=2, kv_heads=1, dim=112, pairs=20, interleaved=False, norm="layer", weight=True),
    "layer across heads": dict(heads=3, kv_heads=2, dim=40, across_heads=True, norm="layer", weight=True, bias=True),
}


def arguments(
    tokens, heads, dim, kv_heads=None, pairs=0, norm="rms", weight=False, bias=False, rows=False, of_heads=False, dtype=torch.float32, **how
):
    """q, k and the keywords of `qk_norm_rope`."""
    kv_heads = kv_heads or heads
    q, k = fused_qkv(tokens, heads, kv_heads, dim, dtype)
    how["norm"] = norm
    for i, (name, number) in enumerate((("q", heads), ("k", kv_heads))):
        size = number * dim if how.get("across_heads") else dim
        if weight:
            how[f"{name}_weight"] = 1 + 0.3 * randn(size, seed=10 + i)
        if bias:
            how[f"{name}_bias"] = 0.3 * randn(size, seed=20 + i)
    if pairs:
        how["cos"], how["sin"] = table(4 if rows else tokens, pairs, heads if of_heads else None)
        if rows:
            how["rows"] = (torch.arange(tokens, device=DEVICE) % 5 - 1).int()
    return q, k, how


def exactly(q, k, how):
    how = dict(how)
    parts = [(q, how.pop("q_weight", None), how.pop("q_bias", None)), (k, how.pop("k_weight", None), how.pop("k_bias", None))]
    rest = [how.get(name, default) for name, default in (("cos", None), ("sin", None), ("norm", "rms"))]
    rest += [how.get("across_heads", False), how.get("interleaved", True), how.get("eps", 1e-6)]
    return [norm_rope_reference(x, w, *rest, b, how.get("axes"), how.get("rows")) for x, w, b in parts]


def run(q, k, how, **options):
    return qk_norm_rope(q, k, how.get("q_weight"), how.get("k_weight"), implementation="triton", **_rest(how), **options)


def _rest(how):
    return {name: value for name, value in how.items() if name not in ("q_weight", "k_weight")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_conventions(name, dtype):
    q, k, how = arguments(7, dtype=dtype, **CASES[name])
    for ours, wanted in zip(run(q, k, how), exactly(q.double(), k.double(), how), strict=True):
        assert ours.is_contiguous()
        assert_close(ours, wanted, dtype)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    q, k, how = arguments(9, **CASES[name])
    ours = [x.detach().clone().requires_grad_() for x in (q, k)]
    names = [each for each in ("q_weight", "k_weight", "q_bias", "k_bias") if each in how]
    leaves = [how[each].clone().requires_grad_() for each in names]
    exact = [x.detach().double().requires_grad_() for x in (*ours, *leaves)]
    directions = randn(*q.shape, seed=30), randn(*k.shape, seed=31)
    found = torch.autograd.grad(run(*ours, how | dict(zip(names, leaves, strict=True))), [*ours, *leaves], directions)
    results = exactly(*exact[:2], how | dict(zip(names, exact[2:], strict=True)))
    wanted = torch.autograd.grad(results, exact, [each.double() for each in directions])
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, torch.float32)


def test_gradients_of_weights_over_many_tiles():
    """More of them than programs."""
    q, k, how = arguments(1500, heads=2, dim=16, kv_heads=1, weight=True)
    ours = [x.detach().clone() for x in (q, k)]
    weight = how["q_weight"].clone().requires_grad_()
    direction = randn(*q.shape, seed=30)
    out, _ = run(*ours, how | {"q_weight": weight})
    exact = weight.detach().double().requires_grad_()
    wanted, _ = exactly(*(x.double() for x in ours), how | {"q_weight": exact})
    found = torch.autograd.grad(out, weight, direction)[0]
    assert_close(found, torch.autograd.grad(wanted, exact, direction.double())[0], torch.float32)
    assert torch.equal(found, torch.autograd.grad(run(*ours, how | {"q_weight": weight})[0], weight, direction)[0])


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cosmos", "part of the channels"])
def test_a_token_alone_and_in_a_pack(name):
    """Bit for bit, beside a token of NaN too."""
    q, k, how = arguments(9, **CASES[name])
    q[4], k[4] = float("nan"), float("nan")
    whole = run(q, k, how)
    for i in (0, 3, 8):
        one = how | {each: how[each][i : i + 1] for each in ("rows",) if each in how}
        if "cos" in how and "rows" not in how:
            one |= {each: how[each][i : i + 1] for each in ("cos", "sin")}
        for a, b in zip(run(q[i : i + 1], k[i : i + 1], one), whole, strict=True):
            assert a.isfinite().all() and torch.equal(a[0], b[i])
    assert whole[0][4].isnan().all()


@pytest.mark.parametrize("name", ["wan", "cogvideox", "allegro"])
def test_in_place(name):
    q, k, how = arguments(6, **CASES[name])
    wanted = [x.clone() for x in run(q, k, how)]
    found = run(q, k, how, out=(q, k))
    assert found[0] is q and found[1] is k
    assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_into_a_cache(implementation):
    """Each key into its slot, and nothing else is touched."""
    q, k, how = arguments(4, heads=3, dim=16, kv_heads=2, pairs=8, weight=True)
    wanted = run(q, k, how)
    cache, out = torch.full((9, 2, 16), 7.0, device=DEVICE), torch.empty(4, 3, 16, device=DEVICE)
    slots = torch.tensor([5, -1, 0, 8], dtype=torch.int32, device=DEVICE)
    weights = how["q_weight"], how["k_weight"]
    qk_norm_rope(q, k, *weights, **_rest(how), out=(out, cache), slots=slots, implementation=implementation)
    expected = torch.full_like(cache, 7.0)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = wanted[1][i]
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(cache, expected)


def test_keys_of_other_numbers():
    q, k = randn(5, 2, 16), randn(11, 1, 16, seed=1)
    for ours, wanted in zip(run(q, k, {}), exactly(q.double(), k.double(), {}), strict=True):
        assert_close(ours, wanted, torch.float32)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    q, k, how = arguments(tokens, heads=2, dim=16, pairs=8)
    assert [x.shape[0] for x in run(q, k, how)] == [tokens, tokens]


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cosmos"])
def test_fp8(name):
    """Close to what `quantize_rows` makes of the exact result: an element lies within a step of E4M3, 2^-3 of it, or of its row's least."""
    q, k, how = arguments(6, **CASES[name])
    for (x8, scale), exact in zip(run(q, k, how, fp8=True), exactly(q.double(), k.double(), how), strict=True):
        _, wanted = quantize_rows(exact, implementation="reference")
        assert scale.t().is_contiguous()
        torch.testing.assert_close(scale, wanted, rtol=1e-5, atol=0)
        found = x8.double() * scale.double()[..., None]
        assert found.isfinite().all()
        assert ((found - exact).abs() <= exact.abs() * 2**-3 + scale.double()[..., None] * 2**-8).all()


def test_registered_as_it_should_be():
    q, k, how = arguments(5, heads=2, dim=16, kv_heads=1, pairs=4, norm="layer", weight=True, bias=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, *(how[f"{name}"] for name in ("q_weight", "k_weight", "q_bias", "k_bias")))]
    rest = how["cos"], how["sin"], None, "layer", False, True, None, 1e-6
    torch.library.opcheck(torch.ops.tubelet.qk_norm_rope, (*leaves, *rest, "triton"))
    out = torch.empty_like(q), torch.empty_like(k)
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.tubelet.qk_norm_rope_out, (*plain[:2], *out, None, *plain[2:], *rest, "triton"))


def test_a_graph_without_a_break_compiled_once():
    def block(q, k, weight, cos, sin):
        q, k = qk_norm_rope(q * 2, k, weight, weight, cos, sin, implementation="triton")
        return q + 1, k

    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 8, 13):
        q, k, weight = (x.requires_grad_() for x in (randn(tokens, 2, 16), randn(tokens, 2, 16, seed=1), 1 + randn(16, seed=2)))
        inputs = q, k, weight, *table(tokens, 8)
        results = []
        for function in (block, compiled):
            reset_engaged()
            out = function(*inputs)
            results.append((*out, *torch.autograd.grad(sum(x.square().sum() for x in out), inputs[:3])))
            assert engaged()["qk_norm_rope"]["triton"].calls == 1
        for a, b in zip(*results, strict=True):
            assert_close(a.detach(), b.detach().double(), torch.float32)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # torch starts the first compilation twice, for a float among the arguments


@pytest.mark.gpu
def test_a_captured_graph_serves_other_contents_and_slots():
    q, k, how = arguments(6, heads=2, dim=64, pairs=32, weight=True, dtype=torch.bfloat16)
    out, cache = torch.empty(6, 2, 64, device=DEVICE, dtype=q.dtype), torch.zeros(12, 2, 64, device=DEVICE, dtype=q.dtype)
    slots = torch.arange(6, dtype=torch.int32, device=DEVICE)
    run(q, k, how, out=(out, cache), slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(q, k, how, out=(out, cache), slots=slots)
    q.copy_(randn(*q.shape, seed=8, dtype=q.dtype))
    slots.add_(6)
    cache.zero_()
    graph.replay()
    wanted = run(q, k, how)
    assert torch.equal(out, wanted[0]) and torch.equal(cache[6:], wanted[1]) and not cache[:6].any()


def test_gradients_that_do_not_exist():
    q, k, how = arguments(4, heads=2, dim=16, pairs=8)
    with pytest.raises(ValueError, match="no gradient to be required"):
        run(q.clone().requires_grad_(), k, how, fp8=True)
    cos = how["cos"].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"cannot run as 'triton': .*cos and sin require gradients"):
        run(q, k, how | {"cos": cos})
    with pytest.raises(ValueError, match="slots: expected None without out"):
        run(q, k, how, slots=torch.zeros(4, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "wan"])
def test_parameters_with_gaps(name):
    """Weights and biases that are columns of a tensor, or one number for all channels."""
    q, k, how = arguments(6, **CASES[name])
    parameters = [name for name in how if name.endswith(("weight", "bias"))]
    apart = {name: how[name][:, None].repeat(1, 3)[:, 1].requires_grad_() for name in parameters}
    plain = {name: how[name].clone().requires_grad_() for name in parameters}
    found, expected = (qk_norm_rope(q, k, **how | each, implementation="triton") for each in (apart, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    grads = (
        torch.autograd.grad(sum(x.square().sum() for x in out), list(each.values())) for out, each in ((found, apart), (expected, plain))
    )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    ones = {name: torch.ones(1, device=DEVICE).expand_as(how[name]) for name in parameters}
    found, expected = (
        qk_norm_rope(q, k, **how | each, implementation="triton") for each in (ones, {name: x.contiguous() for name, x in ones.items()})
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
