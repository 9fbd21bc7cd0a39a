from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.images import ImageDecoder
from training import checkpoint, data, pretrain, pretrained, progressive, vision
from training.config import PretrainConfig

TINY = {"shape": "tiny", "size": 32, "batch": 8, "lr": 0.05, "device": "cpu", "precision": "float32", "epochs": 1}
ROUNDS = {**TINY, "labels": "clusters", "objectives": "projected=1,contrastive=0.5", "rounds": 2, "cluster": 6}


@pytest.fixture(scope="module")
def start(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start")
    pretrain.main(PretrainConfig(data=shapes, out=out, **TINY))
    return out


@pytest.fixture(scope="module")
def unbroken(shapes: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    pretrain.main(PretrainConfig(data=shapes, out=out, start=start, **ROUNDS))
    return out


def same(first: Path, second: Path) -> bool:
    one, two = (load_file(folder / pretrained.CHECKPOINT) for folder in (first, second))
    return len(one) > 3 and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def heads(folder: Path) -> int:
    """For how many classes the last round had directions."""
    return len(checkpoint.load(folder / pretrained.CHECKPOINT)["network"]["heads.projected.directions"])


def test_each_round_starts_from_the_one_before_and_the_last_is_the_result(unbroken: Path, start: Path) -> None:
    first, last = (pretrained.load_extractor(unbroken / f"round{n}")[0].state_dict() for n in (1, 2))
    found, config = pretrained.load_extractor(unbroken)
    assert all(torch.equal(found.state_dict()[name], last[name]) for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert config.start == unbroken / "round1"
    assert pretrained.load_extractor(unbroken / "round1")[1].start == start
    assert 5 < heads(unbroken) <= 12  # 72 images in clusters of six
    assert pretrained.classes_of(unbroken) == pretrained.classes_of(start) != ""  # not those of the clusters


def test_no_label_is_read(
    shapes: Path, start: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = data.load

    def shuffled(*arguments: Any, **options: Any) -> data.Images:
        images = load(*arguments, **options)
        labels = np.random.default_rng(0).permutation(images.labels)
        return data.Images(images.pixels, labels, images.classes, images.groups)

    monkeypatch.setattr(data, "load", shuffled)
    pretrain.main(PretrainConfig(data=shapes, out=tmp_path, start=start, **ROUNDS))
    assert same(unbroken, tmp_path)


def test_rounds_stopped_by_the_clock_go_on_to_the_same_end(
    shapes: Path, start: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data": shapes, "out": tmp_path, "start": start, **ROUNDS}
    take_step = vision.Run.take_step

    def slowly(run: vision.Run) -> dict[str, Tensor]:
        time.sleep(0.03)  # so that of its 16 steps the clock lets no run make more than three
        return take_step(run)

    with monkeypatch.context() as slow:
        slow.setattr(vision.Run, "take_step", slowly)
        for _ in range(4):
            pretrain.main(PretrainConfig(**given, minutes=1e-3))
            assert not (tmp_path / pretrained.CHECKPOINT).exists()
    pretrain.main(PretrainConfig(**given))
    assert same(unbroken, tmp_path)
    before = (tmp_path / "round1" / "pretrain.jsonl").stat().st_size
    pretrain.main(PretrainConfig(**given))  # once more changes nothing
    assert same(unbroken, tmp_path)
    assert (tmp_path / "round1" / "pretrain.jsonl").stat().st_size == before


def test_going_on_with_other_settings_is_refused(shapes: Path, start: Path, unbroken: Path) -> None:
    with pytest.raises(SystemExit, match="made with other settings"):
        pretrain.main(PretrainConfig(data=shapes, out=unbroken, start=start, **{**ROUNDS, "lr": 0.06}))


def test_turned_images_are_clustered_as_images_of_their_own(shapes: Path, start: Path, tmp_path: Path) -> None:
    given = {**ROUNDS, "rounds": 1, "rotations": True, "batch": 64}
    pretrain.main(PretrainConfig(data=shapes, out=tmp_path, start=start, **given))
    assert 24 < heads(tmp_path) <= 48


def test_without_a_start_there_is_nothing_to_cluster(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--labels clusters needs --start"):
        pretrain.main(PretrainConfig(data=shapes, out=tmp_path, **ROUNDS))


def test_clusters_are_no_labels_but_a_start_may_have_seen_some(shapes: Path, start: Path, tmp_path: Path) -> None:
    own = {"data": shapes, "out": tmp_path / "next"}
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    for folder, objectives in ((seen, "projected=1"), (unseen, "contrastive=1")):
        pretrain.main(PretrainConfig(data=shapes, out=folder, **{**TINY, "objectives": objectives}))
    assert pretrained.labelled(PretrainConfig(**own, **{**TINY, "objectives": "supervised=1,contrastive=1"}))
    assert not pretrained.labelled(PretrainConfig(**own, **TINY))
    assert pretrained.labelled(PretrainConfig(**own, start=seen, **ROUNDS))
    assert not pretrained.labelled(PretrainConfig(**own, start=unseen, **ROUNDS))
    assert pretrained.labelled(PretrainConfig(**own, start=tmp_path / "gone", **ROUNDS))  # nobody knows


def test_what_is_left_out_is_said(
    shapes: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PretrainConfig(data=shapes, out=tmp_path, start=start, **ROUNDS)
    images = data.load(shapes, "train", ImageDecoder(32, 32, 3))
    found = progressive.clustered(config, images)
    assert len(found) <= 65  # of 72 a tenth is without a class
    assert set(found.labels.tolist()) == set(range(len(found.classes)))
    assert f"{len(found.classes)} clusters of {len(found)} images" in capsys.readouterr().err
    assert not (tmp_path / "pretrain.jsonl").exists()
    assert json.dumps(found.classes[:2]) == '["cluster0", "cluster1"]'
