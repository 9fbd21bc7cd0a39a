from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch

from models.text import TextDecoder
from training import augment, data, splits, synthetic, texts
from training.folders import DataError


def test_a_folder_of_text_files_is_read_by_class_and_split(tmp_path: Path) -> None:
    source = synthetic.write_texts(tmp_path / "texts", classes=5, texts=3)
    (source / "class00" / "note.png").write_bytes(b"no text")
    found = [data.load(source, split, TextDecoder(32)) for split in splits.SPLITS]
    assert [len(part.classes) for part in found] == [3, 1, 1]
    everything = data.load(source, "all", TextDecoder(32))
    assert everything.pixels.shape == (15, 32)
    first = (source / "class00" / "00.txt").read_bytes()[:32]
    assert everything.pixels[0].tobytes().rstrip(b"\0") == first.rstrip(b"\0")


def test_the_lines_of_a_file_are_texts_with_labels(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [{"text": "one", "label": "b"}, {"text": "zwei", "label": "a"}, {"text": "two", "label": "b"}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    found = data.load(file, "all", TextDecoder(8))
    assert found.classes == ("a", "b")
    assert [row.tobytes().rstrip(b"\0") for row in found.pixels] == [b"zwei", b"one", b"two"]
    (tmp_path / "splits.json").write_text('{"train": ["a"], "test": ["b"]}')
    assert data.load(file, "train", TextDecoder(8)).classes == ("a",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no object"),
        ("[]", "no object"),
        ('{"label": "a"}', "no object"),
        ('{"text": 1}', "strings"),
        ('{"text": "a", "label": null}', "strings"),
        ('{"text": "a\\u0000"}', "NUL"),
        ('{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_text_stops_the_training_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=f"texts.jsonl:2.*{words}"):
        data.load(file, "all", TextDecoder(8))


def test_one_file_is_cut_into_whole_lines_and_is_one_class(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("It was\na dark\n\nand stormy night, so they say\n")
    found = data.load(file, "train", TextDecoder(16))
    assert found.classes == (texts.UNNAMED,)
    pieces = [row.tobytes().rstrip(b"\0").decode() for row in found.pixels]
    assert pieces == ["It was\na dark\n\n", "and stormy night", ", so they say\n"]


def test_a_cut_loses_nothing_and_splits_no_character() -> None:
    text = "ä" * 31 + "\n" + "b€" * 9
    for length in (4, 5, 7, 16):
        pieces = list(texts.cut(text.encode(), length))
        assert b"".join(pieces).decode() == text
        assert all(len(piece) <= length and piece.decode() for piece in pieces)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no texts in class folders .looked for .txt."):
        data.load(tmp_path, "all", TextDecoder(8))


def test_a_stretch_is_a_part_of_its_text_and_comes_from_anywhere_in_it() -> None:
    lengths = [1, 2, 7, 20, 24]
    given = torch.zeros(len(lengths), 24, dtype=torch.uint8)
    for row, length in enumerate(lengths):
        given[row, :length] = torch.arange(1, length + 1)
    begins = set()
    for seed in range(30):
        found = augment.Stretches(0.5)(given, 24, torch.Generator().manual_seed(seed))
        assert found.shape == (5, 12)
        for row, length in enumerate(lengths):
            many = -(-length // 2)
            stretch = found[row][found[row] != 0].tolist()
            assert len(stretch) == many
            assert stretch == list(range(stretch[0], stretch[0] + many))
            assert stretch[-1] <= length
        begins.add(int(found[4, 0]))
    assert min(begins) == 1
    assert max(begins) == 13
    again = augment.Stretches(0.5)(given, 24, torch.Generator().manual_seed(0))
    assert torch.equal(again, augment.Stretches(0.5)(given, 24, torch.Generator().manual_seed(0)))
