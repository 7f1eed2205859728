"""Steps as CUDA graphs. Without a GPU a graph is a list of calls; what a capture would refuse is looked for all the same."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tubelet.engine import Engine, Request, graphs
from tubelet.engine import engine as engine_of
from tubelet.engine.training.evaluate import psnr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
REQUESTS = [
    Request("a red circle bounces on a blue background", 5, 32, 48, seed=1),
    Request("a small green cross moves left", 3, 32, 32, seed=2, guidance=1.0, known={0: torch.zeros(32, 32, 3, dtype=torch.uint8)}),
]


class FromTheHost(TorchDispatchMode):
    """Notes what copies from the host's memory to a device or waits for the device, or would if this were a GPU."""

    OPS = ("aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero", "aten.is_pinned", "aten.item", "aten.equal", "aten.unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.OPS):
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def captured(monkeypatch):
    """Captures without a GPU: those that there were."""
    made = []
    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "capture", lambda *arguments: made.append(Replayed(*arguments)) or made[-1])
    return made


class Replayed:
    """In place of a CUDA graph."""

    def __init__(self, function, device, pool):
        self.replay, self.shared = function, pool

    def pool(self):
        return self


def always(monkeypatch):
    """As if every device were a GPU."""
    repeated = graphs.Repeated
    found = []
    monkeypatch.setattr(engine_of, "Repeated", lambda function, calls, given: repeated(function, calls, found))


def test_a_cpu_has_none():
    with pytest.raises(ValueError, match="graphs: expected None or False for a model on cpu, which has no CUDA graphs, got True"):
        Engine.from_pretrained(device="cpu").sample("a red circle", graphs=True)


@pytest.mark.parametrize("stagger", [0, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_sample_is_the_same_with_graphs(captured, monkeypatch, precision, stagger):
    engine = Engine.from_pretrained(device=DEVICE, precision=precision)
    options = {"steps": 4, "stagger": stagger}
    wanted = engine.sample(REQUESTS, **options, graphs=False)
    assert not captured
    always(monkeypatch)
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a capture that fails
        found = engine.sample(REQUESTS, **options, progress=lambda i, n: done.append((i, n)))
    for a, b in zip(found, wanted, strict=True):  # on a GPU the library may choose another product in a capture
        assert (a.frames == b.frames).all() if DEVICE == "cpu" else psnr(a.frames, b.frames) >= 45
    assert done == [(i, done[-1][1]) for i in range(1, done[-1][1] + 1)]
    if DEVICE == "cpu":
        assert [graph.shared for graph in captured] == [None, *[captured[0]] * (4 if stagger else 0)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_an_evaluation_neither_copies_from_the_host_nor_waits(monkeypatch, precision):
    """But for the first, which fills tables."""
    engine, seen, evaluate = Engine.from_pretrained(device=DEVICE, precision=precision), [], Engine._evaluate

    def watched(*arguments):
        with FromTheHost() as mode:
            evaluate(*arguments)
        seen.append(mode.seen)

    monkeypatch.setattr(Engine, "_evaluate", lambda self, *arguments: watched(self, *arguments))
    engine.sample(REQUESTS, steps=3, stagger=0)
    assert len(seen) == 3 and seen[0] and seen[1:] == [[], []]


def test_what_is_repeated():
    """The first call runs, the second is captured, and later ones replay it, with their own inputs; of two calls none is."""
    total, log = torch.zeros(3, device=DEVICE), []

    def add(x, y):
        log.append(1)
        total.add_(x * y)

    for calls in (2, 5):
        run = graphs.Repeated(add, calls, [] if DEVICE == "cuda" else None)
        log.clear(), total.zero_()
        for i in range(calls):
            run(torch.full((3,), float(i), device=DEVICE), torch.arange(3.0, device=DEVICE))
        assert total.tolist() == [sum(range(calls)) * i for i in range(3)]
        assert len(log) == (2 if DEVICE == "cuda" or calls == 2 else calls)


def test_where_no_graph_can_be_captured(monkeypatch):
    """It is said, and what is repeated runs all the same."""

    def refuse(function, device, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    calls = []
    run = graphs.Repeated(calls.append, 4, [])
    run(torch.zeros(1))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, since it could not be captured: operation not permitted"):
        run(torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(torch.zeros(1))
    assert len(calls) == 3


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_device_as_it_was():
    x, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: x.sum().item(), x.device)
    assert torch.cuda.current_stream() == stream
    graph = graphs.capture(lambda: x.mul_(2), x.device)
    graph.replay(), graph.replay()
    assert x.tolist() == [4.0] * 4
