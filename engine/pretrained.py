"""Models in folders: config.json and model.safetensors, written whole or not at all. Nothing is ever unpickled."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


class PretrainedModule(nn.Module):
    """A module made from a frozen dataclass `config_class`, saved to and loaded from a folder."""

    config_class: type

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """Load from a folder. Raises FileNotFoundError for a missing folder or file, ValueError for contents that do not fit."""
        folder = Path(folder)
        config = cls.config_class(**read_config(folder, cls.config_class))
        model = cls(config)
        tensors = load_tensors(folder / "model.safetensors")
        # Weights may be stored in half precision to be small; the model computes in float32 unless it is asked otherwise.
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        expected = model.state_dict()
        wrong = sorted(set(expected) ^ set(state)) + [n for n in expected if n in state and expected[n].shape != state[n].shape]
        if wrong:
            raise ValueError(f"{folder / 'model.safetensors'}: does not fit config.json at {len(wrong)} tensors, the first is {wrong[0]!r}")
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; floating point tensors as `dtype` if one is given."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dataclasses.asdict(self.config))
        save_tensors(folder / "model.safetensors", {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.state_dict().items()})


def read_config(folder: Path, config_class: type) -> dict:
    """The fields of a dataclass from folder/config.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with config.json and model.safetensors")
    values = read_json(folder / "config.json")
    known = {f.name for f in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{folder / 'config.json'}: unknown fields {', '.join(unknown)}")
    return {name: _tuples(value) for name, value in values.items()}


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: dict) -> None:
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; a ValueError that names the file if it is corrupt or cut short."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (weights are read from safetensors only)")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        whole = Path(temporary) / path.name
        save_file(tensors, whole, metadata)
        os.replace(whole, path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        whole = Path(temporary) / path.name
        whole.write_bytes(data)
        os.replace(whole, path)
