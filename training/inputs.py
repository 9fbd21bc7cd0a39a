"""What images and texts have each of their own in training: decoder, network, augmentation, and how a batch is shown.

The kind follows from the name of the network's shape, so that a checkpoint knows it; whoever else trains, measures or
exports asks here and does not ask which kind it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models import bytenet, resnet
from models.bytenet import ByteNet, TextExtractor
from models.extractor import Decoder
from models.images import ImageDecoder
from models.resnet import ImageExtractor, ResNet
from models.text import TextDecoder
from training.augment import AUGMENTATIONS, Photos, Stretches
from training.config import PretrainConfig
from training.folders import DataError

Network = ImageExtractor | TextExtractor
Shown = Callable[[Tensor, int, torch.Generator], Tensor]  # a batch, its size, random numbers -> other views of it
SHAPES = (*resnet.SHAPES, *bytenet.SHAPES)


def kind(shape: str) -> str:
    """ "image" or "text", of a shape by name."""
    return "text" if shape in bytenet.SHAPES else "image"


def described(config: PretrainConfig) -> dict[str, Any]:
    """What the manifest says of the input."""
    if kind(config.shape) == "text":
        return {"kind": "text", "length": config.size}
    channels = resnet.SHAPES[config.shape].channels
    return {"kind": "image", "height": config.size, "width": config.size, "channels": channels}


def decoder(config: PretrainConfig) -> Decoder:
    if kind(config.shape) == "text":
        return TextDecoder(config.size)
    return ImageDecoder(config.size, config.size, resnet.SHAPES[config.shape].channels)


def network(shape: str) -> Network:
    """An extractor with weights as they are before training."""
    if kind(shape) == "text":
        return TextExtractor(ByteNet(bytenet.SHAPES[shape]))
    return ImageExtractor(ResNet(resnet.SHAPES[shape]))


def augmentation(config: PretrainConfig) -> Shown:
    return Stretches() if kind(config.shape) == "text" else AUGMENTATIONS[config.augment]


def fitting(shape: str, augment: str) -> None:
    """Raises DataError where an augmentation is of colours, and the network sees grey."""
    grey = kind(shape) == "image" and resnet.SHAPES[shape].channels == 1
    if grey and isinstance(AUGMENTATIONS[augment], Photos):
        fit = " or ".join(name for name, one in AUGMENTATIONS.items() if not isinstance(one, Photos))
        raise DataError(f"--augment {augment} is for colour, and the shape {shape} sees grey: --augment {fit} fits.")


def prepared(batch: Tensor) -> Tensor:
    """uint8 as decoded -> what a backbone takes: images float [n, C, H, W] in [0, 1], texts as they are."""
    return batch.permute(0, 3, 1, 2).float() / 255 if batch.ndim == 4 else batch


def laid_out(batch: Tensor) -> Tensor:
    """In the order in memory that its backbone is fastest with."""
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
