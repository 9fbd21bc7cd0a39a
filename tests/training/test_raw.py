from __future__ import annotations

import shlex
from pathlib import Path

from training import raw
from training.config import CompareObjectivesConfig, EvaluateConfig, PretextConfig, PretrainConfig, parse


def test_a_command_leaves_out_what_is_the_default() -> None:
    config = EvaluateConfig(artifact=Path("a"), data=Path("/far/away/flowers"), group="^[0-9]+_", json_out=Path("x"))
    assert raw.command("evaluate", config) == (
        "python -m training evaluate --artifact a --data DATA/flowers --group '^[0-9]+_'"
    )


def test_a_command_leaves_out_defaults_and_where_the_data_lie() -> None:
    config = PretrainConfig(data=Path("/far/away/letters"), out=Path("runs/x"), rotations=True, lr=0.1)
    assert raw.command("pretrain", config) == (
        "python -m training pretrain --data DATA/letters --out runs/x --rotations --lr 0.1"
    )


def test_a_command_gives_the_same_configuration_again() -> None:
    for name, config in {
        "compare-objectives": CompareObjectivesConfig(data=Path("DATA/d"), out=Path("o"), seconds=3, clock="cpu"),
        "pretext": PretextConfig(data=Path("DATA/d"), extractors="a=x,b=y z", steps=5),
    }.items():
        words = shlex.split(raw.command(name, config))
        assert words[3] == name
        assert parse(type(config), words[4:], prog="x") == config
