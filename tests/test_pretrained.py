"""Models in folders: what is saved comes back, what is broken is named, nothing is unpickled."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from torch import nn
from tubelet.engine.pretrained import PretrainedModule, fetch, load_tensors, pick_device, save_tensors, write_json, write_whole


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    width: int = 3
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")


class Tiny(PretrainedModule):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, 2)
        self.register_buffer("count", torch.tensor(3))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    tiny = Tiny(TinyConfig(5, (4, 5, 6)))
    tiny.save_pretrained(tmp_path / "model")
    return tiny, tmp_path / "model"


def test_a_saved_module_comes_back(saved):
    tiny, folder = saved
    back = Tiny.from_pretrained(folder)
    assert back.config == tiny.config and not back.training
    assert all(torch.equal(back.state_dict()[name], value) for name, value in tiny.state_dict().items())
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_half_precision_on_disk_is_float32_in_use(saved):
    tiny, folder = saved
    tiny.save_pretrained(folder, torch.float16)
    assert load_tensors(folder / "model.safetensors")["layer.weight"].dtype == torch.float16
    back = Tiny.from_pretrained(folder)
    assert back.layer.weight.dtype == torch.float32 and back.count.dtype == torch.int64
    assert torch.equal(back.layer.weight, tiny.layer.weight.half().float())


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def swap_in_a_pickle(path):
    path.write_bytes(pickle.dumps({"layer.weight": [1.0]}))


def edit(**changes):
    def change(path):
        values = json.loads((path.parent / "config.json").read_text()) | changes
        (path.parent / "config.json").write_text(json.dumps(values))

    return change


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (cut, ValueError, r"model\.safetensors: not a whole safetensors file"),
        (swap_in_a_pickle, ValueError, r"model\.safetensors: not a whole safetensors file"),
        (lambda path: path.unlink(), FileNotFoundError, r"model\.safetensors: no such file"),
        (lambda path: (path.parent / "config.json").unlink(), FileNotFoundError, r"config\.json: no such file"),
        (lambda path: (path.parent / "config.json").write_text("{"), ValueError, r"config\.json: not valid JSON"),
        (lambda path: (path.parent / "config.json").write_text("[1]"), ValueError, r"config\.json: expected a JSON object, got list"),
        (edit(depth=3), ValueError, r"config\.json: unknown fields depth"),
        (edit(width=0), ValueError, r"config\.json: width: expected at least 1, got 0"),
        (edit(width=7), ValueError, r"does not fit config\.json at 1 tensors, the first is 'layer\.weight'"),
    ],
)
def test_broken_folders_are_named(saved, harm, error, words):
    _, folder = saved
    harm(folder / "model.safetensors")
    with pytest.raises(error, match=words):
        Tiny.from_pretrained(folder)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        Tiny.from_pretrained(tmp_path / "none")
    for name in (tmp_path / "none", "./none", "/none/of/these"):
        with pytest.raises(FileNotFoundError, match=r"model '.*none.*': no such folder"):
            fetch(name, "model", ["*.json"])
    with pytest.raises(TypeError, match="model: expected a folder or a hub id, got a int"):
        fetch(3, "model", [])


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"device: cannot use '{name}'"):
            pick_device(name)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, b"new"),
        lambda path: write_json(path, {"a": 1}),
        lambda path: save_tensors(path, {"a": torch.ones(2)}),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
