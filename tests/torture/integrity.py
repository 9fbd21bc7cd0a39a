"""What is stored is what was written, whatever happens to its bytes and however many write at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import redis

from service.stores import SealBroken, Sealer, Store
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from service.support import example_id
from tests.fakes import picture
from tests.redis_server import RedisServer
from tests.service.stores import values
from tests.service.stores.conftest import KEY, BeneathMemory, BeneathRedis, BeneathSqlite
from tests.torture.isolation import PATIENT, QUESTION, UNSHARED, Wire, at_once, message, metric, run, running, without
from tests.torture.line import Outcome, fault
from tests.torture.world import RAW, Service, support

KINDS = ("pointer", "history", "record", "head", "remembered")
WAYS = (
    *4 * ("bit",),
    "cut",
    "emptied",
    "extended",
    "noise",
    "other type",
    "other value",
    "other key",
    "pickle",
    "huge",
)
HUGE = bytes(1_000_000)


def damaged(way: str, data: bytes, others: Sequence[bytes], choose: random.Random, canary: Path) -> bytes:
    """A value as it may come back one day. `others` are values that are whole, but stand elsewhere."""
    at = choose.randrange(len(data))
    match way:
        case "bit":
            return data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "emptied":
            return b""
        case "extended":
            return data + choose.randbytes(choose.randint(1, 64))
        case "noise":
            return data[:at] + choose.randbytes(choose.randint(1, 32)) + data[at + 32 :]
        case "other value":
            return choose.choice(others)
        case "other key":  # by somebody who knows all but the key
            return Sealer(b"another key").seal(data[36:], "a", "pointer", "one")
        case "pickle":  # whoever unpickles it makes a folder
            return choose.choice((b"", data[:36])) + b"cos\nmkdir\n(V" + str(canary).encode() + b"\ntR."
        case _:
            return data + HUGE


class Unsealed(Sealer):
    """For controls: a store that trusts what it reads."""

    def seal(self, payload: bytes, *place: str) -> bytes:
        return payload

    def open(self, data: bytes, *place: str) -> bytes:
        return bytes(data)


class Damage:
    """Two tenants with two tasks each, of two versions, in one store; values of task one of tenant a are damaged."""

    def __init__(self, store: Store, beneath: Any, seed: int, canary: Path):
        self.store, self.beneath, self.canary = store, beneath, canary
        self.choose = random.Random(f"{store.name} {seed}")
        self.places = list(itertools.product("ab", ("one", "two")))
        self.counts: Counter[str] = Counter()
        self.accepted: list[str] = []
        self.raised: Counter[str] = Counter()

    def seed_of(self, tenant: str, task: str) -> int:
        return 10 * self.places.index((tenant, task))

    async def read(self, kind: str, tenant: str, task: str) -> Any:
        """What the store says of one kind of value, as its callers get it; "refused" where it is declared damaged."""
        getattr(self.store, "pointers", {}).clear()  # what it remembers was not damaged
        scope, head = self.store.scope(tenant), f"hd_{self.seed_of(tenant, task) + 1}"
        try:
            match kind:
                case "pointer":
                    found: Any = await scope.pointer(task)
                case "history":
                    found = await scope.versions(task)
                case "record":
                    found = await scope.record(task)
                case "head":
                    found = await scope.head(head)
                case "remembered":
                    found = await scope.recall(task, "key")
                case _:
                    found = [entry for entry in await scope.tasks(limit=9) if entry[0] == task]
        except SealBroken:
            return "refused"
        except Exception as error:
            self.raised[f"{self.store.name} {kind}: {type(error).__name__}"] += 1
            return "refused"
        return found or "refused"

    async def begin(self) -> None:
        """Writes everything, and notes what is true and the values that a place may be given from elsewhere."""
        for tenant, task in self.places:
            for k in range(2):
                await values.commit(self.store.scope(tenant), task, self.seed_of(tenant, task) + k)
            await self.store.scope(tenant).remember(task, "key", f"{tenant} {task}".encode(), ttl_s=3600)
        self.true = {
            (kind, *place): await self.read(kind, *place) for kind in (*KINDS, "listed") for place in self.places
        }
        self.bytes = {kind: self.get(kind, "a", "one") for kind in KINDS}
        if isinstance(self.beneath, BeneathRedis):
            self.keys = {kind: self.beneath._key(kind, "a", self.name(kind, "a", "one"), None) for kind in KINDS}
        stand = [self.get(kind, *place) for kind in KINDS for place in self.places]
        stand += [self.beneath.get("record", "a", name="one", version=1), self.beneath.get("head", "a", name="hd_0")]
        self.others = {kind: [data for data in stand if data != self.bytes[kind]] for kind in KINDS}

    def name(self, kind: str, tenant: str, task: str) -> str:
        return f"hd_{self.seed_of(tenant, task) + 1}" if kind == "head" else task

    def get(self, kind: str, tenant: str, task: str) -> bytes:
        return self.beneath.get(kind, tenant, name=self.name(kind, tenant, task))

    def put(self, kind: str, data: Any, *, other_type: bool = False) -> None:
        """Writes beneath the store. `other_type`: as something else than bytes, which no store writes there."""
        if isinstance(self.beneath, BeneathRedis):
            client, key = self.beneath._client, self.keys[kind]
            client.delete(key)
            push = self.choose.choice((client.rpush, client.sadd)) if other_type else client.set
            push(key, data)
        elif isinstance(self.beneath, BeneathSqlite) and other_type:
            column, table, _ = self.beneath.WHERE[kind]
            cast = self.choose.choice(("TEXT", "INTEGER", "REAL"))
            row = self.beneath._row(kind, "a", self.name(kind, "a", "one"), None)[0]
            self.beneath._db.execute(f"UPDATE {table} SET {column} = CAST(? AS {cast}) WHERE rowid = ?", (data, row))
        else:
            data = self.choose.choice((7, 0.5, data.decode("latin-1"))) if other_type else data
            self.beneath.set(kind, "a", name=self.name(kind, "a", "one"), data=data)

    async def strike(self, n: int) -> None:
        """Damages one value after the other, n in all, and reads each through the store."""
        for number in range(n):
            kind, way = self.choose.choice(KINDS), self.choose.choice(WAYS)
            data = self.bytes[kind]
            if way != "other type":
                data = damaged(way, data, self.others[kind], self.choose, self.canary)
                self.counts["same bytes"] += data == self.bytes[kind]
            self.put(kind, data, other_type=way == "other type")
            for read in {kind, "pointer", self.choose.choice(KINDS), "listed"}:
                found, true = await self.read(read, "a", "one"), self.true[read, "a", "one"]
                if found == "refused":
                    self.counts["refused"] += read == kind
                elif not alike(found, true):
                    self.accepted.append(f"{self.store.name} {kind} {way}: {read}")
                else:
                    self.counts["read as written"] += 1
            place = self.choose.choice(self.places[1:])
            for read in (*KINDS, "listed") if number % 20 == 0 else ("pointer", "listed"):
                if not alike(await self.read(read, *place), self.true[read, *place]):
                    self.accepted.append(f"{self.store.name} {kind} {way}: {read} of the unharmed {place}")
            self.put(kind, self.bytes[kind])


def alike(found: Any, true: Any) -> bool:
    """Equal to the last bit, pairs and lists part by part."""
    if isinstance(found, tuple | list) and isinstance(true, tuple | list):
        return len(found) == len(true) and all(alike(one, other) for one, other in zip(found, true, strict=True))
    return bool(values.same(found, true)) if hasattr(true, "__dataclass_fields__") else found == true


@fault("G5", n=100_000, quick=1500)
def corrupted_values(n: int, seed: int, folder: Path) -> Outcome:
    """A stored value that was changed, cut, swapped or planted is never taken for what was written.

    Eight of ten in a dictionary, which is the quickest to damage, one of ten each in SQLite and Redis: all of them seal
    and read their values by the same code.
    """
    canary = folder / "unpickled"
    (folder / "redis").mkdir()

    async def strike(store: Store, beneath: Any, count: int) -> Damage:
        damage = Damage(store, beneath, seed, canary)
        await damage.begin()
        await damage.strike(count)
        await store.close()
        return damage

    async def all_stores() -> list[Damage]:
        memory = MemoryStore(key=KEY)
        found = [await strike(memory, BeneathMemory(memory), n - 2 * (n // 10))]
        sqlite = SqliteStore(folder, key=KEY)
        await sqlite.open()
        with closing(sqlite3.connect(folder / "fewshot.sqlite3", isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = OFF")
            db.text_factory = bytes
            found.append(await strike(sqlite, BeneathSqlite(db, sqlite), n // 10))
        with RedisServer(folder / "redis", "--appendonly", "no") as server:
            shared = RedisStore(server.url, key=KEY, timeout_s=10)
            await shared.open()
            with closing(redis.Redis(port=server.port)) as client:
                found.append(await strike(shared, BeneathRedis(client), n // 10))
        trusting = MemoryStore(key=KEY)
        trusting.sealer = Unsealed(KEY)
        return [*found, await strike(trusting, BeneathMemory(trusting), max(n // 10, 500))]

    logging.disable(logging.WARNING)  # a line for each
    try:
        *sealed, control = asyncio.run(all_stores())
    finally:
        logging.disable(logging.NOTSET)
    accepted = [text for damage in sealed for text in damage.accepted]
    raised = sum((damage.raised for damage in sealed), Counter())
    wrong = [f"{count} x {text}" for text, count in raised.items()]
    if canary.exists():
        wrong.append("a pickle was opened")
    share = len(control.accepted) / max(n // 10, 500)
    if share < 0.2:
        wrong.append(f"control: without a seal only {share:.0%} were accepted")
    counts = sum((damage.counts for damage in sealed), Counter())
    return Outcome(
        acknowledged=n,
        lost=len(accepted),
        control={"no seal, share accepted": round(share, 3), "undeclared errors": sum(control.raised.values())},
        figures={**counts, "accepted": dict(Counter(accepted).most_common(8))},
        wrong=tuple(wrong),
    )


def ask(http: httpx.Client, task: str) -> httpx.Response:
    return http.post(f"/v1/tasks/{task}/classify", content=QUESTION, headers=RAW)


def told(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer; of one that is no JSON, nothing: without a seal, that comes as well."""
    try:
        return dict(answer.json())
    except ValueError:
        return {}


