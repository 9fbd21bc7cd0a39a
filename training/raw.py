"""Raw results: JSON lines that describe themselves, one measured number each, and the command that made it.

A line holds what was measured (`accuracy` or another number, with its `interval`), on what (`experiment`, `data`,
`split`, `way`, `shot`, `episodes`, `seed`), with what (`method`, `artifact`, `labels`, `training_seed`), how long the
training took (`seconds`, null where nobody wrote it down) and `command`. Knows nothing of how they are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.artifact import ARRAYS, WEIGHTS, Artifact
from training.config import Config
from training.folders import DataError

Line = dict[str, Any]

SILENT = {"json_out", "results"}  # flags that change nothing of what is measured
FOLDERS = {"data": "DATA"}  # whose place differs from one computer to the next


def command(name: str, config: Config) -> str:
    """The command line that means this configuration: flags that have their default are left out."""
    words = [f"python -m training {name}"]
    for field, info in type(config).model_fields.items():
        value = getattr(config, field)
        if field in SILENT or (not info.is_required() and value == info.default):
            continue
        flag = "--" + field.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        text = f"{FOLDERS[field]}/{value.name}" if field in FOLDERS else str(value)
        words.append(f"{flag} '{text}'" if set(text) & set(" |^$()[]*+\\") else f"{flag} {text}")
    return " ".join(words)


def made_with(artifact: Artifact) -> Line:
    """What an artifact's manifest tells about how it was trained, as fields of a line."""
    training = artifact.manifest.training
    return {
        "artifact": artifact.manifest.name,
        "digest": artifact.digest.removeprefix("sha256:")[:16],
        "weights_digest": weights(artifact.manifest.files),
        "labels": "training classes" if training.get("labels_used") else "none",
        "trained_on": f"{training.get('data')} ({training.get('split')})",
        "training_seed": training.get("seed"),
        "seconds": training.get("seconds"),
    }


def weights(files: Mapping[str, str]) -> str:
    """Names extractor and learners by the digests of their files: a draft has those of the artifact made after it."""
    return hashlib.sha256("".join(files.get(name, "") for name in (WEIGHTS, ARRAYS)).encode()).hexdigest()[:16]


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read(path: Path) -> list[Line]:
    """The lines of a file. Raises DataError, naming the line, where one is no JSON object."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise DataError(f"{path}, line {number}: not a JSON object.")
        lines.append(line)
    return lines
