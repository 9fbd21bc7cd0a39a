"""How well a running service does on folders of photographs: teaches it over HTTP and asks about the rest.

    python deploy/field.py http://127.0.0.1:8000 FOLDER_OR_ZIP --classes 5 --shots 5,10 --draws 10

Draws classes and examples at random (the same for the same --seed), teaches every learner of the service the same
examples, asks about every other image of those classes, and prints a Markdown row per learner: the mean accuracy
over the draws with its 95 % interval. `--group` is an expression: images of a class whose file names give the same
match show one thing, and stay on one side.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.data import Grouper, members, pieces  # noqa: E402
from training.episodes import Pool  # noqa: E402
from training.evaluate import interval  # noqa: E402

TOGETHER = 64  # images in one request


def post(url: str, files: list[tuple[str, bytes]], *, method: str = "POST") -> dict[str, Any]:
    boundary = "f13ldb0undary"
    head = '--{}\r\nContent-Disposition: form-data; name="{}"; filename="x"\r\n\r\n'
    parts = [head.format(boundary, name).encode() + data + b"\r\n" for name, data in files]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind, method=method), timeout=120) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
    return found


def accuracy(url: str, learner: str, support: list[tuple[str, bytes]], query: list[tuple[str, bytes]]) -> float:
    post(f"{url}/v1/tasks/field-test?method={learner}&on_bad_image=fail", support, method="PUT")
    right = 0
    for at in range(0, len(query), TOGETHER):
        part = query[at : at + TOGETHER]
        rows = post(
            f"{url}/v1/tasks/field-test/classify?on_bad_image=fail&reject=off", [("image", data) for _, data in part]
        )
        right += sum(row["label"] == label for row, (label, _) in zip(rows["predictions"], part, strict=True))
    return right / len(query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("data", type=Path)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--shots", default="5,10")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--group", default="")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    images: list[tuple[str, bytes]] = []
    groups = []
    grouper = Grouper(pieces(given.data), given.group)
    for name, member, archive in members(given.data):
        images.append((name, archive.read(member) if archive else Path(member).read_bytes()))
        groups.append(grouper(name, Path(member).name))
    names = sorted({name for name, _ in images})
    labels = np.array([names.index(name) for name, _ in images])
    pool = Pool.of(labels, np.array(groups))
    with urllib.request.urlopen(given.url + "/v1/artifact", timeout=10) as answer:  # noqa: S310
        learners = [method["name"] for method in json.load(answer)["methods"]]
    shots = [int(shot) for shot in given.shots.split(",")]
    found: dict[tuple[str, int], list[float]] = {(learner, shot): [] for learner in learners for shot in shots}
    for draw in range(given.draws):
        for shot in shots:
            rng = np.random.default_rng([given.seed, draw, shot])
            counts = np.full(given.classes, shot)
            episode = pool.episode(rng, way=given.classes, shots=counts, queries=len(images))
            support, query = ([images[row] for row in rows] for rows in (episode.support, episode.query))
            for learner in learners:
                found[learner, shot].append(accuracy(given.url, learner, support, query))
    delete = urllib.request.Request(f"{given.url}/v1/tasks/field-test", method="DELETE")  # noqa: S310
    urllib.request.urlopen(delete, timeout=10).close()  # noqa: S310
    for learner in learners:
        cells = [np.array(found[learner, shot]) for shot in shots]
        text = [f"{100 * values.mean():.1f} ± {100 * interval(values):.1f}" for values in cells]
        print(f"| {given.data.name} | {learner} | " + " | ".join(text) + " |")


if __name__ == "__main__":
    main()
