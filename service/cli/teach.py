"""Commands that teach a task and ask it: adapt, add, remove, classify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli import show
from service.cli.options import HERE, BadImage, Json, Key, Task, Url, client
from service.client import ExampleNotFound, TaskState, pictures
from service.client import Task as Taught
from service.client.plans import Precision, Reject

Folder = Annotated[Path, typer.Argument(help="A folder, or a zip, with one sub-folder of pictures for each label.")]


def adapt(
    folder: Folder,
    task: Annotated[str | None, typer.Option(help="Its name; without one it is named after what was learned.")] = None,
    method: Annotated[str | None, typer.Option(help="Learner; the service has a default.")] = None,
    retain: Annotated[Literal["features", "images"], typer.Option(help="What is kept of the pictures.")] = "features",
    ttl: Annotated[float | None, typer.Option(help="Seconds until it is forgotten; otherwise never.")] = None,
    on_bad_image: BadImage = "skip",
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> int:
    """Learn a task from a folder of pictures. Exit status 1 when some could not be read."""
    with client(url, key) as service, show.progress("Sending pictures") as progress:
        found = service.adapt(
            folder, task=task, method=method, retain=retain, ttl=ttl, on_bad_image=on_bad_image, progress=progress
        )
    return _told(found, json=json)


def add(
    task: Task,
    folder: Folder,
    on_bad_image: BadImage = "skip",
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> int:
    """Add examples to a task, of known classes or new ones. Exit status 1 when some pictures could not be read."""
    with client(url, key) as service, show.progress("Sending pictures") as progress:
        found = service.task(task).add(folder, on_bad_image=on_bad_image, progress=progress)
    return _told(found, json=json)


def _told(found: TaskState, *, json: bool) -> int:
    """The exit status: a picture that is there twice was read all the same."""
    show.task(found, json=json)
    return int(any(item.code != "duplicate_example" for item in found.rejected))


def remove(
    task: Task,
    example: Annotated[
        str | None, typer.Option(help="The example to take back: its id, which `tasks show` lists, or its file.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Label of the class to take back.")] = None,
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> None:
    """Take an example or a whole class back."""
    with client(url, key) as service:
        if (example is None) == (label is None):
            raise typer.BadParameter("Say either --example or --label.")
        found = service.task(task)
        found = found.remove_class(label) if label is not None else _without(found, example or "")
    show.task(found, json=json)


def _without(found: Taught, example: str) -> Taught:
    """Takes back an example that is named by its id or its file. Raises Failure."""
    file = Path(example)
    known = {item.id: item.label for item in found.examples}
    if example in known or not (file.is_file() or file.suffix or "/" in example):
        return found.remove(example)
    if not file.is_file():  # perhaps named as `adapt` does, by what lies below its folder
        raise show.Failure(f"There is no file {example}; `fewshot tasks show {found.name}` lists the ids of examples.")
    data = file.read_bytes()
    ids = sorted({pictures.example_id(item.label, data) for item in found.classes} & set(known))
    if len(ids) > 1:
        which = ", ".join(f"{id} of {known[id]!r}" for id in ids)
        raise show.Failure(f"{example} is an example of several classes; say which by its id: {which}.")
    try:
        return found.remove(ids[0] if ids else pictures.example_id(None, data))  # unlabelled ones are not listed
    except ExampleNotFound:
        raise show.Failure(f"{example} is no example of the task {found.name!r}.") from None


def _rate(text: str) -> Reject:
    try:
        return "off" if text == "off" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor off.") from None


def classify(
    task: Task,
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    reject: Annotated[
        str | None,
        typer.Option(help="Share of genuine images that may be taken for none of these (0.001 to 0.5), or off."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Name the examples that each image resembles most.")
    ] = False,
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> int:
    """Ask a task about pictures. Exit status 1 when some could not be read."""
    rate = None if reject is None else _rate(reject)
    files = [file for path in images for file in pictures.many(path)]
    with client(url, key) as service, show.progress("Asking") as progress:
        found = service.task(task).classify(
            [file.name for file in files], reject=rate, explain=explain or None, progress=progress
        )
    if json:
        show.as_json([{"image": file.name, **show.plain(row)} for file, row in zip(files, found, strict=True)])
    else:
        show.predictions(files, found, explain=explain)
    bad = [(file, row.error) for file, row in zip(files, found, strict=True) if row.error]
    for file, error in bad:
        show.say(f"{file.name}: {error.detail}")
    return 1 if bad else 0


def export(
    task: Task,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .onnx, or .zip with a program that runs it.")
    ],
    precision: Annotated[
        Precision | None, typer.Option(help="Of its extractor; otherwise that of the service.")
    ] = None,
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> None:
    """Write a task as one ONNX file that runs without the service."""
    with client(url, key) as service:
        found = service.task(task)
        found.export(output, precision=precision)
    size = output.stat().st_size
    if json:
        show.as_json({"task": found.name, "version": found.version, "file": str(output), "bytes": size})
    else:
        show.rows(("file", "bytes"), [(output, size)])


def register(app: typer.Typer) -> None:
    for command in (adapt, add, remove, classify, export):
        app.command()(command)
