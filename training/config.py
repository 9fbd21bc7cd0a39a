"""One frozen configuration per command; its flags are generated from it.

Knows nothing of what the values do. A wrong value names its flag.
"""

from __future__ import annotations

import argparse
import types
import typing
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)

NUMBERS = r"^[1-9]\d*(,[1-9]\d*)*$"


class PretrainConfig(Config):
    """Learn an extractor."""

    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder for the checkpoint and the log")
    split: str = Field("train", description="which classes to learn from: train, or all")
    hold_out: int = Field(
        0, ge=0, description="classes of the split to learn nothing from: `metatrain` then practises on them"
    )
    shape: str = Field("resnet18", description="network, a name from models/resnet.py")
    size: int = Field(84, ge=16, description="pixels of the input, height and width")
    small: int = Field(0, ge=0, description="pixels in the first part of the training; 0 = the same throughout")
    small_share: float = Field(0.6, ge=0, le=1, description="how long that first part is, as a share")
    objectives: str = Field(
        "contrastive=1",
        pattern=r"^\w+=\d*\.?\d+(,\w+=\d*\.?\d+)*$",
        description="name=weight, with commas: contrastive, supervised, projected, rotation",
    )
    start: Path | None = Field(
        None, description="folder of a finished pretraining, or of an artifact, whose weights to start from"
    )
    augment: Literal["photos", "snapshots", "characters"] = "photos"
    rotations: bool = Field(False, description="turns by 90, 180, 270 degrees are images (and classes) of their own")
    epochs: int = Field(20, ge=1)
    batch: int = Field(128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.2, gt=0, description="the highest learning rate, after the warm-up")
    warmup: float = Field(0.15, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(5e-4, ge=0)
    per_class: int = Field(0, ge=0, description="at most so many images a class; 0 = all")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: timed on the spot")
    checkpoint_s: float = Field(60, description="seconds between checkpoints")
    check_epochs: int = Field(0, ge=0, description="epochs between quick looks at the validation classes; 0 = none")
    minutes: float = Field(0, ge=0, description="stop after a checkpoint when this time is up; run again to go on")


class MetatrainConfig(Config):
    """Learn to learn: episodes over the features of a pretrained extractor."""

    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder with the pretrained checkpoint; the learners are put beside it")
    split: str = "train"
    tasks: Literal["labels", "pseudo"] = Field(
        "labels", description="pseudo: every image a class of its own, no label read"
    )
    practise: str = Field(
        "", description="more folders, with commas, whose training classes episodes are drawn from as well"
    )
    cell: Path | None = Field(
        None, description="folder of a finished metatrain, on any extractor, whose LSTM cell to start from"
    )
    rotations: bool = False
    views: int = Field(4, ge=0, description="augmented views of each image whose features are cached")
    learners: str = Field("prototype,ridge,whitened,gradient,lstm", description="which to train")
    steps: int = Field(3000, ge=1)
    episodes: int = Field(8, ge=1, description="episodes a step")
    max_way: int = Field(20, ge=2)
    max_shot: int = Field(10, ge=1)
    queries: int = Field(5, ge=1, description="questions per class")
    slots: int = Field(256, ge=1, description="slots of the external memory")
    lr: float = Field(1e-3, gt=0)
    check_steps: int = Field(200, ge=1, description="steps between looks at held-out tasks; the best is kept")
    per_class: int = Field(0, ge=0)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_s: float = 60
    minutes: float = 0


class EvaluateConfig(Config):
    """Measure an artifact on frozen episodes."""

    artifact: Path = Field(description="artifact folder")
    data: Path = Field(description="folder or zip with one folder per class")
    split: str = "test"
    way: str = Field("5", pattern=NUMBERS, description="with commas")
    shot: str = Field("1,5,10", pattern=NUMBERS, description="with commas")
    queries: int = Field(15, ge=1, description="questions per class")
    episodes: int = Field(2000, ge=2)
    learners: str = Field("", description="with commas; empty = all of the artifact")
    paired: str = Field("", description="learner that each of the others is compared with, episode by episode")
    paired_out: Path | None = Field(None, description="also write the differences there, one JSON line per row")
    rotations: bool = False
    foreign: int = Field(
        0, ge=0, description="classes per episode that the task does not know; measures trust as well: see honesty.py"
    )
    group: str = Field("", description="expression whose match in a file name tells images of one thing apart")
    precision: Literal["float32", "int8"] = "float32"
    per_class: int = Field(0, ge=0)
    seed: int = 7
    json_out: Path | None = Field(None, description="also write the figures there, one JSON line per row")


class ExportConfig(Config):
    """Turn a checkpoint into an artifact."""

    checkpoint: Path = Field(description="folder with the checkpoints of pretrain and metatrain")
    data: Path = Field(description="the data they were trained on: calibration, int8 and the probe come from it")
    out: Path = Field(description="folder of the artifact; must not exist")
    name: str = Field(description="what the artifact is called")
    description: str = ""
    tasks: Literal["labels", "pseudo"] = Field("labels", description="how calibration tasks are made")
    calibration_split: str = "val"
    rotations: bool = False
    default: str = Field("", description="default learner; empty = the best on the calibration tasks")
    int8: bool = True
    episodes: int = Field(400, ge=10, description="calibration episodes per way and shot")
    per_class: int = Field(0, ge=0)
    metrics: str = Field("", description="files of `evaluate --json-out`, with commas: the measured accuracy")
    seed: int = 11


def parse(model: type[C], arguments: list[str], *, prog: str) -> C:
    """Reads flags into a configuration; ends the process with a sentence if they are wrong."""
    parser = argparse.ArgumentParser(prog=prog, description=model.__doc__)
    for name, field in model.model_fields.items():
        flag = "--" + name.replace("_", "-")
        help_text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
            continue
        if not field.is_required():
            help_text += f" [{field.default}]"
        if typing.get_origin(field.annotation) is Literal:
            parser.add_argument(
                flag, choices=typing.get_args(field.annotation), default=argparse.SUPPRESS, help=help_text
            )
            continue
        is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
        name_of = "PATH" if is_union else getattr(field.annotation, "__name__", "value").upper()
        parser.add_argument(
            flag, required=field.is_required(), default=argparse.SUPPRESS, metavar=name_of, help=help_text
        )
    given = vars(parser.parse_args(arguments))
    try:
        return model(**given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        parser.error(f"{flag}: {first['msg']}")
