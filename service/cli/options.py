"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from service.client import Client
from service.client.http import DEFAULT_URL

OnBadImage = Literal["skip", "fail"]
Url = Annotated[str, typer.Option(envvar="FEWSHOT_URL", help="Address of the service.")]
Key = Annotated[str, typer.Option(envvar="FEWSHOT_KEY", show_envvar=True, show_default=False, help="API key.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Task = Annotated[str, typer.Argument(help="Name of the task.")]
BadImage = Annotated[OnBadImage, typer.Option(help="Leave unreadable images out, or refuse them all.")]
HERE = DEFAULT_URL


def client(url: str, key: str) -> Client:
    return Client(url, key)  # "" is no key
