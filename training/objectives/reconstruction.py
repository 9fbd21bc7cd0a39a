"""Reconstruction: what stood in the blocks of an image that were masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import ResNet
from training.objectives.question import View

SIDE = 8  # blocks in a row and in a column


class Reconstruction(nn.Module):
    """Paints the masked blocks anew, from the last maps.

    Pathak et al., "Context Encoders: Feature Learning by Inpainting", 2016, https://arxiv.org/abs/1604.07379, and
    He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, https://arxiv.org/abs/2111.06377: 50 to 60 %
    of the blocks are hidden, and what is asked for is each block's pixels less their mean, over their spread, so that
    shape counts and brightness does not. The decoder is three up-convolutions, too weak to see by itself.
    """

    views = 0
    uses_labels = False
    share = 0.25

    def __init__(self, backbone: ResNet, classes: int, *, least: float = 0.5, most: float = 0.6) -> None:
        super().__init__()
        self.least, self.most = least, most
        layers: list[nn.Module] = []
        inputs = backbone.shape.dim
        for outputs in (inputs // 2, inputs // 4, inputs // 8):
            up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            layers += [up, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.decode = nn.Sequential(*layers, nn.Conv2d(inputs, backbone.shape.channels, 3, 1, 1))

    def pose(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masked images, grey where nothing is to be seen; answers [m, C + 1, H, W]: what was there, and the mask."""
        m = len(images)
        shares = self.least + (self.most - self.least) * torch.rand(m, 1, generator=rng)
        counts = (shares * SIDE * SIDE).round()
        ranks = torch.rand(m, SIDE * SIDE, generator=rng).argsort(dim=1).argsort(dim=1)
        hidden = (ranks < counts).float().reshape(m, 1, SIDE, SIDE).to(images.device)
        mask = F.interpolate(hidden, size=images.shape[2:], mode="nearest")
        return images * (1 - mask) + 0.5 * mask, torch.cat([images, mask], dim=1)

    def forward(self, views: list[View], answers: Tensor) -> Tensor:
        pixels, mask = answers[:, :-1], answers[:, -1:]
        size = pixels.shape[2:]
        painted = F.interpolate(self.decode(views[0].maps).float(), size=size, mode="bilinear", align_corners=False)
        mean = _over_blocks(pixels.mean(dim=1, keepdim=True), size)
        spread = (_over_blocks(pixels.square().mean(dim=1, keepdim=True), size) - mean.square()).clamp(min=0).sqrt()
        error = (painted - (pixels - mean) / (spread + 0.05)).square().mean(dim=1, keepdim=True)
        return (error * mask).sum() / mask.sum()


def _over_blocks(x: Tensor, size: torch.Size) -> Tensor:
    """The mean of each block at each of its pixels, [m, 1, H, W] -> [m, 1, H, W]."""
    return F.interpolate(F.adaptive_avg_pool2d(x, SIDE), size=size, mode="nearest")
