from __future__ import annotations

import itertools

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from torch import Tensor
from torch.nn import functional as F

from models.resnet import SHAPES, ResNet
from training.losses import nt_xent
from training.objectives import OBJECTIVES, Kept, Posed, View, rotated
from training.objectives.clusters import Clusters, sinkhorn
from training.objectives.contrastive import Contrastive
from training.objectives.jigsaw import Jigsaw, shuffled
from training.objectives.labels import Supervised
from training.objectives.momentum import Momentum
from training.objectives.reconstruction import SIDE, Reconstruction
from training.objectives.rotation import Rotation

DIM, CLASSES, N = 8, 5, 10
POSED = [name for name, objective in OBJECTIVES.items() if objective.views == 0]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def backbone() -> ResNet:
    return ResNet(SHAPES["tiny"]).train()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int = N, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=rng(seed))


def seen(count: int = 2, n: int = N) -> list[View]:
    """Views whose pooled features have gradients of their own."""
    views = []
    for number in range(count):
        maps = torch.rand(n, DIM, 4, 4, generator=rng(number)).requires_grad_()
        views.append(View(noise(n, seed=number), maps, maps.mean(dim=(2, 3))))
    return views


def looked_at(backbone: ResNet, images: Tensor) -> View:
    maps = backbone.maps(images)
    return View(images, maps, maps.mean(dim=(2, 3)))


def labels() -> Tensor:
    return torch.arange(N) % CLASSES


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in POSED])
def test_each_objective_reads_the_views_and_labels_that_it_says(name: str, backbone: ResNet) -> None:
    objective = OBJECTIVES[name](backbone, CLASSES)
    views = seen()
    loss = objective(views, labels())
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    loss.backward()
    read = sum(view.maps.grad is not None and bool(view.maps.grad.any()) for view in views)
    assert read == objective.views
    other = objective(views, labels().roll(1))
    assert objective.uses_labels == (not torch.equal(other, loss))
    assert all(weight.grad.abs().max() > 0 for weight in objective.parameters() if weight.requires_grad)


@pytest.mark.parametrize("name", POSED)
def test_each_posed_objective_asks_of_altered_images_and_its_answers_count(name: str, backbone: ResNet) -> None:
    objective = OBJECTIVES[name](backbone, CLASSES)
    assert isinstance(objective, Posed)
    assert 0 < objective.share <= 1
    images = noise()
    kept = images.clone()
    altered, answers = objective.pose(images, rng(2))
    assert altered.shape == images.shape
    assert len(answers) == N
    assert torch.equal(images, kept)
    assert not torch.equal(altered, images)
    again, same = objective.pose(images, rng(2))
    assert torch.equal(altered, again)
    assert torch.equal(answers, same)
    view = looked_at(backbone, altered)
    loss = objective([view], answers)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(weight.grad.abs().max() > 0 for weight in objective.parameters())
    assert backbone.conv.weight.grad is not None
    assert objective([view], answers.roll(1, 0)) != loss


def test_contrastive_is_the_loss_on_projections_of_both_views_together(backbone: ResNet) -> None:
    objective = Contrastive(backbone, CLASSES, hidden=16, out=4, temperature=0.3)
    first, second = seen()
    projected = objective.project(torch.cat([first.pooled, second.pooled]))
    assert projected.shape == (2 * N, 4)
    expected = nt_xent(projected[:N], projected[N:], temperature=0.3)
    torch.testing.assert_close(objective([first, second], labels()), expected)


@pytest.mark.parametrize("name", ["contrastive", "clusters"])
def test_those_of_two_views_leave_further_ones_alone(name: str, backbone: ResNet) -> None:
    objective = OBJECTIVES[name](backbone, CLASSES)
    views = seen(3)
    torch.testing.assert_close(objective(views, labels()), objective(views[:2], labels()))


def test_supervised_is_cross_entropy_with_smoothed_labels(backbone: ResNet) -> None:
    objective = Supervised(backbone, CLASSES, smoothing=0.1)
    (view,) = seen(1)
    logs = torch.log_softmax(objective.classify(view.pooled), dim=1)
    target = torch.full((N, CLASSES), 0.1 / CLASSES)
    target[torch.arange(N), labels()] += 0.9
    torch.testing.assert_close(objective([view], labels()), -(target * logs).sum(dim=1).mean())


