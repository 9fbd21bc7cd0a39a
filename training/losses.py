"""Losses on embeddings, each with its paper. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy between two views, [n, d] and [n, d] -> scalar.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
    https://arxiv.org/abs/2002.05709. Each view must find its twin among the 2n - 1 other views of the batch.
    """
    n = len(first)
    z = F.normalize(torch.cat([first, second]).float(), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
    twin = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, twin)
