"""Episodic meta-training: one outer loop over any learner, on cached features.

    affine = learner.adapt(support)                     inner loop, differentiable
    loss = cross_entropy(query @ affine, answers)       on questions the inner loop never saw

With the gradient learner this is Meta-SGD of a head: step sizes are learned, and the scale of the prototypes that it
starts from, through all inner steps (second order); no start is learned, for it cancels (models/learners/gradient.py).
The other outer loop is Reptile: some steps on one episode, then a part of the way from the start to where they ended.
Each learner starts at a sensible classifier and is kept at the step that did best on held-out tasks, the start
included, so training cannot make it worse there. Resumes after a kill to the same values, bit for bit. Where episodes
come from is said in training/practice.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from models.episode import Support
from models.extractor import Decoder
from models.learners import LEARNERS, Learner, build
from models.learners.lstm import EACH, NO_SCATTER, SEEN, SHARED
from training import checkpoint, data, evaluate, inputs, memory, rows, splits
from training.config import MetatrainConfig
from training.episodes import Indices, frozen, varied
from training.folders import DataError
from training.practice import Source, Tasks, cached, practice, slots_of
from training.pretrained import digest, load_extractor
from training.reptile import interpolate
from training.stepping import choose_device
from training.stopping import STATUS, Stop

CHECKPOINT = "metatrain.safetensors"
HIDDEN, STEPS = 32, 10
INNER = 3  # steps on one episode when Reptile is the outer loop
LENSES = (0.1, 1.0, 5.0, 30.0)
# Remembered, not learned by gradient.
# That the scatter of a task counts as it is measured: training classes, whose examples the extractor has drawn
# together, would have it count for little, and it is there for tasks of other kinds.
FIXED = {"basis", "spectrum", "slots", "log_own"}
# What an LSTM knows that is of no extractor: it may go on to another.
CELL = ("log_lenses", "log_focus", "inputs", "recur", "offset", "shared", "each")


def start(method: str, tasks: Tasks, config: MetatrainConfig) -> dict[str, np.ndarray]:
    """The arrays a learner starts from: all of them make it a plain classifier. What is remembered is of `tasks`."""
    rng = np.random.default_rng([config.seed, len(method)])

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
    if method == "discriminant":
        return {**remembered, "log_own": number(0.0)}
    slots, _ = slots_of(tasks, config.slots, seed=config.seed)
    arrays = {
        **remembered,
        "log_own": number(0.0),
        "slots": slots,
        "log_lenses": np.log(np.array(LENSES, np.float32)),
        "log_focus": number(np.log(20.0)),
        "inputs": normal(2 * SEEN, 4 * HIDDEN),
        "recur": normal(HIDDEN, 4 * HIDDEN),
        "offset": np.concatenate([np.ones(HIDDEN), np.zeros(3 * HIDDEN)]).astype(np.float32),
        "shared": np.zeros((HIDDEN, SHARED), np.float32),
        "each": np.zeros((HIDDEN, EACH), np.float32),
    }
    if config.cell is None:
        return arrays
    learned = load_learners(config.cell).get("lstm", {})
    if not set(CELL) <= set(learned):
        raise DataError(f"--cell: {config.cell} holds no cell of an LSTM such as this version has.")
    return {**arrays, **{name: learned[name] for name in CELL}}


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
            spread=True,
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

    def learner(self, keep: np.ndarray | None = None) -> Learner:
        """The learner as it is now, remembering all slots or those to `keep`."""
        arrays = {**self.fixed, **self.learned}
        if self.method == "lstm":
            # The cell would learn of training classes to undo what their scatter does; it is checked with it.
            arrays["log_own"] = torch.full_like(arrays["log_own"], NO_SCATTER)
        if keep is not None and "slots" in arrays:
            arrays["slots"] = arrays["slots"][torch.from_numpy(keep).to(self.device)]
        return LEARNERS[self.method](**arrays)

    def loss(self, features: Tensor, episode: Indices, kept: np.ndarray | None = None) -> Tensor:
        """Of the questions of one episode, to be differentiated through the adaptation. `kept`: which slots of the
        memory [slots] are there: what it holds of the very classes of a task would be the answer."""
        support = Support(
            features[torch.from_numpy(episode.support)],
            torch.from_numpy(episode.labels).to(self.device),
            episode.way,
        )
        affine = self.learner(kept).adapt(support)
        logits = features[torch.from_numpy(episode.query)] @ affine.weight.T + affine.bias
        return F.cross_entropy(logits, torch.from_numpy(episode.answers).to(self.device))

    def descend(self, loss: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.learned.values(), 1.0)
        self.optimizer.step()
        return loss.item()

    def advance(self, features: Tensor, episodes: list[Indices], kept: Sequence[np.ndarray] | None = None) -> float:
        """One step on some episodes, each with the slots in `kept` (see `loss`); returns their mean loss."""
        share = 1 - self.step / self.config.steps
        self.step += 1
        if self.config.outer == "reptile":

            def train(number: int) -> float:
                slots = None if kept is None else kept[number]
                losses = [self.descend(self.loss(features, episodes[number], slots)) for _ in range(INNER)]
                return losses[0]

            return interpolate(list(self.learned.values()), range(len(episodes)), train, share)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        slots: list[np.ndarray | None] = list(kept) if kept else [None] * len(episodes)
        losses = [self.loss(features, episode, some) for episode, some in zip(episodes, slots, strict=True)]
        return self.descend(torch.stack(losses).mean())

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
    known = digest(extractor)
    with checkpoint.alone(config.out):
        fits(config.out, known)
        extractor.to(device)
        decoder = inputs.decoder(pretrained)
        told = {"extractor": known, **_told(config, decoder)}
        remembered, sources = practice(extractor, decoder, config, pretrained)
        check_images = data.load(config.data, config.check_split, decoder, per_class=config.per_class or None)
        check_tasks = cached(extractor, check_images, config, pretrained, seed=config.seed + 1)
        return train(config, remembered, sources, check_tasks, device, told)


def fits(folder: Path, extractor: str) -> None:
    """Raises DataError where the learners in a folder, if there are any, were trained on another extractor.

    `extractor`: the digest of the one that is there now. Checkpoints from before it was kept do not tell.
    """
    path = folder / CHECKPOINT
    if path.exists() and checkpoint.load(path).get("extractor", extractor) != extractor:
        raise DataError(
            f"{path} holds learners of another extractor than {folder} has now: delete it and run "
            f"`python -m training metatrain --out {folder}` again."
        )


def _told(config: MetatrainConfig, decoder: Decoder) -> dict[str, Any]:
    """The census of what is learned from, in all folders, and of the classes that decide which step is kept.

    And the digests of the classes learned from.
    """
    folders = [Path(name) for name in config.practise.split(",") if name]
    parts = [(config.data, config.split), *((folder, "train") for folder in folders), (config.data, config.check_split)]
    found = [data.listed(folder, split, decoder, per_class=config.per_class or None) for folder, split in parts]
    counts = {f"{place} {name}": count for place, part in enumerate(found) for name, count in part.items()}
    return {
        "trained_on": data.census(counts),
        "classes": splits.digests(name for part in found[:-1] for name in part),
    }


def train(
    config: MetatrainConfig,
    remembered: Tasks,
    sources: Sequence[Source],
    check_tasks: Tasks,
    device: torch.device,
    known: Mapping[str, Any] | None = None,
) -> Path:
    """The same on features that are there already, by whatever extractor.

    `known`: what the checkpoint is to say of extractor and data, and what one that is there is held to.
    """
    for pool in (*(pool for source in sources for pool in source.tasks.pools), *check_tasks.pools):
        if len(pool.classes) < 2:
            raise DataError(
                f"{config.data} gives one class to learn from or one to validate on, and a task has two or more. "
                "Where no image is sorted, --tasks pseudo makes each a class."
            )
    episodes = held_out(check_tasks, config)
    path = config.out / CHECKPOINT
    state: dict[str, Any] = {"config": config.model_dump(mode="json"), "learners": {}, **(known or {})}
    if path.exists():
        state = checkpoint.load(path)
        free = {"minutes", "device", "checkpoint_s", "data", "out"}
        if MetatrainConfig(**state["config"]).model_dump(exclude=free) != config.model_dump(exclude=free):
            sys.exit(f"{path} was made with other settings; delete it to start again.")
        data.unchanged(state, (known or {}).get("trained_on", state.get("trained_on")), path)
    rows.cut(config.out / "metatrain.jsonl", lambda line: _stays(line, state["learners"]))
    turns = []
    for source in sources:
        features = torch.from_numpy(source.tasks.features).to(device)
        near = None if config.tasks == "pseudo" else source.tasks.near()
        for pool in source.tasks.pools:
            turns.append((source, features, pool, near if pool is source.tasks.pool else None))
    began = last = time.monotonic()
    # Each line is out before the checkpoint that counts on it: what a kill took from a buffer nobody writes again.
    with Stop() as stop, (config.out / "metatrain.jsonl").open("a", buffering=1) as log:
        for number, method in enumerate(config.learners.split(",")):
            arrays = start(method, remembered, config)
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
                source, features, pool, near = turns[training.step % len(turns)]
                drawn = list(
                    varied(
                        pool,
                        config.seed * 100 + number,
                        training.step,
                        count=config.episodes,
                        max_way=config.max_way,
                        max_shot=config.max_shot,
                        queries=config.queries,
                        near=near,
                    )
                )
                loss = training.advance(features, drawn, source.kept(drawn))
                if training.step % 20 == 0:
                    log.write(json.dumps({"learner": method, "step": training.step, "loss": round(loss, 5)}) + "\n")
                late = stop.asked or (config.minutes > 0 and time.monotonic() - began > 60 * config.minutes)
                if late or time.monotonic() - last > config.checkpoint_s:
                    state["learners"][method] = training.state()
                    checkpoint.save(path, state)
                    last = time.monotonic()
                if late:
                    print("Stopped; run the same command to go on.", file=sys.stderr)
                    if stop.asked:
                        sys.exit(STATUS)
                    return path
            training.check(check_tasks, episodes)
            state["learners"][method] = training.state()
            checkpoint.save(path, state)
    state["done"] = True
    checkpoint.save(path, state)
    return path


def _stays(line: Mapping[str, Any], learners: Mapping[str, Any]) -> bool:
    """Whether a line of the log is of a step before the checkpoint; a step's look comes before the step."""
    reached = learners.get(line.get("learner", ""), {"step": 0})["step"]
    step = line.get("step", math.inf)
    return bool(step < reached if "check" in line else step <= reached)


def load_learners(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The best arrays of each learner of a finished meta-training."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise DataError(f"{path} does not exist: run `python -m training metatrain --out {folder}` first.")
    state = checkpoint.load(path)
    if not state.get("done"):
        raise DataError(f"{path} is not finished: run the same `metatrain` command again, it goes on.")
    return {
        method: {name: value.numpy() for name, value in values["best"].items()}
        for method, values in state["learners"].items()
    }
