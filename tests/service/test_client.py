"""The Python client against a real service: what it takes, gives back, and does when things go wrong."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from models import errors as theirs
from service import client as package
from service import keys
from service.client import (
    AsyncClient,
    AsyncTask,
    Busy,
    ClassNotFound,
    Client,
    ExampleNotFound,
    InvalidSupport,
    Overloaded,
    Task,
    TaskNotFound,
    TimedOut,
    TooLarge,
    Unauthorized,
    UndecodableExample,
    Unreachable,
    UnreadableAnswer,
    errors,
    pictures,
)
from service.client.plans import Plans
from service.client.wire import Patience
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import Failing, MeanColour, picture, tiny_artifact
from tests.service.faults import Faults
from tests.service.live import served

ROOT = Path(__file__).resolve().parents[2]
# A picture of the fakes has between one and two kilobytes.
LIMITS = {"max_body_bytes": 12_000, "max_example_bytes": 6_000, "max_examples": 40, "max_queries": 4, "lanes": 2}
RED = picture("red", seed=50)


@contextmanager
def service(folder: Path, **settings: object) -> Iterator[tuple[str, Faults]]:
    """The address of a service that knows mean colours, and its faults."""
    artifact = tiny_artifact(folder / "artifact")
    app = create_app(
        Settings(**{**LIMITS, **settings}),  # type: ignore[arg-type]
        artifact=artifact,
        extractor=MeanColour(),
        store=MemoryStore(),
    )
    faults = Faults(app)
    with served(faults) as http:
        yield str(http.base_url), faults


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Faults]]:
    with service(tmp_path_factory.mktemp("service")) as found:
        yield found


@pytest.fixture
def faults(running: tuple[str, Faults]) -> Iterator[Faults]:
    running[1].asked.clear()
    yield running[1]
    running[1].next.clear()


@pytest.fixture
def client(running: tuple[str, Faults]) -> Iterator[Client]:
    with Client(running[0]) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Red and blue pictures in a folder for each, among what else lies in folders."""
    return drawn(tmp_path / "photos", "red", "blue", shots=3)


def drawn(root: Path, *colours: str, shots: int) -> Path:
    for colour in colours:
        (root / colour).mkdir(parents=True)
        for k in range(shots):
            (root / colour / f"{k}.png").write_bytes(picture(colour, seed=k))
    (root / "README.md").write_text("what these are")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "0.png").write_bytes(b"junk")
    (root / colours[0] / ".DS_Store").write_bytes(b"junk")
    return root


def some(*colours: str, shots: int = 3) -> dict[str, list[bytes]]:
    return {colour: [picture(colour, seed=k) for k in range(shots)] for colour in colours}


def paths(faults: Faults) -> list[str]:
    return [f"{method} {path}" for method, path, _ in faults.asked]


# What it takes


def test_the_line_of_the_readme_is_all_it_takes(client: Client, folder: Path, tmp_path: Path) -> None:
    now = tmp_path / "now.jpg"
    now.write_bytes(picture("blue", seed=9, format="JPEG"))
    assert client.adapt(folder, task="colours").classify(str(now)).label == "blue"


def test_all_spellings_of_a_support_set_give_the_same_head(client: Client, folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder.parent))
        file.writestr("__MACOSX/photos/red/._0.png", b"junk")
    spellings = {
        "folder": folder,
        "text": str(folder),
        "zip": archive,
        "patterns": {"red": f"{folder}/red/*.png", "blue": f"{folder}/blue/?.png"},
        "folders": {"red": folder / "red", "blue": str(folder / "blue")},
        "paths": {colour: [folder / colour / f"{k}.png" for k in range(3)] for colour in ("red", "blue")},
        "generator": {colour: (folder / colour).glob("*.png") for colour in ("red", "blue")},
        "bytes": some("red", "blue"),
        "files": {c: [io.BytesIO(data) for data in images] for c, images in some("red", "blue").items()},
    }
    heads = {name: client.adapt(support, task=f"s-{name}").head for name, support in spellings.items()}  # type: ignore[arg-type]
    assert len(set(heads.values())) == 1, heads


def test_pictures_of_pil_are_images_as_well(client: Client) -> None:
    support = {c: [Image.open(io.BytesIO(data)) for data in images] for c, images in some("red", "blue").items()}
    task = client.adapt(support)
    assert task.classify(Image.new("RGB", (30, 20), "blue")).label == "blue"
    assert task.name == "t_" + task.head[3:27]


