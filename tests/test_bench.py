"""The benchmarks' harness: what is wrong is caught and not timed, what is right is timed right, no failure is another's, and the quick
suite.
"""

import copy
import importlib
import math
import os
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from tubelet.bench import ahead, attention, block, peers, record, run, sampling, suite, wan
from tubelet.bench.harness import (
    DEFAULT,
    QUICK,
    TOLERANCE,
    Bench,
    Case,
    Implementation,
    Problem,
    Settings,
    Tolerance,
    Unsupported,
    relative_error,
)
from tubelet.bench.sequences import groups, reference
from tubelet.engine import Engine
from tubelet.kernels import FrameCausal, Full, Spatial, Temporal, VideoLayout
from tubelet.kernels.attention.reference import attention_reference

CPU = torch.device("cpu")


def problem_of(**implementations) -> Problem:
    """Twice the input, by functions of it."""
    return Problem(
        make=lambda seed: torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)),
        implementations=[
            each if isinstance(each, Implementation) else Implementation(name, lambda x, each=each: lambda: each(x))
            for name, each in implementations.items()
        ],
        reference=lambda x: 2 * x.double(),
        dtype=torch.float32,
        flops=512,
        bytes=4096,
    )


def measure(problem: Problem | None, **settings):
    """name -> Measurement."""

    def make(device):
        if problem is None:
            raise RuntimeError("no such device")
        return problem

    bench = Bench(Settings(CPU, **{"seconds": 0.02} | settings))
    return {each.implementation: each for each in bench.measure(Case("op", "case", {"dtype": "float32"}, make))}


def one_wrong(x):
    out = 2 * x
    out[17, 3] += 0.5
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2.01 * x,
        one_wrong,
        lambda x: (2 * x)[:-1],
        lambda x: torch.where(torch.arange(64)[:, None] == 5, math.nan, 2 * x),
        lambda x: (2 * x, 2 * x),
        lambda x: torch.full_like(x, math.inf),
    ],
)
def test_a_wrong_result_is_not_timed(wrong):
    calls = []

    def counted(x):
        calls.append(1)
        return wrong(x)

    found = measure(problem_of(right=lambda x: x + x, wrong=counted))
    assert found["right"].status == "ok" and found["right"].ms > 0
    assert found["wrong"].status == "wrong" and "relative error" in found["wrong"].reason
    assert found["wrong"].ms is found["wrong"].low is found["wrong"].graph_ms is None and len(calls) == 1


def test_only_a_part_that_is_compared_may_hide_nothing_that_is_not_finite():
    def bad_elsewhere(x):
        out = 2 * x
        out[40] = math.nan
        return out

    problem = problem_of(bad=bad_elsewhere)
    problem.part, problem.reference = (lambda out: out[:8]), lambda x: 2 * x.double()[:8]
    assert measure(problem)["bad"].status == "wrong"


def test_a_known_cost_is_timed_right():
    def slow(x):
        time.sleep(0.02)
        return 2 * x

    found = measure(problem_of(slow=slow), seconds=0.3)["slow"]
    assert 19.9 < found.ms < 30 and found.low <= found.ms <= found.high and found.samples >= 5


def test_building_is_not_timed_and_inputs_take_turns():
    seen = []

    def build(x):
        time.sleep(0.05)
        return lambda: seen.append(x.data_ptr()) or 2 * x

    found = measure(problem_of(x=Implementation("x", build)))["x"]
    assert found.ms < 40
    assert len(set(seen[1:5])) == 2


def test_failures_stay_where_they_are():
    def fails(x):
        raise RuntimeError("out\nof luck")

    def cannot(x):
        raise Unsupported("even sizes alone")

    found = measure(
        problem_of(
            fails=fails,
            absent=Implementation("absent", lambda x: lambda: x, needs=("no_such_module_at_all",)),
            cannot=Implementation("cannot", cannot),
            hangs=lambda x: time.sleep(30),
            right=lambda x: 2 * x,
        ),
        limit=0.3,
    )
    assert {name: each.status for name, each in found.items()} == {
        "fails": "failed", "absent": "missing", "cannot": "unsupported", "hangs": "timed out", "right": "ok",
    }  # fmt: skip
    assert found["fails"].reason == "RuntimeError: out of luck" and "fails" in found["fails"].where
    assert "no_such_module_at_all" in found["absent"].reason and found["cannot"].reason == "even sizes alone"


