"""`fewshot tasks`: look at what the service knows, forget it, or go back to what it was."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from service.cli import show
from service.cli.options import HERE, Json, Key, Task, Url, client

group = typer.Typer(help="List tasks; show, forget or roll one back.", pretty_exceptions_enable=False)


@group.callback(invoke_without_command=True)
def every(context: typer.Context, url: Url = HERE, key: Key = "", json: Json = False) -> None:
    """List tasks; show, forget or roll one back."""
    if context.invoked_subcommand is not None:
        return
    with client(url, key) as service:
        found = list(service.tasks())
    if json:
        show.as_json([{"task": item.name, "version": item.version, "head": item.head} for item in found])
    elif found or not show.is_terminal():
        show.rows(("task", "version", "head"), [(item.name, item.version, item.head) for item in found])
    else:
        show.say("There is no task yet. `fewshot adapt FOLDER --task NAME` learns one.")


@group.command("show")
def one(
    task: Task,
    version: Annotated[int | None, typer.Option(help="An earlier version that is still kept.")] = None,
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> None:
    """Describe a task, with its examples, its report and its versions."""
    with client(url, key) as service:
        found = service.task(task, version=version)
        show.task(found, json=json, versions=found.versions(), with_examples=True)


@group.command()
def forget(
    task: Task,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> None:
    """Delete a task with all its versions, for good."""
    with client(url, key) as service:
        found = service.task(task)
        if not yes and sys.stdin.isatty():
            typer.confirm(f"Forget {task!r} and all its versions for good?", abort=True, err=True)
        found.forget()
    if json:
        show.as_json({"task": task, "forgotten": True})
    elif show.is_terminal():
        show.say(f"{task!r} is forgotten.")


@group.command()
def rollback(
    task: Task,
    version: Annotated[int, typer.Argument(help="The version to go back to; `show` lists them.")],
    url: Url = HERE,
    key: Key = "",
    json: Json = False,
) -> None:
    """Make an earlier version the newest."""
    with client(url, key) as service:
        show.task(service.task(task).rollback(version), json=json)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="tasks")