def test_what_is_no_support_set_is_said_before_anything_is_sent(client: Client, faults: Faults, tmp_path: Path) -> None:
    (tmp_path / "loose.png").write_bytes(RED)
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[object, type[Exception], str]] = [
        (tmp_path / "none", FileNotFoundError, "There is no folder"),
        (tmp_path / "empty", FileNotFoundError, "There is no picture in"),
        (tmp_path, ValueError, "lies in no sub-folder"),
        (tmp_path / "loose.png", ValueError, "neither a folder nor a zip"),
        ({"red": f"{tmp_path}/*.jpg"}, FileNotFoundError, "There is no picture in"),
        ({"red": []}, ValueError, "'red' has no images"),
        ({"red": [7]}, TypeError, "An image is a path, .* not int"),
        ({1: [RED], "blue": [RED]}, TypeError, "A label is text, not int"),
    ]
    for support, kind, words in wrong:
        with pytest.raises(kind, match=words):
            client.adapt(support)  # type: ignore[arg-type]
    assert faults.asked == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "label", ['5" disc', "back\\slash", "100%", "%22", "é ✓ 猫", "a;b=c", "unlabelled", "query", "label:x", "a/b"]
)
def test_any_label_comes_back_as_it_was(client: Client, label: str) -> None:
    images = some("red", "blue")
    task = client.adapt({label: images["red"], "other": images["blue"]}, unlabelled=[RED])
    assert sorted(item.label for item in task.classes) == sorted([label, "other"])
    assert task.unlabelled == 1
    assert task.classify(RED).label == label
    assert client.classify_once({label: images["red"], "other": images["blue"]}, [RED])[0].label == label
    smaller = task.add(some("lime")).remove_class(label)
    assert [item.label for item in smaller.classes] == ["lime", "other"]


ODD = ["mug: blue", "50%", "50%25", "a/b", "unlabelled", "label:x", "🦊 é", ".hidden", "dots..", "__MACOSX", "%FF"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_kept_images_that_are_taught_again_keep_their_labels(client: Client, tmp_path: Path, form: str) -> None:
    support = {label: picture("red", seed=seed) for seed, label in enumerate(ODD)}
    task = client.adapt(support, unlabelled=RED, retain="images")
    saved = task.save_support(tmp_path / "kept.zip")
    if form == "folder":
        with zipfile.ZipFile(saved) as archive:
            archive.extractall(tmp_path / "kept")
        saved = tmp_path / "kept"
    again = client.adapt(saved, task="again")
    assert [item.label for item in again.classes] == sorted(ODD)
    assert (again.head, again.unlabelled) == (task.head, 1)


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_texts_come_from_a_folder_or_a_zip_as_pictures_do(tmp_path: Path, form: str) -> None:
    for label, text in (("sun", "warm"), ("rain", "wet"), ("unlabelled", "grey")):
        (tmp_path / "days" / label).mkdir(parents=True)
        (tmp_path / "days" / label / "1.txt").write_text(text)
    source = tmp_path / "days"
    if form == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "days"), "zip", source))
    found = {file.label: file.load() for file in pictures.support(source, ())}
    assert found == {None: b"grey", "rain": b"wet", "sun": b"warm"}
    if form == "folder":
        assert [file.load() for file in pictures.many(source / "sun")] == [b"warm"]


@pytest.mark.parametrize("name", ["unlabeled", "Unlabelled"])
def test_a_folder_that_is_nearly_called_unlabelled_is_no_class(client: Client, tmp_path: Path, name: str) -> None:
    for label in ("red", "blue", name):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(picture("lime"))
    with pytest.raises(ValueError, match=f"Is 'unlabelled' meant by the folder '{name}'"):
        client.adapt(tmp_path)
    (tmp_path / name).rename(tmp_path / f"label:{name}")
    assert name in [item.label for item in client.adapt(tmp_path).classes]


def test_a_label_of_dots_leads_to_no_other_address(client: Client) -> None:
    with pytest.raises(InvalidSupport, match="it means the task"):
        client.adapt({"..": RED, "lime": picture("lime"), "tan": picture("tan")})
    task = client.adapt({".": RED, "a/../b": picture("blue"), "lime": picture("lime"), "tan": picture("tan")})
    with pytest.raises(ClassNotFound):
        task.remove_class("..")
    task = task.remove_class(".").remove_class("a/../b")
    assert [item.label for item in client.task(task.name).classes] == ["lime", "tan"]


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b", "x" * 65, "é"])
def test_a_name_that_no_task_has_is_said_to_be_none(client: Client, faults: Faults, name: str) -> None:
    task = client.adapt(some("red", "blue"), task="named")
    faults.asked.clear()
    support = some("red", "blue")
    asking: list[Callable[[], object]] = [lambda: client.task(name), lambda: client.adapt(support, task=name)]
    for ask in asking:
        with pytest.raises(package.InvalidRequest) as caught:
            ask()
        assert caught.value.detail == "A task name has 1 to 64 letters, digits, '-' or '_'."
    for example in (task.remove, task.image):
        with pytest.raises(ExampleNotFound, match="The task has no example"):
            example(name)
    assert [path for path in paths(faults) if "/v1/tasks" in path] == []


def test_a_folder_named_unlabelled_has_no_label(client: Client, folder: Path) -> None:
    (folder / "unlabelled").mkdir()
    for k in range(4):
        (folder / "unlabelled" / f"{k}.png").write_bytes(picture("red", seed=20 + k))
    (folder / "unlabelled" / "broken.png").write_bytes(b"nothing")
    task = client.adapt(folder)
    assert [item.label for item in task.classes] == ["blue", "red"]
    assert task.unlabelled == 4
    assert [item.name for item in task.rejected] == ["unlabelled/broken.png"]


# What comes back


