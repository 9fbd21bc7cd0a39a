"""The README is held to the code: its commands run, and it names every setting, route and code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import errors
from service.settings import PREFIX, PRETRAINED, Settings
from tests.service.test_main import started
from training import accuracy, raw, results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
QUICK = README.split("## Quick start")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", QUICK, re.DOTALL)


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, Path) and default.is_absolute():
            default = default.relative_to(ROOT)
        text = "" if default in ("", None) else f"`{default}`"
        description = field.description or f"one of {', '.join(getattr(field.annotation, '__args__', ()))}"
        lines.append(f"| `{PREFIX}{name.upper()}` | {text} | {description} |")
    return "\n".join(lines)


BENCHMARK = {
    "photos-free-long": "no labels; eleven minutes of a GPU",
    "photos-64-long": "the same, then labels for five minutes",
    "photos-cpu": "labels; two CPU cores",
    "photos-free-cpu": "no labels; two CPU cores, ResNet-10",
}


def accuracy_tables() -> str:
    """The default learners: on mini-ImageNet from the raw results, on Omniglot as the shipped manifest says."""
    lines, _, _ = results.load(ROOT / "training" / "results")
    found = accuracy.distinct([line for line in lines if line["experiment"] == "accuracy"])
    values = {
        (line["artifact"], line["shot"], line.get("views", 1)): f"{line['accuracy']:.2f} ± {line['interval']:.2f}"
        for line in found
        if line["default"] and line["data"] == "mini_imagenet" and line["precision"] == "float32" and line["way"] == 5
    }
    shots = (1, 5, 10)
    parts = ["**mini-ImageNet**, 64 classes to learn from, the 20 test classes, 2,000 episodes, ResNet-18:\n"]
    parts.append("| artifact | learned from | " + " | ".join(f"5-way {shot}-shot" for shot in shots) + " |")
    parts.append("|---|---|" + "---|" * len(shots))
    for name, source in BENCHMARK.items():
        parts.append(f"| `{name}` | {source} | " + " | ".join(values[name, shot, 1] for shot in shots) + " |")
        seen = " | ".join(values[name, shot, 3] for shot in shots)
        parts.append(f"| | the same in three views an image (`FEWSHOT_VIEWS=3`) | {seen} |")
    manifest = json.loads((PRETRAINED / "characters" / "manifest.json").read_text())
    rows = manifest["accuracy"]
    cells = sorted({(row["way"], row["shot"]) for row in rows})
    parts.append("")
    parts.append(
        f"**{manifest['description']}**, trained without labels; the {rows[0]['split']} classes, "
        f"{rows[0]['episodes']:,} episodes; the artifact `characters`:\n"
    )
    parts.append("| learner | " + " | ".join(f"{way}-way {shot}-shot" for way, shot in cells) + " |")
    parts.append("|---|" + "---|" * len(cells))
    for precision in ("float32", "int8"):
        own = {
            (row["way"], row["shot"]): f"{row['accuracy']:.2f} ± {row['interval']:.2f}"
            for row in rows
            if row["method"] == manifest["default"] and row["precision"] == precision
        }
        title = f"`{manifest['default']}`" + ", int8" * (precision == "int8")
        parts.append(f"| {title} | " + " | ".join(own[cell] for cell in cells) + " |")
    return "\n".join(parts)


SHOWN = ("photos", "photos-64-long", "characters")


def measured(experiment: str) -> list[raw.Line]:
    """The raw results of the shipped artifacts' default learners, as the results page shows them."""
    lines, _, _ = results.load(ROOT / "training" / "results")
    found = accuracy.distinct([line for line in lines if line["experiment"] == experiment])
    ours = [line for line in found if line.get("default") and line["artifact"] in SHOWN]
    return [line for line in ours if line["command"].startswith("python -m training evaluate ")]


NAMES = {
    "trashnet": "household waste (TrashNet, 6 kinds)",
    "magnetic_tile": "magnetic-tile defects (6 kinds)",
    "gtsrb": "traffic signs (GTSRB, 43 kinds)",
    "mini_imagenet": "mini-ImageNet",
    "omniglot": "Omniglot",
}


CROSS = """`photos`, the artifact that is served, learned from 80 classes of mini-ImageNet, in pictures as people take
them; for the benchmark above that would be too many. On domains that it never saw, 5-way, 2,000 episodes, default
learner; that and the 128 pixels were chosen with looks at these three sets. Chance is 20: they are hard for a small
extractor that saw 80 kinds of things in 84 pixels. By every learner: [training/RESULTS.md](training/RESULTS.md).
"""
TRUST = """How far probabilities and "none of these" can be trusted on classes never seen, with five in each episode
that the task does not know (one where there are six in all; `python -m training evaluate ... --foreign 5`), per cent,
default learner. In a domain far from the training photographs little that is foreign is noticed, and where the examples
of a class show few things, as frames of one approach to a sign do, more genuine images are turned away than were asked
for.
"""


