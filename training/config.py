"""One frozen configuration per command; its flags are generated from it.

Knows nothing of what the values do. A wrong value names its flag.
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text} is no expression that can be looked for: {error}") from None
    return text


def _weighed(text: str) -> str:
    if idle := [part for part in text.split(",") if re.fullmatch(r"\w+=[0.]+", part)]:
        raise ValueError(f"{idle[0]} teaches nothing: weights are above 0")
    return text


Expression = Annotated[str, AfterValidator(_compiles)]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)

NUMBERS = r"^[1-9]\d*(,[1-9]\d*)*$"
PRECISION = "auto: bfloat16 on a GPU that has it, else (and for texts) float32"


class PretrainConfig(Config):
    """Learn an extractor."""

    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder for the checkpoint and the log")
    split: str = Field(
        "train", description="which classes to learn from: train, all, or (Omniglot) background5 or background30"
    )
    hold_out: int = Field(
        0, ge=0, description="classes of the split to learn nothing from: `metatrain` then practises on them"
    )
    labelled: float = Field(
        1, gt=0, le=1, description="share of the images of each class to learn from, as if no other had a label"
    )
    shape: str = Field("resnet18", description="network, a name from models/resnet.py, or from bytenet.py for texts")
    size: int = Field(84, ge=16, description="pixels of the input, height and width; bytes of a text")
    small: int = Field(0, ge=0, description="pixels in the first part of the training; 0 = the same throughout")
    small_share: float = Field(0.6, ge=0, le=1, description="how long that first part is, as a share")
    objectives: Annotated[str, AfterValidator(_weighed)] = Field(
        "contrastive=1",
        pattern=r"^\w+=\d*\.?\d+(,\w+=\d*\.?\d+)*$",
        description="name=weight, with commas: contrastive, momentum, clusters, reconstruction, rotation, jigsaw, "
        "supervised, projected; for texts, language",
    )
    weighting: Literal["fixed", "learned", "uncertainty"] = Field(
        "fixed", description="learned: by the query loss of tasks of images held out, from the weights given"
    )
    weighting_steps: int = Field(8, ge=1, description="steps between two looks at held-out tasks")
    weighting_lr: float = Field(0.01, gt=0, description="learning rate of the learned weights")
    start: Path | None = Field(
        None, description="folder of a finished pretraining, or of an artifact, whose weights to start from"
    )
    labels: Literal["classes", "clusters"] = Field(
        "classes", description="clusters: of what --start sees in the images, made anew each round; no label is read"
    )
    rounds: int = Field(3, ge=1, description="of --epochs each, with --labels clusters")
    cluster: int = Field(15, ge=2, description="images in a cluster, on average")
    augment: Literal["photos", "strong", "snapshots", "characters"] = "photos"
    mix: bool = Field(False, description="cuts pieces of other images into each, which then is of both classes")
    details: int = Field(0, ge=0, description="small cut-outs of each image, asked about beside its views (momentum)")
    detail_size: int = Field(32, ge=16, description="pixels of a detail, height and width")
    rotations: bool = Field(False, description="turns by 90, 180, 270 degrees are images (and classes) of their own")
    epochs: int = Field(20, ge=0, description="0 = the weights of --start as they are, seeing at this --size")
    batch: int = Field(128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.2, gt=0, description="the highest learning rate, after the warm-up")
    warmup: float = Field(0.15, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(5e-4, ge=0)
    per_class: int = Field(0, ge=0, description="at most so many images a class; 0 = all")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description=PRECISION)
    checkpoint_s: float = Field(60, description="seconds between checkpoints")
    check_epochs: int = Field(0, ge=0, description="epochs between quick looks at the validation classes; 0 = none")
    minutes: float = Field(0, ge=0, description="stop after a checkpoint when this time is up; run again to go on")


class MetatrainConfig(Config):
    """Learn to learn: episodes over the features of a pretrained extractor."""

    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder with the pretrained checkpoint; the learners are put beside it")
    split: str = "train"
    tasks: Literal["labels", "pseudo", "clusters", "mixed"] = Field(
        "labels",
        description="with no label read: pseudo, every image a class; clusters of features, fine and coarse; or mixed",
    )
    check_split: str = Field("val", description="classes whose tasks decide which step is kept")
    practise: str = Field(
        "", description="more folders, with commas, whose training classes episodes are drawn from as well"
    )
    cell: Path | None = Field(
        None, description="folder of a finished metatrain, on any extractor, whose LSTM cell to start from"
    )
    rotations: bool = False
    views: int = Field(4, ge=0, description="augmented views of each image whose features are cached")
    learners: str = Field("prototype,ridge,whitened,gradient,lstm,discriminant", description="which to train")
    steps: int = Field(3000, ge=1)
    episodes: int = Field(8, ge=1, description="episodes a step")
    max_way: int = Field(20, ge=2)
    max_shot: int = Field(10, ge=1)
    queries: int = Field(5, ge=1, description="questions per class")
    slots: int = Field(256, ge=1, description="slots of the external memory")
    lr: float = Field(1e-3, gt=0)
    outer: Literal["episodic", "reptile"] = Field(
        "episodic", description="outer loop; episodic: through the inner loop, as Li et al. learn step sizes"
    )
    check_steps: int = Field(200, ge=1, description="steps between looks at held-out tasks; the best is kept")
    per_class: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
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
    rotations: bool = False
    foreign: int = Field(
        0, ge=0, description="classes per episode that the task does not know; measures trust as well: see honesty.py"
    )
    scores: bool = Field(False, description="with --foreign: compare other ways to score them, see scores.py")
    unlabelled: int = Field(0, ge=0, description="images of each class without a label; measures what they add as well")
    distractors: int = Field(0, ge=0, description="classes per episode that the unlabelled images show besides")
    only_distractors: bool = Field(False, description="the unlabelled images show those classes alone")
    labelled: float = Field(
        1, gt=0, le=1, description="share of the images of each class that are labelled: --unlabelled takes the others"
    )
    group: Expression = Field("", description="expression whose match in a file name tells images of one thing apart")
    spread: bool = Field(
        False,
        description="the examples of a class show as many things as they can, and not one after the other in full",
    )
    precision: Literal["float32", "int8"] = "float32"
    views: int = Field(1, ge=1, le=3, description="of each image: 2 = its middle too, 3 = mirrored too")
    against_float32: bool = Field(False, description="also the difference to float32, paired on the same episodes")
    per_class: int = Field(0, ge=0)
    seed: int = Field(7, ge=0)
    json_out: Path | None = Field(None, description="also write the figures there, one JSON line per row")


class ContinualConfig(Config):
    """Add classes one at a time and take them away again: what is forgotten, against a head that is fine-tuned."""

    artifact: Path = Field(description="artifact folder")
    data: Path = Field(description="folder or zip with one folder per class")
    split: str = "test"
    rotations: bool = False
    classes: int = Field(100, ge=4, description="classes that come one at a time")
    removed: int = Field(50, ge=0, description="of them, how many go again")
    every: int = Field(10, ge=1, description="classes between two measurements")
    shot: int = Field(5, ge=1)
    queries: int = Field(10, ge=1, description="questions per class")
    orders: int = Field(3, ge=2, description="different orders in which the same classes come")
    learners: str = Field("", description="with commas; empty = all of the artifact")
    lr: float = Field(0.03, gt=0, description="of the head that is fine-tuned on the newest class alone")
    steps: int = Field(5, ge=1, description="of its fine-tuning for each class")
    seed: int = Field(7, ge=0)
    json_out: Path | None = Field(None, description="also write the figures there, one JSON line per row")


class ExportConfig(Config):
    """Turn a checkpoint into an artifact."""

    checkpoint: Path = Field(description="folder with the checkpoints of pretrain and metatrain")
    data: Path = Field(description="the data they were trained on: calibration and int8 come from it")
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
    seed: int = Field(11, ge=0)


class TextDemoConfig(Config):
    """All commands on passages of Python's standard library, in some minutes: which module is this from?"""

    out: Path = Field(Path("runs/text-demo"), description="folder for the corpus, checkpoints and the artifact")
    epochs: int = Field(2, ge=1, description="of pretraining")
    episodes: int = Field(2000, ge=2, description="that accuracy is measured on")
    json_out: Path | None = Field(None, description="also write the figures there, one JSON line per row")