def test_one_image_gives_one_answer_and_several_a_list_of_any_length(client: Client, faults: Faults) -> None:
    task = client.adapt(some("red", "blue"))
    one = task.classify(RED)
    assert (one.label, one.index, one.error) == ("red", 0, None)
    assert one.probabilities is not None
    assert one.probability == one.probabilities["red"] == max(one.probabilities.values())
    assert task.classify([RED]) == [one]
    assert task.classify([]) == []
    colours = ["red", "blue", "blue"] * 5
    faults.asked.clear()
    many = task.classify(picture(colour, seed=k) for k, colour in enumerate(colours))
    assert [row.label for row in many] == colours
    assert [row.index for row in many] == list(range(15))
    assert len(faults.asked) == 4  # of MAX_QUERIES each


def test_one_bad_image_of_several_has_its_error_and_the_others_their_answers(client: Client) -> None:
    task = client.adapt(some("red", "blue"))
    rows = task.classify([b"x", b"y", b"z", b"nothing", RED, b"nothing"])  # the first request has no good one
    assert [row.label for row in rows] == [None, None, None, None, "red", None]
    assert [row.error and row.error.code for row in rows] == ["undecodable_example"] * 4 + [None, "undecodable_example"]
    with pytest.raises(UndecodableExample) as caught:
        task.classify(b"nothing")
    assert (caught.value.status, caught.value.code) == (422, "undecodable_example")
    assert caught.value.request_id
    with pytest.raises(UndecodableExample):
        task.classify([RED, b"nothing"], on_bad_image="fail")
    rows = task.classify([RED, bytes(20_000)])
    assert rows[1].error is not None
    assert rows[1].error.code == "too_large"


def test_an_image_at_fault_is_told_by_its_own_place_and_name(
    running: tuple[str, Faults], client: Client, folder: Path
) -> None:
    text = "This is not an image; JPEG, PNG and WEBP are accepted."
    readme = str(folder / "README.md")
    reds = [str(folder / "red" / f"{k}.png") for k in range(3)]
    support = {"red": reds, "blue": [readme, str(folder / "blue" / "1.png")]}
    task = client.adapt(some("red", "blue"), task="placed")
    asks: list[tuple[Callable[[], object], int, str]] = [
        (lambda: client.adapt(support, on_bad_image="fail"), 3, readme),
        (lambda: task.add(support, unlabelled=reds[:1], on_bad_image="fail"), 3, readme),
        (lambda: client.adapt(support | {"blue": [readme]}), 3, readme),
        (lambda: client.adapt(some("red", "blue"), unlabelled=[b"x"], on_bad_image="fail"), 6, "unlabelled[0]"),
        (lambda: task.classify(reds * 2 + [readme], on_bad_image="fail"), 6, readme),  # of MAX_QUERIES each
        (lambda: client.embed(reds * 2 + [readme], on_bad_image="fail"), 6, readme),
        (lambda: client.embed(readme), 0, readme),
    ]
    for ask, index, name in asks:
        with pytest.raises(package.InvalidRequest) as caught:
            ask()
        assert caught.value.index == index
        assert str(caught.value) == caught.value.detail
        assert caught.value.detail.startswith(f"{name}: ")
        assert caught.value.detail.endswith(text)
    with pytest.raises(UndecodableExample) as caught:
        task.classify([*[RED] * 5, b"nothing"], on_bad_image="fail")
    assert (caught.value.index, caught.value.detail) == (5, text)
    with pytest.raises(TooLarge) as large:
        task.classify([*[RED] * 5, bytes(20_000)], on_bad_image="fail")
    assert large.value.index == 5

    async def awaited() -> None:
        async with AsyncClient(running[0]) as other:
            with pytest.raises(UndecodableExample) as caught:
                await other.adapt(support, on_bad_image="fail")
            assert (caught.value.index, caught.value.detail) == (3, f"{readme}: {text}")

    asyncio.run(awaited())


def test_an_image_at_fault_in_a_later_request_is_told_by_its_own_place(client: Client, folder: Path) -> None:
    many = {"red": [picture("red", seed=k) for k in range(18)], "blue": [picture("blue", seed=k) for k in range(3)]}
    many["red"][15] = b"nothing"
    with pytest.raises(UndecodableExample) as caught:
        client.adapt(many, on_bad_image="fail")
    assert (caught.value.index, caught.value.detail.partition(":")[0]) == (15, "red[15]")


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_several_images_of_which_none_is_good_have_an_error_each(client: Client, count: int) -> None:
    task = client.adapt(some("red", "blue"))
    gif = picture("red", format="GIF")
    images = [gif, b"", *[b"nothing"] * 7][:count]
    rows = task.classify(images)
    assert [row.index for row in rows] == list(range(count))
    alone = []
    for image in images:
        with pytest.raises(UndecodableExample) as caught:
            task.classify(image)
        alone.append(caught.value.detail)
    assert [row.error and row.error.detail for row in rows] == alone
    assert len(set(alone)) == min(count, 3)
    found = client.embed(images)
    assert [item.detail for item in found.errors] == alone
    assert (found.features, found.dim, found.artifact) == ((None,) * count, 3, "sha256:tiny")
    for ask in (task.classify, client.embed):
        with pytest.raises(UndecodableExample):
            ask(images, on_bad_image="fail")


