from __future__ import annotations

from pathlib import Path

from training import rows


def test_rows_are_added_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read(path) == []
    rows.append(path, [{"a": 1}, {"a": None}])
    rows.append(path, [{"b": "x"}])
    assert rows.read(path) == [{"a": 1}, {"a": None}, {"b": "x"}]


def test_what_is_written_again_is_cut_and_a_log_that_needs_no_cut_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows.cut(path, lambda line: True)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    rows.cut(path, lambda line: line["step"] < 2)
    assert path.read_text() == '{"step": 1}\n'
    before = path.stat()
    rows.cut(path, lambda line: True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]