def test_supervised_has_an_answer_for_every_class(backbone: ResNet) -> None:
    assert Supervised(backbone, 11)(seen(1), torch.full((N,), 10)).isfinite()
    with pytest.raises(IndexError):
        Supervised(backbone, 10)(seen(1), torch.full((N,), 10))


def test_the_answers_of_rotation_are_the_turns_made(backbone: ResNet) -> None:
    images = noise()
    altered, turns = Rotation(backbone, CLASSES).pose(images, rng(2))
    assert set(turns.tolist()) <= {0, 1, 2, 3}
    assert len(set(turns.tolist())) > 1
    for image, turn, found in zip(images, turns, altered, strict=True):
        assert torch.equal(torch.rot90(image, int(turn), (1, 2)), found)


def test_rotated_turns_each_image_by_its_own_quarter_turns() -> None:
    images = torch.arange(2 * 9, dtype=torch.float32).reshape(2, 1, 3, 3)
    found = rotated(images, torch.tensor([0, 3]))
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], torch.rot90(images[1], 3, (1, 2)))


def test_shuffled_lays_each_tile_where_its_order_says_and_leaves_the_rest() -> None:
    images = torch.arange(2 * 25, dtype=torch.float32).reshape(2, 1, 5, 5)
    found = shuffled(images, torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]]), 2)
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1, 0, :2, :2], images[1, 0, 2:4, 2:4])  # tile 3 in place 0
    assert torch.equal(found[1, 0, :2, 2:4], images[1, 0, :2, :2])  # tile 0 in place 1
    assert torch.equal(found[1, 0, 2:4, 2:4], images[1, 0, 2:4, :2])  # tile 2 in place 3
    assert torch.equal(found[:, :, 4], images[:, :, 4])
    assert torch.equal(found[:, :, :, 4], images[:, :, :, 4])


def test_jigsaw_has_an_answer_for_every_order(backbone: ResNet) -> None:
    objective = Jigsaw(backbone, CLASSES)
    assert sorted(map(tuple, objective.orders.tolist())) == sorted(itertools.permutations(range(4)))
    altered, answers = objective.pose(noise(200, 4), rng())
    assert len(set(answers.tolist())) > 15
    back = torch.argsort(objective.orders[answers], dim=1)
    assert torch.equal(shuffled(altered, back, 2), noise(200, 4))


