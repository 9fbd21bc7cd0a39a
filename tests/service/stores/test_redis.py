"""The shared store when Redis dies, hangs, comes back, is set up wrongly, or loses its callers."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import redis
import redis.asyncio

from models.errors import StoreUnavailable
from service.stores import Pointer, Sealer, StoreMisconfigured, redis_link
from service.stores.lru import Recent
from service.stores.record import RecentRecords
from service.stores.redis import MARK, Found, RedisScope, RedisStore
from service.stores.sealed import Sealed
from tests.redis_server import RedisServer
from tests.service.stores.files import holding
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

TIMEOUT_S = 0.5
PAUSE_S = 0.5  # less than what is in force, to save time
LIMITED = "+get +set +del +mget +watch +multi +exec +unwatch +zadd +zrem +zrangebylex +scan +ping"


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "PAUSE_S", PAUSE_S)


@asynccontextmanager
async def opened(
    server: RedisServer, *, connections: int = 16, user: str = "", password: str = "", head_ttl_s: int = 100
) -> AsyncIterator[RedisStore]:
    store = RedisStore(
        server.url,
        key=b"key",
        timeout_s=TIMEOUT_S,
        connections=connections,
        user=user,
        password=password,
        head_ttl_s=head_ttl_s,
    )
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def refused_after(operation: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    with pytest.raises(StoreUnavailable):
        await operation()
    return time.perf_counter() - start


async def back(scope: RedisScope) -> float:
    """Waits until the store answers again; returns the seconds that took."""
    start = time.perf_counter()
    while True:
        try:
            await scope.pointer("cats")
            return time.perf_counter() - start
        except StoreUnavailable:
            assert time.perf_counter() - start < 10
            await asyncio.sleep(0.01)


# Faults of Redis.


async def test_what_was_acknowledged_survives_kill_9_of_redis(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        for seed in range(10):
            await commit(scope, f"task{seed}", seed)
        await scope.delete("task0")
        await commit(scope, "task1", 1)
        await scope.remember("task1", "key", b"value", ttl_s=60)
        own_redis.kill()
        own_redis.start()
        assert await back(scope) < PAUSE_S + 0.5  # without a restart of ours
        assert [name for name, _ in await scope.tasks(limit=20)] == [f"task{seed}" for seed in range(1, 10)]
        for seed in range(1, 10):
            found = await scope.record(f"task{seed}")
            assert found is not None
            assert same(found[1], make_record(seed))
        assert await scope.pointer("task0") is None
        assert await scope.versions("task1") == [Pointer(2, "hd_1"), Pointer(1, "hd_1")]
        assert await scope.recall("task1", "key") == b"value"


async def test_deleted_photos_leave_the_log_of_redis_when_it_is_rewritten(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    log, record = tmp_path / "appendonlydir", make_record(1, images=True)
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await scope.commit("cats", record, "hd_1", make_head(1), expect=None)
        await scope.delete("cats")
    assert holding(log, record.images[5])
    with redis.Redis(port=own_redis.port) as client:
        client.bgrewriteaof()
    left = True
    async with asyncio.timeout(10):
        while left:
            await asyncio.sleep(0.05)
            with suppress(FileNotFoundError):  # just then
                left = bool(holding(log, record.images[5]))


async def test_without_a_log_kill_9_of_redis_would_lose_all(tmp_path: Path) -> None:
    # The control of the test above.
    with RedisServer(tmp_path, "--appendonly", "no") as server:
        async with opened(server) as store:
            await commit(store.scope("t"), "cats")
            server.kill()
            server.start()
            await asyncio.sleep(PAUSE_S + 0.2)
        async with opened(server) as store:  # the one that was open would have noticed
            assert await store.scope("t").tasks(limit=20) == []


@pytest.mark.parametrize("fault", ["kill", "hang"])
async def test_a_redis_that_is_away_or_hangs_fails_in_time_then_at_once_and_recovers(
    own_redis: RedisServer, fault: str
) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        operations: list[Callable[[], Awaitable[object]]] = [
            lambda: scope.pointer("cats"),
            lambda: commit(scope, "cats", 2),
            lambda: scope.delete("cats"),
            lambda: scope.tasks(limit=5),
        ]
        getattr(own_redis, fault)()
        # All at once, more than there are connections: none waits for two timeouts, even on a busy machine.
        took = await asyncio.gather(*(refused_after(operation) for operation in operations * 10))
        assert sorted(took)[len(took) // 2] < TIMEOUT_S + 0.1
        assert max(took) < TIMEOUT_S + 0.3
        for operation in operations:
            assert min([await refused_after(operation) for _ in range(5)]) < 0.02
        assert await store.ping() is False
        (own_redis.start if fault == "kill" else own_redis.go_on)()
        assert await back(scope) < PAUSE_S + TIMEOUT_S
        assert await store.ping() is True
        pointer = await scope.pointer("cats")
        # What was refused while it hung is there or not, as a whole.
        if pointer is not None:
            found = await scope.record("cats")
            assert found is not None
            assert same(found[1], make_record(int(found[0].head.removeprefix("hd_"))))
        await commit(scope, "cats", 3)


async def test_an_operation_that_takes_too_long_is_refused_and_no_other(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(own_redis) as store:
        scope, answered = store.scope("t"), 0
        await commit(scope, "cats", 1)

        async def endless(client: redis.asyncio.Redis) -> None:
            await client.blpop("fs:none", timeout=10)

        waits = [asyncio.create_task(refused_after(lambda: store.link.call(endless))) for _ in range(3)]
        while not all(wait.done() for wait in waits) or answered < 20:
            assert await scope.pointer("cats") == Pointer(1, "hd_1")
            answered += 1
            await asyncio.sleep(0.01)
        assert max([await wait for wait in waits]) < TIMEOUT_S + 0.3
        assert await store.ping() is True
        assert "cannot be used" not in caplog.text
        assert caplog.text.count("one operation took it too long") == 1  # and not once for each
        with redis.Redis(port=own_redis.port) as client:  # so that no answer goes to another operation
            assert "blpop" not in [one["cmd"] for one in client.client_list()]


async def test_a_redis_that_was_busy_for_a_moment_is_used_again_at_once(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "PAUSE_S", 5)
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        own_redis.hang()
        await refused_after(lambda: scope.pointer("cats"))
        own_redis.go_on()
        assert await back(scope) < TIMEOUT_S + 0.3


async def test_a_redis_that_hangs_behind_a_slow_operation_is_found_out(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        await commit(store.scope("t"), "cats", 1)

        async def two(client: redis.asyncio.Redis) -> None:
            await asyncio.sleep(0.9 * TIMEOUT_S)  # asked meanwhile, Redis answers
            own_redis.hang()
            await client.get("fs:none")

        assert await refused_after(lambda: store.link.call(two, answers=2)) < 2 * TIMEOUT_S + 0.1
        assert await refused_after(lambda: store.scope("t").pointer("cats")) < 0.05
        own_redis.go_on()
        await back(store.scope("t"))


async def test_a_redis_that_is_away_at_the_start_is_used_when_it_comes(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.kill()
    async with opened(own_redis) as store:
        assert "does not answer yet" in caplog.text
        assert await store.ping() is False
        own_redis.start()
        await back(store.scope("t"))
        assert await commit(store.scope("t"), "cats") == 1


async def test_known_tasks_are_answered_at_once_while_redis_hangs(own_redis: RedisServer) -> None:
    async with opened(own_redis) as beneath:
        scope = Recent(beneath, most=10, stale_ok_s=60).scope("t")
        await commit(scope, "cats", 1)
        own_redis.hang()
        assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)
        start = time.perf_counter()
        for _ in range(10):
            assert await scope.pointer("cats") == Pointer(1, "hd_1", stale=True)
            assert same(await scope.head("hd_1"), make_head(1))
        assert time.perf_counter() - start < 0.05


async def test_a_connection_lost_in_a_commit_is_no_conflict(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RedisScope._found

    async def and_cut(self: RedisScope, pipe: redis.asyncio.client.Pipeline, task: str) -> Found:
        found = await read(self, pipe, task)
        with redis.Redis(port=own_redis.port) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        return found

    async with opened(own_redis) as store:
        monkeypatch.setattr(RedisScope, "_found", and_cut)
        with pytest.raises(StoreUnavailable):
            await commit(store.scope("t"), "cats", expect=0)


async def test_a_full_redis_refuses_changes_and_goes_on_reading(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        with redis.Redis(port=own_redis.port) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(StoreUnavailable):
                await commit(scope, "cats", 2)
            with pytest.raises(StoreUnavailable):
                await scope.keep_head("cats", Pointer(1, "hd_1"), make_head(2))
            assert await scope.pointer("cats") == Pointer(1, "hd_1")
            assert len(await scope.tasks(limit=10)) == 1
            with pytest.raises(StoreUnavailable):
                await scope.remember("cats", "key", b"value", ttl_s=60)
            assert await scope.delete("cats") is True
            assert client.keys("fs:*") == [MARK.encode()]
            client.config_set("maxmemory", 0)
        assert await commit(scope, "cats", 3) == 1


async def test_when_memory_is_short_heads_go_and_records_stay(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "volatile-lru") as server:
        async with opened(server) as store:
            scope = store.scope("t")
            for seed in range(50):
                await commit(scope, f"task{seed}", seed)
            for seed in range(50):  # some 150 kB each
                await scope.keep_head(f"task{seed}", Pointer(1, f"hd_{seed}"), make_head(seed, way=4096))
            heads = [await scope.head(f"hd_{seed}") for seed in range(50)]
            assert None in heads
            assert heads[-1] is not None
            for seed in range(10):
                found = await scope.record(f"task{seed}")
                assert found is not None
                assert same(found[1], make_record(seed))


async def test_too_many_callers_are_no_reason_to_think_redis_is_away(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(own_redis, connections=1) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        gate = asyncio.Event()
        busy = asyncio.create_task(store.link.call(lambda _: gate.wait()))  # has the only connection
        await asyncio.sleep(0)
        took = await asyncio.gather(*(refused_after(lambda: scope.pointer("cats")) for _ in range(10)))
        assert max(took) < TIMEOUT_S + 0.3
        gate.set()
        with suppress(StoreUnavailable):
            await busy
        assert await scope.pointer("cats") == Pointer(1, "hd_1")
        assert "cannot be used" not in caplog.text


async def test_a_task_with_an_end_stays_until_it_when_memory_is_short(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        async with opened(server) as store:
            scope = store.scope("t")
            for seed in range(5):
                await commit(scope, f"lease{seed}", seed, expires=time.time() + 1000)
            await scope.remember("lease0", "key", b"value", ttl_s=50)
            with suppress(StoreUnavailable):
                for seed in range(5000):
                    await commit(scope, f"task{seed}", seed)
            assert seed < 4999
            for seed in range(5):
                found = await scope.record(f"lease{seed}")
                assert found is not None
                assert found[0] == Pointer(1, f"hd_{seed}")
            assert await scope.recall("lease0", "key") == b"value"
            assert await store.ping() is False


async def test_names_of_tasks_that_ended_leave_the_index_though_nobody_lists_them(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.stores.redis.WEED_BEHIND_S", 0)
    async with opened(own_redis) as store, redis.asyncio.Redis(port=own_redis.port) as client:
        scope = store.scope("t")
        for seed in range(20):
            await commit(scope, f"job{seed}", seed, expires=time.time() + 0.05)
        await asyncio.sleep(0.1)
        await commit(scope, "last", 1, expires=time.time() + 100)
        async with asyncio.timeout(5):
            while await client.zcard("fs:t:tasks") > 1:
                await asyncio.sleep(0.01)
        assert await scope.tasks(limit=10) == [("last", Pointer(1, "hd_1"))]


@pytest.mark.parametrize("wrong_by_s", [-500, 500])
async def test_the_clock_of_redis_may_be_another(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, wrong_by_s: float
) -> None:
    async with opened(own_redis) as store, redis.asyncio.Redis(port=own_redis.port) as client:
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + wrong_by_s)  # ours is; which of the two makes no difference
        scope = store.scope("t")
        await scope.commit("lease", make_record(1, expires=time.time() + 100), "hd_1", make_head(1), expect=None)
        assert await scope.pointer("lease") == Pointer(1, "hd_1")
        assert await scope.remember("lease", "key", b"value", ttl_s=60, new=True) is True
        assert await scope.remember("lease", "key", b"value", ttl_s=60, new=True) is False
        for key in await client.keys("fs:t:[pvrhm]:*"):
            assert 50_000 < await client.pttl(key) <= 100_000


# How Redis is set up.


async def test_what_was_sealed_with_another_key_is_left_alone(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        async with opened(server) as store:
            await commit(store.scope("t"), "cats", 1)
        with redis.Redis(port=server.port) as client:
            before = {key: client.dump(key) for key in client.keys("*")}
            with pytest.raises(StoreMisconfigured, match="another key"):
                await RedisStore(server.url, key=b"another key").open()
            assert {key: client.dump(key) for key in client.keys("*")} == before
        late = RedisStore(server.url, key=b"another key", timeout_s=TIMEOUT_S)
    await late.open()  # Redis is away, which is no reason to fail
    try:
        server.start()
        await asyncio.sleep(PAUSE_S + 0.5)
        for change in (
            commit(late.scope("t"), "cats", 2),
            late.scope("t").delete("cats"),
            late.scope("t").pointer("no"),
        ):
            with pytest.raises(StoreUnavailable, match="another key"):
                await change
        assert await late.ping() is False
    finally:
        await late.close()
        server.kill()


async def test_a_replica_of_another_redis_is_not_well_for_as_long_as_it_is_one(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_link, "LOOK_S", 0.1)
    async with opened(own_redis) as store, redis.asyncio.Redis(port=own_redis.port) as client:
        await commit(store.scope("t"), "cats", 1)
        await client.replicaof("127.0.0.1", "1")
        async with asyncio.timeout(5):
            while await store.ping():
                await asyncio.sleep(0.05)
        assert await store.scope("t").pointer("cats") == Pointer(1, "hd_1")
        assert "is a replica" in caplog.text
        await client.replicaof("NO", "ONE")
        async with asyncio.timeout(5):
            while not await store.ping():
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_redis_that_may_evict_records_is_refused(tmp_path: Path, policy: str) -> None:
    with RedisServer(tmp_path, "--maxmemory-policy", policy) as server, pytest.raises(StoreMisconfigured, match=policy):
        async with opened(server):
            pass


async def test_a_redis_that_may_evict_records_is_refused_when_it_comes_late(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory-policy", "allkeys-lru")
    async with opened(server) as store:
        with server:
            scope = store.scope("t")
            await asyncio.sleep(PAUSE_S + 0.3)
            with pytest.raises(StoreUnavailable, match="allkeys-lru"):
                await commit(scope, "cats")
            with redis.Redis(port=server.port) as client:
                client.config_set("maxmemory-policy", "volatile-lru")
            assert await back(scope) < PAUSE_S + 0.5
            assert await commit(scope, "cats") == 1


async def test_eviction_is_noticed_while_redis_is_up(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_link, "LOOK_S", 0.1)
    async with opened(own_redis) as store:
        assert await store.ping() is True
        with redis.Redis(port=own_redis.port) as client:
            client.config_set("maxmemory-policy", "allkeys-random")
        await asyncio.sleep(2 * PAUSE_S + 0.3)  # nobody asked anything meanwhile
        assert await store.ping() is False
        with pytest.raises(StoreUnavailable, match="allkeys-random"):
            await commit(store.scope("t"), "cats")
        assert caplog.text.count("maxmemory-policy allkeys-random") == 1


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), False),
        (("--appendfsync", "everysec"), True),
        (("--appendonly", "no"), True),
        (("--no-appendfsync-on-rewrite", "yes"), True),
    ],
)
async def test_a_redis_that_may_lose_what_was_acknowledged_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...], warned: bool
) -> None:
    with RedisServer(tmp_path, *options) as server:
        async with opened(server):
            assert ("can lose acknowledged tasks" in caplog.text) == warned


def with_user(folder: Path, rights: str, *options: str) -> RedisServer:
    (folder / "users.acl").write_text(
        f"user default off\nuser inspector on nopass ~* +@all\n"
        f"user fewshot on >secret-word ~fs:* resetchannels -@all {rights}\n"
    )
    return RedisServer(folder, "--aclfile", str(folder / "users.acl"), *options)


@pytest.mark.parametrize("url", ["localhost:6379", "redis://:secret@x@host:port/0", "http://host"])
async def test_an_address_that_is_none_is_said_at_the_start(url: str) -> None:
    with pytest.raises(StoreMisconfigured, match="redis://host:port/db") as refused:
        await RedisStore(url, key=b"key").open()
    assert "secret" not in str(refused.value)


async def test_few_rights_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with with_user(tmp_path, LIMITED) as server:
        async with opened(server, user="fewshot", password="secret-word") as store:
            assert "does not tell its settings" in caplog.text
            scope = store.scope("t")
            await commit(scope, "cats", 1)
            await commit(scope, "cats", 2)
            await scope.commit("soon", make_record(3, expires=time.time() + 0.05), "hd_3", make_head(3), expect=None)
            await asyncio.sleep(0.1)
            assert await scope.full(2) is False
            assert await scope.tasks(limit=10) == [("cats", Pointer(2, "hd_2"))]
            assert await scope.full(1) is True
            assert await scope.record("cats") is not None
            await commit(scope, "cats", 3, expires=time.time() + 50)  # its versions get an end
            assert len(await scope.versions("cats")) == 3
            assert await scope.record("cats", version=1) is not None
            assert await scope.remember("cats", "key", b"value", ttl_s=50, new=True) is True
            assert await scope.remember("cats", "key", b"value", ttl_s=50, new=True) is False
            assert await scope.recall("cats", "key") == b"value"
            await scope.forget_remembered("cats", "key")
            await scope.remember("cats", "key", b"value", ttl_s=50)
            with redis.Redis(port=server.port, username="inspector", password="any") as client:
                client.set("fs:t:v:cats", b"damaged")
            assert await scope.delete("cats") is True
            with redis.Redis(port=server.port, username="inspector", password="any") as client:
                assert client.keys("fs:t:[^h]*") == []


async def test_eviction_is_noticed_without_the_right_to_read_settings(tmp_path: Path) -> None:
    with with_user(tmp_path, f"{LIMITED} +info", "--maxmemory-policy", "allkeys-lfu") as server:
        store = RedisStore(server.url, key=b"key", user="fewshot", password="secret-word")
        with pytest.raises(StoreMisconfigured, match="allkeys-lfu"):
            await store.open()


async def test_a_wrong_password_is_a_store_that_is_away_and_stays_out_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with with_user(tmp_path, LIMITED) as server:
        async with opened(server, user="fewshot", password="wrong-word") as store:
            for _ in range(20):
                await refused_after(lambda: store.scope("t").pointer("cats"))
            assert caplog.text.count("Redis cannot be used") == 1  # one attempt a second
            assert "word" not in caplog.text.replace("password", "")


async def test_a_missing_right_is_told_once_and_without_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_link, "REFUSED_S", 0.2)
    with (
        with_user(tmp_path, LIMITED) as server,
        redis.Redis(port=server.port, username="inspector", password="x") as ask,
    ):
        async with opened(server, user="fewshot", password="secret-word") as store:
            scope = store.scope("t")
            await commit(scope, "cats", 1)
            ask.execute_command("ACL", "SETUSER", "fewshot", "-set")
            for _ in range(5):
                await refused_after(lambda: commit(scope, "cats", 2))
            assert await scope.pointer("cats") == Pointer(1, "hd_1")  # what is allowed goes on
            assert await store.ping() is False
            told = [line for line in caplog.messages if line.startswith("Redis refused a command")]
            assert len(told) == 1
            assert "'set'" in told[0]
            assert "fs:t" not in told[0]
            ask.execute_command("ACL", "SETUSER", "fewshot", "+set")
            assert await commit(scope, "cats", 2) == 2
            await asyncio.sleep(0.25)
            assert await store.ping() is True


# A Redis that is not the one it was.


async def refuses_all(store: RedisStore) -> None:
    scope = store.scope("t")
    for operation in (
        lambda: scope.pointer("dogs"),
        lambda: scope.tasks(limit=5),
        lambda: scope.record("cats"),
        lambda: commit(scope, "dogs", 2),
        lambda: scope.delete("cats"),
        lambda: scope.remember("cats", "key", b"value", ttl_s=60),
    ):
        store.link._closed = ""  # each is to find out by itself
        with pytest.raises(StoreUnavailable, match="restart the service"):
            await operation()


@pytest.mark.parametrize("fault", ["FLUSHALL", "FLUSHDB ASYNC", "SWAPDB 0 1"])
async def test_a_redis_that_was_emptied_is_found_out_by_whatever_is_asked_first(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    async with opened(own_redis) as store:
        await commit(store.scope("t"), "cats", 1)
        with redis.Redis(port=own_redis.port) as client:
            client.execute_command(*fault.split())
            await refuses_all(store)
            assert client.dbsize() == 0  # nothing was written to it
        assert await store.ping() is False
        assert caplog.text.count("Redis cannot be used: Redis was emptied") >= 1
        async with opened(own_redis) as restarted:  # the operator agrees
            assert await restarted.scope("t").pointer("cats") is None
            assert await commit(restarted.scope("t"), "cats", 1) == 1
            await asyncio.sleep(PAUSE_S + 0.2)
            with pytest.raises(StoreUnavailable, match="restart the service"):
                await store.scope("t").pointer("cats")  # and has not asked this one yet


async def test_while_redis_cannot_be_used_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_link, "PAUSE_S", 0.02)
    with RedisServer(tmp_path, "--appendfsync", "everysec") as server:
        async with opened(server) as store:
            with redis.Redis(port=server.port) as client:
                client.flushall()
            await refused_after(lambda: store.scope("t").pointer("cats"))
            await asyncio.sleep(0.5)  # some twenty looks
    assert caplog.text.count("Redis cannot be used") == 1
    assert caplog.text.count("can lose acknowledged") <= 2  # at the start, and since it was away


async def test_a_redis_that_is_emptied_in_a_commit_gets_nothing(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RedisScope._found

    async def and_emptied(self: RedisScope, pipe: redis.asyncio.client.Pipeline, task: str) -> Found:
        found = await read(self, pipe, task)
        with redis.Redis(port=own_redis.port) as client:
            client.flushall()
        return found

    async with opened(own_redis) as store:
        monkeypatch.setattr(RedisScope, "_found", and_emptied)
        with pytest.raises(StoreUnavailable, match="restart the service"):
            await commit(store.scope("t"), "new")
        with redis.Redis(port=own_redis.port) as client:
            assert client.dbsize() == 0


async def test_what_was_brought_back_is_used_again(own_redis: RedisServer, tmp_path: Path) -> None:
    async with opened(own_redis) as store:
        await commit(store.scope("t"), "cats", 1)
        for there in (False, True):
            own_redis.kill()
            if there:
                shutil.rmtree(tmp_path / "appendonlydir")
                (tmp_path / "away").rename(tmp_path / "appendonlydir")
            else:
                (tmp_path / "appendonlydir").rename(tmp_path / "away")
            own_redis.start()
            await asyncio.sleep(PAUSE_S + 0.3)
            assert await store.ping() is there
        assert await store.scope("t").pointer("cats") == Pointer(1, "hd_1")


async def test_replicas_that_meet_a_new_redis_at_once_agree(own_redis: RedisServer) -> None:
    stores = [RedisStore(own_redis.url, key=b"key", timeout_s=5) for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    for number, store in enumerate(stores):
        assert await commit(store.scope("t"), "cats", number) == number + 1
        await store.close()


async def test_a_full_redis_without_a_mark_is_read(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        await commit(store.scope("t"), "cats", 1)
    with redis.Redis(port=own_redis.port) as client:
        client.delete(MARK)  # as an earlier release left it
        client.config_set("maxmemory", 1)
        async with opened(own_redis) as store:
            assert await store.scope("t").pointer("cats") == Pointer(1, "hd_1")
            assert await store.scope("t").pointer("dogs") is None
            client.config_set("maxmemory", 0)
            assert await commit(store.scope("t"), "cats", 2) == 2


# What lies in Redis.


async def test_only_what_can_be_made_again_or_ends_has_a_ttl(own_redis: RedisServer) -> None:
    async with opened(own_redis, head_ttl_s=100) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        await commit(scope, "cats", 2)
        await commit(scope, "soon", 3)
        await commit(scope, "soon", 4, expires=time.time() + 50)
        await commit(scope, "long", 5, expires=time.time() + 50)
        await commit(scope, "long", 6)
        await scope.remember("cats", "key", b"value", ttl_s=20)
        await scope.remember("cats", "other key", b"value", ttl_s=10)
    with redis.Redis(port=own_redis.port) as client:
        found = {key.decode(): client.ttl(key) for key in client.scan_iter()}

    def having(least: int, most: int) -> set[str]:
        return {key.removeprefix("fs:t:") for key, ttl in found.items() if least <= ttl <= most}

    lasting = {f"{kind}:{task}" for task in ("cats", "long") for kind in ("p", "v", "r")}
    assert {key.removesuffix(":1").removesuffix(":2") for key in having(-1, -1)} == {"tasks", MARK} | lasting
    assert len(having(-1, -1)) == 10  # of each of the two, both records
    # Heads end with their task; of one that was given another end, earlier heads are gone.
    assert having(51, 100) == {"h:hd_1", "h:hd_2", "h:hd_6"}
    assert having(21, 50) == {"p:soon", "v:soon", "r:soon:1", "r:soon:2", "h:hd_4"}
    assert len(having(11, 20)) == 2  # the index lasts as long as the last of what it names
    assert len(having(0, 10)) == 1


async def test_what_an_earlier_program_wrote_is_read_and_gone_on_from(own_redis: RedisServer) -> None:
    sealed = Sealed(Sealer(b"key"), "t", RecentRecords())

    def written_by_it(task: str, version: int, *, end: int | None = None) -> None:
        pointer = Pointer(version, f"hd_{version}")
        record = make_record(version, expires=end)
        with redis.Redis(port=own_redis.port) as client:
            client.delete(f"fs:t:r:{task}:{version - 1}")
            client.set(
                f"fs:t:r:{task}:{version}",
                sealed.seal_record(task, version, record=record, base=None, stored=None)[0],
                exat=end,
            )
            client.set(f"fs:t:p:{task}", sealed.seal_pointer(task, pointer), exat=end)
            client.set(f"fs:t:h:{pointer.head}", sealed.seal_head(pointer.head, make_head(version)), ex=100)
            client.zadd("fs:t:tasks", {task: 0})

    async with opened(own_redis) as store:
        scope = store.scope("t")
        written_by_it("cats", 3)
        assert await scope.versions("cats") == [Pointer(3, "hd_3")]
        assert await scope.record("cats", version=2) is None
        found = await scope.record("cats", version=3)
        assert found is not None
        assert same(found[1], make_record(3))
        assert await commit(scope, "cats", 4, expect=3) == 4
        assert await commit(scope, "cats", 5) == 5
        assert await scope.versions("cats") == [Pointer(5, "hd_5"), Pointer(4, "hd_4"), Pointer(3, "hd_3")]
        written_by_it("cats", 6)  # while both are running: it takes the record before along, and no history
        assert await scope.versions("cats") == [Pointer(6, "hd_6")]
        assert await scope.record("cats", version=4) is None
        assert await commit(scope, "cats", 7) == 7
        assert await scope.versions("cats") == [Pointer(7, "hd_7"), Pointer(6, "hd_6")]
        written_by_it("soon", 1, end=int(time.time()) + 50)
        await commit(scope, "soon", 2)  # made lasting, with what there was before
        with redis.Redis(port=own_redis.port) as client:
            assert sorted(client.keys("fs:t:r:*")) == [
                b"fs:t:r:cats:6",
                b"fs:t:r:cats:7",
                b"fs:t:r:soon:1",
                b"fs:t:r:soon:2",
            ]
            assert client.ttl("fs:t:r:soon:1") == -1


async def test_expired_tasks_leave_the_index(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await commit(scope, "cats")
        for k in range(5):
            record = make_record(k, expires=time.time() + 0.05)
            await scope.commit(f"soon{k}", record, "hd_1", make_head(k), expect=None)
        await asyncio.sleep(0.1)
        assert [name for name, _ in await scope.tasks(limit=2)] == ["cats"]
    with redis.Redis(port=own_redis.port) as client:
        assert client.zrange("fs:t:tasks", 0, -1) == [b"cats"]


async def test_a_key_of_another_type_counts_as_damage(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        await commit(scope, "cats", 1)
        with redis.Redis(port=own_redis.port) as client:
            client.delete("fs:t:h:hd_1", "fs:t:p:cats")
            client.rpush("fs:t:h:hd_1", "x")
            client.rpush("fs:t:p:cats", "x")
        assert await scope.head("hd_1") is None
        await scope.keep_head("cats", Pointer(1, "hd_1"), make_head(1))
        assert await scope.head("hd_1") is None  # nobody can say whether the task is still at it
        assert await commit(scope, "cats", 2) == 2


async def test_two_replicas_adapt_one_task_one_after_the_other(own_redis: RedisServer) -> None:
    async with opened(own_redis) as one, opened(own_redis) as other:
        scopes = [one.scope("t"), other.scope("t")]
        versions = await asyncio.gather(*(commit(scopes[seed % 2], "cats", seed) for seed in range(4)))
        assert sorted(versions) == [1, 2, 3, 4]
        assert [known.version for known in await one.scope("t").versions("cats")] == [4, 3, 2, 1]


async def test_of_two_replicas_one_gets_the_claim(own_redis: RedisServer) -> None:
    async with opened(own_redis) as one, opened(own_redis) as other:
        scopes = [one.scope("t"), other.scope("t")]
        for key in "abcde":
            claims = (scope.remember("cats", key, b"mine", ttl_s=60, new=True) for scope in scopes * 2)
            assert sorted(await asyncio.gather(*claims)) == [False, False, False, True]


async def test_what_the_index_does_not_name_is_not_there(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        for damaged in (b"rotten", None):
            await scope.remember("cats", "key", b"value", ttl_s=60)
            with redis.Redis(port=own_redis.port) as client:
                client.set("fs:t:m:cats", damaged) if damaged else client.delete("fs:t:m:cats")
            assert await scope.recall("cats", "key") is None
            assert await scope.remember("cats", "other", b"value", ttl_s=60)
            assert await scope.recall("cats", "key") is None
            assert await scope.remember("cats", "key", b"again", ttl_s=60, new=True) is True
            assert await scope.recall("cats", "key") == b"again"


# Callers who leave.


async def storm(read: Callable[[str], Awaitable[str]], names: list[str]) -> int:
    """Sixty reads, most of them cancelled on their way; then one after the other. Returns the foreign answers."""
    foreign = 0
    for name in names:
        reading = asyncio.ensure_future(read(name))
        for _ in range(random.randrange(25)):  # from not yet sent to long answered
            await asyncio.sleep(0)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            foreign += await reading != name
    for name in names:
        foreign += await read(name) != name
    return foreign


async def test_a_connection_that_is_reset_before_it_is_used_is_a_redis_that_is_away(own_redis: RedisServer) -> None:
    """uvloop says so by a RuntimeError, which redis-py hands on as it is."""

    async def reset(client: redis.asyncio.Redis) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    async with opened(own_redis) as store:
        with pytest.raises(StoreUnavailable):
            await store.link.call(reset)
        assert not store.link.well
        assert await back(store.scope("t")) < PAUSE_S + 0.5


async def test_callers_who_leave_never_get_each_others_answers(own_redis: RedisServer) -> None:
    names = [f"hd_{k}" for k in range(60)]
    async with opened(own_redis, connections=1) as store:
        scope = store.scope("t")
        for k, name in enumerate(names):
            await scope.commit(name, make_record(k), name, make_head(k), expect=None)

        async def read(name: str) -> str:
            pointer = await scope.pointer(name)
            assert pointer is not None
            return pointer.head

        assert await storm(read, names) == 0
        assert len(store.link._running) == 0


class Careless(redis.asyncio.Connection):
    """Stays connected, and is lent again, whatever was left unread."""

    async def disconnect(self, *_: object, **__: object) -> None:
        pass

    async def can_read(self) -> bool:
        return False


async def test_the_storm_would_notice_foreign_answers(own_redis: RedisServer) -> None:
    # The control: a pool that lends connections with unread replies.
    names = [f"hd_{k}" for k in range(60)]
    pool = redis.asyncio.BlockingConnectionPool(
        max_connections=1, connection_class=Careless, port=own_redis.port, protocol=2
    )
    client = redis.asyncio.Redis.from_pool(pool)
    await client.mset({name: name for name in names})

    async def read(name: str) -> str:
        return (await client.get(name)).decode()

    try:
        # Whether one cancellation meets a reply under way is chance; in twenty storms it does.
        foreign = 0
        for _ in range(20):
            foreign = foreign or await storm(read, names)
        assert foreign > 0
    finally:
        for connection in pool._available_connections:
            await redis.asyncio.Connection.disconnect(connection)


async def test_a_caller_who_leaves_does_not_cut_a_commit(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        scope = store.scope("t")
        for k in range(10):
            leaving = asyncio.create_task(commit(scope, f"task{k}", k))
            for _ in range(k + 1):
                await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        await asyncio.wait(store.link._running)
        for k in range(10):
            found = await scope.record(f"task{k}")
            assert found is not None
            assert same(found[1], make_record(k))


async def test_closing_waits_for_what_is_on_its_way(own_redis: RedisServer) -> None:
    async with opened(own_redis) as store:
        leaving = asyncio.create_task(commit(store.scope("t"), "cats", 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
    async with opened(own_redis) as store:
        assert await store.scope("t").pointer("cats") == Pointer(1, "hd_1")
