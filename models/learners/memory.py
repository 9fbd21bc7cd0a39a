"""External memory: slots of features from earlier tasks, read by attention.

Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", 2016, https://arxiv.org/abs/1605.06065, read and
write such a memory within a sequence; here it is filled in training and only read while serving, so that what one
client sends never changes what another gets.
"""

from __future__ import annotations

from models.arrays import Array, softmax


def attention(queries: Array, keys: Array) -> Array:
    """How much of each slot [m, k] is remembered at each query [q, k], [q, m]: what is read is this times the slots."""
    return softmax(queries @ keys.T)