def test_a_case_that_cannot_be_made_is_told_of():
    (found,) = measure(None).values()
    assert found.status == "failed" and "no such device" in found.reason


def test_a_reference_that_fails_is_put_down_to_no_implementation():
    problem = problem_of(right=lambda x: 2 * x)
    problem.reference = lambda x: time.sleep(30)
    (found,) = measure(problem, limit=0.2).values()
    assert (found.implementation, found.status) == ("", "timed out")


def test_relative_error_of_more_or_other_tensors_is_infinite():
    x = torch.ones(3)
    assert relative_error([x, x], [x]).norm == math.inf and relative_error(x, torch.ones(4)).norm == math.inf
    assert relative_error({"a": x}, x) == Tolerance(0, 0)


GRIDS = [(3, 2, 3), (3, 2, 3), (2, 3, 3), (1, 2, 3), (5, 1, 2)]
MASKS = [Full(), Spatial(), Temporal(causal=True), Temporal(causal=False), Temporal(window=2), FrameCausal(),
         FrameCausal(chunk=2, window=2),
         FrameCausal(chunk=2, window=1, sink=1)]  # fmt: skip


def inputs(tokens: int, keys: int | None = None):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, 4, 8, generator=generator)
    return q, *torch.randn(2, keys or tokens, 4, 8, generator=generator).unbind(0), torch.randn(q.shape, generator=generator)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_reference_is_that_of_the_kernels(mask):
    layout = VideoLayout.pack(GRIDS)
    q, k, v, do = inputs(layout.tokens)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = attention_reference(*wide, layout, mask, layout, 8**-0.5)
    parts = groups(GRIDS, mask)
    torch.testing.assert_close(reference(q, k, v, parts, mask, [0, 3])[0], out[:, [0, 3]])
    expected = torch.autograd.grad(out, wide, do.double())
    for found, right in zip(reference(q, k, v, parts, mask, [0, 3], do), expected, strict=True):
        torch.testing.assert_close(found, right[:, [0, 3]])


def test_the_reference_of_cross_attention():
    layout, text = VideoLayout.pack(GRIDS), VideoLayout.segments([3, 3, 5, 1, 7])
    q, k, v, _ = inputs(layout.tokens, text.tokens)
    out, _ = attention_reference(q.double(), k.double(), v.double(), layout, Full(), text, 8**-0.5)
    torch.testing.assert_close(reference(q, k, v, groups(GRIDS, Full(), [3, 3, 5, 1, 7]), Full(), range(4))[0], out)


def test_the_reference_of_joint_layouts_and_grouped_heads():
    words = [3, 1, 5, 2, 4]
    shape = attention.Shape(GRIDS, 4, 8, Full(), joint=words, text_first=True)
    layout = VideoLayout.pack(GRIDS, text=words, text_first=True)
    q, k, v, _ = inputs(layout.tokens)
    assert shape.tokens == layout.tokens
    for heads in (4, 2):
        out, _ = attention_reference(q.double(), k[:, :heads].double(), v[:, :heads].double(), layout, Full(), layout, 8**-0.5)
        torch.testing.assert_close(reference(q, k[:, :heads], v[:, :heads], shape.sequences(), Full(), range(4))[0], out)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """What flash_attn_varlen_func is to do."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True):
        parts = (x[i:j].transpose(0, 1) for x, i, j in ((q, a, b), (k, c, d), (v, c, d)))
        out[a:b] = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal).transpose(0, 1)
    return out


class BlockDiagonal:
    """What xFormers' mask of that name is to hold."""

    def __init__(self, queries, keys, causal=False):
        self.queries, self.keys, self.causal = queries, keys, causal

    @classmethod
    def from_seqlens(cls, queries, keys, device):
        return cls(queries, keys)

    def make_causal(self):
        return BlockDiagonal(self.queries, self.keys, True)


