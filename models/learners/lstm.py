"""LSTM meta-learner with an external memory: one small cell, the same for every class and every extractor.

Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning", 2017, let an LSTM learn how a classifier is made
from a few examples; Santoro et al., 2016, https://arxiv.org/abs/1605.06065, give a network a memory of earlier
experience. The memory here is what earlier classes were like: how examples of one class differ, and where classes lie.
The cell looks at the task several times, each time through another lens: the space whitened by the remembered
covariance, from strongly to hardly at all. What it sees are plain numbers (how far the classes lie apart, whether
examples would be told apart without being known, how near the remembered classes are), never a coordinate; so a cell
that was trained on one extractor serves any other, with the memory of that one.

It answers how strongly to whiten this task, and for each class how far to move its mean towards what was remembered;
what the task's own scatter tells beside what is remembered is added as discriminant.py adds it. All answers start at
zero: before training this *is* that classifier. Reads are sums over examples and over slots: no order matters. No
learned array has a `way` axis, and classes may be permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from models.arrays import Array, class_means, each_own, normalise, one_hot, sigmoid, softmax, square_sum
from models.episode import Support
from models.head import Affine
from models.learners.discriminant import Centres, inverse, scores_left_out
from models.learners.memory import attention
from models.learners.once import Once
from models.learners.prototype import others_of, prototypes
from models.learners.things import sums
from models.learners.whitened import whitening

SEEN = 11  # numbers seen of one class through one lens
SHARED, EACH = 3, 2  # answers for the whole task, and for each class
FAR = 4.0  # the strength of the whitening moves by less than e to this
POWER = 0.5
NO_SCATTER = -30.0  # log_own of an LSTM for which the scatter of a task does not count


class Memory(NamedTuple):
    slots: Array  # [slots, dim], in the remembered basis
    directions: tuple[Array, ...]  # [slots, dim] for each read through its lens, of unit length
    transform: Array  # [dim, dim], see `whitening`


class Answers(NamedTuple):
    """What the cell says of a task."""

    scale: Array  # []
    transform: Array  # [dim], in the remembered basis: how each direction is whitened
    noise: Array  # []: see whitened.offset
    way: Array  # [way, 1]: the part of the way to the memory that each mean goes
    bias: Array  # [way]


class Fit(NamedTuple):
    """What is made of a task by what the cell says; all in the transformed space."""

    answers: Answers
    slots: Array  # [slots, dim]
    names: Array  # [slots, dim]: of the length at which they are attended to
    features: Array  # [n, dim]
    own: Array  # [n, way], classes one-hot
    away: Array  # [n, dim], from the mean of the class
    apart: Callable[[Array], Array]  # see discriminant.inverse
    centres: Centres  # of the classes


@dataclass(frozen=True, slots=True, eq=False)
class LSTM(Once):
    # The memory: the covariance of earlier classes and slots of their features.
    basis: Array  # [dim, dim]
    spectrum: Array  # [dim]
    log_shrink: Array  # []
    slots: Array  # [slots, dim]
    # The base classifier.
    log_scale: Array  # []
    log_noise: Array  # []
    log_own: Array  # []; see discriminant.py
    # The cell; no array of it knows the length of a feature. `hidden` is the length of its state.
    log_lenses: Array  # [reads]: how little each look whitens
    log_focus: Array  # []: how sharply the memory is attended to
    inputs: Array  # [2 * SEEN, 4 * hidden]
    recur: Array  # [hidden, 4 * hidden]
    offset: Array  # [4 * hidden]
    # What is answered; zero at the start.
    shared: Array  # [hidden, SHARED]: strength and power of the whitening, trust in lengths
    each: Array  # [hidden, EACH]: the way towards the memory, bias

    def adapt(self, support: Support) -> Affine:
        return self._map(self._fit(support))

    def leave_out(self, support: Support, things: np.ndarray) -> Array:
        """Logits [n, way] of each example as if its thing [n] had not been there, but for what the cell answered, which
        it did for all of them; meaningless where its class shows no other."""
        alone = Support(support.features, support.labels, support.way)
        return self._left_out(support, self._fit(alone), things)

    def adapt_and_leave_out(self, support: Support, things: np.ndarray) -> tuple[Affine, Array]:
        """Both, from one fit where there are no unlabelled examples."""
        fit = self._fit(support)
        alone = support.unlabelled is None or support.unlabelled.shape[0] == 0
        return self._map(fit), self._left_out(support, fit, things) if alone else self.leave_out(support, things)

    def _fit(self, support: Support) -> Fit:
        xp = array_namespace(support.features)
        memory: Memory = self.worked_out
        examples = support.features @ self.basis  # [n, dim]
        own = one_hot(support.labels, support.way, examples)
        # Unlabelled examples move the means, and are looked at no further.
        means, counts = prototypes(support, memory.transform)
        means = means @ self.basis  # [way, dim]
        answers = self._ask(examples, own, means, memory)
        means, slots = means * answers.transform, memory.slots * answers.transform
        names = normalise(slots) * xp.exp(self.log_focus)
        recalled = attention(normalise(means), names) @ slots
        at = means + answers.way * (recalled - means)
        away = (examples - own @ class_means(examples, own)) * answers.transform
        apart = inverse(away, self.log_own)
        centres = Centres(at, apart(at), counts / (counts + answers.noise))
        return Fit(answers, slots, names, examples * answers.transform, own, away, apart, centres)

    def _ask(self, examples: Array, own: Array, means: Array, memory: Memory) -> Answers:
        """Looks at the task through each lens, and answers."""
        xp = array_namespace(examples)
        met = meet(examples, own)
        state = xp.zeros((means.shape[0], self.recur.shape[0]), dtype=examples.dtype, device=device(examples))
        cell = state
        for read in range(self.log_lenses.shape[0]):
            lens = self._lens(read)
            seen = look(met, means * lens, memory.directions[read], own, xp.exp(self.log_focus), lens)
            together = xp.broadcast_to(xp.mean(seen, axis=0)[None, :], seen.shape)
            state, cell = self._step(xp.concat([seen, together], axis=1), state, cell)
        shared = xp.mean(state, axis=0) @ self.shared  # [SHARED]
        each = state @ self.each  # [way, EACH]
        strength = spread(self.spectrum, self.log_shrink + FAR * xp.tanh(shared[0]))
        log_scale = self.log_scale
        if self.shared.shape[1] > SHARED:  # a cell from before: it answered this as well
            log_scale = log_scale + shared[SHARED]
        return Answers(
            scale=xp.exp(log_scale),
            transform=strength ** (-0.5 * (1 + POWER * xp.tanh(shared[1]))),
            noise=xp.exp(self.log_noise + shared[2]),
            way=xp.tanh(each[:, 0:1]),
            bias=each[:, 1],
        )

    def _map(self, fit: Fit) -> Affine:
        xp = array_namespace(fit.features)
        answers, (at, towards, sure) = fit.answers, fit.centres
        weight = answers.scale * ((towards * answers.transform) @ self.basis.T)
        return Affine(weight, answers.scale * (-0.5 * xp.sum(towards * at, axis=1) * sure + answers.bias))

    def _left_out(self, support: Support, fit: Fit, things: np.ndarray) -> Array:
        xp = array_namespace(fit.features)
        answers, others = fit.answers, others_of(fit.own, things)
        turned, plain = fit.apart(fit.away), class_means(fit.features, fit.own)
        part = (1 / others)[:, None]
        means = xp.take(plain, support.labels, axis=0) - part * sums(things, fit.away)
        towards = xp.take(fit.apart(plain), support.labels, axis=0) - part * sums(things, turned)
        shares = attention(normalise(means), fit.names)
        way = xp.take(answers.way, support.labels, axis=0)
        mine = Centres(
            means + way * (shares @ fit.slots - means),
            towards + way * (shares @ fit.apart(fit.slots) - towards),
            others / (others + answers.noise),
        )
        scores = scores_left_out(things, fit.features, fit.own, fit.away, turned, self.log_own, fit.centres, mine)
        return answers.scale * (scores + answers.bias[None, :])

    def work_out(self) -> Memory:
        """All that is looked at and does not depend on the task."""
        slots = self.slots @ self.basis
        reads = range(self.log_lenses.shape[0])
        directions = tuple(normalise(slots * self._lens(read)) for read in reads)
        return Memory(slots, directions, whitening(self.basis, self.spectrum, self.log_shrink))

    def _lens(self, read: int) -> Array:
        xp = array_namespace(self.spectrum)
        return 1 / xp.sqrt(spread(self.spectrum, self.log_lenses[read]))

    def _step(self, seen: Array, state: Array, cell: Array) -> tuple[Array, Array]:
        """One step of the cell (Hochreiter and Schmidhuber, 1997), class by class: [way, ...] -> [way, hidden]."""
        xp = array_namespace(seen)
        hidden = self.recur.shape[0]
        total = seen @ self.inputs + state @ self.recur + self.offset
        keep = sigmoid(total[:, :hidden])
        write = sigmoid(total[:, hidden : 2 * hidden])
        show = sigmoid(total[:, 2 * hidden : 3 * hidden])
        cell = keep * cell + write * xp.tanh(total[:, 3 * hidden :])
        return show * xp.tanh(cell), cell


def spread(spectrum: Array, log_shrink: Array) -> Array:
    """Remembered variances [dim], shrunk towards their mean; see `whitening`."""
    xp = array_namespace(spectrum)
    shrink = xp.exp(log_shrink)
    return (spectrum + shrink) / (1 + shrink)


class Met(NamedTuple):
    """Examples and their classes, multiplied coordinate by coordinate: through a lens each is one sum more."""

    examples: Array  # [n, dim]
    squares: Array  # [n, dim]
    together: Array  # [n, dim]: with the sum of the class
    sums: Array  # [way, dim]: squares of the sum of the class


def meet(examples: Array, labels: Array) -> Met:
    sums = labels.T @ examples
    return Met(examples, examples * examples, examples * (labels @ sums), sums * sums)


def look(met: Met, means: Array, directions: Array, labels: Array, focus: Array, lens: Array) -> Array:
    """What is seen of each class through one lens [dim], [way, SEEN]; numbers of about one.

    Labels one-hot [n, way]; means [way, dim] and directions of slots [slots, dim] are seen through the lens already.
    """
    xp = array_namespace(means)
    way = means.shape[0]
    counts = xp.sum(labels, axis=0)
    several = xp.astype(counts > 1, means.dtype)
    names = normalise(means)

    # The other classes.
    alike = names @ names.T
    self_mask = xp.eye(way, dtype=means.dtype, device=device(means))
    nearest = xp.max(alike - 3 * self_mask, axis=1)
    others = (xp.sum(alike, axis=1) - 1) / (way - 1)

    # Its own examples, each met as if it were a question: its mean is taken without it.
    sizes, together, sums = (part @ (lens * lens) for part in (met.squares, met.together, met.sums))
    rest = each_own(labels, sums) - 2 * together + sizes  # squared length of the sum of the others
    size = xp.sqrt(sizes + 1e-12)
    mine = (together - sizes) / (size * xp.sqrt(xp.maximum(rest, xp.zeros_like(rest)) + 1e-12))
    rival = xp.max((met.examples @ (names * lens).T) / size[:, None] - 3 * labels, axis=1)
    margin = several * (labels.T @ (mine - rival)) / counts
    told = several * ((labels.T @ sigmoid(20 * (mine - rival))) / counts - 0.5)
    length = square_sum(means)
    scatter = (labels.T @ sizes) / counts / (length + 1e-6)

    # The memory.
    known = names @ directions.T
    share = softmax(focus * known)
    doubt = -xp.sum(share * xp.log(share + 1e-9), axis=1) / math.log(directions.shape[0] + 1)
    return xp.stack(
        [
            xp.log(length + 1e-6),
            nearest,
            others,
            5 * margin,
            2 * told,
            xp.log(scatter + 1e-6),
            2 * xp.max(known, axis=1),
            2 * xp.sum(share * known, axis=1),
            doubt,
            0.5 * xp.log(counts),
            xp.full_like(counts, 0.5 * math.log(way)),
        ],
        axis=1,
    )
