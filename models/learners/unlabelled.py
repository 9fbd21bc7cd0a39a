"""What unlabelled examples add to the means of the classes: one soft step towards them, and how far to trust it.

Ren et al., "Meta-Learning for Semi-Supervised Few-Shot Classification", 2018, https://arxiv.org/abs/1803.00676: soft
k-means from the labelled means, with one more cluster for what belongs to no class, and a mask over what lies too far
out. Cluster and mask are one here: a cluster of no class, as near to every example as the average example is to its
nearest class. So the mask follows the task, and nothing of it is learned.

Unlabelled examples that show other things altogether would pull the means astray, and with one shot no labelled
example can be held out to notice. But they can be asked: if they show the classes of the task, a labelled example is
one of their kind and lies in as dense a crowd of them as they do themselves, however many classes and shots there are
and whatever the extractor. The farther out the labelled ones stand, the less all the unlabelled count. Knows nothing
of where the features lie: the learner says in which space to compare them.
"""

from __future__ import annotations

from array_api_compat import array_namespace, device

from models.arrays import Array, normalise, softmax

SHARPNESS = 20.0  # of the cosine, among classes; hardly matters between 10 and 40
CROWD = 10.0  # of the cosine, for who counts as a neighbour
STRANGE, KNOWN = -0.8, -0.5  # kinship at which the unlabelled begin to count, and at which they count fully
LEAST_SPREAD = 0.1  # of the logarithms of how dense crowds are


def shares(means: Array, unlabelled: Array) -> Array:
    """How much of each unlabelled example belongs to each class: [way, dim] and [u, dim] -> [u, way].

    What is missing from one is the share of the cluster of no class.
    """
    xp = array_namespace(unlabelled)
    cosines = normalise(unlabelled) @ normalise(means).T  # [u, way]
    usual = xp.mean(xp.max(cosines, axis=1))
    nowhere = xp.zeros_like(cosines[:, :1]) + usual
    return softmax(SHARPNESS * xp.concat([cosines, nowhere], axis=1))[:, :-1]


def kinship(examples: Array, unlabelled: Array) -> Array:
    """How much denser the crowd of unlabelled [u, dim] is around labelled examples [n, dim] than around their own: [].

    In standard deviations of the latter. About zero where both show the same things, and well below where the
    labelled ones are strangers.
    """
    xp = array_namespace(unlabelled)
    u = unlabelled.shape[0]
    directions = normalise(unlabelled)
    others = 1 - xp.eye(u, dtype=unlabelled.dtype, device=device(unlabelled))
    theirs = xp.sum(xp.exp(CROWD * (directions @ directions.T)) * others, axis=1) / max(u - 1, 1)
    theirs = xp.log(theirs + 1e-6)  # an only one has no crowd
    ours = xp.log(xp.mean(xp.exp(CROWD * (normalise(examples) @ directions.T)), axis=1))
    spread = xp.sqrt(xp.mean((theirs - xp.mean(theirs)) ** 2) + LEAST_SPREAD**2)
    return (xp.mean(ours) - xp.mean(theirs)) / spread


def trust(examples: Array, unlabelled: Array) -> Array:
    """How much the unlabelled examples count, from 0 to 1: []."""
    xp = array_namespace(unlabelled)
    return xp.clip((kinship(examples, unlabelled) - STRANGE) / (KNOWN - STRANGE), 0.0, 1.0)
