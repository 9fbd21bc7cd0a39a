"""Episodic meta-training: one outer loop over any learner, on cached features.

    affine = learner.adapt(support)                     inner loop, differentiable
    loss = cross_entropy(query @ affine, answers)       on questions the inner loop never saw

With the gradient learner this loop is MAML, and first- or second-order makes no difference to its closed-form steps.
The other outer loop is Reptile: some steps on one episode, then a part of the way from the start to where they ended.
Each learner starts at a sensible classifier and is kept at the step that did best on held-out tasks, the start
included, so training cannot make it worse there. Resumes after a kill to the same values, bit for bit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models.episode import Support
from models.learners import LEARNERS, Learner, build
from training import checkpoint, data, evaluate, inputs, memory, pseudo
from training.config import MetatrainConfig, PretrainConfig
from training.episodes import Indices, Pool, frozen, varied
from training.pretrain import autocast, choose_device, generator, load_extractor
from training.reptile import interpolate

CHECKPOINT = "metatrain.safetensors"
HIDDEN, SMALL, STEPS = 128, 64, 10
INNER = 3  # steps on one episode when Reptile is the outer loop
# Remembered, not learned by gradient.
FIXED = {"basis", "spectrum", "slots"}


class Tasks:
    """Cached features with the pools that episodes are drawn from."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray | None,
        *,
        plain: int,
        others: tuple[Pool, ...] = (),
    ):
        """The first `plain` rows are what the covariance of a class is taken from; a negative label is none.

        `others` are pools beside that of the labels, where an image has more than one class.
        """
        self.plain = plain
        self.features = features
        self.labels = labels
        self.pool = Pool.of(labels, groups)
        self.pools = (self.pool, *others)

    def near(self) -> np.ndarray:
        """Similarity of classes by their means, [classes, classes]."""
        sums = np.zeros((len(self.pool.classes), self.features.shape[1]), np.float32)
        named = self.labels >= 0
        np.add.at(sums, self.labels[named], self.features[named])
        means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return np.asarray(means @ means.T)


@torch.no_grad()
def cached(
    extractor: inputs.Network, images: data.Images, config: MetatrainConfig, pretrained: PretrainConfig, *, seed: int
) -> Tasks:
    """Features of each image and of `views` augmentations of it.

    With labels, a class is a class, and all views of one image are one group; in pseudo-tasks, an image is a class. A
    cluster of images is a class as well, one of similar images as of less similar ones: fine and coarse.
    """
    if config.rotations:
        images = evaluate.turned(images)
    device = next(extractor.parameters()).device
    augment = inputs.augmentation(pretrained)
    extractor.eval()
    parts: list[list[Tensor]] = [[] for _ in range(config.views + 1)]
    for at in tqdm(range(0, len(images), 256), desc="features", mininterval=2):
        x = inputs.prepared(torch.from_numpy(images.pixels[at : at + 256]).to(device))
        for view in range(config.views + 1):
            shown = augment(x, pretrained.size, generator(seed, at * 64 + view)) if view else x
            with autocast(device, pretrained.precision):
                pooled = extractor.backbone(inputs.laid_out(shown))
            parts[view].append(extractor.normalise(pooled.float()).cpu())
    features = torch.cat([torch.cat(part) for part in parts]).numpy()
    number = np.tile(np.arange(len(images)), config.views + 1)
    if config.tasks == "pseudo":
        return Tasks(features, number, None, plain=len(features))
    count, views = len(images), config.views + 1
    if config.tasks == "labels":
        return Tasks(features, np.tile(images.labels, views), number, plain=count)
    fine, coarse = (
        np.tile(pseudo.clusters(features[:count], size, seed=seed), views) for size in (pseudo.FINE, pseudo.COARSE)
    )
    others = [Pool.of(coarse, number)]
    if config.tasks == "mixed":
        others.append(Pool.of(number))
    return Tasks(features, fine, number, plain=count, others=tuple(others))


