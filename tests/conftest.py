"""Without a GPU, Triton's kernels run in its interpreter, and what needs a GPU is skipped."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are decorated: before they are imported


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores, and what they start does
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


LONGEST = ("test_attention_block", "test_vae_memory", "test_bench")
"""Files that take minutes on two cores. Workers take whole files: these first, for none to wait for another at the end."""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # by how many tests a file has, which says little of its time
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def right_conversions():
    """Triton's interpreter (3.7.1) cuts float32 to bfloat16 instead of rounding it, rounds to E4M3 wrongly, takes its NaN for 480, and
    rounds the product of a fused multiplication and addition. Here it does as the GPU.
    """
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    narrow = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def convert_rightly(x, source, target, rounding_mode):
        if source == tl.float8e4nv:
            bits = target.primitive_bitwidth
            return torch.from_numpy(np.array(x)).view(torch.float8_e4m3fn).float().numpy().astype(f"float{bits}").view(f"uint{bits}")
        if source == tl.float32 and target in narrow:
            dtype, bits = narrow[target]
            x = torch.from_numpy(np.array(x))
            return (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype).view(bits).numpy()
        return convert(x, source, target, rounding_mode)

    def create_fma(self, x, y, z):
        a, b, c = (each.data.astype(np.float64) for each in (x, y, z))
        return interpreter.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert_rightly)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        yield


ONE_OF_A_NAME = {
    "test_autocast",
    "test_checkpoints",
    "test_forwards_of_others",
    "test_offloading_of_single_layers",
    "test_processors_of_others",
}


def pytest_generate_tests(metafunc):
    if "tiny" in metafunc.fixturenames:  # of `adapter_checks`
        models = metafunc.module.MODELS
        # What takes its time is done with one model of a file, or with one of each name before a comma.
        few = {"test_interpreted", "test_compiled"} | (set() if torch.cuda.is_available() else {"test_in_bfloat16"})
        most = 1 if metafunc.function.__name__ in few else None
        models = dict(list(models.items())[:most])
        if metafunc.function.__name__ in ONE_OF_A_NAME:
            models = {name: models[name] for name in {name.split(",")[0]: name for name in reversed(models)}.values()}
        metafunc.parametrize("tiny", models.values(), ids=models)