def cross_table() -> str:
    """The default learner of `photos` on domains that it never saw."""
    lines = [line for line in measured("accuracy") if line["data"] in ("trashnet", "magnetic_tile", "gtsrb")]
    values = {
        (line["data"], line["shot"], "spread" if "spread" in line else line.get("views", 1)): (
            f"{line['accuracy']:.1f} ± {line['interval']:.1f}"
        )
        for line in lines
        if line["way"] == 5
    }
    shots = (1, 5, 10)
    parts = [
        CROSS,
        "| set | " + " | ".join(f"{shot}-shot" for shot in shots) + " |",
        "|---|" + "---|" * len(shots),
    ]
    for name in ("trashnet", "magnetic_tile", "gtsrb"):
        parts.append(f"| {NAMES[name]} | " + " | ".join(values[name, shot, 1] for shot in shots) + " |")
        for how, words in (
            (2, "the same in two views an image (`FEWSHOT_VIEWS=2`)"),
            ("spread", "the same, each example of another thing (`evaluate --spread`)"),
        ):
            if (name, 1, how) in values:
                parts.append(f"| {words} | " + " | ".join(values[name, shot, how] for shot in shots) + " |")
    return "\n".join(parts)


def trust_table() -> str:
    """How far probabilities and "none of these" can be trusted, by the default learners."""
    parts = [
        TRUST,
        "| artifact, set | task | calibration error (ECE) | genuine images turned away, 5 asked for "
        "| foreign images turned away | AUROC |",
        "|---|---|---|---|---|---|",
    ]
    for line in [line for line in measured("trust") if not {"views", "spread"} & set(line)]:
        parts.append(
            f"| {line['artifact']}, {NAMES[line['data']]} | {line['way']}-way {line['shot']}-shot "
            f"| {line['ece']:.1f} | "
            f"{line['false_reject']:.1f} ± {line['false_reject_interval']:.1f} | {line['foreign_rejected']:.1f} | "
            f"{line['auroc']:.1f} ± {line['auroc_interval']:.1f} |"
        )
    return "\n".join(parts)


def passage(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_table_of_settings_is_that_of_the_code() -> None:
    assert passage("settings") == settings_table(), "python -m tests.test_readme writes it anew"


def test_the_tables_of_accuracy_are_those_of_the_artifacts() -> None:
    assert passage("accuracy") == accuracy_tables(), "python -m tests.test_readme writes it anew"


def test_the_tables_across_domains_and_of_trust_are_those_of_the_results() -> None:
    assert passage("cross") == cross_table(), "python -m tests.test_readme writes it anew"
    assert passage("trust") == trust_table(), "python -m tests.test_readme writes it anew"


def test_every_error_code_is_explained() -> None:
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.FewshotError) and kind is not errors.FewshotError
    }
    missing = {code for code in codes - {"artifact_invalid"} if f"`{code}`" not in README}
    assert not missing


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("readme")) as (_, address, _said):
        yield address


@pytest.mark.slow
def test_every_route_is_in_the_table(address: str) -> None:
    done = subprocess.run(["curl", "-s", address + "/openapi.json"], capture_output=True, timeout=30)
    routes = {(method.upper(), path) for path, item in json.loads(done.stdout)["paths"].items() for method in item}
    missing = {f"{method} {path}" for method, path in routes if f"`{method} {path}`" not in README}
    assert not missing


@pytest.mark.slow
def test_the_quick_start_runs_as_it_is_written(address: str) -> None:
    assert len(BLOCKS) >= 8
    for kind, block in BLOCKS:
        block = block.replace("http://localhost:8000", address).replace("localhost:8000", address)
        program = (
            ["bash", "-euo", "pipefail", "-c", block]
            if kind == "sh"
            else [sys.executable, "-W", "error::SyntaxWarning", "-c", block]
        )
        done = subprocess.run(program, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (block, done.stderr)
        if kind == "python":
            assert done.stdout.strip() == "theta"
            continue
        if "-X DELETE" in block:
            assert '"task_not_found"' not in done.stdout
            continue
        answer = json.loads(done.stdout)
        assert "code" not in answer, (block, answer)
        for prediction in answer.get("predictions", []):
            assert prediction["label"] in ("alpha", "theta")


def test_the_quick_start_tells_the_letters_apart(address: str) -> None:
    sample = ROOT / "service" / "sample"
    fields = [f"-F{label}=@{sample}/{label}/{n}.png" for label in ("alpha", "theta") for n in (1, 2, 3)]
    queries = [f"-Fquery=@{sample}/{label}/{n}.png" for label in ("alpha", "theta") for n in range(4, 10)]
    done = subprocess.run(["curl", "-s", address + "/v1/classify", *fields, *queries], capture_output=True, timeout=60)
    labels = [row["label"] for row in json.loads(done.stdout)["predictions"]]
    right = sum(label == want for label, want in zip(labels, ["alpha"] * 6 + ["theta"] * 6, strict=True))
    assert right >= 11, labels


if __name__ == "__main__":
    text = README
    made = {"settings": settings_table, "accuracy": accuracy_tables, "cross": cross_table, "trust": trust_table}
    for name, content in ((name, table()) for name, table in made.items()):
        start, rest = text.split(f"<!-- {name} -->\n")
        text = f"{start}<!-- {name} -->\n{content}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
    (ROOT / "README.md").write_text(text)
