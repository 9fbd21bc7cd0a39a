"""ResNet with its input scaling and its feature normalisation inside the module.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, https://arxiv.org/abs/1512.03385:
blocks learn a residual that is added to their input. The named shapes differ from the paper's where small images ask
for it: a stem of 5x5 or 3x3 instead of 7x7, and a last stage that keeps its resolution.

Knows nothing of training, files or runtimes. Needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the graph of a ResNet; written into the manifest of an artifact."""

    width: int = 64  # channels of the first stage; the features have 8 x width
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_pool: bool = True
    channels: int = 3

    @property
    def dim(self) -> int:
        return int(self.width * 2 ** (len(self.blocks) - 1))


SHAPES: dict[str, Shape] = {
    "resnet18": Shape(stem_kernel=5, strides=(1, 2, 2, 1)),
    "resnet10": Shape(width=32, blocks=(1, 1, 1, 1), stem_kernel=3, stem_pool=False),
    "resnet10-grey": Shape(width=32, blocks=(1, 1, 1, 1), stem_kernel=3, stem_pool=False, channels=1),
    "resnet10-small-grey": Shape(
        width=8, blocks=(1, 1, 1, 1), strides=(1, 2, 2, 1), stem_kernel=3, stem_pool=False, channels=1
    ),
    "tiny": Shape(width=4, blocks=(1, 1), strides=(1, 2), stem_kernel=3, stem_pool=False),
    "tiny-grey": Shape(width=4, blocks=(1, 1), strides=(1, 2), stem_kernel=3, stem_pool=False, channels=1),
}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Images in [0, 1], float [n, C, H, W] -> pooled maps [n, dim], not negative.

    `mean` and `scale` standardise the input: (x - mean) * scale, per channel.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.full((shape.channels, 1, 1), 0.5))
        self.register_buffer("scale", torch.full((shape.channels, 1, 1), 4.0))
        width = shape.width
        self.conv = nn.Conv2d(
            shape.channels, width, shape.stem_kernel, shape.stem_stride, shape.stem_kernel // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if shape.stem_pool else nn.Identity()
        stages: list[nn.Module] = []
        inputs = width
        for stage, (blocks, stride) in enumerate(zip(shape.blocks, shape.strides, strict=True)):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(Block(inputs, outputs, stride if block == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, x: Tensor) -> Tensor:
        """The last maps before they are pooled, [n, C, H, W] -> [n, dim, h, w]: they still say what is where."""
        x = (x - self.mean) * self.scale
        x = self.pool(F.relu(self.bn(self.conv(x))))
        maps: Tensor = self.stages(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean(dim=(2, 3))


class ImageExtractor(nn.Module):
    """uint8 [n, H, W, C] -> unit-length float32 features [n, dim]: the graph that an artifact holds.

    The square root tames the few channels that fire strongly, and subtracting `centre`, the mean over the training
    images, takes away what all images share (Wang et al., "SimpleShot", 2019, https://arxiv.org/abs/1911.04623, and
    the power transform of Hu et al., 2020, https://arxiv.org/abs/2006.03806).
    """

    centre: Tensor

    def __init__(self, backbone: ResNet, centre: Tensor | None = None):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("centre", torch.zeros(backbone.shape.dim) if centre is None else centre)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.centre.dtype) / 255.0
        return self.normalise(self.backbone(x))

    def normalise(self, pooled: Tensor) -> Tensor:
        """Pooled maps [n, dim] -> unit-length features [n, dim]."""
        x = torch.sqrt(pooled + 1e-6) - self.centre
        return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-6)


def fold(backbone: ResNet) -> ResNet:
    """Puts each batch normalisation into its convolution, in place: the form in which weights are exported."""
    fuse: Any = torch.nn.utils.fusion.fuse_conv_bn_eval
    backbone.eval()
    parts: list[Any] = [backbone, *backbone.stages]
    for part in parts:
        for name in ("", "1", "2"):
            if hasattr(part, f"conv{name}"):
                setattr(part, f"conv{name}", fuse(getattr(part, f"conv{name}"), getattr(part, f"bn{name}")))
                setattr(part, f"bn{name}", nn.Identity())
        if isinstance(getattr(part, "shortcut", None), nn.Sequential):
            part.shortcut = nn.Sequential(fuse(*part.shortcut))
    return backbone
