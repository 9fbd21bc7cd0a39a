"""Momentum: an image is told from those of many batches before, as a slow copy of the network saw them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import ResNet
from training.objectives.question import View, projector


class Momentum(nn.Module):
    """Two views of one image are each other's answer among a queue of earlier images, and that to details of it.

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (MoCo), 2019,
    https://arxiv.org/abs/1911.05722: the keys come from a copy of backbone and projector that follows them slowly, so
    that those in the queue stay comparable. Both views ask and both answer (Chen, Xie and He, "An Empirical Study of
    Training Self-Supervised Vision Transformers", 2021, https://arxiv.org/abs/2104.02057). The copy normalises by
    statistics that follow as its weights do (Cai et al., "Exponential Moving Average Normalization", 2021,
    https://arxiv.org/abs/2101.08482): a batch's own would tell question and answer belong together.
    """

    views = 2
    uses_labels = False
    queue: Tensor
    at: Tensor

    def __init__(
        self,
        backbone: ResNet,
        classes: int,
        *,
        hidden: int = 512,
        out: int = 128,
        temperature: float = 0.2,
        slots: int = 8192,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.temperature, self.decay = temperature, decay
        self.project = projector(backbone.shape.dim, hidden, out)
        self.slow = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "project": copy.deepcopy(self.project)})
        self.slow.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(slots, out), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))  # where the next keys go
        self._keys: Tensor | None = None  # of the loss asked for last, until `keep`

    def train(self, mode: bool = True) -> Momentum:
        super().train(mode)
        self.slow.eval()
        return self

    def forward(self, views: list[View], labels: Tensor) -> Tensor:
        asked = F.normalize(self.project(torch.cat([view.pooled for view in views])).float(), dim=1)
        with torch.no_grad():
            images = torch.cat([view.images for view in views[:2]])
            pooled = self.slow["backbone"](images.contiguous(memory_format=torch.channels_last))
            keys = F.normalize(self.slow["project"](pooled).float(), dim=1)
        self._keys = keys
        # A copy, for `keep` writes into the queue.
        others = torch.logsumexp(asked @ self.queue.clone().T / self.temperature, dim=1)
        first, second = keys.chunk(2)
        losses = []
        for number, (own, rest) in enumerate(
            zip(torch.split(asked, len(first)), torch.split(others, len(first)), strict=True)
        ):
            # A view is told by the other one; a detail by both.
            for answer in (second,) if number == 0 else (first,) if number == 1 else (first, second):
                score = (own * answer).sum(dim=1) / self.temperature
                losses.append((torch.logaddexp(score, rest) - score).mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def keep(self, backbone: ResNet) -> None:
        for slow, fast in ((self.slow["backbone"], backbone), (self.slow["project"], self.project)):
            state = fast.state_dict()
            follow = {name: value for name, value in slow.state_dict().items() if value.is_floating_point()}
            torch._foreach_lerp_(list(follow.values()), [state[name] for name in follow], 1 - self.decay)
        if self._keys is None:
            return
        # One view of each image is enough: two of one image are hardly two negatives.
        keys = self._keys[: min(len(self._keys) // 2, len(self.queue))]
        places = (self.at + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.at.copy_((self.at + len(keys)) % len(self.queue))
        self._keys = None