class ImportConfig(Config):
    """Make an artifact of a backbone that was trained elsewhere."""

    backbone: Path = Field(description="ONNX file, or folder of a Hugging Face model (config.json, model.safetensors)")
    data: Path = Field(description="folder or zip with one folder per class: the learners are fitted to it")
    out: Path = Field(description="folder of the artifact; must not exist")
    name: str = Field(description="what the artifact is called")
    description: str = ""
    size: int = Field(0, ge=0, le=1024, description="pixels of the input, height and width; 0 = what the backbone says")
    pooling: Literal["auto", "cls", "mean"] = Field(
        "auto",
        description="how tokens or maps become one vector; auto: an ONNX file's vector as it is, a transformer's class "
        "token from a Hugging Face folder",
    )
    output: str = Field("", description="name of the output, where an ONNX file has several")
    mean: str = Field("", description="of the colours from 0 to 1, with commas; empty = preprocessor_config.json's")
    std: str = Field("", description="their deviation, likewise")
    learners: str = Field("prototype,ridge,whitened,gradient,lstm,discriminant", description="which to train")
    steps: int = Field(3000, ge=1, description="training steps of each learner")
    default: str = Field("", description="default learner; empty = the best on the calibration tasks")
    int8: bool = Field(True, description="also an int8 graph, if it loses at most half a point of accuracy")
    episodes: int = Field(400, ge=10, description="calibration episodes per way and shot")
    per_class: int = Field(100, ge=0, description="at most so many images a class; 0 = all")
    seed: int = Field(11, ge=0)


