"""Pretraining on texts: the trunk predicts the next byte of a text at every place, and resumes after any kill.

The one self-supervised task that asks nothing but the text itself. Objectives that read pooled features alone may stand
beside it: for `contrastive`, two stretches of one text are each other's answer. The loop, the checkpoints and the log
are those of training/pretrain.py; what differs is the batch and what is asked of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bytenet import BYTES, SHAPES, ByteNet, TextExtractor
from training import data, inputs
from training.config import PretrainConfig
from training.folders import DataError
from training.objective import Fixed
from training.objectives import POOLED, View
from training.pretrained import load_extractor
from training.stepping import Stepper, autocast, choose_device, generator, learning_rate, optimizer


class Language(nn.Module):
    """Which byte comes next, from what the last layer holds at a place (cross-entropy, in nats a byte)."""

    views = 1
    uses_labels = False

    def __init__(self, width: int):
        super().__init__()
        self.predict = nn.Linear(width, BYTES)

    def forward(self, held: Tensor, texts: Tensor) -> Tensor:
        """What is held at each place [n, width, length], and the texts [n, length], zeros behind their ends."""
        logits = self.predict(held[:, :, :-1].transpose(1, 2)).float()
        return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten().long(), ignore_index=0)


LANGUAGE = "language"
OBJECTIVES = (LANGUAGE, *POOLED)


class Run(Stepper):
    """All state of one pretraining: networks, optimizer, step."""

    def __init__(self, config: PretrainConfig, texts: data.Images):
        self.config = config
        self.device = choose_device(config.device)
        self.texts = torch.from_numpy(texts.pixels)
        self.labels = torch.from_numpy(texts.labels)
        torch.manual_seed(config.seed)
        self.backbone = ByteNet(SHAPES[config.shape])
        if config.start is not None:
            start, before = load_extractor(config.start)
            if before.shape != config.shape:
                raise DataError(f"--start: {config.start} is of --shape {before.shape}, not {config.shape}.")
            self.backbone.load_state_dict(start.backbone.state_dict())
        weights = dict(part.split("=") for part in config.objectives.split(","))
        self.weights = {name: float(weight) for name, weight in weights.items()}
        classes = len(texts.classes)
        made: dict[str, nn.Module] = {
            name: Language(self.backbone.shape.width) if name == LANGUAGE else POOLED[name](self.backbone, classes)
            for name in self.weights
        }
        self.heads = nn.ModuleDict(made)
        self.network = nn.ModuleDict({"backbone": self.backbone, "heads": self.heads}).to(self.device)
        self.views = max([1, *(POOLED[name].views for name in self.weights if name in POOLED)])
        self.weighting = Fixed(self.weights)
        self.optimizer = optimizer(self.network, config)
        self.step = 0
        # A trunk of this size is cheap in any precision.
        self.precision = "float32" if config.precision == "auto" else config.precision
        self.augment = inputs.augmentation(config)
        self.steps_per_epoch = max(1, len(self.labels) // config.batch)
        self.steps = self.steps_per_epoch * config.epochs
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Texts uint8 [n, length] and their labels [n], both on the device."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.labels), generator=generator(self.config.seed, -1 - epoch))
            self._order = (epoch, order)
        chosen = self._order[1][at * self.config.batch : (at + 1) * self.config.batch]
        return self.texts[chosen].to(self.device), self.labels[chosen].to(self.device)

    def take_step(self) -> dict[str, Tensor]:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.config)
        texts, labels = self.batch(self.step)
        rng = generator(self.config.seed, self.step)
        shown = [texts] if self.views == 1 else [self.augment(texts, texts.shape[1], rng) for _ in range(self.views)]
        asked = torch.cat(shown)
        with autocast(self.device, self.precision):
            places = self.backbone.places(asked)
            parts = (asked, places[-1], self.backbone.pool(places, asked))
            views = [View(*part) for part in zip(*(torch.split(part, len(texts)) for part in parts), strict=True)]
            losses = {
                name: head(places[-1], asked) if name == LANGUAGE else head(views, labels)
                for name, head in self.heads.items()
            }
        self.optimizer.zero_grad(set_to_none=True)
        self.weighting.total(losses).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def extractor(self) -> TextExtractor:
        """The extractor as it is now, with the centre of the training texts (at most 10,000 of them)."""
        extractor = TextExtractor(self.backbone).eval()
        picked = self.texts[:: max(1, len(self.texts) // 10_000)]
        roots = [torch.sqrt(self.backbone(part.to(self.device)) + 1e-6).sum(dim=0) for part in torch.split(picked, 256)]
        extractor.centre = torch.stack(roots).sum(dim=0) / len(picked)
        return extractor.to(self.device)
