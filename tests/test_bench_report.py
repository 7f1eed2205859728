"""Results on disk, what is drawn from them, and the comparison of two runs."""

import dataclasses
import json
import re
import sys

import pytest
from tubelet.bench import analysis, record, report, roofline
from tubelet.bench.compare import compare
from tubelet.bench.record import Ceilings, Measurement, Run
from tubelet.engine import cli


def timed(op, case, implementation, ms, spread=0.01, **fields) -> Measurement:
    ours = implementation.startswith("tubelet")
    shape = {"tokens": 1000, "dtype": "bfloat16"} | fields.pop("shape", {})
    times = {"ms": ms, "low": ms * (1 - spread), "high": ms * (1 + spread), "samples": 20}
    fields = {"ours": ours, "flops": 1e9, "bytes": 1e6, "error": [1e-3, 1e-2], "peak_bytes": 10**6, "workspace_bytes": 0} | fields
    return Measurement(op, case, implementation, "ok", shape=shape, **times, **fields)


def a_run(**fields) -> Run:
    measurements = [
        timed("temporal", "Latte", "tubelet", 1.0),
        timed("temporal", "Latte", "torch SDPA", 2.0),
        timed("temporal", "Latte", "tubelet in torch", 0.1, comparable=False),
        Measurement("temporal", "Latte", "Broken", "wrong", reason="relative error 1 | of the norm", error=[1.0, 1.0]),
        Measurement("norms", "long", "", "not run", reason="the 465 s of the run were over"),
        Measurement("temporal", "Latte", "xFormers", "missing", reason="xformers.ops: No module <named> so"),
        timed("norms", "short", "tubelet", 0.05, graph_ms=0.01),
        timed("norms", "short", "eager torch", 0.05, graph_ms=0.03),
        timed("norms", "short", "cannot be captured", 0.04),
    ]
    for tokens in (256, 512, 1024, 2048):
        for name, power in (("tubelet", 1.0), ("torch", 2.0)):
            measurements.append(timed("length", f"{tokens}", name, (tokens / 256) ** power, series="full", shape={"tokens": tokens}))
        measurements.append(timed("CUDA graph", f"{tokens}", "tubelet", tokens / 256, shape={"tokens": tokens}))
    for clips in (1, 4):
        for name in ("tubelet", "tubelet one by one"):
            measurements.append(
                timed("packing", f"{clips}", name, 1.0 * clips, series="small", shape={"clips": clips, "tokens": clips * 64})
            )
    given = {
        "device": "NVIDIA Test 9000", "kind": "cuda", "date": "2026-11-20T10:00:00+00:00", "level": "default",
        "commit": "0" * 40, "complete": True,
        "versions": {"torch": "2.11.0"}, "ceilings": Ceilings(3e12, {"bfloat16": 7e14, "float32": 5e13}),
        "clocks": {"clocks.sm": [1.0, 2.0, 3.0]},
        "measurements": measurements, "host": {"load": 0.1},
    }  # fmt: skip
    return Run(**given | fields)


def test_what_is_written_is_read(tmp_path):
    run = a_run()
    record.write(run, tmp_path / "a.json")
    assert record.read(tmp_path / "a.json") == run
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_no_run_is_written_over(tmp_path):
    run, names = a_run(), set()
    for _ in range(3):
        path = record.path_of(run, tmp_path)
        record.write(run, path)
        names.add(path.name)
    assert names == {f"nvidia-test-9000-20261120T100000-00000000{end}.json" for end in ("", "-2", "-3")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.pop("device"), "expected a field 'device', got none"),
        (lambda run: run.update(colour="red"), "unknown field 'colour'"),
        (lambda run: run.update(schema=7), "schema: expected 1, got 7"),
        (lambda run: run.update(kind="tpu"), "kind: expected cuda or cpu, got 'tpu'"),
        (lambda run: run.update(level="fast"), "level: expected quick or default or full, got 'fast'"),
        (lambda run: run.update(measurements={}), "measurements: expected a list"),
        (lambda run: run["measurements"][0].update(ms="fast"), r"measurements\[0\]: ms: expected float, got 'fast'"),
        (lambda run: run["measurements"][0].update(ms=None), r"measurements\[0\]: ms: expected a time above 0"),
        (lambda run: run["measurements"][0].update(ms=-1.0), "expected a time above 0"),
        (lambda run: run["measurements"][3].update(ms=0.1), "expected none of a wrong result"),
        (lambda run: run["measurements"][0].update(status="fine"), "status: expected one of ok, wrong"),
        (lambda run: run["measurements"][0].pop("case"), "expected a field 'case'"),
        (lambda run: run["ceilings"].update(copy=True), "ceilings: copy: expected float, got True"),
    ],
)
def test_malformed_files_are_named(tmp_path, change, words):
    content = dataclasses.asdict(a_run())
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as raised:
        record.read(path)
    assert str(path) in str(raised.value)


