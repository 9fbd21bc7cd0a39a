from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from training.episodes import Indices, Pool, digest, frozen, varied
from training.folders import DataError

# What frozen lists were when the first results were published. A change here makes every result incomparable.
GOLDEN = {"alone": "2e1ef4a76ef4ce2a", "grouped": "e1e912042f53159b"}


def labels(classes: int = 8, images: int = 12) -> np.ndarray:
    return np.repeat(np.arange(classes), images)


def groups() -> np.ndarray:
    """For labels(): each class has four images alone and two things of four images."""
    one = np.array([-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1])
    return np.concatenate([np.where(one < 0, -1, one + 2 * label) for label in range(8)])


def equal(first: list[Indices], second: list[Indices]) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(first, second, strict=True)
        for field in dataclasses.fields(Indices)
    )


def lists() -> Iterator[tuple[np.ndarray, np.ndarray, list[Indices]]]:
    """Labels, groups and episodes of several kinds."""
    alone = np.full(96, -1)
    for group in (alone, groups()):
        pool = Pool.of(labels(), group)
        for way, shot, queries in ((2, 1, 1), (5, 3, 4), (8, 5, 15)):
            yield labels(), group, frozen(pool, way=way, shot=shot, queries=queries, count=40, seed=1)
        yield labels(), group, list(varied(pool, 1, 0, count=60, max_way=8, max_shot=6, queries=5))


def test_the_same_arguments_give_the_same_list() -> None:
    pool = Pool.of(labels())
    first = frozen(pool, way=5, shot=2, queries=3, count=20, seed=7)
    assert equal(first, frozen(Pool.of(labels()), way=5, shot=2, queries=3, count=20, seed=7))
    assert equal(first[:5], frozen(pool, way=5, shot=2, queries=3, count=5, seed=7))


@pytest.mark.parametrize("other", [{"seed": 8}, {"way": 4}, {"shot": 3}, {"queries": 4}])
def test_any_other_argument_gives_another_list(other: dict[str, int]) -> None:
    pool = Pool.of(labels())
    given = {"way": 5, "shot": 2, "queries": 3, "count": 20, "seed": 7}
    assert digest(frozen(pool, **given)) != digest(frozen(pool, **{**given, **other}))


@pytest.mark.parametrize("kind", ["alone", "grouped"])
def test_the_lists_are_those_of_the_first_results(kind: str) -> None:
    pool = Pool.of(labels(), None if kind == "alone" else groups())
    assert digest(frozen(pool, way=5, shot=3, queries=4, count=50, seed=7)) == GOLDEN[kind]


def test_support_and_query_share_neither_an_image_nor_a_group() -> None:
    for _, group, episodes in lists():
        for episode in episodes:
            rows = np.concatenate([episode.support, episode.query])
            assert len(set(rows.tolist())) == len(rows)
            seen, asked = set(group[episode.support].tolist()), set(group[episode.query].tolist())
            assert seen & asked <= {-1}


def test_classes_are_distinct_and_rows_carry_the_label_of_their_class() -> None:
    for label, _, episodes in lists():
        for episode in episodes:
            classes = [set(label[episode.support[episode.labels == k]].tolist()) for k in range(episode.way)]
            assert all(len(found) == 1 for found in classes)
            assert len(set.union(*classes)) == episode.way
            for k in range(episode.way):
                assert set(label[episode.query[episode.answers == k]].tolist()) == classes[k]


@pytest.mark.parametrize("group", [None, groups()], ids=["alone", "grouped"])
@pytest.mark.parametrize("shot", [1, 2, 5])
def test_every_class_has_its_shots_and_its_questions(group: np.ndarray | None, shot: int) -> None:
    for episode in frozen(Pool.of(labels(), group), way=6, shot=shot, queries=2, count=50, seed=3):
        assert np.bincount(episode.labels).tolist() == [shot] * 6
        assert np.bincount(episode.answers, minlength=6).min() >= 1
        assert np.bincount(episode.answers).max() <= 2
        assert len(episode.support) == len(episode.labels)
        assert len(episode.query) == len(episode.answers)
        assert episode.way == 6


def test_shots_may_differ_from_class_to_class() -> None:
    shots = np.array([4, 1, 7])
    episode = Pool.of(labels()).episode(np.random.default_rng(0), way=3, shots=shots, queries=5)
    assert np.bincount(episode.labels).tolist() == [4, 1, 7]
    assert np.bincount(episode.answers).tolist() == [5, 5, 5]


def test_chosen_classes_keep_their_order() -> None:
    chosen = np.array([6, 0, 3])
    episode = Pool.of(labels()).episode(
        np.random.default_rng(0), way=3, shots=np.ones(3, int), queries=1, chosen=chosen
    )
    assert (labels()[episode.support] == chosen[episode.labels]).all()


def test_too_few_groups_give_fewer_examples_rather_than_share_one() -> None:
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    pool = Pool.of(np.repeat([0, 1], 4), group)  # two things of two images in each class
    for episode in frozen(pool, way=2, shot=3, queries=9, count=20, seed=0):
        assert np.bincount(episode.labels).tolist() == [2, 2]
        assert np.bincount(episode.answers).tolist() == [2, 2]
        assert not set(group[episode.support]) & set(group[episode.query])


