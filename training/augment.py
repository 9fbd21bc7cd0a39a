"""Batched augmentation as tensor operations, on whatever device the batch is.

Kinds: photos (crops, flips, colour, as in Chen et al., "SimCLR", 2020, https://arxiv.org/abs/2002.05709), strong (as
much of it as that paper found losses without labels to need: small crops, hue, blur), snapshots (photos as people take
them: also small in the picture, dim and blurred) and characters (small affine and elastic distortion and stroke width,
which keep a character what it is; flips and hard crops would make it another); and of texts, stretches. All randomness
comes from the generator given, on the CPU, so that a resumed run sees what an unbroken one sees. Knows nothing of
losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Photos:
    """Random resized crop, flip, colour and, sometimes, grey; where asked for, also small, dim or blurred."""

    crop: float = 0.35  # smallest share of the area that is kept
    most: float = 1.0  # largest; above 1 the picture becomes smaller, and its mirror image surrounds it
    colour: float = 0.4
    hue: float = 0.0  # of a full turn, either way
    grey: float = 0.1  # share of the images
    dim: float = 0.0  # share that is darkened, by a power of up to 2.5
    blur: float = 0.0  # share that loses detail, down to a third of the resolution

    def __call__(self, images: Tensor, size: int, rng: torch.Generator) -> Tensor:
        """float [n, 3, H, W] in [0, 1] -> [n, 3, size, size]."""
        n, device = len(images), images.device
        uniform = _uniform(rng, device)
        area = uniform(n, self.crop, self.most)
        ratio = torch.exp(uniform(n, math.log(3 / 4), math.log(4 / 3)))
        edge = max(1.0, math.sqrt(self.most))
        width = (area * ratio).sqrt().clamp(max=edge)
        height = (area / ratio).sqrt().clamp(max=edge)
        left = uniform(n, 0.0, 1.0) * (1 - width)
        top = uniform(n, 0.0, 1.0) * (1 - height)
        flip = torch.where(uniform(n, 0.0, 1.0) < 0.5, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3, device=device)
        theta[:, 0, 0] = width * flip
        theta[:, 1, 1] = height
        theta[:, 0, 2] = 2 * left + width - 1
        theta[:, 1, 2] = 2 * top + height - 1
        views = _warp(images, theta, size)
        if self.blur:
            # One for the batch: a resize has one size.
            share = 1 / 3 + (0.8 - 1 / 3) * float(torch.rand(1, generator=rng))
            small = F.interpolate(views, scale_factor=share, mode="bilinear", antialias=True)
            soft = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
            views = torch.where((uniform(n, 0.0, 1.0) < self.blur)[:, None, None, None], soft, views)
        # Brightness, contrast and saturation are one affine map of the three channels: x -> M x + b.
        bright = uniform(n, 1 - self.colour, 1 + self.colour)
        contrast = uniform(n, 1 - self.colour, 1 + self.colour)
        saturation = uniform(n, 1 - self.colour, 1 + self.colour)
        saturation = torch.where(uniform(n, 0.0, 1.0) < self.grey, 0.0, saturation)
        luma = torch.tensor([0.299, 0.587, 0.114], device=device)
        mean = (views.mean(dim=(2, 3)) @ luma)[:, None]
        eye = torch.eye(3, device=device)
        matrix = saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * luma.expand(3, 3)
        if self.hue:
            matrix = matrix @ turned_hue(uniform(n, -self.hue, self.hue))
        matrix = (bright * contrast)[:, None, None] * matrix
        bias = (bright * (1 - contrast))[:, None] * mean
        flat = torch.baddbmm(bias[:, :, None].expand(n, 3, 1), matrix, views.flatten(2))
        views = flat.clamp(0, 1).view_as(views)
        if self.dim:
            power = torch.where(uniform(n, 0.0, 1.0) < self.dim, uniform(n, 1.0, 2.5), 1.0)
            views = views ** power[:, None, None, None]
        return views


@dataclass(frozen=True, slots=True)
class Characters:
    """Affine and elastic distortion, stroke width and contrast of grey drawings, dark ink on light paper."""

    rotate: float = 15.0  # degrees
    shear: float = 0.3
    scale: float = 0.2
    shift: float = 0.12  # of half the picture
    elastic: float = 0.10  # of half the picture
    stroke: float = 0.5  # how far towards the thinner or the thicker stroke

    def __call__(self, images: Tensor, size: int, rng: torch.Generator) -> Tensor:
        """float [n, 1, H, W] in [0, 1] -> [n, 1, size, size]."""
        n, device = len(images), images.device
        uniform = _uniform(rng, device)
        angle = uniform(n, -self.rotate, self.rotate) * math.pi / 180
        shear = uniform(n, -self.shear, self.shear)
        scale_x = 1 / uniform(n, 1 - self.scale, 1 + self.scale)
        scale_y = 1 / uniform(n, 1 - self.scale, 1 + self.scale)
        cos, sin = torch.cos(angle), torch.sin(angle)
        theta = torch.stack(
            [
                torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, uniform(n, -self.shift, self.shift)], 1),
                torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, uniform(n, -self.shift, self.shift)], 1),
            ],
            1,
        )
        ink = 1 - images
        coarse = torch.rand(n, 2, 4, 4, generator=rng).to(device) * 2 - 1
        bend = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True) * self.elastic
        views = _warp(ink, theta, size, bend.permute(0, 2, 3, 1))
        thick = F.max_pool2d(views, 3, 1, 1)
        thin = -F.max_pool2d(-views, 3, 1, 1)
        amount = uniform(n, -self.stroke, self.stroke)[:, None, None, None]
        views = torch.where(amount > 0, views + amount * (thick - views), views - amount * (thin - views))
        return 1 - views.clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Stretches:
    """What augmentation is to texts: of each a stretch of its own, `share` of its bytes, from anywhere in it."""

    share: float = 0.5

    def __call__(self, texts: Tensor, size: int, rng: torch.Generator) -> Tensor:
        """uint8 [n, size] -> uint8 [n, share x size], zeros behind the ends."""
        n, device = len(texts), texts.device
        many = (texts != 0).sum(dim=1)
        kept = torch.ceil(many * self.share).long()
        chance = torch.rand(n, generator=rng).to(device)
        start = (chance * (many - kept + 1)).long()
        at = torch.arange(math.ceil(size * self.share), device=device)
        found = texts.gather(1, (start[:, None] + at).clamp(max=texts.shape[1] - 1))
        return torch.where(at < kept[:, None], found, torch.zeros_like(found))


Augmentation = Photos | Characters
AUGMENTATIONS: dict[str, Augmentation] = {
    "photos": Photos(),
    "strong": Photos(crop=0.15, hue=0.1, grey=0.2, blur=0.5),
    "snapshots": Photos(crop=0.2, most=1.8, grey=0.15, dim=0.25, blur=0.3),
    "characters": Characters(),
}


def close(augmentation: Augmentation) -> Augmentation:
    """The same, of a small part of each photo: what is asked about as a detail of it (characters are left whole).

    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020,
    https://arxiv.org/abs/2006.09882: their multi-crop, whose small crops cost little.
    """
    return (
        replace(augmentation, crop=0.05, most=augmentation.crop) if isinstance(augmentation, Photos) else augmentation
    )


def mixed(images: Tensor, labels: Tensor, classes: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square of each image from another one of the batch, or, as often, none; and of what class how much is seen.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019,
    https://arxiv.org/abs/1905.04899. Images [n, C, H, W] and labels [n] -> images and shares [n, classes].
    """
    n, side = len(images), images.shape[-1]
    order = torch.randperm(n, generator=rng).to(images.device)
    # The share of the square is even between nothing and all, as in the paper.
    chance, share, down, right = torch.rand(4, generator=rng).tolist()
    edge = round(side * math.sqrt(share)) if chance < 0.5 else 0
    top, left = round(down * (side - edge)), round(right * (side - edge))
    images = images.clone()
    images[:, :, top : top + edge, left : left + edge] = images[order, :, top : top + edge, left : left + edge]
    part = (edge / side) ** 2
    shares = F.one_hot(labels, classes).float()
    return images, torch.lerp(shares, shares[order], part)


def turned_hue(turns: Tensor) -> Tensor:
    """Parts of a full turn [n] -> matrices [n, 3, 3] that turn red, green and blue about the axis of greys."""
    angle = 2 * math.pi * turns
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    grey = torch.full((3, 3), 1 / 3, device=turns.device)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=turns.device) / math.sqrt(3)
    return grey + cos * (torch.eye(3, device=turns.device) - grey) + sin * across


def _uniform(rng: torch.Generator, device: torch.device) -> Callable[[int, float, float], Tensor]:
    def draw(n: int, low: float, high: float) -> Tensor:
        return (torch.rand(n, generator=rng) * (high - low) + low).to(device, non_blocking=True)

    return draw


def _warp(images: Tensor, theta: Tensor, size: int, bend: Tensor | None = None) -> Tensor:
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    if bend is not None:
        grid = grid + bend
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection" if bend is None else "zeros", align_corners=False
    )
