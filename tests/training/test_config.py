from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from training.__main__ import COMMANDS
from training.config import (
    BaselineConfig,
    CompareObjectivesConfig,
    Config,
    ContinualConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    LakeConfig,
    MetatrainConfig,
    PretextConfig,
    PretrainConfig,
    parse,
)

REQUIRED = {
    PretrainConfig: ["--data", "d", "--out", "o"],
    MetatrainConfig: ["--data", "d", "--out", "o"],
    EvaluateConfig: ["--artifact", "a", "--data", "d"],
    ContinualConfig: ["--artifact", "a", "--data", "d"],
    CompareObjectivesConfig: ["--data", "d", "--out", "o"],
    PretextConfig: ["--data", "d", "--extractors", "mine=r"],
    ExportConfig: ["--checkpoint", "c", "--data", "d", "--out", "o", "--name", "n"],
    ImportConfig: ["--backbone", "b", "--data", "d", "--out", "o", "--name", "n"],
    LakeConfig: ["--artifact", "a", "--data", "d"],
    BaselineConfig: ["--method", "maml", "--data", "d", "--out", "o"],
}
CONFIGS = pytest.mark.parametrize("model", REQUIRED, ids=lambda model: model.__name__)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@CONFIGS
def test_what_is_required_is_enough(model: type[Config]) -> None:
    config = parse(model, REQUIRED[model], prog="x")
    assert config == model(**{key[2:]: value for key, value in zip(*[iter(REQUIRED[model])] * 2, strict=True)})


@CONFIGS
def test_what_is_required_is_asked_for_by_its_flag(model: type[Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(model, [], prog="x")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in REQUIRED[model][::2])


@pytest.mark.parametrize("model", [model for model, _ in COMMANDS.values()], ids=list(COMMANDS))
def test_help_lists_every_field_with_its_default(model: type[Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(model, ["--help"], prog="x")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in model.model_fields.items():
        assert f"{flag(name)} " in text
        assert " ".join((field.description or "").split()) in text
        if field.annotation is not bool and not field.is_required():
            assert f"[{field.default}]" in text


def test_flags_become_values_of_their_type() -> None:
    given = "--data d --out o --rotations --lr 1e-3 --epochs 7 --precision float32 --small-share .25 --no-rotations"
    config = parse(PretrainConfig, given.split(), prog="x")
    assert config.data == Path("d")
    assert config.lr == 0.001
    assert config.epochs == 7
    assert config.precision == "float32"
    assert config.small_share == 0.25
    assert config.rotations is False  # the last word counts
    assert parse(PretrainConfig, [*given.split(), "--rotations"], prog="x").rotations is True
    assert parse(EvaluateConfig, [*REQUIRED[EvaluateConfig], "--json-out", "x/y"], prog="x").json_out == Path("x/y")


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (PretrainConfig, "epochs", "many"),
        (PretrainConfig, "epochs", "-1"),
        (PretrainConfig, "epochs", "1.5"),
        (PretrainConfig, "lr", "0"),
        (PretrainConfig, "size", "8"),
        (PretrainConfig, "small_share", "1.1"),
        (PretrainConfig, "warmup", "1"),
        (PretrainConfig, "weight_decay", "-1"),
        (PretrainConfig, "augment", "sounds"),
        (PretrainConfig, "device", "tpu"),
        (PretrainConfig, "objectives", "contrastive"),
        (PretrainConfig, "objectives", "contrastive=much"),
        (PretrainConfig, "objectives", "contrastive=0"),
        (PretrainConfig, "objectives", "supervised=1,contrastive=.0"),
        (PretrainConfig, "minutes", "-1"),
        *((model, "seed", "-1") for model in REQUIRED if "seed" in model.model_fields),
        *((model, "group", "(") for model in REQUIRED if "group" in model.model_fields),
        (MetatrainConfig, "tasks", "guess"),
        (MetatrainConfig, "max_way", "1"),
        (MetatrainConfig, "slots", "0"),
        (EvaluateConfig, "way", "five"),
        (EvaluateConfig, "shot", "1,,5"),
        (EvaluateConfig, "shot", "0"),
        (EvaluateConfig, "episodes", "1"),
        (EvaluateConfig, "precision", "float64"),
        (ExportConfig, "episodes", "9"),
        (CompareObjectivesConfig, "objectives", "momentum"),
        (CompareObjectivesConfig, "clock", "sun"),
        (PretextConfig, "extractors", "runs/mine"),
    ],
)
def test_a_wrong_value_ends_with_a_sentence_that_names_its_flag(
    model: type[Config], name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(model, [*REQUIRED[model], flag(name), value], prog="x")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert flag(name) in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_flag_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(PretrainConfig, [*REQUIRED[PretrainConfig], "--epoch-count", "3"], prog="x")
    assert end.value.code == 2
    assert "--epoch-count" in capsys.readouterr().err


@pytest.mark.parametrize("objectives", ["contrastive=1", "supervised=.5,contrastive=2", "contrastive=0.25"])
def test_objectives_are_names_with_weights(objectives: str) -> None:
    assert PretrainConfig(data=Path("d"), out=Path("o"), objectives=objectives).objectives == objectives


@CONFIGS
def test_a_configuration_survives_a_checkpoint_and_cannot_be_changed(model: type[Config]) -> None:
    config = parse(model, REQUIRED[model], prog="x")
    assert model(**config.model_dump(mode="json")) == config
    with pytest.raises(pydantic.ValidationError):
        config.data = Path("elsewhere")  # type: ignore[attr-defined]
    with pytest.raises(pydantic.ValidationError):
        model(**config.model_dump(), surprise=1)
