"""Checkpoints: nested dictionaries of tensors and plain values, in one safetensors file, written atomically.

No pickle, so that a checkpoint from a stranger runs nothing. Knows nothing of what the values mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.data import DataError

_TENSOR = "tensor:"


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}{path}"  # the number, since a key may hold a slash and two paths be spelled alike
        tensors[name] = value.detach().cpu().contiguous().clone()
        return _TENSOR + name
    if isinstance(value, dict):
        # JSON turns integer keys into text, and optimizers use them: say what they were.
        return {
            "items": [
                [key if isinstance(key, str) else int(key), _flatten(item, f"{path}/{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _unflatten(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that after a kill or a power cut either the old file or the new one is there, whole.

    Raises DataError where the disk does not take it: the old file stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"tree": json.dumps(tree)})
    except (OSError, SafetensorError) as error:  # which says "I/O error" in a sentence of its own on a full disk
        partial.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error}") from None
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state given to `save`; tensors on the CPU, tuples as lists. Raises DataError for what is no checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            tree = json.loads(file.metadata()["tree"])
    except (SafetensorError, TypeError, KeyError, ValueError):
        raise DataError(f"{path} is no checkpoint of this program, or a damaged one.") from None
    state: dict[str, Any] = _unflatten(tree, tensors)
    return state
