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
        config = read_config(folder / "config.json", cls.config_class)
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
        save_tensors(
            folder / "model.safetensors", {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.state_dict().items()}
        )


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name, or the GPU if there is one, else the CPU. Raises ValueError for one that is not there."""
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {str(device)!r}: {str(error).splitlines()[0]}") from error
    return picked


def fetch(name: str | Path, what: str, patterns: list[str]) -> Path:
    """A local folder, or where the files of a hub id that match the patterns were downloaded to. Raises FileNotFoundError."""
    if not isinstance(name, str | Path):
        raise TypeError(f"{what}: expected a folder or a hub id, got a {type(name).__name__}")
    folder, text = Path(name), str(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or folder.exists() or folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{what} {text!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # a bad name, no such name, no access, no network: each has its own class there
        raise FileNotFoundError(f"{what} {text!r}: no such folder, and not to be had from the Hugging Face hub: {error}") from error


def read_config(path: Path, config_class: type):
    """A dataclass from a JSON file. Raises FileNotFoundError or ValueError, naming the file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; expected one with {path.name}")
    values = read_json(path)
    known = {f.name for f in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path}: unknown fields {', '.join(unknown)}")
    try:
        return config_class(**{name: _tuples(value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


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
    """Write a JSON file whole or not at all."""
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
        whole.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(whole, path)


def write_whole(path: Path, data: bytes) -> None:
    """Write whole or not at all: to a new file beside it, which then takes its name. Raises OSError naming the path."""
    check_parent(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def check_parent(path: Path) -> None:
    """Raise FileNotFoundError if there is no folder to write `path` in."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: cannot be written: there is no folder {path.parent}")
