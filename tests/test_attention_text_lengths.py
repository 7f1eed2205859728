"""Texts with padding that the host knows nothing of: `attention(..., text_lengths=...)`."""

import contextlib

import pytest
import torch
from test_attention import definition, leaves, randn
from test_attention import qkv_of as on_the_cpu
from test_fp8 import ALLOWED
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from tubelet.kernels import Capacity, FrameCausal, Full, NormRope, Spatial, Temporal, VideoLayout, attention, qk_norm_rope, quantize_rows
from tubelet.kernels.dispatch import HAS_TRITON
from tubelet.kernels.fp8 import dequantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's NumPy on infinities and NaN that are meant
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
IMPLEMENTATIONS = ["torch", *(["triton"] if HAS_TRITON else [])]
ROOM = 20
GRIDS = [(3, 2, 3), (1, 4, 4), (2, 3, 2), (4, 1, 2)]
LENGTHS = [0, 20, 7, 1]
MASKS = [Full(), Spatial(), FrameCausal(chunk=2)]


def qkv_of(*args, **options) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(DEVICE) for x in on_the_cpu(*args, **options))


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Which end in a text, and some of which are wholly past its length."""
    with tiles(16, 16) if HAS_TRITON else contextlib.nullcontext():
        yield


def tiles(*blocks):
    from test_attention_block import attention_configs, tiles_of

    return tiles_of(attention_configs.Configs(*[attention_configs.Config(*blocks, 4, 1)] * 3))


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cross() -> tuple[VideoLayout, VideoLayout, VideoLayout]:
    """Where queries and keys lie, and where the keys that are there would without padding."""
    return (
        VideoLayout.pack(GRIDS, device=DEVICE),
        VideoLayout.segments([ROOM] * 4, device=DEVICE),
        VideoLayout.segments(LENGTHS, device=DEVICE),
    )


def joint(text_first: bool = False) -> tuple[VideoLayout, VideoLayout, VideoLayout]:
    texts = ([ROOM] * 4, [ROOM] * 4, LENGTHS)
    return tuple(VideoLayout.pack(GRIDS, text=text, text_first=text_first, device=DEVICE) for text in texts)


CASES = {"cross": cross(), "text last": joint(), "text first": joint(text_first=True)}


def kept(padded: VideoLayout, short: VideoLayout) -> torch.Tensor:
    """Which tokens of one layout are in the other."""
    there = torch.zeros(padded.tokens, dtype=torch.bool)
    for a, b in zip(padded.clips, short.clips, strict=True):
        there[a.video_start : a.video_stop] = True
        there[a.text_start : a.text_start + b.text_length] = True
    return there.to(DEVICE)


def poisoned(there: torch.Tensor, *tensors: torch.Tensor, poison: float = torch.nan) -> tuple[torch.Tensor, ...]:
    return tuple(x.masked_fill(~there.view(-1, *[1] * (x.dim() - 1)), poison) for x in tensors)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_attention_to_what_is_there(name, mask, implementation, poison):
    layout, kv_layout, short = CASES[name]
    q, k, v = qkv_of(layout, kv_layout)
    there = kept(kv_layout, short)
    expected = definition(q, k[there], v[there], layout, mask, short)
    k, v = poisoned(there, k, v, poison=poison)
    how = {"kv_layout": kv_layout, "text_lengths": int32(LENGTHS), "implementation": implementation}
    assert_close(attention(q, k, v, layout, mask, **how), expected, torch.float32)
    out, lse = attention(q, k, v, layout, mask, return_lse=True, **how)
    assert_close(out, expected, torch.float32)
    _, expected_lse = attention(
        q.double(), k[there].double(), v[there].double(), layout, mask, kv_layout=short, return_lse=True, implementation="reference"
    )
    nothing = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing) and bool(nothing.any()) == (name == "cross")
    assert_close(lse[~nothing], expected_lse[~nothing], torch.float32)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        (name, dtype)
        for name in IMPLEMENTATIONS
        for dtype in (torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16)
        if DEVICE == "cuda" or (name, dtype) != ("triton", torch.float32)  # the interpreter takes its time
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, implementation, dtype):
    for mask in MASKS:
        check_gradients(*CASES[name], LENGTHS, mask, implementation, dtype)


def check_gradients(layout, kv_layout, short, lengths, mask, implementation, dtype, **shape):
    there, do = kept(kv_layout, short), qkv_of(layout, seed=7, **shape)[0].to(dtype)
    q, k, v = qkv_of(layout, kv_layout, dtype=dtype, **shape)
    exact = leaves(q, k[there], v[there], dtype=torch.float64)
    q, k, v = leaves(q, *poisoned(there, k, v))
    out = attention(q, k, v, layout, mask, kv_layout=kv_layout, text_lengths=int32(lengths), implementation=implementation)
    wanted = definition(*exact, layout, mask, short)
    assert_close(out, wanted.detach(), dtype)
    out.backward(do)
    wanted.backward(do.double())
    for grad, x in zip((q.grad, k.grad[there], v.grad[there]), exact, strict=True):
        assert_close(grad, x.grad, dtype)
    assert not k.grad[~there].any() and not v.grad[~there].any()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", CASES)
def test_full_lengths_change_no_bit(name):
    layout, kv_layout, _ = CASES[name]
    results = []
    for lengths in (None, int32([ROOM] * 4)):
        qkv = leaves(*qkv_of(layout, kv_layout))
        how = {"kv_layout": kv_layout, "text_lengths": lengths, "return_lse": True, "implementation": "triton"}
        out, lse = attention(*qkv, layout, FrameCausal(chunk=2), **how)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(ours, whole) for ours, whole in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("name", CASES)
def test_a_view_of_lengths_and_lengths_below_zero(name, implementation):
    """The video is there all the same."""
    layout, kv_layout, _ = CASES[name]
    q, k, v = qkv_of(layout, kv_layout)
    lengths = int32([[-3, 9], [ROOM + 1, 9], [7, 9], [1, 9]])[:, 0]
    ours, same = (
        attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=each, implementation=implementation)
        for each in (lengths, int32(LENGTHS))
    )
    assert torch.equal(ours, same)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_capacity(implementation):
    """The lengths of the clips that there is room for; of another pack once it is refilled."""
    room = {"capacity": Capacity(clips=5, frames=12, tokens=180), "device": DEVICE}
    layout = VideoLayout.pack(GRIDS, text=[ROOM] * 4, **room)
    q, k, v = qkv_of(layout, heads=4, kv_heads=2)
    for grids, lengths in ((GRIDS, LENGTHS), (GRIDS[::-1][:3], [5, 0, 16])):
        whole, short = (VideoLayout.pack(grids, text=text, device=DEVICE) for text in ([ROOM] * len(grids), lengths))
        layout.refill(VideoLayout.pack(grids, text=[ROOM] * len(grids), **room))
        there = kept(whole, short)
        here = torch.cat((there, there.new_zeros(layout.tokens - whole.tokens)))
        wanted = definition(q[: whole.tokens], k[here], v[here], whole, Full(), short)
        padded = int32(lengths + [3] * (5 - len(lengths)))
        out = attention(q, *poisoned(here, k, v), layout, Full(), text_lengths=padded, implementation=implementation)
        assert_close(out[: whole.tokens], wanted, torch.float32)
        assert not out[whole.tokens :].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_fp8(name, implementation):
    layout, kv_layout, short = CASES[name]
    there = kept(kv_layout, short)
    x8, scales = zip(*(quantize_rows(x) for x in qkv_of(layout, kv_layout, dim=32)), strict=True)
    q, k, v = (dequantize_rows(*each, torch.float64) for each in zip(x8, scales, strict=True))
    (k8, v8), nan = poisoned(there, *(x.view(torch.uint8) for x in x8[1:]), poison=127), (scales[0], *poisoned(there, *scales[1:]))
    x8 = x8[0], k8.view(x8[0].dtype), v8.view(x8[0].dtype)
    how = {"kv_layout": kv_layout, "text_lengths": int32(LENGTHS), "implementation": implementation}
    with tiles(16, 32) if implementation == "triton" else contextlib.nullcontext():  # products of E4M3 sum over at least 32 keys
        for mask in MASKS:
            out = attention(*x8, layout, mask, scales=nan, **how)
            assert_close(out, definition(q, k[there], v[there], layout, mask, short), torch.bfloat16, ALLOWED[implementation])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_and_rope(implementation):
    layout, _, short = CASES["text last"]
    angles = randn(layout.tokens, 8).to(DEVICE)
    weights = [randn(16, seed=i).to(DEVICE).requires_grad_() for i in (1, 2)]
    how = NormRope(*weights, angles.cos(), angles.sin())
    results = []
    for norm_rope in (how, None):
        q, k, v = plain = leaves(*qkv_of(layout))
        if norm_rope is None:
            q, k = qk_norm_rope(q, k, **how._asdict(), implementation=implementation)
        out = attention(q, k, v, layout, FrameCausal(), norm_rope=norm_rope, text_lengths=int32(LENGTHS), implementation=implementation)
        results.append((out, *torch.autograd.grad(out.square().sum(), (*plain, *weights))))
    assert all(torch.equal(ours, apart) for ours, apart in zip(*results, strict=True))
    absent = ~kept(layout, short)
    assert not any(grad[absent].any() for grad in results[0][2:4])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation):
    layout, kv_layout, _ = CASES["cross"]
    qkv = leaves(*qkv_of(layout, kv_layout))

    def function(q, k, v, lengths):
        return attention(2 * q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=lengths, implementation=implementation)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [3, 4, 5, 6]):
        results = []
        for run in (function, compiled):
            out = run(*qkv, int32(lengths))
            results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()


class NothingIsRead(TorchDispatchMode):
    """What would make a host wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2")
        return function(*arguments, **options or {})


