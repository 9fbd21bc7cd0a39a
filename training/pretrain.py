"""Pretraining: one backbone learns under one or several weighted objectives, and resumes after any kill.

Every random choice of step s is drawn from a generator seeded with (seed, s), so a checkpoint holds no random state
and a run that was killed ends at the same weights, bit for bit, as one that was not (on one kind of CPU and the same
number of threads). Knows nothing of episodes but for the quick look at validation classes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.artifact import Artifact
from models.images import ImageDecoder
from models.learners.prototype import Prototype
from models.resnet import SHAPES, ImageExtractor, ResNet
from training import checkpoint, data, evaluate
from training.augment import AUGMENTATIONS
from training.config import PretrainConfig
from training.episodes import Pool, frozen
from training.objectives import OBJECTIVES, Posed, rotated
from training.start import from_artifact, is_artifact

CHECKPOINT = "pretrain.safetensors"


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same whenever it is run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(step: int, steps: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Run:
    """All state of one pretraining: networks, optimizer, step."""

    def __init__(self, config: PretrainConfig, images: data.Images):
        self.config = config
        self.device = choose_device(config.device)
        self.pixels = torch.from_numpy(images.pixels)
        self.labels = torch.from_numpy(images.labels)
        self.turns = 4 if config.rotations else 1
        torch.manual_seed(config.seed)
        self.backbone = ResNet(SHAPES[config.shape])
        if config.start is not None:
            self.backbone.load_state_dict(starting(config.start, self.pixels).state_dict())
        weights = dict(part.split("=") for part in config.objectives.split(","))
        self.weights = {name: float(weight) for name, weight in weights.items()}
        classes = len(images.classes) * self.turns
        dim = self.backbone.shape.dim
        self.heads = nn.ModuleDict({name: OBJECTIVES[name](dim, classes) for name in self.weights})
        self.network = nn.ModuleDict({"backbone": self.backbone, "heads": self.heads})
        # torch's stub of Module.to leaves out memory_format.
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.views = max(1, *(OBJECTIVES[name].views for name in self.weights))
        self.optimizer = self._optimizer()
        self.step = 0
        self.precision: str = config.precision
        self.augment = AUGMENTATIONS[config.augment]
        count = len(self.labels) * self.turns
        self.steps_per_epoch = max(1, count // config.batch)
        self.steps = self.steps_per_epoch * config.epochs
        self._order: tuple[int, Tensor] | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if self.config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.config.lr)
        return torch.optim.SGD(groups, lr=self.config.lr, momentum=0.9, nesterov=True)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float [n, C, H, W] in [0, 1] and their labels [n], both on the device."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            count = len(self.labels) * self.turns
            self._order = (epoch, torch.randperm(count, generator=generator(self.config.seed, -1 - epoch)))
        chosen = self._order[1][at * self.config.batch : (at + 1) * self.config.batch]
        index, turn = chosen // self.turns, chosen % self.turns
        images = self.pixels[index].to(self.device).permute(0, 3, 1, 2).float() / 255
        if self.turns > 1:
            images = rotated(images, turn.to(self.device))
        return images, (self.labels[index] * self.turns + turn).to(self.device)

    def size_at(self, step: int) -> int:
        if self.config.small and step < self.config.small_share * self.steps:
            return self.config.small
        return self.config.size

    def advance(self) -> dict[str, float]:
        """One step; returns the losses by name."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.config)
        images, labels = self.batch(self.step)
        rng = generator(self.config.seed, self.step)
        size = self.size_at(self.step)
        views = [self.augment(images, size, rng) for _ in range(self.views)]
        posed = {name: head.pose(views[0], rng) for name, head in self.heads.items() if isinstance(head, Posed)}
        inputs = torch.cat([*views, *(altered for altered, _ in posed.values())])
        sizes = [len(images)] * self.views + [len(answers) for _, answers in posed.values()]
        with autocast(self.device, self.precision):
            parts = self.backbone(inputs.contiguous(memory_format=torch.channels_last)).split(sizes)
            own = dict(zip(posed, parts[self.views :], strict=True))
            plain = list(parts[: self.views])
            asked = {name: ([own[name]], posed[name][1]) if name in posed else (plain, labels) for name in self.weights}
            losses = {name: self.heads[name](*question) for name, question in asked.items()}
        total = sum(
            (self.weights[name] * loss for name, loss in losses.items()), start=torch.zeros((), device=self.device)
        )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "precision": self.precision,
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.precision = state["precision"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def time_precision(self) -> str:
        """Times a few steps in each precision and puts everything back as it was."""
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        seconds = {}
        for precision in ("float32", "bfloat16"):
            self.precision = precision
            for count in range(4):
                if count == 1:
                    start = time.perf_counter()
                self.advance()
            seconds[precision] = time.perf_counter() - start
        self.network.load_state_dict(before)
        self.optimizer = self._optimizer()
        self.step = 0
        return min(seconds, key=lambda name: seconds[name])

    @torch.no_grad()
    def extractor(self) -> ImageExtractor:
        """The extractor as it is now, with the centre of the training images (at most 10,000 of them)."""
        extractor = ImageExtractor(self.backbone).eval()
        picked = self.pixels[:: max(1, len(self.pixels) // 10_000)]
        total = torch.zeros(self.backbone.shape.dim, device=self.device)
        for turn in range(self.turns):
            for part in torch.split(picked, 256):
                x = part.to(self.device).permute(0, 3, 1, 2).float() / 255
                pooled = self.backbone(torch.rot90(x, turn, (2, 3)))
                total += torch.sqrt(pooled + 1e-6).sum(dim=0)
        extractor.centre = total / (len(picked) * self.turns)
        return extractor.to(self.device)


def main(config: PretrainConfig) -> Path:
    """Trains, or goes on training, and returns the path of the checkpoint."""
    if config.small and config.small > config.size:
        sys.exit("--small must not be larger than --size.")
    unknown = {part.split("=")[0] for part in config.objectives.split(",")} - set(OBJECTIVES)
    if unknown or config.shape not in SHAPES:
        sys.exit(f"Known objectives: {', '.join(OBJECTIVES)}; known shapes: {', '.join(SHAPES)}.")
    channels = SHAPES[config.shape].channels
    decoder = ImageDecoder(config.size, config.size, channels)
    images = data.load(config.data, config.split, decoder, per_class=config.per_class or None)
    if config.hold_out:
        images, _ = data.hold_out(images, config.hold_out)
    check = data.load(config.data, "val", decoder) if config.check_epochs else None
    run = Run(config, images)
    path = config.out / CHECKPOINT
    config.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = checkpoint.load(path)
        before = PretrainConfig(**state["config"])
        free = {"minutes", "device", "checkpoint_s", "check_epochs", "data", "out"}
        if before.model_dump(exclude=free) != config.model_dump(exclude=free):
            sys.exit(f"{path} was made with other settings; choose another --out or delete it.")
        run.restore(state)
    elif run.precision == "auto":
        run.precision = run.time_precision()
    start = last = time.monotonic()
    with (
        (config.out / "pretrain.jsonl").open("a") as log,
        tqdm(total=run.steps, initial=run.step, mininterval=2) as bar,
    ):

        def write(**line: Any) -> None:
            log.write(json.dumps({"step": run.step, "epoch": run.step / run.steps_per_epoch, **line}) + "\n")
            log.flush()

        while run.step < run.steps:
            began = time.perf_counter()
            losses = run.advance()
            if not all(math.isfinite(loss) for loss in losses.values()):
                sys.exit(f"A loss is not finite at step {run.step}: {losses}. Lower --lr.")
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
                rate = config.batch / (time.perf_counter() - began)
                write(
                    losses=losses,
                    lr=run.optimizer.param_groups[0]["lr"],
                    images_per_s=round(rate, 1),
                    precision=run.precision,
                )
            epoch, at = divmod(run.step, run.steps_per_epoch)
            if check is not None and at == 0 and epoch % config.check_epochs == 0:
                write(check=quick_look(run, check))
            done = run.step == run.steps
            late = config.minutes > 0 and time.monotonic() - start > 60 * config.minutes
            if done or late or time.monotonic() - last > config.checkpoint_s:
                checkpoint.save(path, run.state())
                last = time.monotonic()
            if late and not done:
                print(f"Stopped at step {run.step} of {run.steps}; run the same command to go on.", file=sys.stderr)
                return path
    finish(run, path)
    return path


def starting(folder: Path, pixels: Tensor) -> ResNet:
    """The backbone of a finished pretraining, or of an artifact."""
    if is_artifact(folder):
        return from_artifact(Artifact.load(folder), pixels)
    return load_extractor(folder)[0].backbone


def finish(run: Run, path: Path) -> None:
    """Adds the finished extractor, in float32, to the checkpoint."""
    extractor = run.extractor()
    state = run.state()
    state["extractor"] = dict(extractor.state_dict())
    checkpoint.save(path, state)


def quick_look(run: Run, images: data.Images) -> dict[str, float]:
    """5-way accuracy of prototypes on 600 episodes of the validation classes: a look, not a result."""
    extractor = run.extractor()
    features = embed(extractor, images.pixels, run.device)
    pool = Pool.of(images.labels)
    learner = Prototype(np.float32(2.0))
    way = min(5, len(images.classes))
    return {
        f"{way}-way {shot}-shot": round(100 * float(evaluate.run(learner, features, episodes).mean()), 2)
        for shot in (1, 5)
        for episodes in [frozen(pool, way=way, shot=shot, queries=15, count=600, seed=3)]
    }


@torch.no_grad()
def embed(extractor: nn.Module, pixels: np.ndarray, device: torch.device, *, batch: int = 128) -> np.ndarray:
    """uint8 [n, H, W, C] -> float32 features [n, dim]."""
    extractor.eval()
    parts = [
        extractor(torch.from_numpy(pixels[at : at + batch]).to(device)).float().cpu()
        for at in range(0, len(pixels), batch)
    ]
    return torch.cat(parts).numpy()


def load_extractor(folder: Path) -> tuple[ImageExtractor, PretrainConfig]:
    """The extractor of a finished pretraining."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise data.DataError(f"{path} does not exist: run `python -m training pretrain --out {folder}` first.")
    state = checkpoint.load(path)
    if "extractor" not in state:
        raise data.DataError(f"{path} is not finished: run the same `pretrain` command again, it goes on.")
    # With the precision that was decided on, where it was to be timed.
    config = PretrainConfig(**{**state["config"], "precision": state["precision"]})
    extractor = ImageExtractor(ResNet(SHAPES[config.shape]))
    extractor.load_state_dict(state["extractor"])
    return extractor.eval(), config
