from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.images import ImageDecoder
from training import data, splits
from training.folders import DataError

DECODER = ImageDecoder(16, 16, 3)


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of three images; each image is of one grey, ten times its class plus its number."""
    for label in range(10):
        for number in range(3):
            picture(tmp_path / "set" / f"class{label}" / f"{number}.png", 10 * label + number)
    return tmp_path / "set"


def zipped(folder: Path, target: Path, names: list[str] | None = None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(files, reverse=True):  # the order inside must not matter
            if names is None or file.parent.name in names:
                archive.write(file, file.relative_to(folder).as_posix())
    return target


def greys(images: data.Images) -> list[int]:
    assert (images.pixels == images.pixels[:, :1, :1, :1]).all()
    return [int(image[0, 0, 0]) for image in images.pixels]


def same(first: data.Images, second: data.Images) -> bool:
    return (
        np.array_equal(first.pixels, second.pixels)
        and np.array_equal(first.labels, second.labels)
        and np.array_equal(first.groups, second.groups)
        and first.classes == second.classes
    )


def test_every_image_comes_once_in_the_order_of_the_names(folder: Path) -> None:
    images = data.load(folder, "all", DECODER)
    assert greys(images) == [10 * label + number for label in range(10) for number in range(3)]
    assert images.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert images.classes == tuple(f"class{label}" for label in range(10))
    assert images.pixels.shape == (30, 16, 16, 3)
    assert images.pixels.dtype == np.uint8
    assert (images.groups == -1).all()
    assert len(images) == 30


@pytest.mark.slow
@pytest.mark.parametrize("split", [*splits.SPLITS, "all"])
def test_a_folder_and_a_zip_give_the_same_images_in_the_same_order(folder: Path, tmp_path: Path, split: str) -> None:
    archive = zipped(folder, tmp_path / "one.zip")
    assert same(data.load(folder, split, DECODER), data.load(archive, split, DECODER))


def test_zips_in_a_folder_are_read_together(folder: Path, tmp_path: Path) -> None:
    zipped(folder, tmp_path / "zips" / "b.zip", [f"class{label}" for label in range(5)])
    zipped(folder, tmp_path / "zips" / "a.zip", [f"class{label}" for label in range(5, 10)])
    zipped(folder, tmp_path / "zips" / "one_shot_runs.zip", ["class0"])  # as it lies beside Omniglot: left out
    assert same(data.load(folder, "all", DECODER), data.load(tmp_path / "zips", "all", DECODER))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_class_may_be_a_path_of_several_levels_and_other_files_are_left_out(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "set"
    for name in ("Latin/a/2.png", "Latin/a/1.PNG", "Latin/a-b/1.jpeg", "Greek/a/1.webp", "loose.png"):
        picture(source / name, 50)
    (source / "Latin" / "a" / "notes.txt").write_text("no image")
    images = data.load(source if kind == "folder" else zipped(source, tmp_path / "set.zip"), "all", DECODER)
    assert images.classes == ("Greek/a", "Latin/a", "Latin/a-b")
    assert images.labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("kind", ["folder", "zip", "zips"])
def test_what_is_hidden_or_left_behind_by_a_system_is_no_example(tmp_path: Path, kind: str) -> None:
    source = tmp_path / ".hidden" / "set"  # where it lies does not matter
    for name in ("a/1.png", "b/1.png", "b/.ipynb_checkpoints/1.png"):
        picture(source / name, 50)
    for name in ("__MACOSX/a/1.png", "a/._1.png", "a/.DS_Store", "b/Thumbs.db"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"\0\5\x16\7")
    if kind != "folder":
        source = zipped(source, tmp_path / "zips" / "set.zip")
    if kind == "zips":
        source = source.parent
        (source / "._set.zip").write_bytes(b"\0\5\x16\7")
    images = data.load(source, "all", DECODER)
    assert images.classes == ("a", "b")
    assert len(images) == 2


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("paths", ["Train/cat test/cat", "pets/val/cat pets/VALID/cat", "cat/train cat/test"])
def test_one_class_under_folders_that_deal_its_images_is_refused(tmp_path: Path, paths: str, kind: str) -> None:
    source = tmp_path / "set"
    for name in ("train/dog", *paths.split()):
        picture(source / name / "1.png", 50)
    given = source if kind == "folder" else zipped(source, tmp_path / "set.zip")
    first, second = sorted(paths.split())
    for split in ("train", "all"):
        with pytest.raises(DataError, match=f"class in two places, {first} and {second}, .* each class is once"):
            data.load(given, split, DECODER)


def test_folders_that_deal_classes_are_no_matter(tmp_path: Path) -> None:
    for name in ("train/cat", "test/dog", "train/Latin/a", "test/Greek/a", "train", "test", "other/cat"):
        picture(tmp_path / name / "1.png", 50)
    assert len(data.load(tmp_path, "all", DECODER).classes) == 7


def test_of_one_class_in_two_places_a_splits_json_may_name_one(tmp_path: Path) -> None:
    for name in ("train/cat", "test/cat", "train/dog", "test/dog"):
        picture(tmp_path / name / "1.png", 50)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["train/cat"], "test": ["train/dog"]}))
    assert data.load(tmp_path, "train", DECODER).classes == ("train/cat",)


def test_classes_called_alike_are_different_ones_where_splits_json_names_both(tmp_path: Path) -> None:
    """As where each split is numbered anew."""
    named = {"train": ["train/000", "train/001"], "val": ["val/000"], "test": ["test/000"]}
    names = sorted(name for split in named.values() for name in split)
    for name in names:
        picture(tmp_path / name / "1.png", 50)
    (tmp_path / "splits.json").write_text(json.dumps(named))
    for split, classes in named.items():
        assert data.load(tmp_path, split, DECODER).classes == tuple(classes)
    assert data.load(tmp_path, "all", DECODER).classes == tuple(names)
    assert sorted(data.things(tmp_path, DECODER)) == names
    for name in ("train/002", "val/002"):
        picture(tmp_path / name / "1.png", 50)
    with pytest.raises(DataError, match="one class in two places, train/002 and val/002"):
        data.load(tmp_path, "all", DECODER)


def test_of_a_class_that_splits_json_names_in_one_place_the_other_is_nowhere(tmp_path: Path) -> None:
    for name in ("train/cat", "test/cat", "train/dog", "test/dog", "more"):
        picture(tmp_path / name / "1.png", 50)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["train/cat"], "test": ["test/dog"]}))
    assert data.load(tmp_path, "all", DECODER).classes == ("more", "test/dog", "train/cat")
    assert data.things(tmp_path, DECODER) == {"test/dog": 1, "train/cat": 1}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_of_other_endings_are_counted_and_said(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "set"
    for name in ("a/1.png", "b/1.BMP", "b/2.bmp", "b/deep/3.bmp", "c/1.gif"):
        picture(source / name, 50)
    (source / "a" / "LICENSE").write_text("none")
    (source / "a" / ".hidden.bmp").write_text("none")
    (source / "README.md").write_text("outside of any class")
    given = source if kind == "folder" else zipped(source, tmp_path / "zips" / "set.zip").parent
    if kind == "zip":  # of what is left out nothing is said
        zipped(source, given / "one_shot_runs.zip")
    assert data.load(given, "all", DECODER).classes == ("a",)
    told = f"Passed over in the class folders of {given}: 1 without an ending, 3 .bmp, 1 .gif.\n"
    assert capsys.readouterr().err == told
    data.listed(given, "all", DECODER)
    assert capsys.readouterr().err == ""


def test_per_class_takes_the_first_of_each(folder: Path) -> None:
    assert greys(data.load(folder, "all", DECODER, per_class=2)) == [
        10 * label + number for label in range(10) for number in range(2)
    ]


def test_grey_images_have_one_channel(folder: Path) -> None:
    assert data.load(folder, "val", ImageDecoder(12, 12, 1)).pixels.shape[1:] == (12, 12, 1)


def test_the_images_of_the_splits_are_those_of_their_classes(folder: Path) -> None:
    parts = splits.split_classes(folder, [f"class{label}" for label in range(10)])
    found = {split: data.load(folder, split, DECODER) for split in splits.SPLITS}
    assert {split: list(images.classes) for split, images in found.items()} == parts
    assert sorted(grey for images in found.values() for grey in greys(images)) == greys(
        data.load(folder, "all", DECODER)
    )
    for images in found.values():
        assert [grey // 10 for grey in greys(images)] == [int(images.classes[k][5:]) for k in images.labels]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_json_decides_where_there_is_one(folder: Path, tmp_path: Path, kind: str) -> None:
    source = folder if kind == "folder" else zipped(folder, tmp_path / "zips" / "set.zip")
    parts = {"train": ["class3", "class1"], "test": ["class9", "unheard of"]}
    ((source if kind == "folder" else source.parent) / "splits.json").write_text(json.dumps(parts))
    assert data.load(source, "train", DECODER).classes == ("class1", "class3")
    assert data.load(source, "test", DECODER).classes == ("class9",)
    assert len(data.load(source, "all", DECODER).classes) == 10
    with pytest.raises(DataError, match="no classes in its split 'val'"):
        data.load(source, "val", DECODER)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pieces_of_splits_json_become_groups(folder: Path, tmp_path: Path, kind: str) -> None:
    source = folder if kind == "folder" else zipped(folder, tmp_path / "zips" / "set.zip")
    piece = {"class0/0.png": "left", "class0/2.png": "left", "class1/0.png": "left", "class1/1.png": "right"}
    text = json.dumps({"train": ["class0", "class1"], "piece": piece})
    ((source if kind == "folder" else source.parent) / "splits.json").write_text(text)
    groups = data.load(source, "train", DECODER).groups.tolist()
    assert groups[0] == groups[2] >= 0
    assert groups[1] == groups[5] == -1
    assert len({groups[0], groups[3], groups[4]}) == 3  # a name says nothing across classes


def test_an_expression_groups_files_of_one_class_by_its_match(tmp_path: Path) -> None:
    for name in ("a/track1_1.png", "a/track1_2.png", "a/track2_1.png", "a/other.png", "b/track1_1.png"):
        picture(tmp_path / name, 9)
    other, first, second, third, elsewhere = data.load(tmp_path, "all", DECODER, group=r"track\d+").groups.tolist()
    assert other == -1
    assert first == second
    assert len({first, third, elsewhere, -1}) == 4


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_classes_held_out_and_the_rest_are_all_of_them(folder: Path, count: int) -> None:
    images = data.load(folder, "all", DECODER)
    rest, held = data.hold_out(images, count)
    assert len(held.classes) == count
    assert sorted(rest.classes + held.classes) == list(images.classes)
    for part in (rest, held):
        assert sorted(set(part.labels.tolist())) == list(range(len(part.classes)))
        values = [10 * int(part.classes[label][-1]) + k % 3 for k, label in enumerate(part.labels)]
        assert greys(part) == values
    again = data.hold_out(images, count)
    assert same(rest, again[0])
    assert same(held, again[1])


def only(labels: np.ndarray, groups: np.ndarray | None = None) -> data.Images:
    """Images of which nothing but this is known."""
    pixels, names = np.zeros((len(labels), 1, 1, 1), np.uint8), tuple(f"class{k}" for k in range(labels.max() + 1))
    return data.Images(pixels, labels, names, np.full(len(labels), -1) if groups is None else groups)


@pytest.mark.parametrize(("share", "each"), [(0.4, 8), (0.1, 2), (0.01, 2), (1, 20)])
def test_a_share_of_each_class_is_labelled_and_always_the_same(share: float, each: int) -> None:
    images = only(np.repeat([2, 0, 1], 20))
    found = data.named(images, share)
    assert np.bincount(images.labels[found]).tolist() == [each] * 3
    assert np.array_equal(found, data.named(images, share))
    assert share == 1 or not np.array_equal(found[:20], found[20:40])  # not the first of each


def test_images_of_one_thing_are_labelled_or_not_together() -> None:
    groups = np.tile(np.repeat(np.arange(6), 3), 2) + np.repeat([0, 6], 18)
    found = data.named(only(np.repeat([0, 1], 18), groups), 0.5)
    for number in range(12):
        assert len(set(found[groups == number])) == 1
    assert found.reshape(2, 18).sum(axis=1).tolist() == [9, 9]


def test_what_is_loaded_as_labelled_is_what_is_named_so(folder: Path) -> None:
    for label in range(10):
        for number in range(3, 12):
            picture(folder / f"class{label}" / f"{number}.png", 10 * label + number)
    whole = data.load(folder, "all", DECODER, group=r"^\d")  # 1, 10 and 11 show one thing
    rows = data.named(whole, 0.5)
    part = data.load(folder, "all", DECODER, labelled=0.5, group=r"^\d")
    assert part.pixels.tobytes() == whole.pixels[rows].tobytes()
    assert 0 < len(part) < len(whole)


def test_a_class_of_which_too_few_images_are_left_unlabelled_is_named() -> None:
    with pytest.raises(DataError, match=r"--labelled 0\.5: of class1 too few images are left"):
        data.named(only(np.repeat([0, 1], [8, 3])), 0.5)


def test_of_what_is_labelled_alone_the_classes_are_all_there(folder: Path) -> None:
    images = data.load(folder, "all", DECODER)
    some = data.load(folder, "all", DECODER, labelled=0.7)
    rows = np.concatenate([3 * label + data.dealt(3, 0.7, label) for label in range(10)])
    assert some.classes == images.classes
    assert np.bincount(some.labels).tolist() == [2] * 10
    assert greys(some) == [greys(images)[row] for row in rows]
    assert same(data.load(folder, "all", DECODER, labelled=1), images)


def test_a_limit_takes_of_what_is_labelled(folder: Path) -> None:
    """And never what another command, without the limit, did not count as labelled."""
    some = data.load(folder, "all", DECODER, labelled=0.7)
    assert greys(data.load(folder, "all", DECODER, labelled=0.7, per_class=1)) == greys(some)[::2]


def test_neighbours_by_name_are_not_held_out_together(folder: Path) -> None:
    _, held = data.hold_out(data.load(folder, "all", DECODER), 5)
    assert held.classes == ("class0", "class2", "class4", "class6", "class8")


@pytest.mark.parametrize("count", [1, 9, 10])
def test_no_fewer_than_two_classes_may_be_on_one_side(folder: Path, count: int) -> None:
    with pytest.raises(DataError, match=f"--hold-out {count}: of 10 classes, between 2 and 8"):
        data.hold_out(data.load(folder, "all", DECODER), count)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        data.load(tmp_path / "nowhere", "all", DECODER)


@pytest.mark.parametrize("kind", ["folder", "zip", "loose"])
def test_a_source_without_images_says_what_was_looked_for(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "empty"
    source.mkdir()
    if kind == "loose":
        picture(source / "outside-of-any-class.png", 3)
    source = zipped(source, tmp_path / "empty.zip") if kind == "zip" else source
    with pytest.raises(DataError, match=rf"{source.name} has no images in class folders \(looked for .jpeg, .jpg"):
        data.load(source, "train", DECODER)


def test_an_unknown_split_is_named_with_those_that_are_known(folder: Path) -> None:
    with pytest.raises(
        DataError,
        match="'tset' is no split; known are train, val, test, background30, background5, evaluation20 and all",
    ):
        data.load(folder, "tset", DECODER)


def test_an_image_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "class3" / "1.png").write_bytes(b"GIF89a nothing")
    with pytest.raises(DataError, match=r"class3/1\.png: .*GIF"):
        data.load(folder, "all", DECODER)


def test_a_file_that_is_no_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"set\.zip is no zip"):
        data.load(tmp_path, "all", DECODER)


def test_the_order_of_files_on_disk_does_not_matter(folder: Path, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        for label in (5, 9, 0, 3, 1, 8, 2, 7, 4, 6):
            target = tmp_path / "copy" / f"class{label}"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"class{label}" / f"{number}.png", target)
    assert same(data.load(folder, "train", DECODER), data.load(tmp_path / "copy", "train", DECODER))


def test_names_without_a_folder_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "splits.json").write_text(json.dumps({"train": ["class1", "clas2", "b", "c", "d"]}))
    data.load(folder, "train", DECODER)
    assert f"classes that {folder} does not have: b, c, clas2 and 1 more." in capsys.readouterr().err
    assert data.listed(folder, "train", DECODER, per_class=2) == {"class1": 2}
    assert capsys.readouterr().err == ""


def test_a_zip_beside_class_folders_is_named(folder: Path, tmp_path: Path) -> None:
    zipped(folder, folder / "backup.zip")
    with pytest.raises(DataError, match=r"has class folders, .* and backup.zip beside them"):
        data.load(folder, "train", DECODER)
    (folder / "backup.zip").unlink()
    with zipfile.ZipFile(folder / "backup.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing to see")
    with pytest.raises(DataError, match=r"has class folders, .* and backup.zip beside them"):
        data.load(folder, "train", DECODER)


def test_what_is_trained_on_is_told_from_anything_else_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    images = data.load(folder, "all", DECODER)
    known = data.census(data.counted(images))
    assert known == data.census(data.listed(folder, "all", DECODER))
    assert known["classes"] == len(images.classes)
    assert known["examples"] == len(images)
    others = [{"class0": 4}, {"class0": 3, "class1": 1}, {"class1": 4}]
    assert len({data.census(other)["digest"] for other in others}) == 3
    path = tmp_path / "x"
    data.unchanged({}, known, path)
    data.unchanged({"trained_on": known}, known, path)
    with pytest.raises(DataError, match="was trained on other data: 4 examples of 1 classes"):
        data.unchanged({"trained_on": data.census({"a": 4})}, known, path)
