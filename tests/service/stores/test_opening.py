"""Which store the settings ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError
from service.stores import Pointer, StoreMisconfigured
from service.stores.lru import Recent
from service.stores.opening import open_store
from service.stores.redis import RedisStore
from service.stores.sqlite import SqliteStore
from tests.redis_server import RedisServer
from tests.service.stores.values import commit

pytestmark = pytest.mark.anyio


async def test_without_redis_it_is_the_embedded_one_in_the_data_folder(tmp_path: Path) -> None:
    store = open_store(Settings(data_dir=tmp_path / "new" / "data"))
    assert isinstance(store, Recent)
    assert isinstance(store.beneath, SqliteStore)
    assert store.name == "sqlite"
    await store.open()
    assert await commit(store.scope("t"), "cats") == 1
    await store.close()
    assert {path.name for path in (tmp_path / "new" / "data").iterdir()} == {
        "fewshot.sqlite3",
        "store.key",
        "store.lock",
    }


async def test_a_given_key_is_used_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key of enough characters\n")
    settings = Settings(data_dir=tmp_path / "data", store_key_file=tmp_path / "secret")
    store = open_store(settings)
    await store.open()
    await store.close()
    assert not (tmp_path / "data" / "store.key").exists()
    (tmp_path / "secret").write_text("another key of the length\n")
    with pytest.raises(StoreMisconfigured, match="another key"):
        await open_store(settings).open()


@pytest.mark.parametrize("content", ["", "short", None])
def test_a_key_file_without_a_key_stops_the_start(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    with pytest.raises(SettingsError, match="secret"):
        open_store(Settings(data_dir=tmp_path, store_key_file=tmp_path / "secret"))


@pytest.mark.redis
async def test_with_redis_it_is_the_shared_one(
    tmp_path: Path, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(Settings(redis_url=own_redis.url, data_dir=tmp_path / "data", store_timeout_s=5))
    assert isinstance(store, Recent)
    assert isinstance(store.beneath, RedisStore)
    assert "STORE_KEY_FILE" in caplog.text
    await store.open()
    await store.scope("opening").delete("cats")
    assert await commit(store.scope("opening"), "cats") == 1
    await store.close()
    assert not (tmp_path / "data").exists()


@pytest.mark.redis
async def test_user_and_password_of_redis_come_from_the_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "users.acl").write_text("user default off\nuser fewshot on >secret-word ~fs:* +@all\n")
    (tmp_path / "password").write_text("secret-word\n")
    (tmp_path / "key").write_text("a key of enough characters\n")
    with RedisServer(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as server:
        settings = Settings(
            redis_url=server.url,
            redis_user="fewshot",
            redis_password_file=tmp_path / "password",
            store_key_file=tmp_path / "key",
            store_timeout_s=5,
        )
        store = open_store(settings)
        await store.open()
        await commit(store.scope("t"), "cats")
        assert await store.scope("t").pointer("cats") == Pointer(1, "hd_0")
        await store.close()
    (told,) = caplog.messages
    assert "no mark of ours" in told  # and no more, of key or password


@pytest.mark.parametrize("url", ["", "redis://localhost:6379/0"])
def test_how_many_versions_are_kept_comes_from_the_settings(tmp_path: Path, url: str) -> None:
    store = open_store(Settings(data_dir=tmp_path, redis_url=url, versions_kept=3))
    assert isinstance(store, Recent)
    assert isinstance(store.beneath, SqliteStore | RedisStore)
    assert store.beneath.versions_kept == 3
