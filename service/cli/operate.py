"""Commands for whoever runs the service: serve, keys, doctor, bench, train.

What they start is imported, or started as a program of its own, when they run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.cli import lacking, show
from service.cli.options import Json, Key

ROOT = Path(__file__).resolve().parents[2]
HANDED_OVER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    artifact: Annotated[str | None, typer.Option(help="Folder of an artifact, or the name of one that ships.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the embedded store.")] = None,
) -> int:
    """Start the service. Every other setting is a variable FEWSHOT_...; `fewshot doctor --settings` lists them."""
    shipped = ROOT / "models" / "pretrained" / (artifact or "")
    if artifact and not Path(artifact).exists() and shipped.is_dir():
        artifact = str(shipped)
    given = {"HOST": host, "PORT": port, "ARTIFACT": artifact, "DATA_DIR": data_dir}
    os.environ.update({f"FEWSHOT_{name}": str(value) for name, value in given.items() if value is not None})
    try:
        from service.__main__ import main
    except ModuleNotFoundError as error:
        raise show.Failure(lacking(error.name, "serve")) from None
    return main()


def keys(context: typer.Context) -> int:
    """Make, list and revoke API keys: create, list, revoke."""
    try:
        from service.keys import main
    except ModuleNotFoundError as error:
        raise show.Failure(lacking(error.name, "serve")) from None
    return main(context.args)


def doctor(
    url: Annotated[
        str | None,
        typer.Option(envvar="FEWSHOT_URL", help="Service to try; without one, the one that the settings describe."),
    ] = None,
    key: Key = "",
    settings: Annotated[bool, typer.Option("--settings", help="List every setting in force as well.")] = False,
    json: Json = False,
) -> int:
    """Check this computer and the service, and say what to do about what is wrong."""
    from service.doctor import examine, in_force, wrong

    checks = []
    for check in examine(os.environ, url=url, key=key or None):
        checks.append(check)
        if not json:
            show.check(check)
    bad, listed = wrong(checks), in_force(os.environ) if json or settings else {}
    if json:
        show.as_json({"ok": not bad, "checks": checks, "settings": listed})
        return int(bad)
    if settings:
        show.rows(("setting", "value"), list(listed.items()))
    print("Something has to be seen to: " + ", ".join(c.name for c in checks if c.status == "fail") if bad else "OK")
    return int(bad)


def bench(context: typer.Context) -> int:
    """Measure speed on this computer; hands over to deploy/bench.py."""
    program = ROOT / "deploy" / "bench.py"
    if not program.exists():
        raise show.Failure(
            "The benchmark is deploy/bench.py of the project's source; it is not part of what is installed."
        )
    return _handed_over(str(program), *context.args)


def train(context: typer.Context) -> int:
    """Make an artifact: pretrain, metatrain, evaluate, export, demo; hands over to `python -m training`."""
    for package in ("training", "torch"):
        if importlib.util.find_spec(package) is None:
            raise show.Failure(lacking(package, "train"))
    return _handed_over("-m", "training", *context.args)


def _handed_over(*arguments: str) -> int:
    sys.stdout.flush()
    return subprocess.call([sys.executable, *arguments])  # noqa: S603  # the user's own words, to the user's own Python


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(doctor)
    for command in (keys, bench, train):
        app.command(context_settings=HANDED_OVER, add_help_option=False)(command)
