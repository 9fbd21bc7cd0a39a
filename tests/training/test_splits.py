from __future__ import annotations

from pathlib import Path

import pytest

from training import splits
from training.folders import DataError


@pytest.mark.parametrize("count", [4, 5, 10, 11, 100])
def test_dealt_splits_are_disjoint_complete_and_60_20_20(tmp_path: Path, count: int) -> None:
    names = [f"class{label}" for label in range(count)]
    parts = splits.split_classes(tmp_path, names)
    dealt = [name for split in splits.SPLITS for name in parts[split]]
    assert len(dealt) == len(set(dealt)) == count
    assert set(dealt) == set(names)
    assert abs(len(parts["train"]) - 0.6 * count) <= 0.5
    assert abs(len(parts["val"]) - 0.2 * count) <= 1
    assert all(parts.values())
    assert all(split == sorted(split) for split in parts.values())


def test_the_deal_depends_on_the_seed_alone(tmp_path: Path) -> None:
    names = [f"class{label}" for label in range(20)]
    first = splits.split_classes(tmp_path, names)
    assert splits.split_classes(tmp_path, names[::-1]) == first
    assert splits.split_classes(tmp_path / "elsewhere", names) == first
    assert splits.split_classes(tmp_path, names, seed=1) != first


def test_the_deal_stays_as_it_was_when_results_were_published(tmp_path: Path) -> None:
    parts = splits.split_classes(tmp_path, list("abcdefghij"))
    assert parts == {"train": list("bdefhi"), "val": list("ac"), "test": list("gj")}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"train": [', "splits.json is no JSON"),
        ('["class1"]', "no JSON object such as"),
        ('{"train": "class1"}', "'train' is no list of names"),
        ('{"train": ["class1"], "test": ["class2", "class1"]}', "'train' and 'test' share class1: what is learned"),
    ],
    ids=["syntax", "list", "text", "overlap"],
)
def test_a_splits_json_that_cannot_be_meant_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        splits.said(tmp_path)
