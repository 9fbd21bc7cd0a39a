"""The SQL of the embedded store: its tables, how those of an earlier format become them, and every longer statement.

Knows nothing of what the values mean.
"""

from __future__ import annotations

# PRAGMA user_version. The tables are those of 2; since 3 a record may be a difference to another, and since 4 a history
# tells what its versions are.
FORMAT = 4
TASKS_TABLES = """
-- Records lie apart, so reading a pointer never touches the pages of a large one. A task without a history was written
-- in format 1.
CREATE TABLE tasks (tenant TEXT, task TEXT, version INTEGER NOT NULL, expires REAL, pointer BLOB NOT NULL,
                    history BLOB, PRIMARY KEY (tenant, task));
CREATE INDEX tasks_by_expiry ON tasks (expires) WHERE expires IS NOT NULL;
CREATE TABLE records (tenant TEXT, task TEXT, version INTEGER, record BLOB NOT NULL,
                      PRIMARY KEY (tenant, task, version));
CREATE TABLE remembered (tenant TEXT, task TEXT, key TEXT, expires REAL NOT NULL, value BLOB NOT NULL,
                         PRIMARY KEY (tenant, task, key));
CREATE INDEX remembered_by_expiry ON remembered (expires);
"""
SCHEMA = f"""
BEGIN;
{TASKS_TABLES}
CREATE TABLE heads (tenant TEXT, head TEXT, expires REAL NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tenant, head));
CREATE INDEX heads_by_expiry ON heads (expires);
CREATE TABLE seal (value BLOB NOT NULL);
"""
# From format 1, which kept one record for each task, beside its pointer. Cut short anywhere, it has done nothing.
MIGRATION = f"""
BEGIN IMMEDIATE;
ALTER TABLE tasks RENAME TO old;
DROP INDEX tasks_by_expiry;
{TASKS_TABLES}
INSERT INTO tasks SELECT tenant, task, version, expires, pointer, NULL FROM old;
INSERT INTO records SELECT tenant, task, version, record FROM old;
DROP TABLE old;
PRAGMA user_version = {FORMAT};
COMMIT;
"""  # noqa: S608
# Sealed values are read as bytes whatever they are: text that is none would be an error of the whole statement.
POINTER = (
    "SELECT CAST(pointer AS BLOB), expires FROM tasks"
    " WHERE tenant = ? AND task = ? AND (expires IS NULL OR expires > ?)"
)
PLACE = (
    "SELECT version, CAST(pointer AS BLOB), CAST(history AS BLOB) FROM tasks"
    " WHERE tenant = ? AND task = ? AND (expires IS NULL OR expires > ?)"
)
RECORD = "SELECT CAST(record AS BLOB) FROM records WHERE tenant = ? AND task = ? AND version = ?"
UNNEEDED = "DELETE FROM records WHERE tenant = ? AND task = ? AND version NOT IN (SELECT value FROM json_each(?))"
TASKS = (
    "SELECT task, CAST(pointer AS BLOB) FROM tasks"
    " WHERE tenant = ? AND task > ? AND (expires IS NULL OR expires > ?) ORDER BY task"
)
COUNT = "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE tenant = ? AND (expires IS NULL OR expires > ?) LIMIT ?)"
PUT_TASK = "REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?)"
ANY_EXPIRED = (
    "SELECT EXISTS (SELECT 1 FROM tasks WHERE expires <= :now) OR EXISTS (SELECT 1 FROM heads WHERE expires <= :now)"
    " OR EXISTS (SELECT 1 FROM remembered WHERE expires <= :now)"
)
# An expired task leaves with its records and what is remembered beside it; the statements go together, in this order.
FORGOTTEN = "DELETE FROM remembered WHERE expires <= :now"
EXPIRED = (
    "DELETE FROM records WHERE (tenant, task) IN (SELECT tenant, task FROM tasks WHERE expires <= :now)",
    "DELETE FROM remembered WHERE (tenant, task) IN (SELECT tenant, task FROM tasks WHERE expires <= :now)"
    " AND expires > :claims",
    "DELETE FROM tasks WHERE expires <= :now",
    "DELETE FROM heads WHERE expires <= :now",
    FORGOTTEN,
)
# What is remembered beside a name that is no task was asked of an earlier one, but for claims.
EARLIER = "DELETE FROM remembered WHERE tenant = ? AND task = ? AND expires > ?"
DROP_HEAD = "DELETE FROM heads WHERE tenant = ? AND head = ?"
HEAD = "SELECT CAST(value AS BLOB) FROM heads WHERE tenant = ? AND head = ? AND expires > ?"
REMEMBERED = "SELECT CAST(value AS BLOB) FROM remembered WHERE tenant = ? AND task = ? AND key = ? AND expires > ?"
# A row that is written anew gets a new rowid, so these go by age.
TOO_MANY = (
    "DELETE FROM remembered WHERE rowid IN (SELECT id FROM"
    " (SELECT rowid AS id, count(*) OVER newest AS place, sum(length(value)) OVER newest AS bytes FROM remembered"
    " WHERE tenant = ? AND task = ? WINDOW newest AS (ORDER BY rowid DESC ROWS UNBOUNDED PRECEDING))"
    " WHERE place > ? OR bytes > ?)"
)