def start(method: str, tasks: Tasks, config: MetatrainConfig) -> dict[str, np.ndarray]:
    """The arrays a learner starts from: all of them make it a plain classifier."""
    rng = np.random.default_rng([config.seed, len(method)])
    dim = tasks.features.shape[1]

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

    def number(value: float) -> np.ndarray:
        return np.array(value, np.float32)

    scale = number(np.log(10.0))
    if method == "prototype":
        return {"log_scale": scale}
    if method == "ridge":
        return {"log_scale": scale, "log_penalty": number(0.0)}
    if method == "gradient":
        return {"log_scale": scale, "log_steps": np.full(STEPS, np.log(0.5), np.float32)}
    named = np.flatnonzero(tasks.labels[: tasks.plain] >= 0)
    basis, spectrum = memory.within_class(tasks.features[named], tasks.labels[named])
    remembered = {
        "basis": basis,
        "spectrum": spectrum,
        "log_shrink": number(0.0),
        "log_scale": scale,
        "log_noise": number(np.log(5.0)),
    }
    if method == "whitened":
        return remembered
    return {
        **remembered,
        "slots": memory.centroids(tasks.features, config.slots, seed=config.seed),
        "project": normal(dim, SMALL) * np.float32(np.sqrt(dim / SMALL)),
        "ask": normal(HIDDEN, 2 * SMALL) * np.float32(0.1),
        "log_focus": np.array([1.0, 2.0], np.float32),
        "inputs": normal(4 * SMALL + 2, 4 * HIDDEN),
        "recur": normal(HIDDEN, 4 * HIDDEN),
        "offset": np.concatenate([np.ones(HIDDEN), np.zeros(3 * HIDDEN)]).astype(np.float32),
        "gates": np.zeros((HIDDEN, 5), np.float32),
        "free": np.zeros((HIDDEN, dim), np.float32),
    }


def held_out(tasks: Tasks, config: MetatrainConfig) -> list[Indices]:
    """Fixed tasks that decide which step is kept, of every pool alike."""
    shots = (1, min(5, config.max_shot))
    return [
        episode
        for pool in tasks.pools
        for most, count in ((5, 200), (20, 50))
        for shot in shots
        for episode in frozen(
            pool,
            way=min(most, len(pool.classes)),
            shot=shot,
            queries=config.queries,
            count=count // len(tasks.pools),
            seed=config.seed + 1,
        )
    ]


def score(method: str, arrays: dict[str, np.ndarray], tasks: Tasks, episodes: list[Indices]) -> float:
    return float(evaluate.run(build(method, arrays), tasks.features, episodes).mean())


def best_shrink(
    method: str, arrays: dict[str, np.ndarray], tasks: Tasks, episodes: list[Indices]
) -> dict[str, np.ndarray]:
    """The shrinkage of the remembered covariance, chosen on held-out tasks: training tasks would always want less."""
    choices = [{**arrays, "log_shrink": np.array(np.log(s), np.float32)} for s in (0.3, 1.0, 3.0, 6.0, 12.0)]
    return max(choices, key=lambda choice: score(method, choice, tasks, episodes))


