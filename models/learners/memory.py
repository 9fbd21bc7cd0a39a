"""External memory: slots of features from earlier tasks, read by attention.

Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", 2016, https://arxiv.org/abs/1605.06065, read and
write such a memory within a sequence; here it is filled in training and only read while serving, so that what one
client sends never changes what another gets.
"""

from __future__ import annotations

from array_api_compat import array_namespace

from models.arrays import Array, softmax


def attend(queries: Array, keys: Array, values: Array, *, mask: Array | None = None) -> Array:
    """Softmax attention: queries [q, k], keys [m, k], values [m, d] -> [q, d].

    `mask` [q, m] holds 1 where a query may look; a row of zeros gives zeros, for then there is nothing to see.
    """
    xp = array_namespace(queries)
    logits = queries @ keys.T
    if mask is None:
        return softmax(logits) @ values
    logits = xp.where(mask > 0, logits, xp.full_like(logits, -1e9))
    return (softmax(logits) * mask) @ values
