"""One pretraining on images, step by step: networks, objectives, optimizer, and all of its state.

Knows nothing of files but the weights that it starts from, nor of episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from models.resnet import SHAPES, ImageExtractor, ResNet
from training import data
from training.augment import AUGMENTATIONS, close, mixed
from training.config import PretrainConfig
from training.folders import DataError
from training.heldout import SHARE, HeldOut
from training.objective import Fixed, Learned, Uncertainty, Weighting, unchanged
from training.objectives import OBJECTIVES, Kept, Objective, Posed, View, rotated
from training.pretrained import starting
from training.stepping import (
    Stepper,
    autocast,
    choose_device,
    choose_precision,
    generator,
    learning_rate,
    optimizer,
    trial,
)


class Run(Stepper):
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
            begun = starting(config.start, self.pixels)
            if getattr(begun, "shape", None) != self.backbone.shape:
                raise DataError(f"--start: {config.start} is of another --shape than {config.shape}.")
            self.backbone.load_state_dict(begun.state_dict())
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
        self.optimizer = optimizer(self.network, config)
        self.step = 0
        self.precision = choose_precision(config.precision, self.device)
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

    def _weighting(self) -> Weighting:
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

    def take_step(self) -> dict[str, Tensor]:
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
