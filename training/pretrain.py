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
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.artifact import Artifact
from models.learners.prototype import Prototype
from models.resnet import SHAPES, ImageExtractor, ResNet
from training import checkpoint, data, evaluate, inputs
from training.augment import AUGMENTATIONS, close, mixed
from training.config import PretrainConfig
from training.episodes import Pool, frozen
from training.heldout import SHARE, HeldOut
from training.objective import Fixed, Learned, Uncertainty, unchanged
from training.objectives import OBJECTIVES, Kept, Objective, Posed, View, rotated
from training.start import from_artifact, is_artifact

if TYPE_CHECKING:
    from training import language

CHECKPOINT = "pretrain.safetensors"


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same whenever it is run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def trial(seed: int, step: int) -> torch.Generator:
    """Those of what a step tries on held-out images: others, so that the step's own stay as they are."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2)


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
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # sizes are few and come back at every step
        self.turns = 4 if config.rotations else 1
        torch.manual_seed(config.seed)
        self.backbone = ResNet(SHAPES[config.shape])
        if config.start is not None:
            self.backbone.load_state_dict(starting(config.start, self.pixels).state_dict())
        if self.device.type == "cuda":
            self._move_pixels()
        weights = dict(part.split("=") for part in config.objectives.split(","))
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.classes = len(images.classes) * self.turns
        self.heads = nn.ModuleDict({name: OBJECTIVES[name](self.backbone, self.classes) for name in self.weights})
        self.network = nn.ModuleDict({"backbone": self.backbone, "heads": self.heads})
        # torch's stub of Module.to leaves out memory_format.
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.views = max(OBJECTIVES[name].views for name in self.weights)
        self.optimizer = self._optimizer()
        self.step = 0
        self.precision: str = config.precision
        self.augment = AUGMENTATIONS[config.augment]
        self.detail = close(self.augment)
        self.trained = torch.arange(len(self.labels))
        if config.weighting == "learned":
            dealt = torch.randperm(len(self.labels), generator=trial(config.seed, -1))
            out, self.trained = dealt.tensor_split([round(SHARE * len(dealt))])
            self.held_out = self.pixels[out]
        self.weighting = self._weighting()
        count = len(self.trained) * self.turns
        self.steps_per_epoch = max(1, count // config.batch)
        self.steps = self.steps_per_epoch * config.epochs
        self._order: tuple[int, Tensor] | None = None

    def _move_pixels(self) -> None:
        """All images to the device, where they fit beside a training: a step then waits for no copy."""
        free, _ = torch.cuda.mem_get_info(self.device)
        if self.pixels.nbytes < free / 4:
            self.pixels = self.pixels.to(self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        learned = [p for p in self.network.parameters() if p.requires_grad]
        decayed = [p for p in learned if p.ndim > 1]
        plain = [p for p in learned if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if self.config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.config.lr)
        return torch.optim.SGD(groups, lr=self.config.lr, momentum=0.9, nesterov=True)

    def _weighting(self) -> Fixed | Uncertainty | Learned:
        if self.config.weighting == "uncertainty":
            return Uncertainty(self.weights, self.device)
        if self.config.weighting == "learned":
            tasks = HeldOut(self.held_out, self.augment, self.device)
            return Learned(self.weights, tasks, self.device, rate=self.config.weighting_lr)
        return Fixed(self.weights)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float [n, C, H, W] in [0, 1] and their labels [n], both on the device."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            count = len(self.trained) * self.turns
            self._order = (epoch, torch.randperm(count, generator=generator(self.config.seed, -1 - epoch)))
        chosen = self._order[1][at * self.config.batch : (at + 1) * self.config.batch]
        index, turn = self.trained[chosen // self.turns], chosen % self.turns
        images = self.pixels[index.to(self.pixels.device)].to(self.device).permute(0, 3, 1, 2).float() / 255
        if self.turns > 1:
            images = rotated(images, turn.to(self.device))
        return images, (self.labels[index] * self.turns + turn).to(self.device)

    def size_at(self, step: int) -> int:
        if self.config.small and step < self.config.small_share * self.steps:
            return self.config.small
        return self.config.size

    def advance(self) -> dict[str, float]:
        """One step; returns the losses by name."""
        return {name: loss.item() for name, loss in self.take_step().items()}

    def take_step(self) -> dict[str, Tensor]:
        """The same without waiting for the device, which then always has the next step to do."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.config)
        rng = generator(self.config.seed, self.step)
        images, labels = self.batch(self.step)
        size = self.size_at(self.step)
        views = [self.augment(images, size, rng) for _ in range(max(1, self.views))]
        posed: dict[str, tuple[Tensor, Tensor]] = {}
        for name, head in self.heads.items():
            if isinstance(head, Posed):
                # Of the whole batch where nothing else is asked of it.
                some = round(head.share * len(images)) if self.views else len(images)
                posed[name] = head.pose(views[0][: max(1, some)], rng)
        plain = views[: self.views]
        if self.config.mix:
            plain[0], labels = mixed(plain[0], labels, self.classes, rng)
        plain += [self.detail(images, self.config.detail_size, rng) for _ in range(self.config.details)]
        due = (self.step + 1) % self.config.weighting_steps == 0
        learned = self.weighting if isinstance(self.weighting, Learned) and due else None
        before = [parameter.detach().clone() for parameter in self.backbone.parameters()] if learned else []
        with autocast(self.device, self.precision):
            losses = self.losses(plain, labels, posed)
        self.optimizer.zero_grad(set_to_none=True)
        self.weighting.total(losses).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.weighting.step()
        if learned:
            # In float32: what is told apart here is smaller than bfloat16 can say.
            with unchanged(self.network):
                rng = trial(self.config.seed, self.step)
                learned.learn(self.backbone, before, lambda: self.losses(plain, labels, posed), size, rng)
        for head in self.heads.values():
            if isinstance(head, Kept):
                head.keep(self.backbone)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(
        self, plain: list[Tensor], labels: Tensor, posed: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The loss of each objective on these views and on the images that each has altered, with its answers."""
        whole, details = plain[: self.views], plain[self.views :]
        seen = self._seen([*whole, *(altered for altered, _ in posed.values())])
        own = dict(zip(posed, seen[len(whole) :], strict=True))
        views = [*seen[: len(whole)], *(self._seen(details) if details else [])]
        losses = {}
        for name in self.weights:
            head = cast(Objective, self.heads[name])
            losses[name] = head([own[name]], posed[name][1]) if name in posed else head(views, labels)
        return losses

    def _seen(self, shown: list[Tensor]) -> list[View]:
        """What the backbone makes of images of one size, all in one pass."""
        maps = self.backbone.maps(torch.cat(shown).contiguous(memory_format=torch.channels_last))
        sizes = [len(images) for images in shown]
        parts = zip(shown, torch.split(maps, sizes), torch.split(maps.mean(dim=(2, 3)), sizes), strict=True)
        return [View(*part) for part in parts]

    def state(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "precision": self.precision,
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "weighting": self.weighting.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.precision = state["precision"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.weighting != "fixed":
            self.weighting.restore(state["weighting"])

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
        self.weighting = self._weighting()
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
                with autocast(self.device, self.precision):
                    pooled = self.backbone(torch.rot90(x, turn, (2, 3)))
                total += torch.sqrt(pooled.float() + 1e-6).sum(dim=0)
        extractor.centre = total / (len(picked) * self.turns)
        return extractor.to(self.device)


def main(config: PretrainConfig) -> Path:
    """Reads the images, trains, or goes on training, and returns the path of the checkpoint."""
    from training import language  # late: its loop is this one

    if config.small and config.small > config.size:
        sys.exit("--small must not be larger than --size.")
    if config.shape not in inputs.SHAPES:
        sys.exit(f"Known shapes: {', '.join(inputs.SHAPES)}.")
    text = inputs.kind(config.shape) == "text"
    known = language.OBJECTIVES if text else tuple(OBJECTIVES)
    if {part.split("=")[0] for part in config.objectives.split(",")} - set(known):
        sys.exit(
            f"The shape {config.shape} is for {'texts' if text else 'images'}; its objectives: {', '.join(known)}."
        )
    if text and (config.rotations or config.small or config.labels == "clusters" or config.weighting != "fixed"):
        sys.exit("--rotations, --small, --labels clusters and --weighting are for images.")
    if config.details and (text or not any(part.startswith("momentum=") for part in config.objectives.split(","))):
        sys.exit("--details are asked about by the objective momentum alone.")
    if config.mix and (text or not may_mix(config)):
        sys.exit("--mix is for supervised and projected, and for what poses its own question beside them.")
    if config.epochs == 0 and config.start is None:
        sys.exit("--epochs 0 takes the weights of --start as they are: which?")
    decoder = inputs.decoder(config)
    images = data.load(config.data, config.split, decoder, per_class=config.per_class or None)
    if config.hold_out:
        images, _ = data.hold_out(images, config.hold_out)
    check = data.load(config.data, "val", decoder) if config.check_epochs else None
    if config.labels == "clusters" and text:
        sys.exit("--labels clusters is for images.")
    if config.labels == "clusters":
        from training import progressive  # which trains with what stands here, round after round

        return progressive.train(config, images, check)
    return train(config, images, check)


def may_mix(config: PretrainConfig) -> bool:
    """Not where views of one image are held against each other, in which nothing else may be seen."""
    asked = [OBJECTIVES[part.split("=")[0]] for part in config.objectives.split(",")]
    return {objective.uses_labels for objective in asked if objective.views} == {True}


def same(before: PretrainConfig, config: PretrainConfig) -> bool:
    """Whether the two lead to the same weights."""
    free = {"minutes", "device", "checkpoint_s", "check_epochs", "data", "out"}
    return before.model_dump(exclude=free) == config.model_dump(exclude=free)


def train(config: PretrainConfig, images: data.Images, check: data.Images | None) -> Path:
    """Trains on these images, or goes on, and looks at others now and then; returns the path of the checkpoint."""
    from training import language  # late: it builds on this module

    run = language.Run(config, images) if inputs.kind(config.shape) == "text" else Run(config, images)
    path = config.out / CHECKPOINT
    config.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        state = checkpoint.load(path)
        if not same(PretrainConfig(**state["config"]), config):
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

        began = time.perf_counter()
        counted = run.step
        while run.step < run.steps:
            found = run.take_step()
            bar.update()
            done = run.step == run.steps
            late = config.minutes > 0 and time.monotonic() - start > 60 * config.minutes
            save = done or late or time.monotonic() - last > config.checkpoint_s
            if run.step % 20 == 0 or save:
                losses = {name: loss.item() for name, loss in found.items()}
                if not all(math.isfinite(loss) for loss in losses.values()):
                    sys.exit(f"A loss is not finite at step {run.step}: {losses}. Lower --lr.")
            if run.step % 20 == 0:
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
                rate = (run.step - counted) * config.batch / (time.perf_counter() - began)
                began, counted = time.perf_counter(), run.step
                write(
                    losses=losses,
                    weights=run.weighting.weights(),
                    lr=run.optimizer.param_groups[0]["lr"],
                    images_per_s=round(rate, 1),
                    precision=run.precision,
                )
            epoch, at = divmod(run.step, run.steps_per_epoch)
            if check is not None and at == 0 and epoch % config.check_epochs == 0:
                write(check=quick_look(run, check))
            if save:
                checkpoint.save(path, run.state())
                last = time.monotonic()
            if late and not done:
                print(f"Stopped at step {run.step} of {run.steps}; run the same command to go on.", file=sys.stderr)
                return path
    finish(run, path)
    return path


def starting(folder: Path, pixels: Tensor) -> nn.Module:
    """The backbone of a finished pretraining, or of an artifact."""
    if is_artifact(folder):
        return from_artifact(Artifact.load(folder), pixels)
    return load_extractor(folder)[0].backbone


def finish(run: Run | language.Run, path: Path) -> None:
    """Adds the finished extractor, in float32, to the checkpoint."""
    extractor = run.extractor()
    state = run.state()
    state["extractor"] = dict(extractor.state_dict())
    checkpoint.save(path, state)


def quick_look(run: Run | language.Run, images: data.Images) -> dict[str, float]:
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
    """uint8 [n, H, W, C] or [n, length] -> float32 features [n, dim]."""
    extractor.eval()
    parts = [
        extractor(torch.from_numpy(pixels[at : at + batch]).to(device)).float().cpu()
        for at in range(0, len(pixels), batch)
    ]
    return torch.cat(parts).numpy()


def labelled(config: PretrainConfig) -> bool:
    """Whether an extractor has seen a label of its training classes, or started from one that has.

    A start that is gone cannot be asked, and counts as one that has.
    """
    names = [part.split("=")[0] for part in config.objectives.split(",")]
    if config.labels == "classes" and any(name in OBJECTIVES and OBJECTIVES[name].uses_labels for name in names):
        return True
    if config.start is None:
        return False
    if is_artifact(config.start):
        return bool(Artifact.load(config.start).manifest.training["labels_used"])
    return not (config.start / CHECKPOINT).exists() or labelled(load_extractor(config.start)[1])


def epochs(config: PretrainConfig) -> int:
    """Passes over training images behind an extractor, those of what it started from among them, as far as is known."""
    own = config.epochs * (config.rounds if config.labels == "clusters" else 1)
    if config.start is None:
        return own
    if is_artifact(config.start):
        return own + int(Artifact.load(config.start).manifest.training["epochs"])
    return own + epochs(load_extractor(config.start)[1]) if (config.start / CHECKPOINT).exists() else own


def load_extractor(folder: Path) -> tuple[inputs.Network, PretrainConfig]:
    """The extractor of a finished pretraining."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise data.DataError(f"{path} does not exist: run `python -m training pretrain --out {folder}` first.")
    state = checkpoint.load(path)
    if "extractor" not in state:
        raise data.DataError(f"{path} is not finished: run the same `pretrain` command again, it goes on.")
    # With the precision that was decided on, where it was to be timed.
    config = PretrainConfig(**{**state["config"], "precision": state["precision"]})
    extractor = inputs.network(config.shape)
    extractor.load_state_dict(state["extractor"])
    return extractor.eval(), config
