from __future__ import annotations

import numpy as np
import pytest

from training.probe import COUNT, LETTERS, drawn


@pytest.mark.parametrize("shape", [(28, 28, 1), (84, 84, 3), (31, 47, 3)])
def test_pictures_differ_have_contrast_and_are_the_same_each_time(shape: tuple[int, ...]) -> None:
    pictures = drawn(shape)
    assert pictures.shape == (COUNT, *shape)
    assert pictures.dtype == np.uint8
    assert np.array_equal(pictures, drawn(shape))
    assert not np.array_equal(pictures, drawn(shape, seed=1))
    assert pictures.std(axis=(1, 2, 3)).min() > 20
    assert all(np.abs(pictures[i].astype(int) - pictures[j]).mean() > 20 for i in range(COUNT) for j in range(i))


def test_texts_are_letters_and_end_where_zeros_begin() -> None:
    texts = drawn((64,))
    assert texts.shape == (COUNT, 64)
    for text in texts:
        end = int((text != 0).sum())
        assert end >= 16
        assert set(text[:end].tolist()) <= set(LETTERS)
        assert not text[end:].any()
    assert len({bytes(text) for text in texts}) == COUNT
