"""Files of earlier formats become one of this, whole or not at all."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from service.stores import Pointer, Sealer, StoreMisconfigured
from service.stores.record import RecentRecords
from service.stores.sealed import Sealed
from service.stores.sqlite import SqliteStore
from tests.service.stores.files import no_file_grows_beyond
from tests.service.stores.values import commit, make_head, make_record, same

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]


# Files of format 1.

FORMAT_1 = """
CREATE TABLE tasks (tenant TEXT, task TEXT, version INTEGER NOT NULL, expires REAL, pointer BLOB NOT NULL,
                    record BLOB NOT NULL, PRIMARY KEY (tenant, task));
CREATE INDEX tasks_by_expiry ON tasks (expires) WHERE expires IS NOT NULL;
CREATE TABLE heads (tenant TEXT, head TEXT, expires REAL NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tenant, head));
CREATE INDEX heads_by_expiry ON heads (expires);
CREATE TABLE seal (value BLOB NOT NULL);
PRAGMA user_version = 1;
"""
OLD_READ = "SELECT version, expires, pointer, record FROM tasks WHERE tenant = ? AND task = ?"
OLD_TASKS = {"cats": (7, None), "dogs": (3, 4e9), "gone": (1, 1.0)}


def sealed(store_key: bytes = b"key") -> Sealed:
    return Sealed(Sealer(store_key), "t", RecentRecords())


def old_file(folder: Path) -> Path:
    """A store as the program of format 1 left it, with one task that has no end, one that has, and one past it."""
    path = folder / "fewshot.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(FORMAT_1)
        db.execute("INSERT INTO seal VALUES (?)", (Sealer(b"key").seal(b"", "store"),))
        for task, (version, end) in OLD_TASKS.items():
            pointer = sealed().seal_pointer(task, Pointer(version, f"hd_{version}"))
            record, _ = sealed().seal_record(
                task, version, record=make_record(version, expires=end), base=None, stored=None
            )
            db.execute("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?)", ("t", task, version, end, pointer, record))
            head = sealed().seal_head(f"hd_{version}", make_head(version))
            db.execute("INSERT INTO heads VALUES (?, ?, ?, ?)", ("t", f"hd_{version}", 4e9, head))
    return path


def old_program_reads(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        for task, (version, end) in OLD_TASKS.items():
            row = db.execute(OLD_READ, ("t", task)).fetchone()
            assert row[:2] == (version, end)
            assert sealed().open_pointer(task, row[2]) == Pointer(version, f"hd_{version}")
            assert same(sealed().open_record(task, version, data=row[3]), make_record(version, expires=end))
        assert db.execute("SELECT count(*) FROM heads").fetchone() == (3,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return True


async def migrated(folder: Path) -> None:
    """Opens a file of format 1 and looks at all that was in it."""
    store = SqliteStore(folder, key=b"key")
    await store.open()
    scope = store.scope("t")
    assert await scope.tasks(limit=9) == [("cats", Pointer(7, "hd_7")), ("dogs", Pointer(3, "hd_3"))]
    for task, (version, end) in list(OLD_TASKS.items())[:2]:
        assert await scope.versions(task) == [Pointer(version, f"hd_{version}")]
        for asked in (None, version):
            found = await scope.record(task, version=asked)
            assert found is not None
            assert same(found[1], make_record(version, expires=end))
        assert same(await scope.head(f"hd_{version}"), make_head(version))
    assert await store.run(lambda db: db.execute("PRAGMA user_version").fetchone()) == (4,)
    assert await store.run(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
    await store.close()


async def test_a_file_of_format_1_is_brought_to_this_one_with_all_that_is_in_it(tmp_path: Path) -> None:
    assert old_program_reads(old_file(tmp_path))
    for _ in range(2):  # the second time there is nothing left to do
        await migrated(tmp_path)
    store, new = SqliteStore(tmp_path, key=b"key"), SqliteStore(tmp_path / "new")
    await store.open()
    await new.open()
    schema = "SELECT type, name, replace(sql, '\"', '') FROM sqlite_schema ORDER BY name"
    assert await store.run(lambda db: db.execute(schema).fetchall()) == await new.run(
        lambda db: db.execute(schema).fetchall()
    )
    await new.close()
    scope = store.scope("t")
    assert await commit(scope, "cats", 8, expect=7) == 8
    assert await scope.versions("cats") == [Pointer(8, "hd_8"), Pointer(7, "hd_7")]
    found = await scope.record("cats", version=7)
    assert found is not None
    assert same(found[1], make_record(7))
    assert await commit(scope, "gone", 9) == 1
    assert await scope.delete("dogs") is True
    await store.close()


async def test_a_file_of_format_2_is_brought_to_this_one_which_an_older_program_then_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tables are the same; but what is written from now on an older program could not read."""
    caplog.set_level("INFO")
    store = SqliteStore(tmp_path, key=b"key")
    await store.open()
    assert await commit(store.scope("t"), "cats", 1) == 1
    await store.run(lambda db: db.execute("PRAGMA user_version = 2"))
    await store.close()
    again = SqliteStore(tmp_path, key=b"key")
    await again.open()
    assert "has format 2 and is brought to format 4" in caplog.text
    assert await again.run(lambda db: db.execute("PRAGMA user_version").fetchone()) == (4,)
    assert same((await again.scope("t").record("cats") or (None, None))[1], make_record(1))
    await again.close()


async def test_a_file_of_format_1_is_left_alone_when_the_key_is_another(tmp_path: Path) -> None:
    path = old_file(tmp_path)
    with pytest.raises(StoreMisconfigured, match="another key"):
        await SqliteStore(tmp_path, key=b"another key").open()
    assert old_program_reads(path)


KILLED = """
import os, signal, sqlite3, sys
from service.stores.sql import MIGRATION

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")  # so that much of it is in the log by then
db.create_function("killed", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
done, found, rest = MIGRATION.partition(sys.argv[2])
assert found
db.executescript(done + "SELECT killed();" + found + rest)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["INSERT INTO records", "DROP TABLE old", "COMMIT"])
async def test_a_migration_cut_by_kill_9_has_done_nothing(tmp_path: Path, before: str) -> None:
    path = old_file(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), before], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert old_program_reads(path)
    await migrated(tmp_path)


async def test_a_migration_for_which_the_disk_is_too_full_has_done_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = old_file(tmp_path)
    with no_file_grows_beyond(40_000), pytest.raises(StoreMisconfigured, match="cannot be used as a store"):
        await SqliteStore(tmp_path, key=b"key").open()
    assert "is brought to format 4" in caplog.text  # so far it came
    assert old_program_reads(path)
    await migrated(tmp_path)
