"""Attention as an operator of torch.library: registered as it should be, one graph for every pack, its operations counted."""

import gc

import numpy as np
import pytest
import torch
from test_attention import FEW_MASKS, LAYOUTS, MASKS, definition, leaves, qkv_of, randn
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from tubelet.kernels import Capacity, FrameCausal, Full, Spatial, Temporal, VideoLayout, attention, engaged, quantize_rows, reset_engaged
from tubelet.kernels.attention.grouped import attention_grouped_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
PACKS = [([(3, 2, 2)], [3]), ([(4, 2, 3), (1, 3, 3)], [4, 0]), ([(2, 5, 5), (3, 2, 2), (1, 1, 5)], [2, 9, 1])]


def implementations():
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return ["torch"]
    return ["torch", "triton"]


def to_device(tensors):
    return tuple(x.to(DEVICE) for x in tensors)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", ["text first", "known and text", "later frames", "capacity"])
def test_the_backward_written_out(name, mask):
    layout = VideoLayout.pack(**LAYOUTS[name])
    qkv = leaves(*qkv_of(layout, heads=4, kv_heads=2), dtype=torch.float64)
    direction = randn(*qkv[0].shape, dtype=torch.float64, seed=9)
    definition(*qkv, layout, mask).backward(direction)
    found = attention_grouped_backward(direction, *(x.detach() for x in qkv), layout, mask, layout, qkv[0].shape[2] ** -0.5)
    for ours, x in zip(found, qkv, strict=True):
        if x.grad.abs().max() > 1e-12:
            assert_close(ours, x.grad, torch.float64)


@pytest.mark.parametrize("lengths", [None, [2, 1]], ids=["", "text lengths"])
@pytest.mark.parametrize("implementation", implementations())
def test_registered_as_it_should_be(implementation, lengths):
    layout, text = VideoLayout.pack([(3, 2, 3), (1, 2, 2)], device=DEVICE), VideoLayout.segments([3, 4], device=DEVICE)
    q, k, v = leaves(*to_device(qkv_of(layout, text)))
    rule = [int(number) for number in FrameCausal().as_rule()]
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    rest = (*[None] * 6, True, None, lengths, layout.handle, text.handle, rule, False, None, False, implementation)
    # aot_dispatch_static compares its gradients to those of eager mode, bit for bit or nearly so
    torch.library.opcheck(torch.ops.tubelet.attention, (q, k, v, None, None, None, *rest))
    out, lse = torch.ops.tubelet.attention(q, k, v, None, None, None, *rest)
    arguments = (out, q, k, v, out, lse, *rest[:-2], implementation)
    torch.library.opcheck(torch.ops.tubelet.attention_backward, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))


def block(q, k, v, layout, text, mask, implementation):
    x = attention(q * 2, k, v, layout, mask, implementation=implementation)
    x, lse = attention(
        x, k[: text.tokens], v[: text.tokens], layout, Full(), kv_layout=text, return_lse=True, scale=0.5, implementation=implementation
    )
    return x + 1, lse


