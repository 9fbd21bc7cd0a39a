"""docs/mistakes.md is held to the program: each mistake is made, and the words that come back compared.

A shell block that is followed by a quotation is a mistake; one that is not is the remedy, and works.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from service import keys
from service.settings import Settings
from service.stores import folder
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import MeanColour, picture, tiny_artifact
from tests.service.live import served

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "mistakes.md").read_text()
PIECE = re.compile(r"^```sh\n(?P<block>.*?)^```$|^> (?P<quote>[^\n]*)$", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(r"(?:(\d{3}) )?`(\w+)`: (.*)")
SPECIAL = {"No key, or a wrong one": "keys", "Redis is away": "away"}


class Try(NamedTuple):
    block: str
    quote: str  # empty: it works


def sections(part: str) -> dict[str, list[Try]]:
    """What is tried under each heading of one part of the page, in order."""
    found: dict[str, list[Try]] = {}
    for section in re.split(r"^### ", part, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        tries = found.setdefault(title, [])
        for piece in PIECE.finditer(text):
            if piece["block"] is not None:
                tries.append(Try(piece["block"], ""))
            else:
                tries[-1] = Try(tries[-1].block, piece["quote"])
    return found


PARTS = {part.partition("\n")[0]: sections(part) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
STARTING = PARTS.pop("Starting")
ASKING = {title: tries for part in PARTS.values() for title, tries in part.items()}


def as_expected(quote: str) -> re.Pattern[str]:
    return re.compile(re.escape(quote).replace("…", ".*"))


def inside(answer: Any) -> Iterator[dict[str, Any]]:
    """Every object of an answer, however deep."""
    if isinstance(answer, dict):
        yield answer
    for value in answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ():
        yield from inside(value)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the mistakes are made: photos, and what is not one."""
    path = tmp_path_factory.mktemp("desk")
    for name in ("service", "models"):
        (path / name).symlink_to(ROOT / name)
    (path / ".venv").symlink_to(sys.prefix)
    for seed, (name, colour) in enumerate([("mug", "red"), ("other-mug", "red"), ("cup", "blue")]):
        (path / f"{name}.jpg").write_bytes(picture(colour, seed=seed, format="JPEG"))
    (path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(1000))
    mug = (path / "mug.jpg").read_bytes()
    (path / "forty-megabytes.jpg").write_bytes(mug.ljust(40_000_000, b"\0"))
    (path / "ten-megabytes.jpg").write_bytes(mug.ljust(10_000_000, b"\0"))
    Image.new("1", (8000, 6000)).save(path / "poster.png")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp"):
        frames[0].save(path / f"animation.{kind}", save_all=True, append_images=frames[1:])
    (path / "manual.pdf").write_bytes(b"%PDF-1.4\n")
    (path / "notes.txt").write_text("What I noted.")
    (path / "empty.jpg").touch()
    text = ["aGVsbG8="] * 65
    (path / "many-questions.json").write_text(json.dumps({"images": text}))
    zipped(path / "photos.zip", {f"{name}/1.jpg": (path / f"{name}.jpg").read_bytes() for name in ("mug", "cup")})
    zipped(path / "flat.zip", {"mug.jpg": mug})
    zipped(path / "thousands.zip", {f"{k % 2}/{k}.jpg": b"" for k in range(577)})
    zipped(path / "hundreds.zip", {f"{k % 2}/{k}.jpg": b"" for k in range(513)})
    return path


def zipped(path: Path, entries: dict[str, bytes]) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    path.write_bytes(out.getvalue())


def run(block: str, desk: Path, *, port: int = 0, works: bool = False, **variables: str) -> str:
    """What a block says, on either stream. `make run` is the service of this very interpreter."""
    block = re.sub(r"make run( PORT=\d+)?", f"env FEWSHOT_PORT={port} '{sys.executable}' -m service", block)
    # -S: without the packages that are installed.
    block = block.replace("python3 -m service", f"'{sys.executable}' -S -m service")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FEWSHOT_", "PYTHON"))}
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", block],
        cwd=desk,
        env={**clean, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert done.returncode == 0 or not works, (block, done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service with the limits it has by default, and a task `mugs`."""
    artifact = tiny_artifact(tmp_path_factory.mktemp("artifact"))
    app = create_app(Settings(lanes=2), artifact=artifact, extractor=MeanColour(), store=MemoryStore())
    with served(app) as client:
        files = [("mug", picture("red")), ("cup", picture("blue"))]
        assert client.put("/v1/tasks/mugs", files=files).status_code == 201
        yield client


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[httpx.Client, str]]:
    """The service as the section asks for it, and the key of somebody who may only classify."""
    artifact = tiny_artifact(tmp_path / "artifact")
    path = tmp_path / "keys.json"
    _, token = keys.create(path, tenant="mine", scopes=["classify"])
    if request.param == "keys":
        app = create_app(
            Settings(lanes=1, keys_file=path), artifact=artifact, extractor=MeanColour(), store=MemoryStore()
        )
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"redis://127.0.0.1:{free.getsockname()[1]}/0"
        app = create_app(Settings(lanes=1, redis_url=address), artifact=artifact, extractor=MeanColour())
    with served(app) as client:
        yield client, token


def check(tries: list[Try], desk: Path, address: str, **variables: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    assert any(one.quote for one in tries), "nothing is quoted"
    for block, quote in tries:
        typed = block.replace("localhost:8000", address).replace("localhost:8009", f"localhost:{nobody}")
        said = run(typed, desk, works=not quote, **variables).replace(str(nobody), "8009")
        if not quote:
            assert '"code"' not in said, (block, said)
            continue
        wanted = ANSWER.fullmatch(quote)
        if wanted is None:
            assert as_expected(quote).search(said), (block, quote, said)
            continue
        status, code, text = wanted.groups()
        answer = json.loads(said)
        assert status is None or answer["status"] == int(status), (block, said)
        found = [item["detail"] for item in inside(answer) if item.get("code") == code]
        assert any(as_expected(text).fullmatch(detail) for detail in found), (block, text, said)


def test_the_page_has_the_fifteen_and_more() -> None:
    assert len(STARTING) + len(ASKING) >= 15
    assert set(SPECIAL) < set(ASKING)


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in ASKING if title not in SPECIAL])
def test_a_mistake_brings_the_words_that_the_page_says(title: str, desk: Path, http: httpx.Client) -> None:
    check(ASKING[title], desk, http.base_url.netloc.decode())


@pytest.mark.slow
@pytest.mark.parametrize(("title", "elsewhere"), list(SPECIAL.items()), indirect=["elsewhere"], ids=[*SPECIAL.values()])
def test_a_mistake_in_another_place_brings_them_too(
    title: str, desk: Path, elsewhere: tuple[httpx.Client, str]
) -> None:
    client, token = elsewhere
    check(ASKING[title], desk, client.base_url.netloc.decode(), KEY=token)


@pytest.mark.slow
@pytest.mark.parametrize("title", list(STARTING))
def test_a_start_that_fails_says_what_the_page_says(title: str, desk: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, folder.lock(desk / "data"):
        port = taken.getsockname()[1]
        assert STARTING[title]
        for block, quote in STARTING[title]:
            # The folder is taken only where that is the mistake: who comes first to the port does not get to it.
            elsewhere = {} if "folder" in title else {"FEWSHOT_DATA_DIR": str(tmp_path / "data")}
            said = run(block, desk, port=port, **elsewhere).replace(str(port), "8000")
            assert quote, block
            assert as_expected(quote).search(said), (block, quote, said)
