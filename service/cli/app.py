"""The command, put together, and how it ends: what went wrong becomes one sentence and an exit status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from service.cli import VERSION, operate, show, tasks, teach
from service.cli.show import Failure
from service.client import FewshotError, Unauthorized

app = typer.Typer(
    name="fewshot",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fewshot {VERSION}")
        raise typer.Exit()


@app.callback()
def every(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Learns image-classification tasks from a handful of labelled photos."""


teach.register(app)
tasks.register(app)
operate.register(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    try:
        return int(app(args=arguments, prog_name="fewshot", standalone_mode=False) or 0)
    except typer.TyperException as error:  # wrong usage
        where = getattr(getattr(error, "ctx", None), "command_path", "fewshot")
        text = error.format_message()  # none where the help was shown
        end = "" if text.endswith((".", "?")) else "."
        return _told(f"{text}{end} See `{where} --help`.", status=error.exit_code) if text else error.exit_code
    except FewshotError as error:
        hint = " Set FEWSHOT_KEY, or use --key." if isinstance(error, Unauthorized) else ""
        return _told(" ".join([error.detail + hint, *getattr(error, "__notes__", ())]))
    except OSError as error:
        return _told(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except (Failure, ValueError) as error:
        return _told(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _told(text: str, *, status: int = 1) -> int:
    show.say(f"fewshot: {text}")
    return status