@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_nothing(name):
    layout, kv_layout, _ = CASES[name]
    q, k, v = leaves(*qkv_of(layout, kv_layout))
    how = {"kv_layout": kv_layout, "text_lengths": int32(LENGTHS), "implementation": "torch"}
    for mask in MASKS:
        attention(q, k, v, layout, mask, **how)  # planned before
        with NothingIsRead():
            attention(q, k, v, layout, mask, **how).sum().backward()
            attention(q, k, v, layout, mask, return_lse=True, **how)[0].sum().backward()


def test_refused():
    layout, kv_layout, _ = CASES["cross"]
    q, k, v = qkv_of(layout, kv_layout)
    with pytest.raises(ValueError, match=r"^text_lengths: expected None with Temporal"):
        attention(q, k, v, layout, Temporal(), kv_layout=kv_layout, text_lengths=int32(LENGTHS))
    for lengths in (int32(LENGTHS[:3]), int32(LENGTHS).long(), int32([LENGTHS])):
        with pytest.raises(ValueError, match=r"^text_lengths: expected torch.int32 \(4,\)"):
            attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=lengths)
    with pytest.raises(TypeError, match=r"^text_lengths: expected a tensor, got list"):
        attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=LENGTHS)


# On a GPU, with the tiles that it is launched with.


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "joint"])
def test_on_a_gpu(cross, mask, dim):
    from test_attention_block import tiles_of
    from tubelet.kernels.attention import configs

    grids, lengths = [(17, 6, 7), (1, 16, 16), (3, 11, 13)], [0, 512, 77]
    layout = VideoLayout.pack(grids, text=None if cross else [512] * 3, device=DEVICE)
    kv_layout, short = (
        VideoLayout.segments(text, device=DEVICE) if cross else VideoLayout.pack(grids, text=text, device=DEVICE)
        for text in ([512] * 3, lengths)
    )
    rule = configs.default_configs(dim, torch.bfloat16, **configs.limits(torch.device(DEVICE)))
    with tiles_of(rule):
        check_gradients(layout, kv_layout, short, lengths, mask, "triton", torch.bfloat16, heads=4, kv_heads=2, dim=dim)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_in_a_captured_graph(name, implementation):
    """Replayed with other lengths; it waits for nothing."""
    layout, kv_layout, _ = CASES[name]
    q, k, v = leaves(*qkv_of(layout, kv_layout))

    def run(lengths):
        out = attention(q, k, v, layout, Full(), kv_layout=kv_layout, text_lengths=lengths, implementation=implementation)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    lengths = int32(LENGTHS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(lengths)  # compiled and planned before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lengths)
    for now in (LENGTHS, [3, 4, 20, 0]):
        lengths.copy_(int32(now))
        graph.replay()
        for ours, wanted in zip(found, run(int32(now)), strict=True):
            assert_close(ours, wanted.detach().double(), torch.float32)