class Training:
    """The state of one learner in training."""

    def __init__(self, method: str, arrays: dict[str, np.ndarray], config: MetatrainConfig, device: torch.device):
        self.method = method
        self.config = config
        self.device = device
        self.fixed = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays if name in FIXED}
        self.learned = {
            name: torch.from_numpy(np.array(arrays[name])).to(device).requires_grad_()
            for name in arrays
            if name not in FIXED and name != "log_shrink"
        }
        if "log_shrink" in arrays:
            self.fixed["log_shrink"] = torch.from_numpy(np.array(arrays["log_shrink"])).to(device)
        scalars = [value for value in self.learned.values() if value.ndim <= 1 and value.numel() <= STEPS]
        matrices = [value for value in self.learned.values() if not any(value is scalar for scalar in scalars)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": scalars, "lr": 10 * config.lr, "weight_decay": 0.0},
                {"params": matrices, "lr": config.lr, "weight_decay": 0.05},
            ],
            # What one task did to the optimizer should not push the next, so Reptile goes without momentum.
            betas=(0.0 if config.outer == "reptile" else 0.9, 0.999),
        )
        self.rates = [10 * config.lr, config.lr]
        self.step = 0
        self.best = {name: np.array(value) for name, value in arrays.items()}
        self.best_score = -1.0

    def learner(self) -> Learner:
        return LEARNERS[self.method](**{**self.fixed, **self.learned})

    def loss(self, features: Tensor, episode: Indices) -> Tensor:
        """Of the questions of one episode, to be differentiated through the adaptation."""
        support = Support(
            features[torch.from_numpy(episode.support)],
            torch.from_numpy(episode.labels).to(self.device),
            episode.way,
        )
        affine = self.learner().adapt(support)
        logits = features[torch.from_numpy(episode.query)] @ affine.weight.T + affine.bias
        return F.cross_entropy(logits, torch.from_numpy(episode.answers).to(self.device))

    def descend(self, loss: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.learned.values(), 1.0)
        self.optimizer.step()
        return loss.item()

    def advance(self, features: Tensor, episodes: list[Indices]) -> float:
        """One step on some episodes; returns their mean loss."""
        share = 1 - self.step / self.config.steps
        self.step += 1
        if self.config.outer == "reptile":

            def train(episode: Indices) -> float:
                losses = [self.descend(self.loss(features, episode)) for _ in range(INNER)]
                return losses[0]

            return interpolate(list(self.learned.values()), episodes, train, share)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        return self.descend(torch.stack([self.loss(features, episode) for episode in episodes]).mean())

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.detach().cpu().numpy().copy() for name, value in {**self.fixed, **self.learned}.items()}

    def check(self, tasks: Tasks, episodes: list[Indices]) -> float:
        """Accuracy on held-out tasks; keeps the arrays if they are the best so far."""
        arrays = self.arrays()
        value = score(self.method, arrays, tasks, episodes)
        if value > self.best_score:
            self.best, self.best_score = arrays, value
        return value

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "learned": dict(self.learned),
            "optimizer": self.optimizer.state_dict(),
            "best": {name: torch.from_numpy(np.array(value)) for name, value in self.best.items()},
            "best_score": self.best_score,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        with torch.no_grad():
            for name, value in state["learned"].items():
                self.learned[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = {name: value.numpy() for name, value in state["best"].items()}
        self.best_score = state["best_score"]


def main(config: MetatrainConfig) -> Path:
    """Trains the learners one after the other, or goes on; returns the path of the checkpoint."""
    if not set(config.learners.split(",")) <= set(LEARNERS):
        sys.exit(f"--learners: known learners are {', '.join(LEARNERS)}.")
    device = choose_device(config.device)
    extractor, pretrained = load_extractor(config.out)
    extractor.to(device)
    decoder = inputs.decoder(pretrained)
    limit = config.per_class or None
    tasks = cached(
        extractor, data.load(config.data, config.split, decoder, per_class=limit), config, pretrained, seed=config.seed
    )
    check_tasks = cached(
        extractor, data.load(config.data, "val", decoder, per_class=limit), config, pretrained, seed=config.seed + 1
    )
    return train(config, tasks, check_tasks, device)


def train(config: MetatrainConfig, tasks: Tasks, check_tasks: Tasks, device: torch.device) -> Path:
    """The same on features that are there already, by whatever extractor."""
    episodes = held_out(check_tasks, config)
    path = config.out / CHECKPOINT
    state: dict[str, Any] = {"config": config.model_dump(mode="json"), "learners": {}}
    if path.exists():
        state = checkpoint.load(path)
        free = {"minutes", "device", "checkpoint_s", "data", "out"}
        if MetatrainConfig(**state["config"]).model_dump(exclude=free) != config.model_dump(exclude=free):
            sys.exit(f"{path} was made with other settings; delete it to start again.")
    features = torch.from_numpy(tasks.features).to(device)
    near = None if config.tasks == "pseudo" else tasks.near()
    began = last = time.monotonic()
    with (config.out / "metatrain.jsonl").open("a") as log:
        for number, method in enumerate(config.learners.split(",")):
            arrays = start(method, tasks, config)
            if "log_shrink" in arrays:
                arrays = best_shrink(method, arrays, check_tasks, episodes)
            training = Training(method, arrays, config, device)
            if method in state["learners"]:
                training.restore(state["learners"][method])
            for _ in tqdm(
                range(training.step, config.steps),
                initial=training.step,
                total=config.steps,
                desc=method,
                mininterval=2,
            ):
                if training.step % config.check_steps == 0:
                    value = training.check(check_tasks, episodes)
                    log.write(json.dumps({"learner": method, "step": training.step, "check": round(value, 5)}) + "\n")
                    log.flush()
                pool = tasks.pools[training.step % len(tasks.pools)]
                drawn = varied(
                    pool,
                    config.seed * 100 + number,
                    training.step,
                    count=config.episodes,
                    max_way=config.max_way,
                    max_shot=config.max_shot,
                    queries=config.queries,
                    near=near if pool is tasks.pool else None,
                )
                loss = training.advance(features, list(drawn))
                if training.step % 20 == 0:
                    log.write(json.dumps({"learner": method, "step": training.step, "loss": round(loss, 5)}) + "\n")
                late = config.minutes > 0 and time.monotonic() - began > 60 * config.minutes
                if late or time.monotonic() - last > config.checkpoint_s:
                    state["learners"][method] = training.state()
                    checkpoint.save(path, state)
                    last = time.monotonic()
                if late:
                    print("Stopped; run the same command to go on.", file=sys.stderr)
                    return path
            training.check(check_tasks, episodes)
            state["learners"][method] = training.state()
            checkpoint.save(path, state)
    state["done"] = True
    checkpoint.save(path, state)
    return path


def load_learners(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The best arrays of each learner of a finished meta-training."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise data.DataError(f"{path} does not exist: run `python -m training metatrain --out {folder}` first.")
    state = checkpoint.load(path)
    if not state.get("done"):
        raise data.DataError(f"{path} is not finished: run the same `metatrain` command again, it goes on.")
    return {
        method: {name: value.numpy() for name, value in values["best"].items()}
        for method, values in state["learners"].items()
    }