class Attack:
    """A service over Redis whose values are damaged while it runs and while it is down."""

    def __init__(self, service: Service, client: redis.Redis, seed: int, canary: Path, ways: Sequence[str] = WAYS):
        self.service, self.redis, self.canary, self.ways = service, client, canary, ways
        self.kinds = itertools.cycle((*KINDS, "index"))
        self.choose = random.Random(f"http {seed}")
        self.counts: Counter[str] = Counter()
        self.lies: list[str] = []
        self.wrong: list[str] = []

    def said(self, when: str, answer: httpx.Response, true: Any = None) -> bool:
        """Notes an answer: one that is right (`true`: its predictions), or 409 task_stale; says whether it was 2xx."""
        code = told(answer).get("code", "")
        self.counts[f"{when}: {answer.status_code} {code}".strip()] += 1
        if answer.is_success:
            if true is not None and told(answer).get("predictions") != true:
                self.lies.append(when)
        elif (answer.status_code, code) != (409, "task_stale"):
            self.wrong.append(f"{when}: {answer.status_code} {code}")
        return answer.is_success

    def strike(self, task: str, head: str, others: dict[str, list[bytes]]) -> str:
        """Damages one value of a task, of a record its head too, so that it is needed."""
        kind, way = next(self.kinds), self.choose.choice(self.ways)
        key = self.keys(task, head)[kind]
        data: Any = self.redis.get(key)
        if way == "other type":
            self.redis.delete(key)
            self.redis.rpush(key, data)
        else:
            self.redis.set(key, damaged(way, data, others[kind], self.choose, self.canary))
        if kind == "record":
            self.redis.delete(self.keys(task, head)["head"])
        return kind

    def keys(self, task: str, head: str) -> dict[str, Any]:
        remembered: Any = self.redis.keys(f"fs:default:m:{task}:*")
        names = {"pointer": f"p:{task}", "history": f"v:{task}", "record": f"r:{task}:2", "head": f"h:{head}"}
        names["index"] = f"m:{task}"
        return {kind: f"fs:default:{name}" for kind, name in names.items()} | {"remembered": remembered[0]}

    def batch(self, number: int, count: int) -> None:
        """Teaches tasks, damages each, asks it, restarts the service, asks again, and teaches it anew."""
        with self.service.client() as http:
            files = {f"b{number}t{k}": support(1000 * number + k) for k in range(count)}
            extra = {task: picture("green", seed=1000 * number + k) for k, task in enumerate(files)}
            more = {"Idempotency-Key": "once"}
            true, heads = {}, {}
            for task in files:
                assert http.put(f"/v1/tasks/{task}", files=files[task]).status_code == 201
                added = http.post(f"/v1/tasks/{task}/examples", files={"green": extra[task]}, headers=more)
                heads[task] = added.raise_for_status().json()["head"]
                true[task] = ask(http, task).json()["predictions"]
            whole = {task: self.keys(task, head) for task, head in heads.items()}
            others: Any = {kind: [self.redis.get(keys[kind]) for keys in whole.values()] for kind in (*KINDS, "index")}
            struck = {}
            for k, (task, head) in enumerate(heads.items()):
                if k % 5 == 4:
                    struck[task] = "nothing"
                    continue
                mine = {kind: [*others[kind][:k], *others[kind][k + 1 :]] for kind in others}
                struck[task] = self.strike(task, head, mine)
            for task, kind in struck.items():
                alive = self.said(f"warm, {kind}", ask(http, task), true[task])
                if not alive and kind != "pointer":
                    self.wrong.append(f"warm, {kind}: a known task does not go on")
        self.service.kill()
        self.service.start()
        with self.service.client() as http:
            for task, kind in struck.items():
                alive = self.said(f"cold, {kind}", ask(http, task), true[task])
                if alive != (kind not in ("pointer", "record")):
                    self.wrong.append(f"cold, {kind}: {'served' if alive else 'refused'}")
                if alive:
                    again = http.post(f"/v1/tasks/{task}/examples", files={"green": extra[task]}, headers=more)
                    if self.said(f"repeated, {kind}", again) and told(again).get("head") != heads[task]:
                        self.lies.append(f"repeated, {kind}")
                for path in ("", "/versions", "?version=1"):
                    self.said("described", http.get(f"/v1/tasks/{task}{path}"))
                self.said("taught anew", http.put(f"/v1/tasks/{task}", files=[*files[task], ("green", extra[task])]))
                if not self.said("asked anew", ask(http, task), true[task]):
                    self.wrong.append(f"taught anew, {kind}: refused")
            listed = http.get("/v1/tasks?limit=200")
            if not self.said("listed", listed) or not {*files} <= {item["task"] for item in told(listed)["items"]}:
                self.wrong.append("listed: not all of them")
            for task in files:
                if http.delete(f"/v1/tasks/{task}").status_code != 204:
                    self.wrong.append("a task could not be deleted")


