"""Which implementation ran, why others did not, and that the package stands on torch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tubelet.kernels import (
    Engagement,
    Full,
    Modulation,
    VideoLayout,
    attention,
    engaged,
    gated_residual,
    modulated_norm,
    patch_embed,
    qk_norm_rope,
    reset_engaged,
)
from tubelet.kernels.dispatch import as_operator, select

LAYOUT = VideoLayout.pack([(1, 2, 2)])
HEADS = torch.zeros(4, 2, 8)
TOKENS = torch.zeros(4, 8)
OPS = {
    "attention": lambda **options: attention(HEADS, HEADS, HEADS, LAYOUT, Full(), **options),
    "modulated_norm": lambda **options: modulated_norm(TOKENS, **options),
    "gated_residual": lambda **options: gated_residual(TOKENS, TOKENS, **options),
    "qk_norm_rope": lambda **options: qk_norm_rope(HEADS, HEADS, **options),
    "patch_embed": lambda **options: patch_embed([torch.zeros(2, 1, 4, 4)], torch.zeros(3, 8), **options),
}


@pytest.fixture(autouse=True)
def clean_record():
    reset_engaged()
    yield
    reset_engaged()


@pytest.mark.parametrize("op", OPS)
def test_each_call_is_counted(op):
    assert engaged() == {}
    OPS[op]()
    OPS[op](implementation="torch")
    OPS[op](implementation="reference")
    record = engaged()
    assert list(record) == [op]
    assert {name: engagement.calls for name, engagement in record[op].items()} == {"torch": 2, "reference": 1}
    reset_engaged()
    assert engaged() == {}


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_passed_over_where_a_name_is_asked_for(op):
    OPS[op](implementation="torch")
    assert engaged()[op]["torch"].passed_over == {}


@pytest.mark.parametrize("op", OPS)
def test_what_cannot_run_says_why(op):
    with pytest.raises(ValueError, match=f"implementation: {op} cannot run as 'gluon': .+"):
        OPS[op](implementation="gluon")
    assert engaged() == {}  # what did not run is not recorded


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_is_told_the_known_ones(op):
    with pytest.raises(ValueError, match=f"implementation: expected one of auto, .*torch, reference.* for {op}, got 'cuda'"):
        OPS[op](implementation="cuda")


def test_the_record_is_a_copy():
    OPS["attention"]()
    before = engaged()
    OPS["attention"]()
    assert before["attention"]["torch"].calls == 1 and engaged()["attention"]["torch"].calls == 2
    before["attention"].clear()
    assert engaged()["attention"]["torch"].calls == 2


def test_a_compiled_graph_is_compiled_once():
    """Neither the record nor another number of tokens compiles the elementwise ops anew."""
    from torch._dynamo.testing import CompileCounter

    def block(x, y, table, rows):
        x, h = gated_residual(x, y, table, rows, norm=Modulation(table, table))
        h = h.unflatten(1, (2, -1))
        return x, qk_norm_rope(h, h)

    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 6, 7, 8):
        x, rows = torch.randn(tokens, 16), torch.arange(tokens) % 3
        block(x, x, torch.randn(3, 16), rows)  # counted, between the calls of the graph
        compiled(x, x, torch.randn(3, 16), rows)
    assert counter.frame_count == 1


def test_auto_takes_the_first_that_is_available():
    first, second = (lambda: 1), (lambda: 2)
    assert select("op", "auto", {"triton": first, "torch": second}, {"gluon": "the GPU is too old"}) is first
    assert select("op", "torch", {"triton": first, "torch": second}, {"gluon": "the GPU is too old"}) is second
    assert engaged() == {"op": {"triton": Engagement(calls=1, passed_over={"gluon": "the GPU is too old"}), "torch": Engagement(calls=1)}}


WHY_NOT = """
import torch
from tubelet.kernels import Full, VideoLayout, attention, engaged, gated_residual, modulated_norm, patch_embed, qk_norm_rope

x = torch.randn(4, 2, 8)
attention(x, x, x, VideoLayout.pack([(1, 2, 2)]), Full())
modulated_norm(x[:, 0])
gated_residual(x[:, 0], x[:, 1])
qk_norm_rope(x, x)
patch_embed([torch.zeros(2, 1, 4, 4)], torch.zeros(3, 8))
for op, ran in engaged().items():
    print(op, ran["torch"].passed_over["triton"])
"""


def test_ops_on_a_cpu_say_why_their_kernels_were_passed_over(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", WHY_NOT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    lines = ran.stdout.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(OPS), ran.stderr
    assert all("needs a GPU, and the tensors are on cpu" in line for line in lines)


ON_TORCH_ALONE = """
import sys
from pathlib import Path

ABSENT = ("triton", "av", "diffusers", "einops", "transformers")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from tubelet.kernels import Full, VideoLayout, attention, engaged

x = torch.randn(4, 2, 8)
attention(x, x, x, VideoLayout.pack([(1, 2, 2)]), Full())
assert not set(ABSENT) & {name.partition(".")[0] for name in sys.modules}
print(engaged()["attention"]["torch"].calls)
"""


def test_imports_with_torch_alone(tmp_path):
    ran = subprocess.run([sys.executable, "-c", ON_TORCH_ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["1"]


@as_operator("tubelet_tests::double")
def double(x: torch.Tensor, more: list[torch.Tensor]) -> torch.Tensor:
    return 2 * x


@double.register_fake
def _(x, more):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.more = len(inputs[1])


double.register_autograd(lambda ctx, g: (2 * g, [None] * ctx.more), setup_context=_save)


def test_an_operator_is_one_where_torch_looks():
    """And else a call of the function."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    names, x = [], torch.ones(3)
    with Names():
        assert double(x, []).tolist() == [2, 2, 2]
    assert "tubelet_tests.double.default" in names
    leaf = x.clone().requires_grad_()
    double(leaf, []).sum().backward()
    assert leaf.grad.tolist() == [2, 2, 2]
    assert double(x, [leaf]).requires_grad and not double(x, []).requires_grad
    with torch.no_grad():
        assert not double(leaf, []).requires_grad
    assert double(torch.ones(3, device="meta"), []).is_meta
    compiled = torch.compile(lambda x: double(x, []) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(x).tolist() == [3, 3, 3]


def test_a_kernel_is_launched_as_triton_launches_it():
    """Whatever the arguments, also when what was compiled is found by our own key: the same kernel, the same arguments."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).with_name("launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert set(map(tuple, found["launches"])) == {(3, 1)} and found["kernels"] > 12
    assert found["engaged"] == {"kernel": 2 * len(found["launches"])}
