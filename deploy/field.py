"""How well a running service does on folders of photographs: teaches it over HTTP and asks about the rest.

    python deploy/field.py http://127.0.0.1:8000 FOLDER_OR_ZIP --classes 5 --shots 5,10 --draws 10
    python deploy/field.py http://127.0.0.1:8000 FOLDER_OR_ZIP --unlabelled 5 --foreign 5 --json-out field.jsonl

Draws classes and examples at random (the same for the same --seed), teaches every learner of the service the same
examples, asks about every other image of those classes, and prints a Markdown row per learner: the mean accuracy
over the draws with its 95 % interval. `--group` is an expression: images of a class whose file names give the same
match show one thing, and stay on one side.

`--unlabelled` sends so many more images of each class without their label, and teaches and asks each learner that can
use them a second time, about the same images. `--foreign` also asks about images of so many classes that the task does
not know: how many of them, and of the genuine ones, are answered with "none of these". The accuracy is that of the most
probable class, whatever was rejected.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training import raw  # noqa: E402
from training.data import Grouper, pieces  # noqa: E402
from training.episodes import Pool  # noqa: E402
from training.folders import members  # noqa: E402
from training.intervals import interval  # noqa: E402

TOGETHER = 64  # images in one request
REJECT = 0.05  # share of genuine images that may be turned away

Named = list[tuple[str, bytes]]


class Drawn(NamedTuple):
    """One draw: what is taught, and what is asked; a foreign image has no label."""

    support: Named
    unlabelled: Named
    query: list[tuple[str | None, bytes]]


class Scores(NamedTuple):
    """Shares in 0..1 of one draw; None where nothing foreign was asked."""

    accuracy: float
    genuine_rejected: float
    foreign_rejected: float | None


def post(url: str, files: Named, *, method: str = "POST") -> dict[str, Any]:
    boundary = "f13ldb0undary"
    head = '--{}\r\nContent-Disposition: form-data; name="{}"; filename="x"\r\n\r\n'
    parts = [head.format(boundary, name).encode() + data + b"\r\n" for name, data in files]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind, method=method), timeout=120) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
    return found


def draw(pool: Pool, images: Named, given: argparse.Namespace, number: int, shot: int) -> Drawn:
    rng = np.random.default_rng([given.seed, number, shot])
    foreign = min(given.foreign, len(pool.classes) - given.classes)
    way = given.classes + foreign
    counts = np.full(way, shot + given.unlabelled)
    episode = pool.episode(rng, way=way, shots=counts, queries=given.queries or len(images))
    support: Named = []
    unlabelled: Named = []
    for label in range(given.classes):
        rows = episode.support[episode.labels == label]
        support += [images[row] for row in rows[:shot]]
        unlabelled += [("unlabelled", images[row][1]) for row in rows[shot:]]
    query = [
        (images[row][0] if label < given.classes else None, images[row][1])
        for row, label in zip(episode.query, episode.answers, strict=True)
    ]
    return Drawn(support, unlabelled, query)


def ask(url: str, learner: str, taught: Named, query: list[tuple[str | None, bytes]]) -> Scores:
    post(f"{url}/v1/tasks/field-test?method={learner}&on_bad_image=fail", taught, method="PUT")
    rows: list[dict[str, Any]] = []
    for at in range(0, len(query), TOGETHER):
        part: Named = [("image", data) for _, data in query[at : at + TOGETHER]]
        asked = f"{url}/v1/tasks/field-test/classify?on_bad_image=fail&reject={REJECT}"
        rows += post(asked, part)["predictions"]
    right, away, caught = [], [], []
    for row, (label, _) in zip(rows, query, strict=True):
        (caught if label is None else away).append(row["label"] is None)
        if label is not None:
            right.append(max(row["probabilities"], key=row["probabilities"].get) == label)
    return Scores(float(np.mean(right)), float(np.mean(away)), float(np.mean(caught)) if caught else None)


def line(
    scores: list[Scores], served: dict[str, Any], learner: str, shot: int, unlabelled: int, given: argparse.Namespace
) -> raw.Line:
    """The scores of all draws as a raw result, see training/raw.py."""
    training = served["training"]
    found: raw.Line = {
        "experiment": "field",
        "data": given.data.name,
        "method": learner,
        "way": given.classes,
        "shot": shot,
        "unlabelled": unlabelled,
    }
    for name in Scores._fields:
        values = np.array([getattr(score, name) for score in scores if getattr(score, name) is not None])
        if len(values):
            width = "interval" if name == "accuracy" else f"{name}_interval"
            found |= {name: round(100 * float(values.mean()), 2), width: round(100 * interval(values), 2)}
    return found | {
        "episodes": len(scores),
        "foreign": given.foreign,
        "seed": given.seed,
        "artifact": served["name"],
        "digest": served["digest"].removeprefix("sha256:")[:16],
        "precision": served["precision"],
        **({"views": served["views"]} if served["views"] > 1 else {}),
        "labels": "training classes" if training.get("labels_used") else "none",
        "trained_on": f"{training.get('data')} ({training.get('split')})",
        "training_seed": training.get("seed"),
        "command": command(given),
    }


def command(given: argparse.Namespace) -> str:
    words = [f"python deploy/field.py ADDRESS DATA/{given.data.name}"]
    for name in ("classes", "shots", "draws", "group", "unlabelled", "foreign", "queries", "seed"):
        value = getattr(given, name)
        if value != DEFAULTS[name]:
            words.append(f"--{name} '{value}'" if name == "group" else f"--{name} {value}")
    return " ".join(words)


DEFAULTS: dict[str, Any] = {
    "classes": 5,
    "shots": "5,10",
    "draws": 10,
    "group": "",
    "unlabelled": 0,
    "foreign": 0,
    "queries": 0,
    "seed": 0,
}
HELP = {
    "unlabelled": "images of each class that are sent without their label",
    "foreign": "classes that are asked about but not taught, as far as there are so many",
    "queries": "most images of a class that are asked about; 0 = all",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("data", type=Path)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=HELP.get(name))
    parser.add_argument("--json-out", type=Path, help="also add the figures there, one JSON line per row")
    given = parser.parse_args()
    images: Named = []
    groups = []
    grouper = Grouper(pieces(given.data), given.group)
    for name, member, archive in members(given.data):
        images.append((name, archive.read(member) if archive else Path(member).read_bytes()))
        groups.append(grouper(name, Path(member).name))
    names = sorted({name for name, _ in images})
    pool = Pool.of(np.array([names.index(name) for name, _ in images]), np.array(groups))
    with urllib.request.urlopen(given.url + "/v1/artifact", timeout=10) as answer:  # noqa: S310
        served = json.load(answer)
    shots = [int(shot) for shot in given.shots.split(",")]
    # Each learner as it is and, where unlabelled images are sent, once more with them.
    ways = [(method["name"], 0) for method in served["methods"]]
    if given.unlabelled:
        ways += [(method["name"], given.unlabelled) for method in served["methods"] if method["unlabelled"]]
    found: dict[tuple[str, int, int], list[Scores]] = {(*way, shot): [] for way in ways for shot in shots}
    for number in range(given.draws):
        for shot in shots:
            drawn = draw(pool, images, given, number, shot)
            for learner, unlabelled in ways:
                taught = drawn.support + drawn.unlabelled if unlabelled else drawn.support
                found[learner, unlabelled, shot].append(ask(given.url, learner, taught, drawn.query))
    delete = urllib.request.Request(f"{given.url}/v1/tasks/field-test", method="DELETE")  # noqa: S310
    urllib.request.urlopen(delete, timeout=10).close()  # noqa: S310
    for learner, unlabelled in ways:
        lines = [line(found[learner, unlabelled, shot], served, learner, shot, unlabelled, given) for shot in shots]
        text = [f"{cell['accuracy']:.1f} ± {cell['interval']:.1f}" for cell in lines]
        name = f"{learner}, {unlabelled} unlabelled" if unlabelled else learner
        print(f"| {given.data.name} | {name} | " + " | ".join(text) + " |")
        if given.json_out:
            raw.append(given.json_out, lines)


if __name__ == "__main__":
    main()
