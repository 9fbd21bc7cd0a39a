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
        before, after = (unit(prototypes(given)[0]) for given in (support, refined))
        closer.append((after * centres).sum() - (before * centres).sum())
    assert np.mean(closer) > 0.4
    assert np.mean(np.array(closer) > 0) > 0.8  # now and then they are doubted
    assert min(closer) > -0.1


def test_an_example_counts_for_as_much_as_it_belongs_to_a_class() -> None:
    support, query, _ = clusters((1, 2, 3), queries=10, noise=0.25)
    plain = prototypes(support)[1]
    counts = prototypes(dataclasses.replace(support, unlabelled=query))[1]
    assert plain.tolist() == [1, 2, 3]
    assert (counts > plain).all()
    assert counts.sum() < 6 + len(query)


def test_where_examples_are_compared_is_the_learners_choice() -> None:
    """The only axis on which the classes differ is shrunk away: what is near then says nothing of the class."""
    features = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    extra = np.repeat(unit(np.array([[1, 0.2, 0.0], [0.2, 1, 0]], np.float32)), 10, axis=0)
    support = Support(features, np.array([0, 1]), 2, extra)
    blind = np.diag(np.array([1e-3, 1e-3, 1], np.float32)) + np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]], np.float32)
    means, lost = prototypes(support)[0], prototypes(support, blind)[0]
    assert means[0, 0] - means[0, 1] > lost[0, 0] - lost[0, 1] + 0.1