def test_no_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        record.read(tmp_path / "a.json")


def test_committed_results_are_valid():
    for _, run in record.committed():
        assert run.commit and run.measurements


def test_the_best_peer_and_the_floor():
    found = {(row.op, row.case): row for row in analysis.rows(a_run())}
    row = found["temporal", "Latte"]
    assert row.peer.implementation == "torch SDPA" and row.ratio == 2 and row.ours.implementation == "tubelet"
    assert row.of_floor == pytest.approx(1e9 / 7e14 * 1e3)  # FLOPs bind: more than 1e6 / 3e12
    short = found["norms", "short"]
    assert short.in_graph and short.ratio == pytest.approx(3)  # both in a graph: like with like


def test_a_graph_is_not_compared_with_a_call():
    run = a_run(measurements=[timed("op", "a", "tubelet", 0.05, graph_ms=0.01), timed("op", "a", "torch", 0.04)])
    (row,) = analysis.rows(run)
    assert not row.in_graph and row.ratio == pytest.approx(0.8)


def test_exponents():
    found = {(series, name): exponent for series, name, exponent, _ in analysis.exponents(a_run())}
    assert found == {("full", "tubelet"): pytest.approx(1), ("full", "torch"): pytest.approx(2)}


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [(tmp_path / "gpu.json", a_run()), (tmp_path / "cpu.json", a_run(device="CPU x", kind="cpu"))]
    written = report.write_report(analysis.latest(runs), tmp_path / "out")
    names = {path.name for path in written}
    assert {"report.md", "report.html"} <= names and len([name for name in names if name.endswith(".png")]) == 10
    text, page = (tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    for words in ("NVIDIA Test 9000", "copy 3000 GB/s", "torch SDPA", "relative error 1 / of the norm", "They say nothing of any GPU",
                  "| (case) | not run | the 465 s of the run were over | norms (1) |",
                  "of 6 cases: 5 faster, 0 slower, 1 the same within the noise"):  # fmt: skip
        assert words in text
    assert "![Packing, CPU x; no GPU]" in text
    assert "xformers.ops: No module" in text
    # One file: pictures inside, and nothing from elsewhere.
    assert page.count("data:image/png;base64,") == 10 and not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert len(data) == 2 * len(a_run().measurements) and {len(row) for row in data} == {20}


def test_how_long_requests_wait():
    """In a pack until its end; one by one, the i-th of n for the i before it."""
    found = {(each.requests, each.how): each for each in analysis.packing(a_run())}
    packed, alone = found[4, "tubelet"], found[4, "tubelet one by one"]
    assert packed.rate == alone.rate == pytest.approx(4 * 64 / 4e-3) and packed.mean == packed.longest == 4
    assert alone.longest == 4 and alone.mean == (1 + 2 + 3 + 4) / 4
    assert found[1, "tubelet one by one"].mean == 1  # of a single request also where that was not timed by itself


@pytest.mark.parametrize(("bytes_", "expected"), [(1e5, 0.004), (2e6, 0.004), (5e6, 0.010), (8e6, 0.016), (8e7, 0.16), (0.0, None)])
def test_what_a_copy_of_as_many_bytes_takes(bytes_, expected):
    ceilings = Ceilings(1e12, {"bfloat16": 7e14}, {"2000000": 0.004, "8000000": 0.016})
    call = timed("norms", "short", "tubelet", 0.02, shape={"dtype": "bfloat16"}, flops=1e3, bytes=bytes_)
    assert roofline.copy_ms(call, ceilings) == (expected if expected is None else pytest.approx(expected))
    row = analysis.rows(a_run(measurements=[call], ceilings=ceilings))[0]
    assert row.copy == roofline.copy_ms(call, ceilings)
    assert roofline.copy_ms(dataclasses.replace(call, flops=1e12), ceilings) is None  # bound by the products
    assert roofline.copy_ms(call, Ceilings(1e12, {"bfloat16": 7e14})) is None  # an older file


def test_a_floor_needs_flops():
    run = a_run(measurements=[timed("sampling", "a", "tubelet", 1.0, flops=0.0)])
    (row,) = analysis.rows(run)
    assert row.of_floor is None


def test_latest_prefers_more_than_quick(tmp_path):
    old, quick, new = (
        (tmp_path / name, a_run(level=level, date=f"2026-11-{day}T10:00:00+00:00"))
        for name, level, day in (("a", "default", 10), ("b", "quick", 12), ("c", "full", 11))
    )
    assert analysis.latest([old, quick, new]) == [new] and analysis.latest([quick]) == [quick]


def test_an_unfinished_run_has_one_that_was_finished_beside_it(tmp_path):
    finished, unfinished = (
        (tmp_path / name, a_run(date=f"2026-11-{day}T10:00:00+00:00", complete=complete))
        for name, day, complete in (("a", 10, True), ("b", 11, False))
    )
    for each in unfinished[1].measurements:
        if each.op != "temporal":
            each.implementation, each.status = "", "not run"
    first, second = analysis.latest([finished, unfinished])
    assert first == unfinished and second[0] == finished[0]
    assert {each.op for each in second[1].measurements} == {each.op for each in finished[1].measurements} - {"temporal"}
    section = report.speed_section([first, second])
    assert section.count("| temporal | Latte |") == 1 and section.index("`b`") < section.index("| temporal") < section.index("`a`")


def test_a_run_of_some_cases_hides_no_others(tmp_path):
    whole, some = (tmp_path / "a", a_run(date="2026-11-10T10:00:00+00:00")), (tmp_path / "b", a_run(only=["norms"]))
    some[1].measurements = [each for each in some[1].measurements if each.op == "norms"]
    first, second = analysis.latest([whole, some])
    assert first == some and {each.op for each in second[1].measurements} >= {"temporal", "length", "packing"}
    assert not any(each.op == "norms" and each.implementation for each in second[1].measurements)


def test_what_was_tried_is_told():
    """Beside the counts of all cases."""
    told = analysis.outcome(a_run())
    assert "No compiled peer was tried." in told and "Not installed there: xFormers." in told
    slow = [timed("norms", "short", "torch.compile", 0.05, graph_ms=0.005), timed("temporal", "other", "FlexAttention", 3.0)]
    told = analysis.outcome(a_run(measurements=[*a_run().measurements, *slow]))
    assert "A compiled peer was tried in 1 of them: 0 faster, 1 slower, 0 the same within the noise; the median is 0.50 times" in told
    assert "compiled" not in analysis.outcome(a_run(kind="cpu"))


@pytest.mark.parametrize(("theirs", "verdict"), [(0.0103, "the same within the noise"), (0.0108, "faster"), (0.009, "slower")])
def test_in_a_graph_too_a_few_percent_are_noise(theirs, verdict):
    found = [timed("norms", "a", "tubelet", 0.05, graph_ms=0.01), timed("norms", "a", "eager torch", 0.05, graph_ms=theirs)]
    assert analysis.verdict(analysis.rows(a_run(measurements=found))[0]) == verdict


def test_the_readme_says_where_there_is_no_gpu(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(path, [(tmp_path / "cpu.json", a_run(device="CPU x", kind="cpu"))])
    text = path.read_text()
    assert (
        "no speed on a GPU is claimed" in text
        and "CPU x** (a CPU: no GPU was used, and this says nothing of any)" in text
        and "old" not in text
    )
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    report.update_readme(path, [(tmp_path / "gpu.json", a_run())])
    again = path.read_text()
    assert "no speed on a GPU" not in again and "| temporal | Latte | 1 | 2 (torch SDPA) | 2.00 |" in again
    path.write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: expected one line"):
        report.update_readme(path, [])


def differences(before: Measurement, after: Measurement, **options):
    found = compare(a_run(measurements=[before]), a_run(measurements=[after]), **options)
    return [(each.verdict, each.regression) for each in found]


def test_a_regression_is_found_and_noise_is_not():
    before = timed("op", "a", "tubelet", 1.0)
    assert differences(before, timed("op", "a", "tubelet", 1.2)) == [("slower", True)]
    assert differences(before, timed("op", "a", "tubelet", 0.8)) == [("faster", False)]
    assert differences(before, timed("op", "a", "tubelet", 1.03, 0.001)) == [("same", False)]  # apart, but within the margin
    assert differences(before, timed("op", "a", "tubelet", 1.03, 0.001), margin=0.01) == [("slower", True)]
    assert differences(timed("op", "a", "tubelet", 1.0, 0.2), timed("op", "a", "tubelet", 1.3, 0.2)) == [
        ("same", False)
    ]  # quartiles overlap
    assert differences(before, Measurement("op", "a", "tubelet", "wrong", ours=True)) == [("ok -> wrong", True)]
    assert differences(before, Measurement("op", "a", "tubelet", "out of memory", ours=True)) == [("ok -> out of memory", True)]
    assert differences(before, timed("op", "b", "tubelet", 1.0)) == [("missing", False), ("new", False)]
    broken = a_run(measurements=[Measurement("op", "a", "", "failed")])  # nothing of the case could be made
    assert [(each.verdict, each.regression) for each in compare(a_run(measurements=[before]), broken)] == [("ok -> failed", True)]
    graphs = [timed("op", "a", "tubelet", 0.1, graph_ms=ms) for ms in (0.01, 0.02)]
    assert differences(*graphs) == [("slower", True)]
    short = a_run(measurements=[Measurement("op", "a", "", "not run")])
    assert [each.verdict for each in compare(a_run(measurements=[before]), short)] == ["not run"]
    slow_peer = timed("op", "a", "torch", 1.0), timed("op", "a", "torch", 2.0)
    assert differences(*slow_peer) == [] and differences(*slow_peer, peers=True) == [("slower", False)]


@pytest.fixture
def tubelet(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tubelet", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    return run


def test_command(tubelet, tmp_path):
    code, said = tubelet("--device", "cpu", "--quick", "--only", "guided", "-o", "out")
    assert code == 0 and "say nothing of any GPU" in said and "written" in said, said
    (path,) = (tmp_path / "out").glob("*.json")
    run = record.read(path)
    assert run.complete and run.device.startswith("CPU") and {each.status for each in run.measurements} == {"ok"}
    code, said = tubelet("report", path, "-o", "report")
    assert code == 0 and (tmp_path / "report" / "report.html").is_file(), said
    assert tubelet("compare", path, path)[0] == 0
    slower = dataclasses.replace(run, measurements=[timed(*each.key, each.ms * 3, ours=each.ours) for each in run.measurements])
    record.write(slower, tmp_path / "slower.json")
    code, said = tubelet("compare", path, "slower.json")
    assert code == 1 and "slower" in said
    assert tubelet("compare", "slower.json", path)[0] == 0
    record.write(a_run(), tmp_path / "other.json")
    code, said = tubelet("compare", path, "other.json")
    assert code == 2 and "results of one device" in said


def test_list(tubelet, tmp_path):
    code, said = tubelet("--device", "cpu", "--list", "--only", "temporal")
    assert code == 0 and "temporal" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quick", "--full"), "--quick, --full: expected one of them"),
        (("--device", "tpu"), "--device: expected cuda"),
        (("--device", "cpu", "--only", "nonsense"), "--only: no case has 'nonsense'"),
        (("--device", "cpu", "-o", "no/where"), "--out: there is no folder no"),
        (("report", "none.json"), "none.json"),
    ],
)
def test_bad_input(tubelet, tmp_path, arguments, words):
    code, said = tubelet(*arguments)
    assert code == 2 and words in " ".join(said.split()) and "Traceback" not in said, said
    assert not list(tmp_path.iterdir())