def efficient(q, k, v, attn_bias):
    starts = [torch.tensor([0, *each]).cumsum(0) for each in (attn_bias.queries, attn_bias.keys)]
    return varlen(q[0], k[0], v[0], *starts, 0, 0, attn_bias.causal)[None]


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for those that are not installed here; FlexAttention uncompiled."""
    flash = types.SimpleNamespace(flash_attn_varlen_func=varlen)
    fmha = types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonal))
    ops = types.SimpleNamespace(fmha=fmha, memory_efficient_attention=efficient)
    sage = types.SimpleNamespace(
        sageattn=lambda q, k, v, tensor_layout, is_causal: peers.F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    )
    stand_ins = {"flash_attn": flash, "flash_attn_interface": flash, "flash_attn.cute": flash, "xformers.ops": ops, "sageattention": sage}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, package=None: stand_ins.get(name) or real(name, package))
    monkeypatch.setattr(peers, "compile_", lambda function, **options: function)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if "FLASH" not in peer.name], ids=lambda peer: peer.name)
def test_peers_do_the_same(peer, libraries):
    """All of them on all masks that they say they can do, in the shapes that they take."""
    did, words = 0, [3, 3, 5, 1, 7]
    shapes = [attention.Shape(GRIDS, 4, 8, mask) for mask in MASKS] + [attention.Shape(GRIDS, 4, 8, Full(), text=words)]
    shapes += [attention.Shape(GRIDS, 4, 8, Full(), joint=words), attention.Shape(GRIDS, 4, 8, FrameCausal(chunk=2), kv_heads=2)]
    for shape in shapes:
        mask, layout = shape.mask, VideoLayout.pack(GRIDS, text=shape.joint)
        kv_layout = layout if shape.text is None else VideoLayout.segments(shape.text)
        q, k, v, _ = inputs(layout.tokens, kv_layout.tokens)
        k, v = (x[:, : shape.kv_heads] for x in (k, v))
        parts = shape.sequences()
        setup = peers.Setup(parts, layout, kv_layout, mask, 4, 8, torch.float32)._replace(
            head_dim=64 if peer.name == "SageAttention" else 8
        )
        try:
            attend = peer.make(setup)
            if peer.name.startswith("torch SDPA") and peer.gpu:
                continue
        except Unsupported:
            continue
        torch.testing.assert_close(attend(q, k, v).double(), reference(q, k, v, parts, mask, range(4))[0], rtol=1e-4, atol=1e-5)
        did += 1
    assert did or (peer.gpu and peer.name.startswith("torch SDPA"))


def test_cases_have_names_of_their_own_and_every_level_more():
    for device in ("cpu", "cuda"):
        counts = [len(suite.select(device, level)) for level in suite.LEVELS]
        assert counts[0] >= 10 and counts == sorted(counts)
    with pytest.raises(ValueError, match="--only: no case has 'nonsense'"):
        suite.select("cpu", "quick", ["nonsense"])
    assert {case.op for case in suite.select("cuda", "full", ["temporal"])} == {"temporal", "length"}


def test_each_op_has_its_turn():
    """When time is short, none is left out because of where it stands."""
    chosen = suite.select("cuda", "default")
    assert [case.level for case in chosen] == sorted(case.level for case in chosen)
    places: dict[str, list[int]] = {}
    for i, case in enumerate(case for case in chosen if case.level == DEFAULT):
        places.setdefault(case.op, []).append(i)
    assert max(each[0] for each in places.values()) < places["temporal"][1]
    for name in ("four blocks", "full attention", "256 tokens each"):
        where = [i for i, case in enumerate(chosen) if case.series == name and case.level == DEFAULT]
        assert where == list(range(where[0], where[0] + len(where))), name


def test_latents_of_a_video_are_a_fair_check_of_half_precision():
    """Noise decodes to almost nothing, of which bfloat16's rounding is a large part."""
    vae = Engine.from_pretrained(device=CPU).vae.requires_grad_(False)
    space, _ = vae.encode_space(sampling.moving_waves(0, 4, 32, 32, CPU))
    allowed = TOLERANCE[torch.bfloat16]
    errors = []
    for each in (space, torch.randn(space.shape, generator=torch.Generator().manual_seed(0))):
        exact = vae.decode_space(each)
        errors.append(relative_error(copy.deepcopy(vae).to(torch.bfloat16).decode_space(each.to(torch.bfloat16)), exact).norm)
    assert errors[0] < 0.5 * allowed.norm < 2 * allowed.norm < errors[1]


