"""Weights that a pretraining starts from: those of a finished one, or of an artifact.

In an artifact batch normalisation is folded into the convolutions, and cannot be trained like that. It is put back
with the statistics that the convolutions have on the images at hand, so that the network computes what it did before.
Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.artifact import MANIFEST, WEIGHTS, Artifact
from models.resnet import SHAPES, ImageExtractor, ResNet, Shape, fold
from training.folders import DataError

ENOUGH = 2048  # images that the statistics are taken from
EPSILON = 1e-5  # that torch adds to a variance


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def convolutions(backbone: ResNet) -> Iterator[tuple[nn.Conv2d, nn.Module]]:
    """Each convolution with the normalisation behind it, which is an identity where it was folded."""
    parts: list[Any] = [backbone, *backbone.stages]
    for part in parts:
        for name in ("", "1", "2"):
            if hasattr(part, f"conv{name}"):
                yield getattr(part, f"conv{name}"), getattr(part, f"bn{name}")
        shortcut = getattr(part, "shortcut", None)
        if isinstance(shortcut, nn.Sequential):
            conv: Any = shortcut[0]
            yield conv, shortcut[1] if len(shortcut) > 1 else nn.Identity()


def from_artifact(artifact: Artifact, pixels: Tensor) -> ResNet:
    """The backbone of an artifact with its batch normalisation put back; pixels: uint8 [n, H, W, C] of its kind."""
    values = {**artifact.manifest.shape}
    if artifact.kind != "image" or not artifact.manifest.portable:
        raise DataError(
            f"--start: {artifact.path} holds no network of {', '.join(SHAPES)}, and none else can be trained."
        )
    shape = Shape(**{**values, **{name: tuple(values[name]) for name in ("blocks", "strides")}})
    folded = ImageExtractor(fold(ResNet(shape))).eval()
    folded.load_state_dict({name: value.float() for name, value in load_file(artifact.path / WEIGHTS).items()})
    sources = [conv for conv, _ in convolutions(folded.backbone)]
    sums = [torch.zeros(2, conv.out_channels, dtype=torch.float64) for conv in sources]
    counts = [0] * len(sources)

    def note(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(conv: nn.Module, _: Any, out: Tensor) -> None:
            own = out.double() - conv.get_parameter("bias").double()[None, :, None, None]
            sums[number] += torch.stack([own.sum(dim=(0, 2, 3)), own.square().sum(dim=(0, 2, 3))])
            counts[number] += own.numel() // own.shape[1]

        return hook

    handles = [conv.register_forward_hook(note(number)) for number, conv in enumerate(sources)]
    with torch.no_grad():
        for part in torch.split(pixels[:: max(1, len(pixels) // ENOUGH)], 64):
            folded(part)
    for handle in handles:
        handle.remove()

    backbone = ResNet(shape)
    backbone.mean, backbone.scale = folded.backbone.mean, folded.backbone.scale
    with torch.no_grad():
        for (conv, bn), source, (total, squares), count in zip(
            convolutions(backbone), sources, sums, counts, strict=True
        ):
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            conv.weight.copy_(source.weight)
            bn.get_buffer("running_mean").copy_(mean)
            bn.get_buffer("running_var").copy_(variance)
            bn.get_parameter("weight").copy_((variance + EPSILON).sqrt())
            bn.get_parameter("bias").copy_(mean + source.get_parameter("bias"))
    return backbone
