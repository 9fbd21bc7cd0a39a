"""Prints what an image is made of, as CycloneDX JSON: every Python package, its version, licence and dependencies.

    python deploy/sbom.py                    of the CPU image: its lock is installed into a folder that goes
    python deploy/sbom.py --lock deploy/requirements-gpu.txt
    python deploy/sbom.py --python PATH      of an environment that is there already; only what the lock names is told

The tool is cyclonedx-bom. What is not Python, the base image, is told by its own vendor's list.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deploy.licences import locked  # noqa: E402


def installed(lock: Path, folder: Path) -> Path:
    """A Python that has the packages of a lock, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes", "-r", lock]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options], check=True)
    return python


def bill(python: Path, lock: Path) -> dict[str, Any]:
    """The bill of materials of what a Python has of a lock. Raises SystemExit when it lacks a part of it."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", python, "--output-format", "JSON"]
    command += ["--output-reproducible", "--pyproject", ROOT / "pyproject.toml"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    wanted = locked(lock)

    def key(component: dict[str, Any]) -> str:
        return str(component["purl"]).removeprefix("pkg:pypi/").split("@")[0].split("?")[0]

    parts = [part for part in found["components"] if part.get("purl") and key(part) in wanted]
    missing = set(wanted) - {key(part) for part in parts}
    if missing:
        raise SystemExit(f"{python} lacks {', '.join(sorted(missing))}, which {lock.name} names.")
    kept = {part["bom-ref"] for part in parts} | {found["metadata"]["component"]["bom-ref"]}
    found["components"] = parts
    found["dependencies"] = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", ()) if ref in kept]}
        for one in found.get("dependencies", ())
        if one["ref"] in kept
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found["metadata"]["component"] |= {"name": project["name"], "version": project["version"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, default=ROOT / "deploy" / "requirements-cpu.txt")
    parser.add_argument("--python", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = given.python or installed(given.lock, Path(folder) / "venv")
        json.dump(bill(python, given.lock), sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
