"""What a linear head learns of a new self-supervised task from ten images and ten steps, against all data.

For each extractor, and one of random weights: the features stay as they are, the head alone learns. Ten images give
their altered forms as examples, ten gradient steps from their means; all images give the score that the head reaches at
leisure. Both are asked about images of classes held out. Knows nothing of how the extractors were made.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.episode import Support
from models.head import Affine
from models.images import ImageDecoder
from models.learners.gradient import Gradient
from models.resnet import SHAPES, ImageExtractor, ResNet
from training import data, raw, rows
from training.config import PretextConfig
from training.intervals import interval
from training.pretexts import PRETEXTS, Pretext
from training.pretrained import load_extractor
from training.stepping import choose_device

RANDOM = "random"


@torch.no_grad()
def features(extractor: ImageExtractor, pixels: np.ndarray, task: Pretext, device: torch.device) -> np.ndarray:
    """uint8 [n, H, W, C] -> float32 [n, way, dim]: every image in all its altered forms."""
    parts = []
    for part in torch.from_numpy(pixels).tensor_split(max(1, len(pixels) // 64)):
        images = part.to(device).permute(0, 3, 1, 2).float() / 255
        forms = [extractor.normalise(extractor.backbone(task.alter(images, answer))) for answer in range(task.way)]
        parts.append(torch.stack(forms, dim=1).cpu())
    return torch.cat(parts).numpy()


def quick(known: np.ndarray, steps: int) -> Affine:
    """A head from a few images [n, way, dim], by that many gradient steps from the class means."""
    n, way, dim = known.shape
    support = Support(known.reshape(n * way, dim), np.tile(np.arange(way), n), way)
    # The start of the `gradient` learner before its outer loop: no step size is fitted to any of these tasks.
    return Gradient(np.array(np.log(10.0), np.float32), np.full(steps, np.log(0.5), np.float32)).adapt(support)


def thorough(known: np.ndarray) -> Affine:
    """A head from many images [n, way, dim]: logistic regression to the end, hardly held back."""
    n, way, dim = known.shape
    x, y = torch.from_numpy(known.reshape(n * way, dim)), torch.arange(way).repeat(n)
    weight = torch.zeros(way, dim, requires_grad=True)
    bias = torch.zeros(way, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + 1e-6 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Affine(weight.detach().numpy(), bias.detach().numpy())


def accuracy(head: Affine, asked: np.ndarray) -> float:
    """Share of the forms [n, way, dim] whose answer is found."""
    return float(((asked @ head.weight.T + head.bias).argmax(axis=2) == np.arange(asked.shape[1])).mean())


def main(config: PretextConfig) -> list[dict[str, Any]]:
    """Measures each extractor on each task, adds a row for each to the results, if any, and prints the table."""
    device = choose_device(config.device)
    folders = [part.partition("=")[::2] for part in config.extractors.split(",")]
    loaded = {name: load_extractor(Path(folder)) for name, folder in folders}
    first = next(iter(loaded.values()))[1]
    if any((trained.shape, trained.size) != (first.shape, first.size) for _, trained in loaded.values()):
        sys.exit("--extractors must be of one shape and size, for one of random weights is compared with all of them.")
    torch.manual_seed(config.seed)
    extractors = {RANDOM: ImageExtractor(ResNet(SHAPES[first.shape])).eval()}
    for name, (extractor, _) in loaded.items():
        if not isinstance(extractor, ImageExtractor):
            sys.exit(f"--extractors: {name} is of texts.")
        extractors[name] = extractor
    objectives = {name: trained.objectives for name, (_, trained) in loaded.items()}
    decoder = ImageDecoder(first.size, first.size, SHAPES[first.shape].channels)
    rng = np.random.default_rng(config.seed)
    known = _some(data.load(config.data, "train", decoder, per_class=config.per_class or None), config.full, rng)
    asked = _some(data.load(config.data, config.split, decoder), config.asked, rng)
    draws = [rng.choice(len(known), config.images, replace=False) for _ in range(config.draws)]
    found = []
    for name, extractor in extractors.items():
        extractor.to(device)
        for task_name, task in PRETEXTS.items():
            began = time.monotonic()
            everything, questions = (features(extractor, pixels, task, device) for pixels in (known, asked))
            full = accuracy(thorough(everything), questions)
            few = np.array([accuracy(quick(everything[draw], config.steps), questions) for draw in draws])
            chance = 1 / task.way
            found.append(
                {
                    "experiment": "pretext",
                    "data": config.data.name,
                    "split": config.split,
                    "method": name,
                    "objectives": objectives.get(name, ""),
                    "task": task_name,
                    "way": task.way,
                    "shot": config.images,
                    "steps": config.steps,
                    "accuracy": round(100 * float(few.mean()), 2),
                    "interval": round(100 * interval(few), 2),
                    "episodes": len(few),
                    "full": round(100 * full, 2),
                    "full_images": len(known),
                    "asked_images": len(asked),
                    "ratio": round(100 * float(few.mean()) / full, 2),
                    "chance": round(100 * chance, 2),
                    # None where even all images taught nothing.
                    "ratio_above_chance": round(100 * (float(few.mean()) - chance) / (full - chance), 2)
                    if full > chance
                    else None,
                    "seed": config.seed,
                    "labels": "none",
                    "seconds": round(time.monotonic() - began, 1),
                    "command": raw.command("pretext", config),
                }
            )
            if config.results:
                rows.append(config.results, found[-1:])
    print(table(found))
    return found


def _some(images: data.Images, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most so many of the pixels, drawn evenly."""
    return images.pixels[rng.permutation(len(images))[:count]]


def table(found: list[dict[str, Any]]) -> str:
    """Rows as Markdown. Above chance as well, for a head that learned nothing from all data is easily equalled."""
    lines = [
        "| task | extractor | few images | all images | few / all | above chance | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: str(row["task"])):
        above = "-" if row["ratio_above_chance"] is None else f"{row['ratio_above_chance']:.1f}"
        lines.append(
            f"| {row['task']} | {row['method']} | {row['accuracy']:.2f} ± {row['interval']:.2f} | {row['full']:.2f} "
            f"| {row['ratio']:.1f} | {above} | {row['chance']:.1f} |"
        )
    return "\n".join(lines)