@pytest.mark.parametrize(
    ("implementation", "backend", "mask"),
    [
        (name, "inductor" if name == "torch" else "aot_eager", mask)
        for name in implementations()
        for mask in (Spatial(), Temporal(), FrameCausal(chunk=2, window=3))
        if DEVICE == "cuda" or (name, mask) != ("triton", Temporal())  # the interpreter takes its time
    ],
    ids=str,
)
def test_a_graph_without_a_break_compiled_once(implementation, backend, mask):
    """Forwards and backwards, for packs of other clips, frames, tokens and texts; what ran in the graph is recorded."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for grids, lengths in PACKS:
        layout, text = VideoLayout.pack(grids, device=DEVICE), VideoLayout.segments(lengths, device=DEVICE)
        qkv = leaves(*to_device(qkv_of(layout)))
        reset_engaged()
        wanted, found = (f(*qkv, layout, text, mask, implementation) for f in (block, compiled))
        assert engaged()["attention"][implementation].calls == 4
        for a, b in zip(found, wanted, strict=True):
            assert_close(a.detach(), b.detach().double(), torch.float32) if b.isfinite().all() else torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(x.square().sum(), qkv) for x, _ in (found, wanted)]
        for a, b in zip(*grads, strict=True):
            assert_close(a, b.double(), torch.float32)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("implementation", implementations())
def test_a_layout_lives_until_the_backward_pass(implementation, backend):
    """Whoever made it may have forgotten it by then; nothing holds it any longer."""

    def forget(qkv):
        layout = VideoLayout.pack([(3, 2, 2)], device=DEVICE)
        function = torch.compile(lambda q, k, v, layout: attention(q, k, v, layout, Full(), implementation=implementation), backend=backend)
        return function(*qkv, layout), layout.handle

    torch._dynamo.reset()
    qkv = leaves(*to_device(qkv_of(VideoLayout.pack([(3, 2, 2)]))))
    out, handle = forget(qkv)
    gc.collect()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in qkv)
    del out
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(ValueError, match="layout: expected the handle of a living VideoLayout"):
        VideoLayout.of_handle(handle)


def test_bad_input_in_a_graph():
    """What only a look at the clips tells is told when the graph runs."""
    compiled = torch.compile(
        lambda q, k, v, layout, text: attention(q, k, v, layout, Full(), kv_layout=text), fullgraph=True, backend="aot_eager"
    )
    layout, text = VideoLayout.pack([(1, 2, 2)]), VideoLayout.segments([2, 2])
    with pytest.raises(ValueError, match="kv_layout: expected 1 clips as in layout, got 2"):
        compiled(*qkv_of(layout, text), layout, text)


def pairs(layout, mask, kv_layout=None):
    return int(mask.allowed(layout.coordinates[:, None], (kv_layout or layout).coordinates[None]).sum())


@pytest.mark.parametrize("mask", FEW_MASKS, ids=str)
@pytest.mark.parametrize("name", ["image beside video", "text first", "known and text", "capacity"])
def test_operations_are_counted(name, mask):
    layout = VideoLayout.pack(**LAYOUTS[name])
    qkv = leaves(*qkv_of(layout, heads=2, kv_heads=1, dim=16))
    rule = [int(number) for number in mask.as_rule()]
    with FlopCounterMode(display=False) as counter:
        out, _ = torch.ops.tubelet.attention(
            *qkv, *[None] * 9, True, None, None, layout.handle, layout.handle, rule, mask.same_site, None, False, "torch"
        )
        assert counter.get_total_flops() == 4 * 2 * 16 * pairs(layout, mask)
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 16 * pairs(layout, mask)


def test_operations_of_cross_attention():
    """Of the operator without its name, as the public function calls it."""
    layout = VideoLayout.pack([(2, 3, 3), (1, 2, 2)], device=DEVICE)
    text = VideoLayout.segments([5, 0], capacity=Capacity(3, 0, 9), device=DEVICE)
    qkv = to_device(qkv_of(layout, text))
    if "triton" not in implementations():
        pytest.skip("triton is not installed")
    with FlopCounterMode(display=False) as counter:
        attention(*qkv, layout, Full(), kv_layout=text, implementation="triton")
    assert counter.get_total_flops() == 4 * 2 * 16 * 18 * 5


def test_a_graph_of_fp8():
    layout = VideoLayout.pack([(2, 3, 3), (1, 2, 2)])

    def quantised(q, k, v):
        x8, scales = zip(*(quantize_rows(x) for x in (q, k, v)), strict=True)
        return attention(*x8, layout, FrameCausal(), scales=scales)

    qkv = qkv_of(layout)
    found = torch.compile(quantised, fullgraph=True, backend="aot_eager")(*qkv)
    assert found.dtype == torch.bfloat16 and torch.equal(found, quantised(*qkv))


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """As activation offloading does: what is saved for the backward pass is kept in other memory."""

    def __init__(self):
        super().__init__(lambda x: x.detach().clone(), lambda x: x)


@pytest.mark.parametrize("implementation", implementations())
def test_a_layout_lives_though_what_is_saved_is_elsewhere(implementation):

    def step(qkv):
        layout = VideoLayout.pack([(2, 2, 2)], device=DEVICE)
        return attention(*qkv, layout, Full(), implementation=implementation).square().sum()

    qkv = leaves(*to_device(qkv_of(VideoLayout.pack([(2, 2, 2)]))))
    with Elsewhere():
        loss = step(qkv)
    gc.collect()
    loss.backward()
    assert all(x.grad.isfinite().all() for x in qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_is_registered_as_it_should_be(dtype):
    layout = VideoLayout.pack([(3, 2, 3)], device=DEVICE)
    q, k, v = (x.to(dtype) for x in to_device(qkv_of(layout)))
    rule = [int(number) for number in FrameCausal().as_rule()]
    for implementation in ("reference", "torch"):
        for with_lse in (False, True):
            rest = (*[None] * 6, True, None, None, layout.handle, layout.handle, rule, False, None, with_lse, implementation)
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.tubelet.attention, (q, k, v, None, None, None, *rest), test_utils=tests)


@pytest.mark.parametrize("capacity", [None, Capacity(2, 4, 40)])
def test_autocast_changes_no_dtype_of_the_result(capacity):
    layout = VideoLayout.pack([(2, 2, 2)], capacity=capacity, device=DEVICE)
    q, k, v = to_device(qkv_of(layout))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert attention(q, k, v, layout, Full(), implementation="torch").dtype == q.dtype


@pytest.mark.skipif("triton" not in implementations(), reason="triton is not installed")
def test_numbers_of_numpy():
    layout = VideoLayout.pack([(2, 2, 2)], device=DEVICE)
    qkv = to_device(qkv_of(layout))
    found = attention(*qkv, layout, Full(), scale=1 / np.sqrt(qkv[0].shape[-1]), implementation="triton")
    assert torch.equal(found, attention(*qkv, layout, Full(), implementation="triton"))


@pytest.mark.skipif("triton" not in implementations(), reason="triton is not installed")
def test_tangents_are_refused():
    layout = VideoLayout.pack([(2, 2, 2)], device=DEVICE)
    q, k, v = to_device(qkv_of(layout))
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation: the Triton kernels have none"):
            attention(q, k, v, layout, Full(), implementation="triton")
