from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import flushed
from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from safetensors import SafetensorError, safe_open

from training import checkpoint
from training.folders import DataError


def there_and_back(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    checkpoint.save(folder / "state.safetensors", state)
    return checkpoint.load(folder / "state.safetensors")


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


def test_what_is_nested_comes_back_with_its_keys_and_order(tmp_path: Path) -> None:
    state = {
        "b": 1,
        "a": {3: torch.arange(4), 0: {"x": [torch.ones(2, 2, dtype=torch.bfloat16), None, True]}},
        "text": "tensors: two",
        "number": 0.1 + 0.2,
        "infinite": float("-inf"),
        "empty": {},
        "list": [],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }
    assert same(there_and_back(state, tmp_path), state)


def test_integer_keys_and_the_same_digits_as_text_are_two_keys(tmp_path: Path) -> None:
    state = {"state": {1: torch.tensor(1), "1": torch.tensor(2)}, "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}}
    assert same(there_and_back(state, tmp_path), state)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on_from_what_was_loaded(optimizer: Any, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}

    def step(weight: torch.nn.Parameter, running: torch.optim.Optimizer) -> None:
        running.zero_grad()
        (weight**3).sum().backward()
        running.step()

    running = optimizer([weight], lr=0.1, **options)
    step(weight, running)
    loaded = there_and_back({"weight": weight, "optimizer": running.state_dict()}, tmp_path)
    other = torch.nn.Parameter(loaded["weight"].clone())
    resumed = optimizer([other], lr=0.5, **options)
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        step(weight, running)
        step(other, resumed)
    assert torch.equal(weight, other)


def test_views_and_shared_memory_come_back_as_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    state = {
        "transposed": base.transpose(1, 3),
        "last": base.to(memory_format=torch.channels_last),
        "part": base[0, 1],
        "again": base,
        "parameter": torch.nn.Parameter(base.clone()),
    }
    loaded = there_and_back(state, tmp_path)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not loaded["parameter"].requires_grad


def test_a_kill_before_the_new_file_is_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"step": 1, "weight": torch.ones(1000)})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            checkpoint.save(path, {"step": 2, "weight": torch.zeros(2000)})
    assert path.read_bytes() == before
    checkpoint.save(path, {"step": 3})  # what the kill left behind is in nobody's way
    assert checkpoint.load(path) == {"step": 3}
    with checkpoint.alone(tmp_path):  # and goes with the next run
        assert sorted(file.name for file in tmp_path.iterdir()) == [checkpoint.LOCK, path.name]


def test_what_kills_left_half_written_goes_from_folders_inside_too_and_under_its_older_name(tmp_path: Path) -> None:
    kept = [
        tmp_path / "round2" / "pretrain.safetensors",
        tmp_path / "film.mp4.partial",
        tmp_path / "artifact.partial" / "weights.safetensors",
        tmp_path / "other" / checkpoint.LOCK,  # a run of its own, which may be at work
        tmp_path / "other" / "round1" / "pretrain.safetensors.0f0f0f0f.partial",
    ]
    halves = [
        tmp_path / "pretrain.partial",
        tmp_path / "metatrain.safetensors.partial",
        tmp_path / "round2" / "pretrain.safetensors.0f0f0f0f.partial",
        tmp_path / "mixed" / "seed0" / "pretrain.safetensors.0f0f0f0f.partial",
    ]
    for path in kept + halves:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with checkpoint.alone(tmp_path):
        assert [path for path in kept + halves if path.exists()] == kept


def test_what_two_write_at_once_is_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, inside = tmp_path / "state.safetensors", checkpoint.save_file, []

    def overtaken(tensors: Any, file: Path, metadata: Any) -> None:
        write(tensors, file, metadata)
        if not inside:
            inside.append(file)
            checkpoint.save(path, {"run": 2, "weight": torch.zeros(3)})

    monkeypatch.setattr(checkpoint, "save_file", overtaken)
    checkpoint.save(path, {"run": 1, "weight": torch.ones(3)})
    assert same(checkpoint.load(path), {"run": 1, "weight": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with (
        checkpoint.alone(out),
        checkpoint.alone(tmp_path / "other"),
        pytest.raises(DataError, match=f"Another run is at work in {out}: wait"),
        checkpoint.alone(out),
    ):
        raise AssertionError("held twice")
    with checkpoint.alone(out):
        pass


def test_where_a_file_system_has_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", none)
    with checkpoint.alone(tmp_path):
        checkpoint.save(tmp_path / "state.safetensors", {"step": 1})


def test_the_new_file_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bytes and name are flushed, in the order that a power cut asks for."""
    done = flushed.noted(monkeypatch)
    checkpoint.save(tmp_path / "state.safetensors", {"weight": torch.ones(2)})
    assert done == ["flush state.safetensors.*.partial", "name state.safetensors", f"flush {tmp_path.name}"]


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state.safetensors"
    checkpoint.save(path, {"step": 1})
    assert checkpoint.load(path) == {"step": 1}


def test_the_file_is_plain_safetensors_with_no_pickle_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"weight": torch.ones(2), "deep": {0: [torch.zeros(1)]}})
    assert set(checkpoint.load(path)) == {"weight", "deep"}
    raw = path.read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["tree"]
    assert not zipfile.is_zipfile(path)  # which is what torch.save writes
    with safe_open(path, framework="np") as file:
        assert len(list(file.keys())) == 2


def test_what_is_neither_tensor_nor_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "state.safetensors", {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"step": 1})

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DataError, match="cannot be written: I/O error: No space left on device"):
        checkpoint.save(path, {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert checkpoint.load(path) == {"step": 1}
