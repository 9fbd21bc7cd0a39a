"""The pages in docs/ are held to the code: their commands run, their tables are those of the code, their links lead
somewhere.

A block marked `sh` is run by a test, in order, one page in one shell; a block marked `json` or `text` after it shows
what comes back, `…` standing for anything. A block marked `console` is only shown: it needs Docker, or an hour.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml

from models.head import Affine, Head
from service import keys
from service.metrics import Metrics
from service.settings import Settings
from service.stores import Record, Scope
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from service.web import reference
from service.web.app import create_app
from tests.fakes import MeanColour, picture, tiny_artifact
from tests.redis_server import RedisServer
from tests.service.live import served
from tests.service.test_main import get, started
from training import config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
MARK = "@@ block"
CONFIGS = {
    "pretrain": config.PretrainConfig,
    "metatrain": config.MetatrainConfig,
    "evaluate": config.EvaluateConfig,
    "continual": config.ContinualConfig,
    "export": config.ExportConfig,
    "import": config.ImportConfig,
    "lake": config.LakeConfig,
    "results": config.ResultsConfig,
    "compare-objectives": config.CompareObjectivesConfig,
    "pretext": config.PretextConfig,
    "baseline": config.BaselineConfig,
}


class Block(NamedTuple):
    source: str
    shown: tuple[str, str] | None  # kind and content of what comes back


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    for kind, content in FENCE.findall(text):
        if kind == "sh":
            found.append(Block(content, None))
        elif kind in ("json", "text") and found[-1].shown is None:
            found[-1] = Block(found[-1].source, (kind, content))
    return found


def run(
    found: list[Block], *, cwd: Path = ROOT, replace: dict[str, str] | None = None, limit_s: float = 120
) -> list[str]:
    """Runs the blocks in one shell; what each said. Fails at the first that fails."""
    script = "\n".join(f"printf '\\n{MARK}\\n'\n{block.source}" for block in found)
    for old, new in (replace or {}).items():
        assert old in script, f"{old!r} is not on the page"
        script = script.replace(old, new)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=cwd,
            env={**clean, "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}"},
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            shell.wait(limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # what a block that failed has left running
            shell.wait()
        out.seek(0)
        errors.seek(0)
        said = out.read().split(f"\n{MARK}\n")[1:]
        assert shell.returncode == 0, (found[len(said) - 1].source, said[-1], errors.read())
    assert len(said) == len(found)
    return said


def pattern(text: str) -> str:
    return re.escape(text).replace("…", ".*")


def matches(shown: Any, real: Any) -> bool:
    """Whether an answer holds what is shown of it: fractions may differ in value, the rest may not."""
    if shown == "…":
        return True
    if isinstance(shown, dict):
        return isinstance(real, dict) and all(key in real and matches(value, real[key]) for key, value in shown.items())
    if isinstance(shown, list):
        if "…" in shown:
            shown, real = shown[: shown.index("…")], real[: shown.index("…")]
        return len(shown) == len(real) and all(matches(a, b) for a, b in zip(shown, real, strict=True))
    if isinstance(shown, str):
        return isinstance(real, str) and re.fullmatch(pattern(shown), real) is not None
    return type(shown) is type(real) and (isinstance(shown, float) or shown == real)


def answers(said: str) -> Iterator[Any]:
    """The JSON values that were printed, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while (start := re.compile(r"\S").search(said, at)) is not None:
        value, at = decoder.raw_decode(said, start.start())
        yield value


def check(found: list[Block], said: list[str]) -> None:
    """What came back is what is shown: of several answers, the last."""
    for block, output in zip(found, said, strict=True):
        if block.shown is None:
            assert '"urn:fewshot:problem:' not in output, (block.source, output)
            continue
        kind, content = block.shown
        if kind == "json":
            *_, last = answers(output)
            assert matches(json.loads(content), last), (block.source, content, last)
        else:
            for line in content.strip().splitlines():
                flexible = re.sub(r"(\\ )+", r"\\s+", pattern(line.strip()))
                assert re.search(flexible, output), (block.source, line, output)


@pytest.mark.slow
def test_the_commands_of_using_run_and_answer_as_shown(tmp_path: Path) -> None:
    found = blocks(text_of("using.md"))
    assert len(found) > 20
    with started(tmp_path) as (_, address, _said):
        check(found, run(found, replace={"localhost:8000": address, "/tmp/": f"{tmp_path}/"}))


