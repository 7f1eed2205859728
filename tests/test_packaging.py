"""What is in the distribution, what imports what, and that nothing is taken for a package that is none."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "engine", "bench")
MAY_IMPORT = {"kernels": set(), "engine": {"kernels"}, "bench": {"kernels", "engine"}}
MODULES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py") if "examples" not in path.parts)  # those are scripts
PACKAGES = sorted("tubelet." + ".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.name == "__init__.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = (
    "kernels/tuned/a.json",
    "engine/assets/a.png",
    "engine/assets/model/a.json",
    "engine/assets/model/text/a.txt",
    "bench/results/a.json",
)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports from, anywhere in it; relative ones resolved, names of a namespace included."""
    package = ("tubelet", *path.parent.relative_to(ROOT).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "tubelet" else {module}
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project to build, its files empty but those that the build reads, with data files where there will be some."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for path in (*MODULES, *(ROOT / part / "py.typed" for part in PARTS), *(ROOT / name for name in DATA)):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    return copy


def build(tree: Path, kind: str, to: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    ran = subprocess.run([sys.executable, "-c", code, str(to)], cwd=tree, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return next(to.iterdir())


def files(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for part in PARTS for path in (tree / part).rglob("*") if path.is_file()}


def test_wheel_holds_every_file(tree, tmp_path):
    with zipfile.ZipFile(build(tree, "wheel", tmp_path)) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {f"tubelet/{name}" for name in files(tree)}
    assert {f"tubelet/{part}/py.typed" for part in PARTS} <= held


def test_sdist_holds_every_file(tree, tmp_path):
    with tarfile.open(build(tree, "sdist", tmp_path)) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert files(tree) | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= held


def test_every_folder_with_modules_is_a_package():
    without = {str(path.parent.relative_to(ROOT)) for path in MODULES if not (path.parent / "__init__.py").is_file()}
    assert not without, "setup.py leaves out folders without an __init__.py"


@pytest.mark.parametrize("part", PARTS)
def test_imports_run_one_way(part):
    for path in (path for path in MODULES if path.is_relative_to(ROOT / part)):
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("tubelet.")}
        assert parts <= MAY_IMPORT[part] | {part}, path
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & set(PARTS), f"{path} imports a folder of the project as a top-level package"


def test_kernels_need_torch_and_triton_alone():
    tops = {name.partition(".")[0] for path in MODULES if path.is_relative_to(ROOT / "kernels") for name in imports(path)}
    assert tops - sys.stdlib_module_names <= {"tubelet", "torch", "triton"}


def test_pyproject_asks_for_what_is_imported():
    asked = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    asked |= {canonicalize_name(Requirement(line).name) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    tops = {name.partition(".")[0] for path in MODULES for name in imports(path)} - sys.stdlib_module_names - {"tubelet"}
    assert {canonicalize_name(name) for name in tops} <= asked


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package):
    module = importlib.import_module(package)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    assert [name for name in public if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", ["tubelet.kernels", "tubelet.engine"])
def test_public_names_are_declared(package):
    assert importlib.import_module(package).__all__


def test_no_folder_is_importable_by_its_own_name(tmp_path):
    """Under this project's pytest settings: `kernels` is also a package of somebody else's, and must never mean the folder here."""
    test = tmp_path / "test_names.py"
    test.write_text(
        "from importlib.util import find_spec\n"
        "def test_names():\n"
        f"    specs = [find_spec(name) for name in {PARTS}]\n"
        f"    assert not [spec for spec in specs if spec and (spec.origin or '').startswith({str(ROOT)!r})]\n"
    )
    # -P: as the `pytest` command does, and unlike `python -m pytest`, which puts the working directory on the path by itself.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), str(test)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout


def test_constraints_pin_every_requirement():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {}
    for line in filter(None, lines):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", line), f"constraints.txt: expected NAME==VERSION, got {line!r}"
        name, _, version = line.partition("==")
        assert name not in pins, f"constraints.txt: {name} is there twice"
        pins[name] = version
    wanted = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt: no pin for {name}"
        assert requirement.specifier.contains(pins[name]), f"constraints.txt: {name}=={pins[name]} does not meet {requirement}"


def test_the_folder_found_as_the_package_of_another_is_harmless():
    """From the checkout's root, `import kernels` finds this folder; its operators must not be registered a second time."""
    code = "import sys, tubelet.kernels, kernels; assert not [name for name in sys.modules if name.startswith('kernels.')]"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
