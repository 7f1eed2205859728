"""Tuned settings: how they are looked up, what a malformed file is told, and the search, with timers that are told what a launch costs."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tubelet.engine import cli
from tubelet.engine.pretrained import write_json
from tubelet.kernels import FrameCausal, Full, Spatial, Temporal, tuned

fused = pytest.importorskip("tubelet.kernels.attention.fused", reason="triton is not installed")
from tubelet.kernels.attention import configs, tune  # noqa: E402
from tubelet.kernels.attention.reference import attention_reference  # noqa: E402

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
SMALL = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1}
LARGE = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
ENTRY = {"forward": LARGE, "queries": SMALL, "keys": SMALL, "specialised": False, "milliseconds": {"forward": {"rule": 2.0, "tuned": 1.0}}}
HEADER = {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "torch": "2.13.0", "date": "2026-11-20"}
NAME = "nvidia-h100-80gb-hbm3.json"


def content(**classes):
    return HEADER | {"attention": {name.replace("_", " "): entry for name, entry in classes.items()}}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """That of the user and that of the package, on a machine with an H100."""
    for name in ("user", "package"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: HEADER["device"])
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "package")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "user"))
    return tmp_path / "user", tmp_path / "package"


# ---------------------------------------------------------------------------------------------------------------------------- reading


def test_the_folder_of_the_user_comes_first(folders):
    user, package = folders
    write_json(user / NAME, content(A=ENTRY))
    write_json(package / NAME, content(A=ENTRY | {"specialised": True}, B=ENTRY))
    assert tuned.settings(GPU, "attention", "A") == ENTRY
    assert tuned.settings(GPU, "attention", "B") == ENTRY
    assert tuned.settings(GPU, "attention", "C") is None
    assert tuned.settings(GPU, "norm", "A") is None


def test_the_package_alone(folders, monkeypatch):
    write_json(folders[1] / NAME, content(A=ENTRY))
    monkeypatch.delenv(tuned.VARIABLE)
    assert tuned.settings(GPU, "attention", "A") == ENTRY


def test_a_gpu_without_a_file_and_a_cpu(folders, monkeypatch):
    write_json(folders[0] / NAME, content(A=ENTRY))
    assert tuned.settings(CPU, "attention", "A") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    assert tuned.file_name(GPU) == "amd-instinct-mi300x.json"
    assert tuned.settings(GPU, "attention", "A") is None


def test_a_file_is_read_once(folders):
    write_json(folders[0] / NAME, content(A=ENTRY))
    assert tuned.settings(GPU, "attention", "A") == ENTRY
    (folders[0] / NAME).unlink()
    assert tuned.settings(GPU, "attention", "A") == ENTRY


def test_a_folder_that_is_not_there(folders, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, "nowhere")
    with pytest.raises(ValueError, match="TUBELET_TUNED: expected a folder, got 'nowhere'"):
        tuned.settings(GPU, "attention", "A")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: "{", "not valid JSON"),
        (lambda _: [], r"the file: expected an object, got \[\]"),
        (lambda c: c.pop("date") and c, "the file: expected a field 'date', got none"),
        (lambda c: c | {"torch": 2.1}, "torch: expected text, got 2.1"),
        (lambda c: c | {"norms": {}}, "the file: unknown field 'norms'"),
        (lambda c: c | {"attention": 1}, "attention: expected an object, got 1"),
        (lambda _: content(A=[]), r"attention: A: expected an object, got \[\]"),
        (lambda _: content(A={k: v for k, v in ENTRY.items() if k != "keys"}), "attention: A: expected a field 'keys', got none"),
        (lambda _: content(A=ENTRY | {"values": SMALL}), "attention: A: unknown field 'values'"),
        (lambda _: content(A=ENTRY | {"specialised": 1}), "attention: A: specialised: expected true or false, got 1"),
        (lambda _: content(A=ENTRY | {"keys": {"block_m": 16}}), "attention: A: keys: expected a field 'block_n', got none"),
        (lambda _: content(A=ENTRY | {"keys": SMALL | {"maxnreg": 1}}), "attention: A: keys: unknown field 'maxnreg'"),
        (lambda _: content(A=ENTRY | {"keys": SMALL | {"block_m": 48}}), "keys: block_m: expected a power of two, got 48"),
        (lambda _: content(A=ENTRY | {"keys": SMALL | {"num_warps": "4"}}), "keys: num_warps: expected a power of two, got '4'"),
        (lambda _: content(A=ENTRY | {"keys": SMALL | {"num_stages": True}}), "keys: num_stages: expected an integer >= 1, got True"),
    ],
)
def test_a_malformed_file(folders, change, words):
    changed = change(content(A=ENTRY))
    (folders[0] / NAME).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=f"{NAME}: .*{words}"):
        tuned.settings(GPU, "attention", "A")


def test_merging_keeps_the_other_classes():
    newer = HEADER | {"date": "2026-12-01"}
    one = tuned.merged({}, HEADER, "attention", "A", ENTRY)
    two = tuned.merged(one, newer, "attention", "B", ENTRY)
    again = tuned.merged(two, newer, "attention", "A", ENTRY | {"specialised": True})
    assert one == content(A=ENTRY)
    assert two == content(A=ENTRY, B=ENTRY) | newer
    assert again["attention"] == {"A": ENTRY | {"specialised": True}, "B": ENTRY}


def test_the_files_of_the_package():
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.read(path)["device"]


# --------------------------------------------------------------------------------------------------------------- settings of attention


@pytest.mark.parametrize(
    ("mask", "kind"), [(Full(), "video"), (FrameCausal(2, 1, 1), "video"), (Spatial(), "frame"), (Temporal(window=3), "site")], ids=str
)
def test_the_class_of_a_call(folders, mask, kind):
    q = SimpleNamespace(device=GPU, shape=(5, 2, 72), dtype=torch.float16)
    write_json(folders[0] / NAME, HEADER | {"attention": {f"72 float16 {kind}": ENTRY}})
    assert configs.configs_for(q, mask) == configs.Configs(configs.Config(**LARGE), *[configs.Config(**SMALL)] * 2)


def test_without_an_entry_the_rule_holds():
    assert configs.configs_for(torch.zeros(5, 2, 72), Full()) == configs.default_configs(72, torch.float32)


# ------------------------------------------------------------------------------------------------------------------------- the search

TINY = (tune.Shape("tiny", [(2, 2, 3)], 1, FrameCausal()), tune.Shape("with text", [(3, 1, 2)], 1, Full(), text=2))
RULE = configs.default_configs(16, torch.float32)


def reference_forward(*arguments, configs):
    return attention_reference(*arguments)


def reference_backward(do, q, k, v, out, lse, *rest, configs):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention_reference(*leaves, *rest)[0], leaves, do)


@pytest.fixture
def search(monkeypatch):
    """Run the search on the CPU, over tiles of 16 and 32, where a launch costs `cost(configs)` milliseconds and returns
    `tamper(configs, result)`. The reference stands in for the kernels, whose interpreter is slow, unless they are given.
    """
    monkeypatch.setattr(tune.hopper, "unavailable", lambda q, k, v, mask: "not asked for")

    def run(cost, tamper=lambda configs, result: result, shapes=TINY, forward=reference_forward, backward=reference_backward, **options):
        launched = []

        def launching(kernel):
            def launch(*arguments, configs):
                launched.append(configs)
                return tamper(configs, kernel(*arguments, configs=configs))

            return launch

        monkeypatch.setattr(tune, "attention_fused", launching(forward))
        monkeypatch.setattr(tune, "attention_fused_backward", launching(backward))
        options = {"blocks": (16, 32)} | options
        return tune.tune(16, torch.float32, "video", CPU, shapes=shapes, timer=lambda call: cost(launched[-1]), **options)

    return run


def distance(config, best):
    return 1 + sum(abs(math.log2(getattr(config, name) / value)) for name, value in best.items())


BEST = {
    "forward": {"block_m": 32, "block_n": 16, "num_warps": 1, "num_stages": 2},
    "queries": {"block_m": 16, "block_n": 32, "num_warps": 1, "num_stages": 4},
    "keys": {"block_m": 16, "block_n": 16, "num_warps": 1, "num_stages": 1},
}


def test_the_fastest_is_found(search):
    steps = []
    found = search(
        lambda ran: math.prod(distance(getattr(ran, kernel), best) for kernel, best in BEST.items()),
        progress=lambda *step: steps.append(step),
    )
    assert found.configs == configs.Configs(*(configs.Config(**best) for best in BEST.values()))
    assert found.left_out == {}
    for kernel in configs.KERNELS:
        done, totals, gains = zip(*(step[1:] for step in steps if step[0] == kernel), strict=True)
        assert list(done) == sorted(done) and done[-1] == totals[-1] and len(set(totals)) == 1
        rule, best = found.milliseconds[kernel]
        assert gains[-1] == pytest.approx(rule / best) and best < rule


def test_the_kernel_itself(search):
    """Interpreted: its results are taken for right."""
    kernels = {"forward": fused.attention_fused, "backward": fused.attention_fused_backward}
    found = search(lambda ran: 1.0 if ran == RULE else 2.0, quick=True, shapes=TINY[:1], **kernels)
    assert found.configs == RULE and found.left_out == {}


def test_the_quick_search_leaves_stages_alone(search):
    found = search(lambda ran: distance(ran.forward, BEST["forward"]), quick=True)
    assert found.configs.forward.block_m == 32 and found.configs.forward.block_n == 16 and found.configs.forward.num_stages == 3


def test_the_wrong_and_the_failing_are_left_out(search):
    wrong, failing = (lambda c: c.block_m == c.block_n == 16), (lambda c: c.block_m == c.block_n == 32 and c.num_stages == 3)

    def tamper(ran, result):
        if failing(ran.forward):
            raise RuntimeError("out of resource: shared memory")
        return [x * 1.001 for x in result] if wrong(ran.forward) else result

    found = search(lambda ran: 1.0 if wrong(ran.forward) or failing(ran.forward) else distance(ran.forward, BEST["forward"]) + 1, tamper)
    assert found.configs.forward == configs.Config(**BEST["forward"])
    assert {why for name, why in found.left_out.items() if "32x32" in name} == {"tiny: RuntimeError: out of resource: shared memory"}
    assert all("tiny: ArithmeticError: relative error" in why for name, why in found.left_out.items() if "16x16" in name)
    assert {name.split(",")[0] for name in found.left_out} == {"forward 16x16", "forward 32x32"}


def test_wrong_gradients_are_left_out(search):
    def tamper(ran, result):
        return [x * float("nan") for x in result] if ran.keys.block_n == 16 and len(result) == 3 else result

    found = search(lambda ran: 1.0 if ran.keys.block_n == 16 else 2.0, tamper)
    assert found.configs == RULE
    assert found.left_out and all(name.startswith("keys ") and "relative error nan" in why for name, why in found.left_out.items())


def test_the_rule_stays_unless_beaten_by_one_percent(search):
    found = search(lambda ran: 1.0 if ran == RULE else 0.995, quick=True)
    assert found.configs == RULE
    assert all(rule == best for rule, best in found.milliseconds.values())


def test_a_gain_that_does_not_come_again_is_none(search):
    """Of two timings in turn the first is lucky."""
    seen = set()

    def cost(ran):
        lucky = ran != RULE and ran not in seen
        seen.add(ran)
        return 0.5 if lucky else 1.0

    assert search(cost, shapes=TINY[:1], quick=True).configs == RULE


def test_the_hopeless_are_timed_once(search):
    counts = {}

    def cost(ran):
        counts[ran] = counts.get(ran, 0) + 1
        return 1.0 if ran.forward == RULE.forward else 2.0

    search(cost, shapes=TINY, quick=True)
    slow = [count for ran, count in counts.items() if ran.forward != RULE.forward]
    assert slow and set(slow) == {1}


def test_a_rule_that_fails_is_an_error(search):
    def tamper(ran, result):
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        search(lambda ran: 1.0, tamper)


@pytest.mark.parametrize("reason", [None, "needs a Hopper GPU"])
def test_the_specialised_kernel_is_tried_where_it_can_run(search, monkeypatch, reason):
    monkeypatch.setattr(tune.hopper, "unavailable", lambda q, k, v, mask: reason)
    found = search(lambda ran: 1.0 if ran.specialised else 2.0, quick=True, shapes=TINY[:1], blocks=(16,))
    assert found.configs.specialised == found.entry()["specialised"] == (reason is None)
    assert found.configs.forward.block_m == (RULE.forward.block_m if reason else 128)


def test_what_is_found_can_be_read(search, tmp_path):
    found = search(lambda ran: 1.23456 * distance(ran.forward, BEST["forward"]), quick=True, shapes=TINY[:1])
    write_json(tmp_path / NAME, tuned.merged({}, HEADER, "attention", "A", found.entry()))
    entry = tuned.read(tmp_path / NAME)["attention"]["A"]
    assert configs.Config(**entry["forward"]) == found.configs.forward
    assert entry["milliseconds"]["forward"]["rule"] == pytest.approx(found.milliseconds["forward"].rule, rel=1e-3)


@pytest.mark.parametrize("kind", tune.SHAPES)
def test_the_shapes_are_of_their_kind(kind):
    assert len(tune.SHAPES[kind]) >= 3 and {configs.kind_of(shape.mask) for shape in tune.SHAPES[kind]} == {kind}


@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_the_grid_is_modest(dim, monkeypatch):
    monkeypatch.setattr(tune.hopper, "unavailable", lambda q, k, v, mask: "not asked for")
    for quick, most in ((False, 50), (True, 16)):
        grid = tune._Search(dim, torch.bfloat16, CPU, TINY[:1], tune.BLOCKS, quick, None, None)
        for kernel in configs.KERNELS:
            assert 10 < len(grid._tiles(kernel, configs.default_configs(dim, torch.bfloat16))) <= most


# ------------------------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `tubelet tune attention`: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "console", Console(width=200))  # the command's own has the width that was set when it was made

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tubelet", "tune", "attention", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return ended.value.code or 0, " ".join((captured.out + captured.err).split())

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "error: tune: needs a GPU, and torch finds none"),
        (("--head-dim", 300), "--head-dim: expected 1 to 256, got 300"),
        (("--dtype", "int8"), "--dtype: expected one of float16, bfloat16, float32, got 'int8'"),
        (("--mask", "all"), "--mask: expected one of video, frame, site, got 'all'"),
    ],
)
def test_bad_input(command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = command("--out", "settings", *arguments)
    assert code == 2 and words in said and "Traceback" not in said
    assert not (tmp_path / "settings").exists()


@pytest.fixture
def gpu(folders, monkeypatch):
    """A machine that seems to have an H100, on which classes of Temporal masks never end."""

    def tune_class(head_dim, dtype, kind, device, *, quick, progress):
        if kind == "site":
            raise KeyboardInterrupt
        for kernel in configs.KERNELS:
            progress(kernel, 1, 2, 1.5)
        times = {kernel: tune.Milliseconds(2.0, 1.0) for kernel in configs.KERNELS}
        return tune.Tuning(configs.default_configs(head_dim, dtype), times, {"forward 16x16": "tiny: RuntimeError: out of [resource]"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", tune_class)
    return folders


def test_classes_are_written_and_others_kept(command, gpu):
    user, _ = gpu
    write_json(user / NAME, content(A=ENTRY))
    code, said = command("--head-dim", 64, "--head-dim", 72, "--mask", "video", "--dtype", "float16", "--quick")
    assert code == 0, said
    written = tuned.read(user / NAME)
    assert set(written["attention"]) == {"A", "64 float16 video", "72 float16 video"} and written["torch"] == torch.__version__
    assert (
        "+100.0%" in said
        and "128x64, 8 warps, 3 stages" in said
        and "left out forward 16x16: tiny: RuntimeError: out of [resource]" in said
    )


def test_an_interrupted_run_keeps_what_it_finished(command, gpu, tmp_path):
    code, said = command("--head-dim", 64, "--out", "new/settings")
    assert code != 0
    assert set(tuned.read(tmp_path / "new/settings" / NAME)["attention"]) == {"64 bfloat16 video", "64 bfloat16 frame"}
    assert "128x64, 8 warps, 3 stages" in said


def test_a_malformed_file_is_told_of_before_the_work(command, gpu):
    (gpu[0] / NAME).write_text("{")
    code, said = command()
    assert code == 2 and f"{NAME}: not valid JSON" in said and (gpu[0] / NAME).read_text() == "{"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    """A class tuned, written, and used."""
    here = torch.device("cuda", torch.cuda.current_device())
    shapes = [tune.Shape("small", [(4, 16, 16)], 4, Spatial())]
    found = tune.tune(64, torch.float16, "frame", here, quick=True, shapes=shapes, blocks=(32, 64))
    assert all(rule > 0 and best > 0 for rule, best in found.milliseconds.values())
    write_json(tmp_path / tuned.file_name(here), tuned.merged({}, tune.header(here), "attention", "64 float16 frame", found.entry()))
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    assert configs.configs_for(torch.zeros(1, 1, 64, dtype=torch.float16, device=here), Spatial()) == found.configs