@pytest.mark.slow
def test_the_commands_of_operating_run_and_answer_as_shown(tmp_path: Path) -> None:
    for name in ("service", "models", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    found = blocks(text_of("operating.md"))
    assert len(found) >= 6
    with started(tmp_path / "data") as (_, address, _said), socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        ports = {"http://localhost:8000": address, "localhost:8000": address, "8001": str(port)}
        check(found, run(found, cwd=tmp_path, replace=ports))


@pytest.mark.slow
def test_the_script_that_finds_stale_tasks_presents_a_key_and_sees_its_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, store = tmp_path / "keys.json", MemoryStore()
    tokens = {name: keys.create(file, tenant=name, scopes=("adapt",))[1] for name in ("acme", "other")}
    (source,) = re.findall(
        r"^python3 - http://localhost:8000 <<'EOF'\n(.*?)^EOF$", text_of("operating.md"), re.DOTALL | re.MULTILINE
    )

    def at(name: str) -> AbstractContextManager[httpx.Client]:
        artifact = tiny_artifact(tmp_path / name, name=name)
        return served(create_app(Settings(keys_file=file), artifact=artifact, extractor=MeanColour(), store=store))

    def teach(http: httpx.Client, tenant: str, task: str) -> None:
        files = [(colour, picture(colour)) for colour in ("red", "blue")]
        bearer = {"Authorization": f"Bearer {tokens[tenant]}"}
        assert http.put(f"/v1/tasks/{task}", files=files, headers=bearer).status_code == 201

    with at("before") as http:
        teach(http, "acme", "ours")
        teach(http, "other", "theirs")
    with at("after") as http:
        teach(http, "acme", "new")
        for tenant, stale in (("acme", ["ours"]), ("other", ["theirs"])):
            monkeypatch.setenv("FEWSHOT_KEY", tokens[tenant])
            command = [sys.executable, "-c", source, str(http.base_url)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            assert done.stdout.split() == stale, done.stderr


# The same commands, on few small images and for a short time.
QUICK = {
    "pretrain": "--shape tiny --size 32 --epochs 1 --batch 32 --precision float32",
    "metatrain": "--steps 10 --check-steps 5 --max-way 3 --max-shot 3 --slots 16",
    "export": "--episodes 20",
    "evaluate": "--way 3 --episodes 20",
}


@pytest.mark.slow
@pytest.mark.torch
def test_the_commands_of_training_lead_to_an_artifact_that_is_served(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from training import synthetic

    synthetic.write(tmp_path / "my_images", classes=15, images=12)
    for name in ("service", "models", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    found = [
        Block(re.sub(r"python -m training (\w+)", lambda match: f"{match[0]} {QUICK[match[1]]}", block.source), None)
        for block in blocks(text_of("training.md"))
    ]
    assert sum(block.source.count("python -m training") for block in found) == 6
    said = run(found, cwd=tmp_path, limit_s=300)
    assert "| learner | 3-way 1-shot |" in said[0]
    with started(tmp_path / "data", ARTIFACT=str(tmp_path / "runs" / "mine" / "final")) as (_, address, _said):
        served = get(address + "/v1/artifact")
    assert served["name"] == "mine"
    assert served["accuracy"]


@pytest.mark.slow
def test_the_api_reference_is_what_the_generator_gives() -> None:
    made = reference.page(asyncio.run(reference.document()))
    assert text_of("api.md") == made, "python -m service.web.reference writes it anew"


def test_every_metric_is_explained_where_operators_look() -> None:
    page = text_of("operating.md")
    names = {family.name for family in Metrics().registry.collect()}
    assert len(names) > 8
    assert {name for name in names if f"`{name}" not in page} == set()


def test_the_alerts_name_metrics_that_there_are() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", text_of("operating.md"), re.DOTALL | re.MULTILINE)
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) == 13
    families = {family.name: family.type for family in Metrics().registry.collect()}
    ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    served = {name + end for name, kind in families.items() for end in ends[kind]}
    named = {name for rule in rules for name in re.findall(r"\bfewshot_\w+", rule["expr"])}
    assert named <= served, named - served
    routes = {route for rule in rules for route in re.findall(r'route="([^"]*)"', rule["expr"])}
    assert all(f"`POST {route}`" in text_of("api.md") for route in routes)


def test_the_proxy_lets_a_little_more_through_than_the_service_takes_and_the_page_says_how_much() -> None:
    proxy = (ROOT / "deploy" / "nginx.conf").read_text()
    (size,) = re.findall(r"^ *client_max_body_size (\d+)m;$", proxy, re.MULTILINE)
    assert 1 < (int(size) << 20) / Settings().max_body_bytes < 1.1
    assert f"| bodies of {size} MiB, headers of 16 kB | more than `FEWSHOT_MAX_BODY_BYTES`" in text_of("operating.md")


WORDS = re.compile(r"(\d+) classes of (\d+)")


def a_commit(way: int, shot: int, seed: int, photo: int) -> tuple[Record, str, Head]:
    rng = np.random.default_rng(seed)
    labels, n = tuple(f"class {k}" for k in range(way)), way * shot
    record = Record(
        artifact=f"sha256:{0:064}",
        method="whitened",
        labels=labels,
        ids=tuple(f"ex_{rng.bytes(16).hex()}" for _ in range(n)),
        classes=np.repeat(np.arange(way, dtype=np.int32), shot),
        features=rng.normal(size=(n, 512)).astype(np.float16),
        unlabelled=np.zeros((0, 512), np.float16),
        created=0.0,
        images=tuple(rng.bytes(photo) for _ in range(n if photo else 0)),
    )
    weight, bias = rng.normal(size=(way, 512)).astype(np.float32), np.zeros(way, np.float32)
    return record, f"hd_{seed:040}", Head(Affine(weight, bias), labels, (shot,) * way, "whitened", record.artifact)


async def fill(scope: Scope, row: list[str], tasks: int) -> None:
    """Puts so many tasks into a store, as a row of the table describes them."""
    found = WORDS.fullmatch(row[0])
    assert found
    photo = 30_000 if "30 kB" in row[2] else 0
    for task in range(tasks):
        for version in range(int(row[1])):
            record, head_id, head = a_commit(int(found[1]), int(found[2]), 1000 * task + version, photo)
            await scope.commit(f"task-{task}", record, head_id, head, expect=None)


def size_rows() -> list[list[str]]:
    rows = passage("operating.md", "sizes").splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.slow
def test_a_task_takes_as_much_in_sqlite_as_the_page_says(tmp_path: Path) -> None:
    async def measure(row: list[str]) -> float:
        folder = tmp_path / row[3] / row[1]
        store = SqliteStore(folder)
        await store.open()
        await fill(store.scope("tenant"), row, 30)
        await store.close()
        return (folder / "fewshot.sqlite3").stat().st_size / 30 / 1e3

    for row in size_rows():
        assert asyncio.run(measure(row)) == pytest.approx(float(row[3]), rel=0.1), row


@pytest.mark.slow
@pytest.mark.redis
def test_a_task_takes_as_much_in_redis_as_the_page_says(tmp_path: Path) -> None:
    async def measure(row: list[str]) -> float:
        with RedisServer(tmp_path) as server:
            store = RedisStore(server.url, key=b"k" * 16)
            await store.open()
            await fill(store.scope("another"), row, 1)  # buffers, which grow once
            before = (await store.link.call(lambda client: client.info("memory")))["used_memory"]
            await fill(store.scope("tenant"), row, 30)
            after = (await store.link.call(lambda client: client.info("memory")))["used_memory"]
            await store.close()
        shutil.rmtree(tmp_path / "appendonlydir")
        return float(after - before) / 30 / 1e3

    for row in size_rows():
        assert asyncio.run(measure(row)) == pytest.approx(float(row[4]), rel=0.1), row


def flags_table() -> str:
    """The flags of the training commands, as their configurations have them."""
    parts = []
    for name, model in CONFIGS.items():
        parts += [f"**`{name}`**: {(model.__doc__ or '').strip()}\n", "| flag | default | meaning |", "|---|---|---|"]
        for field, info in model.model_fields.items():
            default = "required" if info.is_required() else "" if info.default in ("", None) else f"`{info.default}`"
            choices = [str(choice) for choice in getattr(info.annotation, "__args__", ()) if isinstance(choice, str)]
            meaning = "; ".join(part for part in (", ".join(choices), info.description or "") if part)
            parts.append(f"| `--{field.replace('_', '-')}` | {default} | {meaning} |")
        parts.append("")
    return "\n".join(parts).strip()


def passage(page: str, name: str) -> str:
    return text_of(page).split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_flags_of_training_are_those_of_the_code() -> None:
    assert passage("training.md", "flags") == flags_table(), "python -m tests.test_docs writes it anew"


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page are found, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in LINK.findall(re.sub(FENCE, "", text_of(page))):
        if path.startswith(("http:", "https:")):
            continue
        target = (DOCS / path).resolve() if path else DOCS / page
        assert target.exists(), f"{page} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page} links to {path}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = text_of("README.md")
    assert {path.name for path in DOCS.glob("*.md") if f"({path.name})" not in index} == {"README.md"}


if __name__ == "__main__":
    text = text_of("training.md")
    start, rest = text.split("<!-- flags -->\n")
    (DOCS / "training.md").write_text(
        f"{start}<!-- flags -->\n{flags_table()}\n<!-- /flags -->" + rest.split("<!-- /flags -->")[1]
    )