@pytest.mark.slow
def test_a_fault_of_the_service_is_no_fault_of_the_images(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    extractor = Failing(broken=False)
    app = create_app(Settings(lanes=1, max_queries=2), artifact=artifact, extractor=extractor, store=MemoryStore())
    with served(app) as http, Client(str(http.base_url), retries=0) as client:
        task = client.adapt(some("red", "blue"))

        def fail(done: int, total: int) -> None:
            extractor.broken = True

        with pytest.raises(package.ExtractorFailed):
            task.classify([RED] * 4, progress=fail)


def test_a_folder_and_a_pattern_are_several_images(client: Client, folder: Path) -> None:
    task = client.adapt(folder)
    for several in (folder / "red", str(folder / "red"), f"{folder}/red/*.png", folder / "r?d" / "[012].png"):
        assert [row.label for row in task.classify(several)] == ["red"] * 3
    assert [row.label for row in task.classify(f"{folder}/red/1*")] == ["red"]
    odd = folder / "red [1].png"
    odd.write_bytes(RED)
    assert task.classify(odd).label == "red"
    with pytest.raises(FileNotFoundError, match="There is no picture in"):
        task.classify(f"{folder}/*.gif")
    with pytest.raises(FileNotFoundError):
        task.classify(folder / "none.png")


def test_what_is_learned_can_be_changed_and_taken_back(client: Client) -> None:
    first = client.adapt(some("red", "blue"), task="changing")
    assert (first.version, first.method) == (1, "prototype")
    assert repr(first) == "Task('changing', version=1, method='prototype', classes={'blue': 3, 'red': 3})"
    more = first.add({"lime": [picture("lime", seed=k) for k in range(2)]})
    assert more.classify(picture("lime", seed=9)).label == "lime"
    example = next(item for item in more.examples if item.label == "lime")
    assert example.name == "lime[0]" or example.name == "lime[1]"
    less = more.remove(example.id)
    assert [(item.label, item.shots) for item in less.classes] == [("blue", 3), ("lime", 1), ("red", 3)]
    with pytest.raises(ExampleNotFound):
        less.remove(example.id)
    two = less.remove_class("lime")
    assert two.head == first.head
    assert [item.version for item in two.versions()] == [4, 3, 2, 1]
    ridge = two.learn_with("ridge")
    assert (ridge.version, ridge.method) == (5, "ridge")
    two = ridge.learn_with("prototype")
    assert two.head == first.head
    back = two.rollback(2)
    assert (back.version, back.head) == (7, more.head)
    assert client.task("changing", version=1).head == first.head
    assert first.refresh() == client.task("changing") != first
    back.forget()
    with pytest.raises(TaskNotFound) as caught:
        client.task("changing")
    assert caught.value.detail == "There is no task 'changing'."


def test_one_file_in_two_classes_is_named_in_the_advice(client: Client, tmp_path: Path) -> None:
    for label, colours in (("blue", ("blue", "navy", "teal")), ("red", ("red", "maroon", "orange"))):
        (tmp_path / label).mkdir()
        for number, colour in enumerate(colours):
            (tmp_path / label / f"{number}.png").write_bytes(picture(colour, seed=number))
    (tmp_path / "blue" / "7.png").write_bytes((tmp_path / "red" / "1.png").read_bytes())
    found = client.adapt(tmp_path).report
    assert [len(group) for group in found.doubles] == [2]
    assert (
        found.advice
        == "blue/7.png of 'blue' looks exactly like red/1.png of 'red': take back the one whose label is wrong."
    )


def test_options_reach_the_service(client: Client) -> None:
    task = client.adapt(some("red", "blue"), method="ridge", ttl=60, retain="images", task="options")
    assert (task.method, task.retained) == ("ridge", True)
    assert task.expires_at is not None
    assert task.created_at is not None
    assert 59 < (task.expires_at - task.created_at).total_seconds() < 61
    assert {item.name for item in task.classify(RED, explain=True).nearest} < {f"red[{k}]" for k in range(3)}
    assert task.classify(RED, reject="off").label == "red"
    assert list(task.classify(RED, top=1).probabilities) == ["red"]
    with pytest.raises(package.UnknownMethod):
        client.adapt(some("red", "blue"), method="magic")
    with pytest.raises(UndecodableExample):
        client.adapt({**some("red"), "blue": [RED, b"nothing"]}, on_bad_image="fail")


def test_kept_images_come_back(client: Client, tmp_path: Path) -> None:
    task = client.adapt(some("red", "blue"), retain="images", task="kept")
    example = next(item for item in task.examples if item.name == "red[1]")
    assert task.image(example.id) == picture("red", seed=1)
    again = client.adapt(task.save_support(tmp_path / "kept.zip"))
    assert again.head == task.head
    with pytest.raises(package.NotRetained):
        client.adapt(some("red", "lime")).save_support(tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()


@pytest.mark.parametrize("name", ["x.onnx", "x.ONNX", "x.zip", "x.ZIP"])
def test_the_ending_of_a_name_says_what_is_exported_in_letters_of_any_size(name: str) -> None:
    asked = next(Plans(Patience()).export("t", name, precision=None))
    assert asked.query["format"] == name[2:].lower()


@pytest.mark.parametrize("name", ["x.tflite", "x", "x.zip.gz", ".zip"])
def test_an_export_under_another_ending_is_refused_and_writes_nothing(
    client: Client, faults: Faults, tmp_path: Path, name: str
) -> None:
    task = client.adapt(some("red", "blue"), task="leaves")
    faults.asked.clear()
    with pytest.raises(ValueError, match=r"ends in neither \.onnx nor \.zip"):
        task.export(tmp_path / name)
    assert (paths(faults), list(tmp_path.iterdir())) == ([], [])


@pytest.mark.slow
def test_the_report_names_the_files_it_speaks_of(client: Client, folder: Path) -> None:
    (folder / "red" / "2.png").write_bytes(picture("blue", seed=70))
    task = client.adapt(folder)
    assert {item.name for item in task.examples} == {f"{c}/{k}.png" for c in ("red", "blue") for k in range(3)}
    assert task.report.suspects[0].name == "red/2.png"
    assert (task.report.suspects[0].label, task.report.suspects[0].looks_like) == ("red", "blue")
    assert task.report.confusions[0] == package.Confusion("red", "blue", 1)
    assert task.report.accuracy is not None
    assert task.report.advice


def test_only_so_many_names_are_remembered(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.plans.MOST_NAMES", 4)
    task = client.adapt(some("red", "blue"))
    assert sorted(item.name is None for item in task.examples) == [False] * 4 + [True] * 2


def test_a_call_that_stores_nothing(client: Client, faults: Faults) -> None:
    support = {**some("red"), "blue": [*some("blue")["blue"], b"nothing"]}
    found = client.classify_once(support, [RED, b"nothing"], unlabelled=RED)
    assert found[0].label == "red"
    assert [row.error is None for row in found] == [True, False]
    assert [(item.name, item.code) for item in found.rejected] == [("blue[3]", "undecodable_example")]
    assert paths(faults) == ["POST /v1/classify"]
    with pytest.raises(InvalidSupport, match=r"^blue\[0\]: The class 'blue' has no usable image") as caught:
        client.classify_once({**some("red"), "blue": [b"nothing"]}, [RED])
    assert caught.value.index == len(some("red")["red"])


def test_features_come_for_any_number_of_images(client: Client, faults: Faults) -> None:
    found = client.embed([*[b"x"] * 4, RED, b"nothing"])
    assert (found.dim, found.artifact) == (3, "sha256:tiny")
    assert [row is None for row in found.features] == [True, True, True, True, False, True]
    assert found.features[4] == pytest.approx((0.577, -0.577, -0.577), abs=0.02)
    assert [item.index for item in found.errors] == [0, 1, 2, 3, 5]
    with pytest.raises(UndecodableExample):
        client.embed(b"nothing")
    with pytest.raises(ValueError, match="There is no image"):
        client.embed([])


def test_the_service_describes_itself(client: Client) -> None:
    assert client.artifact().name == "tiny"
    assert [method.name for method in client.artifact().methods] == ["prototype", "ridge"]
    assert client.limits().max_queries == LIMITS["max_queries"]
    assert client.health().status == "ok"


@pytest.mark.slow
def test_tasks_are_listed_over_all_pages(tmp_path: Path) -> None:
    with service(tmp_path) as (url, faults), Client(url) as client:
        assert list(client.tasks()) == []
        names = [f"task-{k:03}" for k in range(203)]
        for name in names:
            client.adapt(some("red", "blue", shots=1), task=name)
        faults.asked.clear()
        assert [item.name for item in client.tasks()] == names
        assert len(faults.asked) == 2


# What is too much for one request


@pytest.mark.slow
def test_a_folder_larger_than_a_request_is_learned_in_several(client: Client, faults: Faults, tmp_path: Path) -> None:
    root = drawn(tmp_path / "large", "red", "blue", "lime", shots=10)
    (root / "red" / "0.png").write_bytes(b"nothing")  # the first of its class
    (root / "blue" / "8.png").write_bytes(bytes(7_000))  # more than MAX_EXAMPLE_BYTES
    (root / "blue" / "9.heic").write_bytes(b"\0\0\0\x18ftypheic")
    told: list[tuple[int, int]] = []
    task = client.adapt(root, task="large", progress=lambda done, total: told.append((done, total)))
    limits, first, *more, made, end = paths(faults)
    upload = first.removeprefix("PUT ")
    assert re.fullmatch("/v1/tasks/upload-[0-9a-f]{16}", upload)
    assert (limits, made, end) == ("GET /v1/limits", "PUT /v1/tasks/large", f"DELETE {upload}")
    assert set(more) == {f"POST {upload}/examples"}
    assert len({key for _, _, key in faults.asked[1:-1]} - {""}) == len(more) + 2 >= 5
    assert told[-1] == (31, 31)
    assert told == sorted(told)
    rejected = {item.name: (item.index, item.code) for item in task.rejected}
    assert rejected == {
        "blue/8.png": (8, "too_large"),
        "blue/9.heic": (9, "undecodable_example"),
        "red/0.png": (21, "undecodable_example"),
    }
    with service(tmp_path, max_body_bytes=10**6) as (url, _), Client(url) as roomy:
        assert roomy.adapt(root).head == task.head
    assert {item.name for item in task.examples} >= {"red/1.png", "lime/9.png"}
    assert task.add(drawn(tmp_path / "more", "yellow", shots=9)).version > task.version + 1


@pytest.mark.slow
def test_a_broken_first_image_costs_no_class_when_requests_are_small(tmp_path: Path) -> None:
    broken = [b"nothing" + bytes(1500), b"nothing" + bytes(1600)]
    support = {c: [*broken, *images] for c, images in some("red", "blue", "lime").items()}
    with service(tmp_path, max_body_bytes=7_000) as (url, faults), Client(url) as client:
        task = client.adapt(support, task="hard")
        assert [(item.label, item.shots) for item in task.classes] == [("blue", 3), ("lime", 3), ("red", 3)]
        assert len(task.rejected) == 6
        assert "POST /v1/embed" in paths(faults)
        with pytest.raises(InvalidSupport, match="'white'"):
            client.adapt({**some("red", "blue"), "white": [b"nothing"] * 3}, task="harder")


def test_more_images_than_a_task_may_have_are_refused_before_any_is_sent(client: Client, faults: Faults) -> None:
    with pytest.raises(TooLarge, match="41 images; a task may have 40"):
        client.adapt({"red": [RED] * 40, "blue": [b"x"]})
    assert paths(faults) == ["GET /v1/limits"]


def uploads(client: Client) -> list[str]:
    return [item.name for item in client.tasks() if item.name.startswith("upload-")]


def test_what_is_learned_in_several_requests_is_one_version(client: Client, faults: Faults) -> None:
    before = client.adapt(some("red", "blue"), task="whole")
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        seen.append(client.task("whole").version)

    support = some("red", "blue", "lime", shots=10)
    task = client.adapt(support, task="whole", method="ridge", ttl=60, retain="images", progress=look)
    assert len(seen) > 2
    assert set(seen) == {1}
    assert [(item.version, item.examples) for item in task.versions()] == [(2, 30), (1, 6)]
    assert (task.method, task.retained, [item.shots for item in task.classes]) == ("ridge", True, [10] * 3)
    assert task.expires_at is not None
    assert task.created_at is not None
    assert 59 < (task.expires_at - task.created_at).total_seconds() < 61
    assert uploads(client) == []
    unnamed = client.adapt(some("red", "blue", "tan", shots=10))
    assert (unnamed.name, unnamed.version, unnamed.expires_at) == (f"t_{unnamed.head[3:27]}", 1, None)
    assert (unnamed.method, unnamed.retained) == ("prototype", False)
    assert before.rollback(1).head == before.head
    faults.asked.clear()
    client.adapt(some("red", "blue"))
    assert paths(faults) == ["POST /v1/tasks"]


@pytest.mark.parametrize("fault", ["422", "cut"])
def test_what_is_broken_off_changes_no_task_and_ends(running: tuple[str, Faults], faults: Faults, fault: str) -> None:
    with Client(running[0], retries=0) as client:
        before = client.adapt(some("red", "blue"), task="half")
        faults.next.extend(["", "", fault])
        with pytest.raises(UnreadableAnswer if fault == "422" else Unreachable) as caught:
            client.adapt(some("red", "blue", shots=15), task="half")
        assert caught.value.__notes__ == ["The task 'half' was not changed."]
        assert (client.task("half").head, client.task("half").version) == (before.head, before.version)
        left = uploads(client)
        assert len(left) == (fault == "cut")  # a service that does not answer is asked for nothing more
        for name in left:
            task = client.task(name)
            assert task.expires_at is not None
            assert task.created_at is not None
            assert (task.expires_at - task.created_at).total_seconds() == pytest.approx(3600, abs=1)
            task.forget()
        faults.next.extend(["", "422"])
        with pytest.raises(UnreadableAnswer) as caught:
            client.adapt(some("red", "blue", shots=15))
        assert caught.value.__notes__ == ["Nothing was learned."]


def test_an_upload_that_cannot_be_deleted_is_no_error(running: tuple[str, Faults], faults: Faults) -> None:
    with Client(running[0], retries=0) as client:
        client.adapt(support := some("red", "blue", shots=9), task="left")
        count = len(faults.asked) - 1  # without the question for the limits
        faults.next.extend([*[""] * (count - 1), "cut"])
        assert client.adapt(support, task="left").version == 1
        (left,) = uploads(client)
        client.task(left).forget()


@pytest.mark.slow
def test_a_last_answer_that_is_lost_makes_no_second_version(client: Client, faults: Faults) -> None:
    support = some("red", "blue", shots=9)
    client.limits()
    faults.asked.clear()
    client.adapt(support, task="last")
    faults.next.extend([*[""] * (len(faults.asked) - 2), "lose answer"])
    assert client.adapt(support, task="last", ttl=60).version == 2
    assert len([path for path in paths(faults) if path == "PUT /v1/tasks/last"]) == 3
    assert uploads(client) == []


def test_a_file_that_goes_away_meanwhile_leaves_nothing(client: Client, tmp_path: Path) -> None:
    root = drawn(tmp_path / "large", "red", "blue", shots=10)

    def remove(done: int, total: int) -> None:
        (root / "red" / "9.png").unlink(missing_ok=True)

    with pytest.raises(FileNotFoundError):
        client.adapt(root, task="gone", progress=remove)
    assert uploads(client) == []
    with pytest.raises(TaskNotFound):
        client.task("gone")


def test_what_went_wrong_half_way_says_how_far_it_got(client: Client, faults: Faults) -> None:
    client.limits()
    task = client.adapt(some("red", "blue", shots=1), task="part")
    faults.next.extend(["", "422"])
    with pytest.raises(UnreadableAnswer) as caught:
        task.add(some("red", "blue", shots=15))
    assert caught.value.__notes__ == ["The task 'part' has learned a part; it is at version 2."]


# What goes wrong


def test_every_code_of_the_service_is_an_exception_of_its_own() -> None:
    kinds = [k for k in vars(theirs).values() if isinstance(k, type) and issubclass(k, theirs.FewshotError)]
    codes = {kind.code for kind in kinds} - {"error", "artifact_invalid"}
    assert codes - set(errors.CODES) == set()
    drawn_tree = (errors.__doc__ or "").split()
    own = [k for k in vars(errors).values() if isinstance(k, type)]
    assert [kind.__name__ for kind in own if kind.__name__ not in drawn_tree] == []
    assert all(getattr(package, kind.__name__) is kind for kind in own)


@pytest.mark.slow
def test_a_busy_service_is_asked_again_after_the_wait_it_asks_for(client: Client, faults: Faults) -> None:
    task = client.adapt(some("red", "blue"))
    faults.asked.clear()
    faults.next.extend(["503 0.3", "502", "429 0"])
    start = time.monotonic()
    assert task.classify(RED).label == "red"
    assert len(faults.asked) == 4
    assert 0.6 < time.monotonic() - start < 6


def test_a_service_that_stays_busy_is_given_up(client: Client, running: tuple[str, Faults], faults: Faults) -> None:
    faults.next.extend(["503"] * 9)
    with Client(running[0], retries=1) as impatient, pytest.raises(Busy) as caught:
        impatient.artifact()
    assert (caught.value.status, caught.value.attempts, len(faults.next)) == (503, 2, 7)
    faults.next.clear()
    faults.next.append("503 3600")
    start = time.monotonic()
    with pytest.raises(Busy) as caught:
        client.artifact()
    assert caught.value.retry_after == 3600
    assert time.monotonic() - start < 2


def test_the_wait_grows_and_is_never_less_than_asked_for() -> None:
    patience = Patience(retries=3, longest_wait_s=10, first_wait_s=1)
    busy = Overloaded("", code="overloaded", status=503)
    waits = [patience.wait(busy, attempt) for attempt in range(4)]
    for least, wait in zip((0.5, 1, 2), waits, strict=False):
        assert wait is not None
        assert least <= wait <= 2 * least
    assert waits[3] is None
    asked = patience.wait(Overloaded("", status=503, retry_after=4), 0)
    assert asked is not None
    assert 4 < asked <= 5
    assert patience.wait(Overloaded("", retry_after=11), 0) is None
    assert patience.wait(TaskNotFound("", status=404), 0) is None
    assert patience.wait(TimedOut(""), 0) is None


@pytest.mark.parametrize("fault", ["cut", "lose answer"])
@pytest.mark.slow
def test_a_change_whose_answer_was_lost_is_made_once(client: Client, faults: Faults, fault: str) -> None:
    task = client.adapt(some("red", "blue"), task=f"once-{fault.replace(' ', '-')}")
    client.limits()
    changes: list[Callable[[Task], Task]] = [
        lambda task: client.adapt(some("red", "blue"), task=task.name, ttl=60),
        lambda task: task.add(some("lime")),
        lambda task: task.remove(next(item.id for item in task.examples if item.label == "lime")),
        lambda task: task.remove_class("lime"),
        lambda task: task.learn_with("ridge"),
        lambda task: task.rollback(3),
    ]
    for change in changes:
        faults.asked.clear()
        faults.next.append(fault)
        changed = change(task)
        assert changed.version == task.version + 1
        assert faults.asked[0] == faults.asked[1]
        assert faults.asked[0][2]
        task = changed
    faults.next.append(fault)
    task.forget()
    with pytest.raises(TaskNotFound):
        task.forget()


def test_every_change_of_a_task_carries_a_key_of_its_own(client: Client, faults: Faults) -> None:
    client.limits()
    faults.asked.clear()
    task = client.adapt(some("red", "blue", "lime", shots=2), task="keyed").add({"red": RED})
    task = task.remove(task.examples[0].id).remove_class("lime").learn_with("ridge").rollback(1)
    keys = [key for _, _, key in faults.asked]
    assert len(keys) == len(set(keys)) == 6
    assert all(keys)


@pytest.mark.slow
def test_a_slow_answer_is_not_waited_for_twice(running: tuple[str, Faults], faults: Faults) -> None:
    faults.next.append("wait 1")
    with Client(running[0], timeout=0.2) as hasty, pytest.raises(TimedOut, match="did not answer in time"):
        hasty.artifact()
    assert len(faults.asked) == 1


def test_nothing_there_is_said_so() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{free.getsockname()[1]}"
    with Client(url, retries=0) as client, pytest.raises(Unreachable) as caught:
        client.artifact()
    assert caught.value.detail.startswith(f"Nothing answers at http://{url}; is the service running there?")
    for wrong in ("ftp://somewhere", "http://", "", "localhost:80o0", "localhost:99999", "http://[::1", "local\0host"):
        with pytest.raises(ValueError, match="is no address of a service"):
            Client(wrong)
    with pytest.raises(ValueError, match="was it copied whole"):
        Client(key="fsk_live_…")


def test_an_address_that_speaks_no_tls_is_said_so(running: tuple[str, Faults]) -> None:
    with Client(running[0].replace("http:", "https:"), retries=0) as client, pytest.raises(Unreachable, match="TLS"):
        client.health()


def test_another_service_at_that_address_is_noticed() -> None:
    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = '{"hello": 1}' if scope["path"] == "/v1/limits" else "<h1>Hello</h1>"
        await Response(body, 404 if scope["path"] == "/readyz" else 200)(scope, receive, send)

    with served(other) as http, Client(str(http.base_url)) as client:
        for ask in (client.artifact, client.limits, client.health):
            with pytest.raises(UnreadableAnswer, match="fewshot service"):
                ask()


def test_a_key_opens_what_is_closed_without(tmp_path: Path) -> None:
    _, key = keys.create(tmp_path / "keys.json", tenant="acme", scopes=("adapt", "classify"))
    with service(tmp_path, keys_file=tmp_path / "keys.json") as (url, _):
        with Client(url) as nobody, pytest.raises(Unauthorized) as caught:
            nobody.adapt(some("red", "blue"))
        assert caught.value.status == 401
        with Client(url, key) as client:
            assert client.adapt(some("red", "blue")).classify(RED).label == "red"


def test_address_and_key_come_from_the_environment_where_none_is_given(
    running: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("FEWSHOT_URL", running[0]), ("FEWSHOT_KEY", "fsk_test_1")):
        monkeypatch.setenv(variable, value)
    for kind in (Client, AsyncClient):
        client = kind()
        assert (client.base_url, client._http.headers["authorization"]) == (running[0], "Bearer fsk_test_1")
        client = kind("http://127.0.0.1:9", "fsk_test_2")
        assert (client.base_url, client._http.headers["authorization"]) == ("http://127.0.0.1:9", "Bearer fsk_test_2")
        assert "authorization" not in kind(key="")._http.headers
    assert Client().health().status == "ok"
    monkeypatch.setenv("FEWSHOT_URL", "")
    assert Client().base_url == "http://127.0.0.1:8000"


def test_a_proxy_of_the_environment_is_not_asked_for_this_computer(
    running: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Client(running[0], retries=0) as client:
        assert client.health().status == "ok"


def test_a_client_that_is_thrown_away_closes_its_connections(running: tuple[str, Faults]) -> None:
    client = Client(running[0])
    client.health()
    http = client._http
    del client
    gc.collect()
    assert http.is_closed


# Two clients, one description


@pytest.mark.slow
def test_the_asynchronous_client_does_the_same(running: tuple[str, Faults], faults: Faults, folder: Path) -> None:
    async def work() -> None:
        async with AsyncClient(running[0]) as client:
            faults.next.extend(["503 0", "cut"])
            task = await client.adapt(folder, task="async")
            assert (await task.classify(RED)).label == "red"
            rows = await task.classify([RED, b"nothing", picture("blue", seed=9)])
            assert [row.label for row in rows] == ["red", None, "blue"]
            assert "async" in [item.name async for item in client.tasks()]
            more = await task.add(some("lime"))
            less = await more.remove(next(item.id for item in more.examples if item.label == "lime"))
            two = await less.remove_class("lime")
            assert two.head == task.head == (await client.task("async", version=1)).head
            assert len(await two.versions()) == 4
            assert (await two.learn_with("ridge")).method == "ridge"
            assert (await two.rollback(2)).head == more.head == (await two.refresh()).head
            assert (await client.classify_once(some("red", "blue"), RED))[0].label == "red"
            assert (await client.embed(RED)).dim == (await client.artifact()).dim
            assert (await client.limits()).max_queries == LIMITS["max_queries"]
            assert (await client.health()).status == "ok"
            with pytest.raises(package.NotRetained):
                await two.image(two.examples[0].id)
            both = await asyncio.gather(*(task.classify(picture(c, seed=8)) for c in ("red", "blue")))
            assert [row.label for row in both] == ["red", "blue"]
            await task.forget()
            with pytest.raises(TaskNotFound):
                await client.task("async")

    asyncio.run(work())


@pytest.mark.parametrize(("left", "right"), [(Client, AsyncClient), (Task, AsyncTask)])
def test_both_clients_have_the_same_methods_with_the_same_parameters(left: type, right: type) -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(f).parameters) for name, f in found if name[0] != "_" or name == "__init__"
        }

    assert len(methods(left)) > 8
    assert methods(left) == methods(right)
    assert all(getattr(left, name).__doc__ for name in ("adapt", "task") if hasattr(left, name))


@pytest.mark.slow
def test_the_client_needs_httpx_and_nothing_else_of_ours_or_others() -> None:
    barred = (
        "models training numpy PIL fastapi starlette onnxruntime pydantic redis torch safetensors uvicorn typer rich"
    )
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({barred.split()!r}));"
        "import service.client; print(sorted(m for m in sys.modules if m.startswith('service.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "service.client.sync" in done.stdout
    assert all(name.startswith("service.client") for name in eval(done.stdout))


def test_the_package_gives_out_its_values_and_no_helpers() -> None:
    public = {name for name, value in vars(package).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert {"Client", "AsyncClient", "Prediction", "Report", "TaskNotFound"} <= public
    assert {name for name in public if name[0].islower()} == set()
