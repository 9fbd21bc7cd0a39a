from __future__ import annotations

from pathlib import Path

from training import rows
from training.config import CompareObjectivesConfig, PretextConfig, PretrainConfig, parse


def test_a_command_leaves_out_defaults_and_where_the_data_lie() -> None:
    config = PretrainConfig(data=Path("/far/away/letters"), out=Path("runs/x"), rotations=True, lr=0.1)
    assert rows.command("pretrain", config) == (
        "python -m training pretrain --data DATA/letters --out runs/x --rotations --lr 0.1"
    )


def test_a_command_gives_the_same_configuration_again() -> None:
    for name, config in {
        "compare-objectives": CompareObjectivesConfig(data=Path("DATA/d"), out=Path("o"), seconds=3, clock="cpu"),
        "pretext": PretextConfig(data=Path("DATA/d"), extractors="a=x,b=y", steps=5),
    }.items():
        words = rows.command(name, config).split()
        assert words[3] == name
        assert parse(type(config), words[4:], prog="x") == config


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