def test_examples_may_be_spread_over_as_many_things_as_there_are() -> None:
    group = np.tile(np.repeat(np.arange(4), 3), 2)  # four things of three images in each of two classes
    pool = Pool.of(np.repeat([0, 1], 12), group)
    for shot, things in ((1, 1), (2, 2), (3, 3), (5, 3), (9, 3)):
        for packed, spread in zip(*lists_of(pool, shot), strict=True):
            for label in (0, 1):
                mine = group[spread.support[spread.labels == label]]
                assert len(mine) == shot
                counts = np.unique(mine, return_counts=True)[1]
                assert len(counts) == things
                assert counts.max() - counts.min() <= 1
                assert not set(mine) & set(group[spread.query[spread.answers == label]])
                assert len(set(group[packed.support[packed.labels == label]])) == -(-shot // 3)


def lists_of(pool: Pool, shot: int) -> list[list[Indices]]:
    return [frozen(pool, way=2, shot=shot, queries=3, count=10, seed=1, spread=spread) for spread in (False, True)]


def test_where_each_image_shows_another_thing_nothing_is_spread() -> None:
    pool = Pool.of(labels())
    packed, spread = (frozen(pool, way=4, shot=3, queries=5, count=20, seed=2, spread=s) for s in (False, True))
    assert digest(packed) == digest(spread)


def test_as_many_questions_as_are_left_when_more_are_asked_for() -> None:
    for episode in frozen(Pool.of(labels(4, 6)), way=4, shot=4, queries=15, count=5, seed=0):
        assert np.bincount(episode.answers).tolist() == [2] * 4
        assert np.bincount(episode.labels).tolist() == [4] * 4


@pytest.mark.parametrize(
    ("label", "group"),
    [([0, 0, 1], None), ([0, 0, 1, 1], [-1, -1, 5, 5]), ([0, 0, 2, 2], None)],
    ids=["one image", "one thing", "none"],
)
def test_a_class_of_one_thing_is_refused_at_once(label: list[int], group: list[int] | None) -> None:
    with pytest.raises(DataError, match="Class 1 "):
        Pool.of(np.array(label), None if group is None else np.array(group))


def test_over_many_episodes_every_class_and_image_is_met_on_both_sides() -> None:
    episodes = frozen(Pool.of(labels(), groups()), way=3, shot=2, queries=2, count=400, seed=5)
    assert set(np.concatenate([episode.support for episode in episodes]).tolist()) == set(range(96))
    assert set(np.concatenate([episode.query for episode in episodes]).tolist()) == set(range(96))


def test_the_digest_changes_with_any_row_and_with_the_order() -> None:
    episodes = frozen(Pool.of(labels()), way=3, shot=2, queries=2, count=4, seed=0)
    name = digest(episodes)
    assert name == digest(list(episodes))
    assert len(name) == 16
    others = [digest(episodes[:-1]), digest(episodes[::-1])]
    for field in ("support", "query"):
        for at in range(3):
            rows = getattr(episodes[2], field).copy()
            rows[at] += 1
            others.append(digest([*episodes[:2], dataclasses.replace(episodes[2], **{field: rows}), episodes[3]]))
    assert len({name, *others}) == len(others) + 1


def test_the_digest_is_the_same_on_a_computer_with_shorter_integers() -> None:
    episodes = frozen(Pool.of(labels()), way=3, shot=2, queries=2, count=4, seed=0)
    shorter = [
        dataclasses.replace(e, support=e.support.astype(np.int32), query=e.query.astype(np.int32)) for e in episodes
    ]
    assert digest(shorter) == digest(episodes)


def test_training_episodes_stay_within_their_bounds_and_reach_them() -> None:
    pool = Pool.of(labels())
    episodes = [e for step in range(30) for e in varied(pool, 0, step, count=8, max_way=6, max_shot=5, queries=3)]
    assert len(episodes) == 240
    shots = [np.bincount(episode.labels) for episode in episodes]
    assert {episode.way for episode in episodes} == {2, 3, 4, 5, 6}
    assert {int(shot) for found in shots for shot in found} == {1, 2, 3, 4, 5}
    assert {tuple(np.bincount(episode.answers)) for episode in episodes} == {(3,) * way for way in range(2, 7)}
    ragged = np.mean([len(set(found.tolist())) > 1 for found in shots])
    assert 0.2 < ragged < 0.6


def test_training_episodes_have_no_more_classes_than_there_are() -> None:
    ways = {
        e.way
        for step in range(10)
        for e in varied(Pool.of(labels(3)), 0, step, count=8, max_way=20, max_shot=1, queries=1)
    }
    assert ways == {2, 3}


def test_training_episodes_are_those_of_their_seed_and_step() -> None:
    pool = Pool.of(labels())
    settings = {"count": 6, "max_way": 6, "max_shot": 4, "queries": 2}
    first = list(varied(pool, 3, 10, **settings))
    assert equal(first, list(varied(pool, 3, 10, **settings)))
    assert digest(first) != digest(list(varied(pool, 3, 11, **settings)))
    assert digest(first) != digest(list(varied(pool, 4, 10, **settings)))


def test_every_second_training_episode_takes_classes_that_are_alike() -> None:
    side = np.arange(12) % 3  # not two of them: what is least alike to one would then be alike as well
    near = np.where(side[:, None] == side[None], 1.0, -5.0)
    classes = labels(12)
    episodes = [
        e
        for step in range(40)
        for e in varied(Pool.of(classes), 0, step, count=6, max_way=4, max_shot=2, queries=1, near=near)
    ]
    mixed = [len(set(side[classes[episode.support]].tolist())) > 1 for episode in episodes]
    assert not any(mixed[1::2])
    assert np.mean(mixed[::2]) > 0.5
    first = [int(classes[episode.support[0]]) for episode in episodes[1::2]]
    assert len(set(first)) == 12  # whichever class the others are like


def test_a_class_of_one_thing_is_called_by_its_name() -> None:
    with pytest.raises(DataError, match="Class 'birch' shows 1 thing; "):
        Pool.of(np.array([0, 0, 1]), names=("beech", "birch"))
