"""A small trunk for texts: bytes in, features out, its embedding and its feature normalisation inside the module.

Kalchbrenner et al., "Neural Machine Translation in Linear Time", 2016, https://arxiv.org/abs/1610.10099:
convolutions that see only what came before, each layer reaching twice as far back as the one below, predict the next
byte of a text at every place at once. What a layer holds at a place is therefore a summary of what stands before it.
The features of a text are the means over its places of what every layer holds: the lower ones know which bytes and
short runs of bytes it has, the upper ones what they make of them.

Knows nothing of training, files or runtimes. Needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the graph of a trunk; written into the manifest of an artifact."""

    width: int = 64  # channels of a place
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    kernel: int = 3

    @property
    def dim(self) -> int:
        return self.width * (1 + len(self.dilations))

    @property
    def reach(self) -> int:
        """How many bytes a place sees, itself included."""
        return 1 + sum(self.dilations) * (self.kernel - 1)


SHAPES: dict[str, Shape] = {
    "bytes": Shape(),
    "small-bytes": Shape(width=32, dilations=(1, 2, 4)),
    "tiny-bytes": Shape(width=16, dilations=(1, 2)),
}


class Layer(nn.Module):
    """A causal dilated convolution, a mix of its channels, and a shortcut; starts as the identity."""

    def __init__(self, width: int, kernel: int, dilation: int):
        super().__init__()
        self.back = (kernel - 1) * dilation
        self.conv = nn.Conv1d(width, width, kernel, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mix(F.relu(self.conv(F.pad(F.relu(x), (self.back, 0)))))
        return out


class ByteNet(nn.Module):
    """Texts as uint8 [n, length], zeros behind their ends -> pooled features [n, dim], not negative."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(BYTES, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.kernel, dilation) for dilation in shape.dilations)

    def forward(self, texts: Tensor) -> Tensor:
        return self.pool(self.places(texts), texts)

    def places(self, texts: Tensor) -> list[Tensor]:
        """What each layer holds at each place, [n, width, length], not negative: of its byte and those before it."""
        x = self.embed(texts.long()).transpose(1, 2)
        held = [F.relu(x)]
        for layer in self.layers:
            x = layer(x)
            held.append(F.relu(x))
        return held

    def pool(self, places: list[Tensor], texts: Tensor) -> Tensor:
        """The means over the places of each text, layer after layer, [n, dim]."""
        there = (texts != 0).to(places[0].dtype)[:, None]
        many = there.sum(dim=2).clamp(min=1.0)
        return torch.cat([(held * there).sum(dim=2) / many for held in places], dim=1)


class TextExtractor(nn.Module):
    """uint8 [n, length] -> unit-length float32 features [n, dim]: the graph that an artifact holds.

    Normalised as the features of images are: see `ImageExtractor` in models/resnet.py.
    """

    centre: Tensor

    def __init__(self, backbone: ByteNet, centre: Tensor | None = None):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("centre", torch.zeros(backbone.shape.dim) if centre is None else centre)

    def forward(self, texts: Tensor) -> Tensor:
        return self.normalise(self.backbone(texts))

    def normalise(self, pooled: Tensor) -> Tensor:
        """Pooled features [n, dim] -> unit-length features [n, dim]."""
        x = torch.sqrt(pooled + 1e-6) - self.centre
        return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-6)
