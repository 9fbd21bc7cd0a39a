"""Asks whether a known weakness is reported of any locked package, and fails when it is, or when nobody could be asked.

    python deploy/advisories.py [LOCK...]        needs pip-audit, and the network

An audit that cannot reach its source finds nothing, and may say so with a good conscience. So a pin that is known to be
bad goes along: unless it is reported, no answer counts. `--service osv` asks another source.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parent
LOCKS = [DEPLOY / "requirements-cpu.txt", DEPLOY / "requirements-gpu.txt"]
CANARY = "pillow==9.0.0"  # CVE-2022-22817 and more; it is never installed
# Advisories that were looked at and do not concern us: id -> why.
EXPLAINED: dict[str, str] = {}


class NoAnswer(Exception):
    """The source could not be asked; the message is what was seen instead."""


def reported(requirements: Path, service: str) -> dict[str, list[str]]:
    """Package -> ids of its advisories. Raises NoAnswer unless every package was looked up."""
    # Pinned and hashed, so nothing is resolved or installed: the names and versions are all that is sent.
    options = ["--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "-r", requirements, "-s", service, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise NoAnswer((done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]) from None
    if any("skip_reason" in one for one in found):
        raise NoAnswer("some packages were skipped")
    return {f"{one['name']}=={one['version']}": [v["id"] for v in one["vulns"]] for one in found if one["vulns"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", type=Path, default=LOCKS, metavar="LOCK")
    parser.add_argument("--service", choices=["pypi", "osv"], default="pypi")
    given = parser.parse_args(arguments)
    bad: dict[str, list[str]] = {}
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as canary:
            canary.write(CANARY)
            canary.flush()
            if CANARY not in reported(Path(canary.name), given.service):
                raise NoAnswer(f"{CANARY} was not reported, and is known to be bad")
        for lock in given.locks:
            bad |= reported(lock, given.service)
    except (NoAnswer, subprocess.TimeoutExpired) as error:
        print(
            f"Nothing is known: the source of advisories ({given.service}) could not be asked ({error}).",
            file=sys.stderr,
        )
        return 2
    unexplained = {name: [one for one in ids if one not in EXPLAINED] for name, ids in bad.items()}
    for name, ids in sorted(unexplained.items()):
        if ids:
            print(f"{name}: {', '.join(ids)}")
    return int(any(unexplained.values()))


if __name__ == "__main__":
    sys.exit(main())
