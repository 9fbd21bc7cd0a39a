from __future__ import annotations

import dataclasses

import numpy as np

from models.episode import Support
from models.learners.prototype import prototypes
from tests.models.learners.given import clusters, learner, unit


def test_a_row_points_to_the_mean_of_its_class_and_all_are_as_long() -> None:
    support, _, _ = clusters((1, 5, 2))
    affine = learner("prototype").adapt(support)
    means = np.stack([support.features[support.labels == k].mean(axis=0) for k in range(3)])
    np.testing.assert_allclose(affine.weight, 10 * unit(means), rtol=1e-5)
    assert not affine.bias.any()


def test_unlabelled_examples_draw_the_means_towards_the_middle_of_their_clusters() -> None:
    rng = np.random.default_rng(3)
    closer = []
    for seed in range(20):
        support, query, answers = clusters((1, 1, 1), queries=30, noise=0.25, seed=seed)
        centres = unit(np.stack([query[answers == k].mean(axis=0) for k in range(3)]))
        refined = dataclasses.replace(support, unlabelled=rng.permutation(query))
        before, after = (unit(prototypes(given, np.float32(10))) for given in (support, refined))
        closer.append((after * centres).sum() - (before * centres).sum())
    assert np.mean(np.array(closer) > 0) > 0.9


def test_a_labelled_example_keeps_its_class_whatever_the_others_say() -> None:
    features = np.eye(4, dtype=np.float32)
    crowd = np.repeat(features[1:2], 50, axis=0)  # all of them look like class 1
    means = prototypes(Support(features[:2], np.array([0, 1]), 2, crowd), np.float32(10))
    np.testing.assert_allclose(means[1], features[1], atol=1e-3)
    assert means[0] @ features[0] > 0.9