@pytest.mark.parametrize("size", [16, 21])
def test_reconstruction_hides_half_to_three_fifths_of_the_blocks_and_asks_for_what_was_there(
    size: int, backbone: ResNet
) -> None:
    images = noise(size=size)
    masked, answers = Reconstruction(backbone, CLASSES).pose(images, rng())
    pixels, mask = answers[:, :3], answers[:, 3:]
    assert torch.equal(pixels, images)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masked, torch.where(mask > 0, 0.5, images))
    if size % SIDE == 0:
        blocks = F.avg_pool2d(mask, size // SIDE)
        assert set(blocks.unique().tolist()) == {0.0, 1.0}  # whole blocks
        shares = blocks.mean(dim=(1, 2, 3))
        assert bool(((shares > 0.49) & (shares < 0.61)).all())
        assert len(shares.unique()) > 1


def test_reconstruction_scores_the_hidden_blocks_alone_and_not_how_bright_they_are(backbone: ResNet) -> None:
    objective = Reconstruction(backbone, CLASSES)
    images = noise()
    masked, answers = objective.pose(images, rng())
    view = looked_at(backbone, masked)
    mask = answers[:, 3:]
    with torch.no_grad():
        loss = objective([view], answers)
        elsewhere = torch.cat([torch.where(mask > 0, images, 0.3), mask], dim=1)
        torch.testing.assert_close(objective([view], elsewhere), loss)
        brighter = torch.cat([images + 0.2, mask], dim=1)
        torch.testing.assert_close(objective([view], brighter), loss, rtol=1e-4, atol=1e-5)
        within = torch.cat([torch.where(mask > 0, 1 - images, images), mask], dim=1)
        assert abs(objective([view], within) - loss) > 1e-4


def test_sinkhorn_gives_every_image_whole_and_every_cluster_its_share() -> None:
    scores = torch.rand(64, 8, generator=rng()) * 0.3
    scores[:, 0] += 0.3  # without it, all would go there
    shares = sinkhorn(scores, rounds=50)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(shares.sum(dim=0), torch.full((8,), 8.0), rtol=0.02, atol=0.0)
    assert len(set(scores.argmax(dim=1).tolist())) == 1
    assert len(set(shares.argmax(dim=1).tolist())) == 8


def test_clusters_ask_each_view_for_the_assignment_of_the_other(backbone: ResNet) -> None:
    objective = Clusters(backbone, CLASSES, prototypes=6)
    first, second = seen()
    z = F.normalize(objective.project(torch.cat([first.pooled, second.pooled])), dim=1)
    a, b = (z @ F.normalize(objective.prototypes, dim=1).T).chunk(2)
    one = -(sinkhorn(b) * torch.log_softmax(a / 0.1, dim=1)).sum(dim=1).mean()
    two = -(sinkhorn(a) * torch.log_softmax(b / 0.1, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(objective([first, second], labels()), (one + two) / 2)


def test_the_queue_takes_keys_in_a_ring_and_only_when_kept(backbone: ResNet) -> None:
    objective = Momentum(backbone, CLASSES, hidden=16, out=4, slots=25).train()
    assert isinstance(objective, Kept)
    start = objective.queue.clone()
    for step in range(3):
        views = [looked_at(backbone, noise(seed=2 * step + number)) for number in range(2)]
        for _ in range(2):  # a loss may be asked for more often than a step is made
            objective(views, labels())
        with torch.no_grad():
            pooled = objective.slow["backbone"](views[0].images)
            keys = F.normalize(objective.slow["project"](pooled), dim=1)
        objective.keep(backbone)
        places = (step * N + torch.arange(N)) % 25
        torch.testing.assert_close(objective.queue[places], keys)
        if step == 0:
            assert torch.equal(objective.queue[N:], start[N:])
    assert int(objective.at) == 5
    before = objective.queue.clone()
    objective.keep(backbone)  # nothing was asked since
    assert torch.equal(objective.queue, before)


def test_the_slow_copy_follows_weights_and_statistics_and_is_not_trained(backbone: ResNet) -> None:
    objective = Momentum(backbone, CLASSES, decay=0.9).train()
    slow = objective.slow["backbone"]
    assert not slow.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(slow.state_dict()[name], value)
    with torch.no_grad():
        backbone.conv.weight += 1
        backbone.bn.running_mean += 2
    weight, mean = slow.conv.weight.clone(), slow.bn.running_mean.clone()
    objective.keep(backbone)
    torch.testing.assert_close(slow.conv.weight, weight + 0.1)
    torch.testing.assert_close(slow.bn.running_mean, mean + 0.2)
    views = [looked_at(backbone, noise(seed=number)) for number in range(2)]
    objective(views, labels()).backward()
    assert all(parameter.grad is None for parameter in objective.slow.parameters())


def test_momentum_finds_the_other_view_of_the_same_image(backbone: ResNet) -> None:
    """With the same image in both views and a projector like its copy, question and answer are alike."""
    objective = Momentum(backbone, CLASSES).eval()
    backbone.eval()
    same = looked_at(backbone, noise())
    other = looked_at(backbone, noise(seed=9))
    with torch.no_grad():
        assert objective([same, same], labels()) < objective([same, other], labels())


def test_momentum_asks_about_details_by_both_views_of_their_image(backbone: ResNet) -> None:
    objective = Momentum(backbone, CLASSES).eval()
    backbone.eval()
    first, second, other = (looked_at(backbone, noise(seed=seed)) for seed in (1, 2, 3))
    small = looked_at(backbone, noise(size=8, seed=4))
    with torch.no_grad():
        plain = objective([first, second], labels())
        # A detail that looks like a view is told more easily than one of something else.
        alike, unlike = objective([first, second, first], labels()), objective([first, second, other], labels())
        assert alike < unlike
        assert objective([first, second, small], labels()) != plain
        # The views count as before: two of four losses.
        own = 2 * alike - plain
        expected = objective([first, first], labels()) / 2 + plain / 2
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