class LakeConfig(Config):
    """Measure an artifact on Lake's one-shot runs of Omniglot."""

    artifact: Path = Field(description="artifact folder, for grey drawings")
    data: Path = Field(description="folder with one_shot_runs.zip and the splits.json of Omniglot")
    json_out: Path | None = Field(None, description="also write the figures there, one JSON line per row")


class ResultsConfig(Config):
    """Make RESULTS.md and its pictures from raw results."""

    raw: Path = Field(Path("training/results"), description="folder of raw results, *.jsonl")
    out: Path = Field(Path("training"), description="folder for RESULTS.md and results/*.svg")


class CompareObjectivesConfig(Config):
    """Each self-supervised loss alone, all alike, by uncertainty and with learned weights, at equal time."""

    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder for the extractors")
    results: Path | None = Field(
        None, description="file to add rows to, objectives.jsonl in --out if not given; what is in it is not run again"
    )
    objectives: str = Field(
        "momentum,clusters,reconstruction,rotation", pattern=r"^\w+(,\w+)+$", description="two or more, with commas"
    )
    seconds: float = Field(600, gt=0, description="of training for each arm and seed")
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="cpu: seconds that this process computed, for a machine that others use as well"
    )
    seeds: int = Field(3, ge=1)
    split: str = Field("val", description="classes to measure on")
    episodes: int = Field(2000, ge=2)
    shape: str = Field("resnet10", description="network, a name from models/resnet.py")
    size: int = Field(32, ge=16, description="pixels of the input, height and width")
    augment: Literal["photos", "strong", "snapshots", "characters"] = "photos"
    batch: int = Field(64, ge=2)
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(2e-3, gt=0, description="the highest learning rate, after the warm-up")
    weighting_steps: int = Field(8, ge=1, description="steps between two looks at held-out tasks")
    weighting_lr: float = Field(0.01, gt=0, description="learning rate of the learned weights")
    per_class: int = Field(0, ge=0, description="at most so many training images a class; 0 = all")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description=PRECISION)


class PretextConfig(Config):
    """How fast a linear head learns self-supervised tasks that an extractor was not trained on."""

    data: Path = Field(description="folder or zip with one folder per class")
    extractors: str = Field(
        pattern=r"^[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*$",
        description="name=folder of a finished pretraining, with commas; one of random weights is added",
    )
    results: Path | None = Field(None, description="also add the rows there, one JSON line each")
    images: int = Field(10, ge=2, description="images that the quick head learns from")
    steps: int = Field(10, ge=1, description="its gradient steps")
    draws: int = Field(50, ge=2, description="times that those images are drawn")
    full: int = Field(2000, ge=10, description="images that the thorough head learns from, at most")
    asked: int = Field(500, ge=2, description="images asked about, at most")
    split: str = Field("val", description="classes to ask about")
    per_class: int = Field(0, ge=0, description="at most so many images a class to learn from; 0 = all")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class BaselineConfig(Config):
    """Measure a baseline, trained first where it is one that is, on frozen episodes."""

    method: Literal["maml", "reptile", "mann", "scratch", "finetune", "scale-shift", "head", "pixels"] = Field(
        description="a module of training/baselines/"
    )
    data: Path = Field(description="folder or zip with one folder per class")
    out: Path = Field(description="folder for the checkpoint and the log")
    artifact: Path | None = Field(None, description="artifact folder: the network to adapt, its input; none for most")
    settings: str = Field("", description="name=value, with commas, over those of the method's file")
    train_split: str = Field("train", description="classes to train on, of one split or several with commas")
    split: str = "test"
    size: int = Field(28, ge=8, description="pixels of the input; that of the artifact where there is one")
    channels: int = Field(1, ge=1, le=3, description="1, or 3 for colour; those of the artifact where there is one")
    way: int = Field(5, ge=2)
    shot: int = Field(1, ge=1)
    queries: int = Field(15, ge=1, description="questions per class")
    episodes: int = Field(2000, ge=2)
    group: Expression = Field("", description="expression whose match in a file name tells images of one thing apart")
    rotations: bool = False
    per_class: int = Field(0, ge=0)
    seed: int = Field(7, ge=0)
    json_out: Path | None = Field(None, description="also append the rows there, one JSON line each")
    checkpoint_s: float = 60
    minutes: float = 0


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
        parser.error(f"{flag}: {first['msg'].removeprefix('Value error, ')}")
