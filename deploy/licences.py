"""Lists the licence of every locked package, as it states it itself, and fails on one that is not in the list below.

    python deploy/licences.py [LOCK...]      of what is installed beside this Python; the locks of deploy/ by default

A package that is not installed here cannot be asked: it is named, and `--all` makes that a failure too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
LOCKS = [DEPLOY / "requirements-cpu.txt", DEPLOY / "requirements-gpu.txt"]

# As SPDX writes them. Each lets us pass the package on in an image, changed or not, beside code of any licence.
ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-CMU", "MPL-2.0"),
    *("PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "Apache-2.0 WITH LLVM-exception"),
}
# What packages that know no SPDX say of themselves: classifiers, and short texts.
NAMES = {
    "apache software license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
# NVIDIA's licence allows its CUDA libraries to be passed on as part of an application; they are in the GPU image alone.
CUDA = re.compile(r"(nvidia|cuda)-[a-z0-9-]+")


def locked(path: Path) -> dict[str, str]:
    """Name -> version."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", path.read_text(), re.M))


def stated(package: Message) -> str:
    """The expression of a package's metadata; of several classifiers, all have to be allowed."""
    if package["License-Expression"]:
        return str(package["License-Expression"])
    classifiers = [c.split(" :: ")[-1] for c in package.get_all("Classifier", ()) if c.startswith("License :: ")]
    said = [c for c in classifiers if c != "OSI Approved"] or [str(package["License"] or "")]
    return " AND ".join(
        NAMES.get(word.strip().lower(), word.strip().splitlines()[0] if word.strip() else "") for word in said
    )


def allowed(expression: str) -> bool:
    """Whether one side of each OR is allowed as a whole. Raises nothing: what cannot be read is not."""
    inner = re.sub(r"\(([^()]*)\)", lambda found: "MIT" if allowed(found[1]) else "no", expression)
    return any(
        all(part.strip() in ALLOWED for part in re.split(r"\bAND\b", side)) for side in re.split(r"\bOR\b", inner)
    )


def rows(locks: list[Path]) -> Iterator[tuple[str, str, str, bool | None]]:
    """Name, version, licence, and whether it is allowed; None: it is not installed."""
    for name, version in sorted({pair for lock in locks for pair in locked(lock).items()}):
        if CUDA.fullmatch(name):
            yield name, version, "NVIDIA CUDA", True
            continue
        try:
            licence = stated(metadata.metadata(name))  # type: ignore[arg-type]
        except metadata.PackageNotFoundError:
            yield name, version, "not installed here", None
        else:
            yield name, version, licence, allowed(licence)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", type=Path, default=LOCKS, metavar="LOCK")
    parser.add_argument("--all", action="store_true", help="fail on a package that is not installed here")
    given = parser.parse_args(arguments)
    bad = 0
    for name, version, licence, good in rows(given.locks):
        wrong = good is False or (good is None and given.all)
        bad += wrong
        print(f"{name}=={version}  {licence or 'says nothing'}{'  NOT ALLOWED' if wrong else ''}")
    if bad:
        print(f"{bad} licences are not in the list of {Path(__file__).name}.", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
