"""`fewshot`: the service, its tasks and its tools on one command line.

    teach.py     adapt, add, remove, classify, export       tasks.py    tasks, show, forget, rollback
    operate.py   serve, keys, doctor, bench, train           show.py     tables, plain lines, JSON
    app.py       puts them together

Commands that talk to a service do so through `service.client`; importing this loads neither the server nor a model.
What goes wrong is one sentence on stderr and exit status 1, or 2 where the command itself was wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

VERSION = "0.1.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status. The command is installed with the client, which needs less than the command does."""
    try:
        from service.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "rich", "typer"):
            raise
        print(f"fewshot: {lacking(error.name, 'cli')}", file=sys.stderr)
        return 1
    return run(arguments)


def lacking(module: str | None, extra: str) -> str:
    return f"This needs more packages (no {module} here): in the project's folder, pip install '.[{extra}]'."