CPU_CASES = suite.select("cpu", "quick") + [
    case for case in suite.select("cpu", "default") if case.shape.get("pass") == "backward" and "attention" not in case.op
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `tubelet bench --quick` is the test")
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_quick_suite(case):
    """And the backward passes of all ops but attention, whose expression is differentiated here."""
    for each in Bench(Settings(CPU, seconds=0.001, least=2)).measure(case):
        assert each.status in ("ok", "missing"), each
        assert each.flops is not None and each.bytes > 0 and each.shape["dtype"] == "float32"


def crash(x):
    os._exit(3)


def block_signals(x):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


def leave_a_mark(name):
    Path(os.environ["MARKS"], name).touch()


def crash_after_a_mark(x):
    leave_a_mark("crashed")
    os._exit(3)


def fail_after_a_mark(x):
    leave_a_mark("failed")
    raise ArithmeticError


def cases_ahead() -> list[Case]:
    made = {
        "crashing": problem_of(tubelet=Implementation("tubelet", lambda x: lambda: crash_after_a_mark(x), ours=True)),
        "failing": problem_of(
            tubelet=Implementation("tubelet", lambda x: lambda: fail_after_a_mark(x), ours=True),
            compiled=Implementation("compiled", lambda x: lambda: leave_a_mark("compiled"), slow=True),
            eager=Implementation("eager", lambda x: lambda: leave_a_mark("eager")),
            absent=Implementation("absent", lambda x: lambda: leave_a_mark("absent"), slow=True, needs=("xyzzy",)),
        ),
    }
    hanging = problem_of(tubelet=Implementation("tubelet", lambda x: lambda: time.sleep(600), ours=True))
    return [Case("plover", "hanging", {}, lambda device: hanging, QUICK, devices=("cpu",))] + [
        Case("plugh", name, {}, lambda device, problem=problem: problem, QUICK, devices=("cpu",)) for name, problem in made.items()
    ]


def cases() -> list[Case]:
    """For the worker, which imports this file as a module that adds cases."""
    problem = problem_of(crashes=crash, hangs=block_signals, tubelet=Implementation("tubelet", lambda x: lambda: 2 * x, ours=True))
    after = problem_of(tubelet=Implementation("tubelet", lambda x: lambda: 2 * x, ours=True))
    return [
        Case("xyzzy", "first", {"dtype": "float32"}, lambda device: problem, QUICK, devices=("cpu",)),
        Case("xyzzy", "second", {"dtype": "float32"}, lambda device: after, QUICK, devices=("cpu",)),
        *cases_ahead(),
    ]


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(run, "GRACE", 1.5)
    monkeypatch.setattr(suite, "MODULES", suite.MODULES)
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    return run.Plan("cpu", "quick", ["xyzzy"], seconds=0.01, limit=1.0, extra=("test_bench",))


def test_what_compiles_is_called_ahead(plan, tmp_path, monkeypatch):
    """In processes of their own, whose errors and crashes end nothing."""
    monkeypatch.setenv("MARKS", str(tmp_path))
    plan.level, plan.only, told = "default", ["plugh"], []
    ahead.compile_ahead(plan, run.cases_of, 2, 300.0, lambda *done: told.append(done))
    assert {path.name for path in tmp_path.iterdir()} == {"crashed", "failed", "compiled"}
    assert told[0] == (0, 2) and told[-1][0] <= 1


@pytest.mark.parametrize(("limit", "seconds"), [(1.0, 300.0), (300.0, 5.0)])
def test_compiling_ahead_ends_in_time(plan, limit, seconds):
    """A call that does not return ends after the limit of a call, and in any case at the end of the time for all."""
    plan.only, plan.limit, start = ["plover"], limit, time.monotonic()
    ahead.compile_ahead(plan, run.cases_of, 1, seconds, lambda *done: None)
    assert min(limit, seconds) <= time.monotonic() - start < 60


def test_no_process_compiles_ahead_on_a_cpu(plan):
    assert plan.compilers == 0


def test_a_crash_or_a_hang_stops_no_other(plan, tmp_path):
    path, result = run.run(plan, tmp_path)
    found = {each.key[1:]: each for each in record.read(path).measurements}
    assert {key: each.status for key, each in found.items()} == {
        ("first", "crashes"): "failed",
        ("first", "hangs"): "timed out",
        ("first", "tubelet"): "ok",
        ("second", "tubelet"): "ok",
    }
    assert "code 3" in found["first", "crashes"].reason
    assert result.complete and result.ceilings.copy > 0 and result.ceilings.matmul["float32"] > 0
    assert len(result.ceilings.copies) == 4 and all(ms > 0 for ms in result.ceilings.copies.values())


def test_an_interrupted_run_keeps_what_it_measured(plan, tmp_path):
    plan.only = ["xyzzy/second", "guided"]

    def tell(progress):
        if progress.finished is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(plan, tmp_path, tell)
    (path,) = tmp_path.glob("*.json")
    result = record.read(path)
    assert len(result.measurements) == 1 and result.measurements[0].status == "ok" and not result.complete


def test_a_run_ends_when_its_time_is_over(plan, tmp_path):
    """In the middle of an implementation too; what was not measured is listed in the order of its importance."""
    plan.limit, hung = 600.0, []

    def tell(progress):
        if progress.implementation == "hangs":
            plan.budget = 0.0
            hung.append(time.monotonic())

    path, result = run.run(plan, tmp_path, tell)
    assert time.monotonic() - hung[0] < 30
    assert record.read(path) == result and not result.complete
    assert [(each.case, each.implementation, each.status) for each in result.measurements] == [
        ("first", "crashes", "failed"), ("first", "", "not run"), ("second", "", "not run"),
    ]  # fmt: skip


@pytest.mark.gpu
def test_events_time_a_copy():
    x = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    settings = Settings(torch.device("cuda"))
    bench = Bench(settings)
    found = bench.stopwatch.time([lambda: y.copy_(x)]).median
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        y.copy_(x)
    stop.record()
    torch.cuda.synchronize()
    assert found == pytest.approx(start.elapsed_time(stop) / 20, rel=0.3)
    peak, workspace = bench.stopwatch.memory(lambda: x + 1)
    assert peak >= 1 << 28 and workspace == 0


@pytest.mark.gpu
def test_a_short_call_is_timed_in_a_graph():
    problem = problem_of(short=lambda x: 2 * x)
    problem.make = lambda seed: torch.randn(64, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    (found,) = Bench(Settings(torch.device("cuda"))).measure(Case("op", "case", {}, lambda device: problem))
    assert found.status == "ok" and found.graph_ms < found.ms and 0 < found.host_ms < 1


@pytest.mark.parametrize("wrong", ["zeros", "across clips"])
def test_a_wrong_attention_shows_in_a_whole_step(monkeypatch, wrong):
    """By more than what is allowed on a GPU, where the model has 30 layers in bfloat16."""
    real = wan.attention

    def broken(q, k, v, layout, mask, **options):
        if options:  # to the text
            return real(q, k, v, layout, mask, **options)
        return torch.zeros_like(q) if wrong == "zeros" else real(q, k, v, VideoLayout.pack([(1, 1, layout.tokens)]), mask)

    monkeypatch.setattr(wan, "attention", broken)
    problem = block.problem(block.ON_CPU, [(2, 6, 8), (3, 4, 4)], 16, CPU, only=["tubelet"])
    inputs = problem.make(0)
    error = relative_error(problem.implementations[0].build(inputs)(), problem.reference(inputs))
    assert error.norm > 2 * block.TOLERANCES[torch.bfloat16].norm


def test_flops_of_decoding_are_those_of_the_decoder():
    problem = sampling.decode(16, 64, 64, CPU)
    space = problem.make(0)
    assert problem.flops == sampling.flops_of(lambda: problem.reference(space))


def test_a_block_in_fp8():
    (case,) = suite.select("cpu", "full", ["block/Wan, small, FP8"])
    found = {each.implementation: each for each in Bench(Settings(CPU, seconds=0.001)).measure(case) if each.status != "missing"}
    assert all(each.status == "ok" for each in found.values()), found
    ours, other = found["tubelet"], found["tubelet without FP8"]
    assert {"fp8_linear", "gelu_quantize_rows"} <= ours.engaged.keys() and "fp8_linear" not in other.engaged
    assert other.error[0] < 1e-5 < ours.error[0] and ours.comparable and not other.comparable


def test_attention_of_one_head_alone_wrong_is_caught(monkeypatch):
    """Compared are the first and the last head, and finiteness of all."""
    real = attention.attention

    def wrong(q, k, v, *rest, **options):
        out = real(q, k, v, *rest, **options).clone()
        out[:, -1] *= 1.1
        return out

    monkeypatch.setattr(attention, "attention", wrong)
    case = attention.Shape([(2, 4, 4)], 4, 16, Full()).case("op", "case", devices=("cpu",))
    found = {each.implementation: each.status for each in Bench(Settings(CPU, seconds=0.001)).measure(case)}
    assert found["tubelet"] == "wrong" and found["torch SDPA"] == "ok"
