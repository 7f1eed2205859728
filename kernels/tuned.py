"""How kernels are launched where it was measured: settings per GPU model and class of shapes, written by `tubelet tune`, read here.

A GPU has one JSON file, `<slug of its name>.json`, in the folder that TUBELET_TUNED names or in `tuned/` beside this module; an entry of
the first hides that of the second. Nothing is measured while sampling: a class without an entry is launched by the op's own rule.

    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "torch": "2.13.0", "date": "2026-11-20",
     "attention": {"128 bfloat16 video": {"forward": {"block_m": 128, ...}, "queries": {...}, "keys": {...}, "specialised": false,
                                          "milliseconds": {"forward": {"rule": 16.2, "tuned": 14.9}, ...}}}}

A class of shapes must not depend on lengths, nor on anything else that a pack holds: tile sizes change the order of sums, and a clip's
numbers are to be the same bits in any pack. For attention it is the head dim, the dtype and the kind of the mask.
"""

import json
import os
import re
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).with_suffix("")
VARIABLE = "TUBELET_TUNED"

KERNELS = {"attention": ("forward", "queries", "keys")}
"""The kernels of each op."""
_HEADER = ("device", "triton", "torch", "date")
_SETTINGS = ("block_m", "block_n", "num_warps", "num_stages")


def settings(device: torch.device, op: str, shape_class: str) -> dict | None:
    """The entry of a class on a GPU; None for one that was not tuned, and off a GPU. Each file is read once in a process.

    Raises ValueError for a malformed file, naming file and field, and for a TUBELET_TUNED that is no folder.
    """
    if device.type != "cuda":
        return None
    name = file_name(device)
    for folder in folders():
        entry = _read_once(folder / name).get(op, {}).get(shape_class)
        if entry is not None:
            return entry
    return None


def file_name(device: torch.device) -> str:
    """Of a GPU's settings: "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-") + ".json"


def folders() -> list[Path]:
    """Where settings are looked for, in this order. Raises ValueError for a TUBELET_TUNED that is no folder."""
    named = os.environ.get(VARIABLE)
    if not named:
        return [FOLDER]
    if not os.path.isdir(named):
        raise ValueError(f"{VARIABLE}: expected a folder, got {named!r}")
    return [Path(named), FOLDER]


def read(path: Path) -> dict:
    """The contents of a file, {} if there is none. Raises ValueError for a malformed one, naming the file and the field."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    _check_fields(path, "the file", content, _HEADER, KERNELS)
    for field in _HEADER:
        if not isinstance(content[field], str):
            raise ValueError(f"{path}: {field}: expected text, got {content[field]!r}")
    for op in KERNELS.keys() & content.keys():
        if not isinstance(content[op], dict):
            raise ValueError(f"{path}: {op}: expected an object, got {content[op]!r}")
        for shape_class, entry in content[op].items():
            _check_entry(path, f"{op}: {shape_class}", entry, KERNELS[op])
    return content


_read_once = lru_cache(read)


def merged(content: dict, header: dict[str, str], op: str, shape_class: str, entry: dict) -> dict:
    """The contents of a file with another header, and with an entry added or replaced."""
    return content | header | {op: content.get(op, {}) | {shape_class: entry}}


def _check_entry(path: Path, field: str, entry, kernels: tuple[str, ...]) -> None:
    _check_fields(path, field, entry, (*kernels, "specialised"), ("milliseconds",))
    if not isinstance(entry["specialised"], bool):
        raise ValueError(f"{path}: {field}: specialised: expected true or false, got {entry['specialised']!r}")
    for kernel in kernels:
        _check_fields(path, f"{field}: {kernel}", entry[kernel], _SETTINGS)
        for name, value in entry[kernel].items():
            whole = type(value) is int and value >= 1
            if not whole or (name != "num_stages" and value & (value - 1)):
                wanted = "an integer >= 1" if name == "num_stages" else "a power of two"
                raise ValueError(f"{path}: {field}: {kernel}: {name}: expected {wanted}, got {value!r}")


def _check_fields(path: Path, field: str, found, needed, allowed=()) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {field}: expected an object, got {found!r}")
    for name in needed:
        if name not in found:
            raise ValueError(f"{path}: {field}: expected a field {name!r}, got none")
    for name in found:
        if name not in (*needed, *allowed):
            raise ValueError(f"{path}: {field}: unknown field {name!r}")
