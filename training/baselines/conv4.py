"""Conv-4: the four-block network that the first papers on few-shot learning share, head included.

Vinyals et al., "Matching Networks", 2016, https://arxiv.org/abs/1606.04080: four times convolution, batch
normalisation, rectifier and a halving. The halving is by pooling (pytorch-maml) or by the stride of the convolution
(Finn et al. and Nichol et al. on Omniglot, four times cheaper at 28 pixels).

Batch normalisation keeps the statistics of the last batch that it saw in training mode, and nothing older. So the
questions can be answered with the statistics of the examples (inductive), or with their own (transductive: an answer
depends on what else is asked). Knows nothing of how it is trained.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Shrink = Literal["pool", "stride"]


class Conv4(nn.Sequential):
    """Images [n, channels, size, size] -> logits [n, way]. `size` is at least 16 with pooling."""

    def __init__(self, *, channels: int, size: int, way: int, width: int, shrink: Shrink):
        layers: list[nn.Module] = []
        for block in range(4):
            inputs = width if block else channels
            layers.append(nn.Conv2d(inputs, width, 3, 2 if shrink == "stride" else 1, 1))
            layers += [nn.BatchNorm2d(width, momentum=1.0), nn.ReLU()]
            if shrink == "pool":
                layers.append(nn.MaxPool2d(2))
            size = size // 2 if shrink == "pool" else (size + 1) // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * size * size, way))


def shown(pixels: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> float [n, C, H, W], ink 1 on paper 0, as the papers feed characters."""
    return 1 - torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