@fault("G5", n=300, quick=7)
def corrupted_over_http(n: int, seed: int, folder: Path) -> Outcome:
    """With a damaged value in Redis, a task is answered as before or refused until it is taught anew; others go on."""
    canary = folder / "unpickled"
    key = folder / "key"
    key.write_text("a key for this torture only")
    trusting = without("from service.stores import Sealer\nSealer.open = lambda self, data, *place: data[36:]")
    (folder / "redis").mkdir()
    with RedisServer(folder / "redis") as server, closing(redis.Redis(port=server.port)) as client:
        settings: dict[str, object] = {"redis_url": server.url, "store_key_file": key, **PATIENT}
        service = Service(folder / "service", **settings)
        unsealed = Service(folder / "control", wrapper=trusting, **settings)
        attack = Attack(service, client, seed, canary)
        control = Attack(unsealed, client, seed, canary, ("other value",))
        with running([service, unsealed]):
            for one, count in ((attack, n), (control, max(n // 4, 7))):
                for number, start in enumerate(range(0, count, 50)):
                    one.batch(number, min(50, count - start))
    if canary.exists():
        attack.wrong.append("a pickle was opened")
    if not control.lies:
        attack.wrong.append("control: without a seal nothing wrong was answered")
    return Outcome(
        acknowledged=n,
        lost=len(attack.lies),
        control={
            "no seal, values of others, tasks": max(n // 4, 7),
            "wrong answers": len(control.lies),
            "other faults": len(control.wrong),
        },
        figures={"answers": dict(sorted(attack.counts.items())), "lies": attack.lies[:5]},
        wrong=tuple(f"{count} x {text}" for text, count in Counter(attack.wrong).most_common(8)),
    )


# Many who write at once.


async def additions(ports: Sequence[int], n: int, seed: int) -> tuple[dict[str, int], Counter[str]]:
    """n additions to one task, from many clients of all replicas; which are acknowledged, with the version of each.

    Every third is made on the condition that the task has not moved, and tried again a few times when it has.
    """
    acknowledged: dict[str, int] = {}
    statuses: Counter[str] = Counter()
    left = iter(range(n))
    look = message("GET", "/v1/tasks/t")

    async def client(number: int) -> None:
        wire = await Wire.to(ports[number % len(ports)])
        for k in left:
            label, image = ("red", "blue", "green")[k % 3], picture("red", seed=10_000 * seed + k, size=(8, 8))
            for _ in range(5 if k % 3 == 0 else 1):
                headers = {}
                if k % 3 == 0:
                    [(_, task)] = await at_once([wire], [look])
                    headers["If-Match"] = f"v{task['version']}"
                request = message("POST", "/v1/tasks/t/examples", files={label: image}, headers=headers)
                [(status, body)] = await at_once([wire], [request])
                statuses[f"{status} {body.get('code', '')}".strip()] += 1
                if status == 200:
                    acknowledged[example_id(label, image)] = body["version"]
                if status != 412:
                    break
        wire.close()

    await asyncio.gather(*(client(number) for number in range(24)))
    return acknowledged, statuses


@fault("G18", n=600, quick=40)
def lost_updates(n: int, seed: int, folder: Path) -> Outcome:
    """Of additions by many clients to one task through two replicas, exactly the acknowledged ones are there."""
    last_wins = without(
        "from service.stores.redis import RedisScope\n"
        "commit = RedisScope.commit\n"
        "RedisScope.commit = lambda *given, expect, **named: commit(*given, expect=None, **named)"
    )
    (folder / "redis").mkdir()
    reports: list[dict[str, Any]] = []
    wrong: list[str] = []
    with RedisServer(folder / "redis") as server:
        shared: dict[str, object] = {"redis_url": server.url, "max_examples": 5000, **PATIENT}
        services = [
            Service(folder / f"{name}{k}", wrapper=wrapper, **shared)
            for name, wrapper in (("replica", ()), ("control", last_wins))
            for k in range(2)
        ]
        with running(services) as ports, services[0].client() as http:
            for pair, count in ((ports[:2], n), (ports[2:], max(n // 5, 40))):
                first = http.put("/v1/tasks/t", files=support(seed)).raise_for_status().json()
                start = time.monotonic()
                acknowledged, statuses = run(additions(pair, count, seed))
                seconds = time.monotonic() - start
                last = http.get("/v1/tasks/t").raise_for_status().json()
                http.delete("/v1/tasks/t").raise_for_status()
                there = {row["id"] for row in last["examples"]} - {row["id"] for row in first["examples"]}
                report: dict[str, Any] = {
                    "acknowledged": len(acknowledged),
                    "lost": len(acknowledged.keys() - there),
                    "not acknowledged, but there": len(there - acknowledged.keys()),
                    "versions": last["version"] - first["version"],
                    "same version twice": len(acknowledged) - len(set(acknowledged.values())),
                    "statuses": dict(statuses),
                    "a_second": round(len(acknowledged) / seconds),
                }
                reports.append(report)
    kept, control = reports
    if kept["not acknowledged, but there"] or kept["same version twice"] or kept["versions"] != kept["acknowledged"]:
        wrong.append(f"versions and examples do not count the acknowledged changes: {kept}")
    if kept["statuses"].keys() - {"200", "412 version_conflict"} or "412 version_conflict" not in kept["statuses"]:
        wrong.append(f"conflicts are not all 412: {kept['statuses']}")
    if not control["lost"]:
        wrong.append("control: where the last writer wins nothing was lost")
    return Outcome(
        kept["acknowledged"], kept["lost"], control={"last writer wins": control}, figures=kept, wrong=tuple(wrong)
    )


COPIES = 100
ADAPTED = 'fewshot_stage_duration_seconds_count{op="adapt",stage="adapt"}'


async def copies(service: Service, rounds: int, seed: int) -> tuple[int, list[str]]:
    """Sends so many times a hundred copies of one POST at the same time: how many were answered, and what was wrong."""
    wires = await asyncio.gather(*(Wire.to(service.port) for _ in range(COPIES)))
    wrong, answered = [], 0
    for number in range(rounds):
        answers = await at_once(wires, [message("POST", "/v1/tasks", files=support(10_000 * seed + number))] * COPIES)
        statuses = Counter(status for status, _ in answers)
        told = {json.dumps({**body, "timings_ms": None}) for _, body in answers}
        answered += statuses[200] + statuses[201]
        if statuses.keys() - {200, 201} or not statuses[201] or len(told) != 1 or answers[0][1]["version"] != 1:
            wrong.append(f"statuses {dict(statuses)}, {len(told)} different answers")
    for wire in wires:
        wire.close()
    return answered, wrong


async def retries(service: Service, rounds: int, *, key: bool) -> tuple[list[int], list[str]]:
    """Sends copies of an addition, takes it back, and sends it again: by how much that moved the version each time."""
    wires = await asyncio.gather(*(Wire.to(service.port) for _ in range(COPIES)))
    moves, wrong = [], []
    for number in range(rounds):
        url, image = f"/v1/tasks/r{key}{number}", picture("red", seed=10**6 + number)
        headers = {"Idempotency-Key": "retried"} if key else {}
        [(_, task)] = await at_once(wires[:1], [message("PUT", url, files=support(number))])
        request = message("POST", f"{url}/examples", files={"red": image}, headers=headers)
        answers = await at_once(wires, [request] * COPIES)
        done = [body for status, body in answers if status == 200]
        busy = [body["code"] for status, body in answers if status != 200]
        if not done or {body["version"] for body in done} != {task["version"] + 1} or set(busy) - {"in_flight"}:
            wrong.append(f"copies: {Counter((status, body.get('code')) for status, body in answers)}")
        other = message("POST", f"{url}/examples", files={"blue": image}, headers=headers)
        back = message("DELETE", f"{url}/examples/{example_id('red', image)}")
        steps = [(other, 422)] if key else []
        for asked, expected in (*steps, (back, 200), (request, 200)):
            [(status, body)] = await at_once(wires[:1], [asked])
            if status != expected:
                wrong.append(f"{status} {body.get('code')} instead of {expected}")
        [(_, last)] = await at_once(wires[:1], [message("GET", url)])
        moves.append(last["version"] - task["version"] - 1)  # one of them took it back
    for wire in wires:
        wire.close()
    return moves, wrong


@fault("G17", n=1000, quick=3)
def one_adaptation_of_many_copies(n: int, seed: int, folder: Path) -> Outcome:
    """A hundred copies of one request, sent at once, are one adaptation; with a key, whenever they come."""
    (folder / "redis").mkdir()
    few = max(n // 100, 3)
    with RedisServer(folder / "redis") as server:
        shared: dict[str, object] = {"redis_url": server.url, **PATIENT}
        service = Service(folder / "service", **shared)
        control = Service(folder / "control", wrapper=UNSHARED, **shared)
        with running([service, control]):
            start = time.monotonic()
            answered, wrong = run(copies(service, n, seed))
            seconds, adapted = time.monotonic() - start, round(metric(service, ADAPTED))
            run(copies(control, few, seed + 1))
            unshared = round(metric(control, ADAPTED))
            keyed, more = run(retries(service, max(n // 20, 3), key=True))
            keyless, _ = run(retries(service, 3, key=False))
    wrong += more
    if adapted != n:
        wrong.append(f"{n} requests were adapted to {adapted} times")
    if set(keyed) != {1}:
        wrong.append(f"with a key, the version moved by {Counter(keyed)}")
    if unshared <= few or min(keyless) <= 1:
        wrong.append(f"control: {unshared} adaptations of {few}, versions moved by {keyless}")
    return Outcome(
        acknowledged=answered,
        lost=max(0, adapted - n) + sum(move != 1 for move in keyed),
        control={"work is not shared, adaptations of one request": unshared / few, "no key, moves": min(keyless)},
        figures={"adaptations": adapted, "copies": COPIES, "keyed": len(keyed), "a_second": round(answered / seconds)},
        wrong=tuple(wrong[:8]),
    )
