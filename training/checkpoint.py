"""Checkpoints: nested dictionaries of tensors and plain values, in one safetensors file, written atomically.

No pickle, so that a checkpoint from a stranger runs nothing. Knows nothing of what the values mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.folders import DataError

LOCK = ".lock"
OLDER = {"pretrain.partial", "metatrain.partial", "baseline.partial"}  # names of halves that had no digits
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder of a run, and takes out what a kill left half written there, or in a folder of a part of it.

    Raises DataError where another run holds it: each would write its own checkpoints over those of the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:  # stays: whoever removed it would let two runs hold one each
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another run is at work in {folder}: wait for its end, or choose another --out.") from None
        except OSError:
            pass  # a network's file system may have no locks
        for left in _halves(folder):
            with suppress(OSError):
                left.unlink()
        yield


def _halves(folder: Path) -> list[Path]:
    """What kills left half written in the folder of a run and in those inside, but for runs of their own."""
    return [
        left
        for left in folder.rglob("*.partial")
        if (".safetensors." in left.name or left.name in OLDER)
        and not any((above / LOCK).exists() for above in left.parents if folder in above.parents)
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that after a kill or a power cut either the old file or the new one is there, whole.

    Raises DataError where the disk does not take it: the old file stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: nobody else's half goes in its place, even where a file system has no locks.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
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
