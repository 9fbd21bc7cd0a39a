from __future__ import annotations

import pytest

from tests.training.conftest import needs, noise

pytestmark = pytest.mark.torch
needs("torch")

import torch
from torch import Tensor, nn

from models.resnet import SHAPES, ResNet
from training import heldout
from training.augment import AUGMENTATIONS
from training.folders import DataError
from training.heldout import HeldOut, kmeans
from training.objective import FLOOR, Fixed, Learned, Uncertainty, hypergradient, unchanged

CPU = torch.device("cpu")
GIVEN = {"a": 1.0, "b": 0.5, "c": 2.0}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tasks(images: int = 60) -> HeldOut:
    pixels = torch.from_numpy(noise(1, images).pixels)
    return HeldOut(pixels, AUGMENTATIONS["photos"], CPU)


def backbone() -> ResNet:
    torch.manual_seed(0)
    return ResNet(SHAPES["tiny"]).train()


def losses(*values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(float(value), requires_grad=True) for name, value in zip(GIVEN, values, strict=True)}


def test_fixed_weights_are_those_given() -> None:
    assert Fixed(GIVEN).total(losses(1, 2, 3)).item() == 8
    assert Fixed(GIVEN).weights() == GIVEN


def test_uncertainty_starts_at_the_weights_given_and_ends_where_weight_times_loss_is_one() -> None:
    """d/ds (exp(-s) L + s) = 0 where exp(-s) = 1 / L."""
    weighting = Uncertainty(GIVEN, CPU)
    assert weighting.weights() == pytest.approx(GIVEN)
    assert weighting.total(losses(1, 2, 3)).item() == pytest.approx(8)
    weighting.optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(300):
        weighting.total(losses(1, 2, 4)).backward()
        weighting.step()
    assert weighting.weights() == pytest.approx({"a": 1.0, "b": 0.5 / 2, "c": 2.0 / 4}, rel=0.02)


def test_learned_weights_start_in_the_ratio_given_sum_to_the_losses_and_keep_a_floor() -> None:
    weighting = Learned(GIVEN, tasks(), CPU, rate=0.1)
    free = {name: value - 3 * FLOOR for name, value in weighting.weights().items()}
    assert free["a"] / free["b"] == pytest.approx(2, rel=1e-4)
    assert free["c"] / free["a"] == pytest.approx(2, rel=1e-4)
    assert sum(weighting.weights().values()) == pytest.approx(3)
    weighting.numbers.data[:] = torch.tensor([50.0, 0.0, 0.0])
    assert weighting.weights() == pytest.approx({"a": 3 - 6 * FLOOR, "b": 3 * FLOOR, "c": 3 * FLOOR})


def test_before_anything_is_learned_the_losses_weigh_what_was_given_whatever_their_scale() -> None:
    weighting = Learned(dict.fromkeys("abc", 1.0), tasks(), CPU, rate=0.1)
    assert weighting.total(losses(1, 10, 0.01)).item() == pytest.approx(11.01)


def test_the_hypergradient_is_the_derivative_of_the_query_loss_by_the_weights() -> None:
    """Against a look-ahead that is differentiated through."""
    torch.manual_seed(1)
    weight, wanted = nn.Parameter(torch.randn(6, 4)), torch.randn(6, 4)
    anchors = torch.randn(3, 6, 4)

    def of(value: Tensor) -> dict[str, Tensor]:
        return {name: (value - anchor).square().sum().sqrt() for name, anchor in zip(GIVEN, anchors, strict=True)}

    rate = 0.05
    lambdas = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in of(weight).values()]
    ahead = weight - rate * torch.stack([lam * g for lam, g in zip(lambdas, gradients, strict=True)]).sum(dim=0)
    (exact,) = torch.autograd.grad((ahead - wanted).square().sum(), lambdas)

    before = weight.detach().clone()
    weight.data.copy_(ahead.detach())
    found = hypergradient([weight], [before], lambda: of(weight), lambda: (weight - wanted).square().sum())
    torch.testing.assert_close(rate * torch.tensor(list(found.values())), exact, rtol=1e-2, atol=1e-3)
    assert torch.equal(weight, ahead)


def test_a_loss_that_pulls_towards_the_query_gains_weight_and_its_opponent_loses() -> None:
    net = backbone()
    weighting = Learned({"helps": 1.0, "harms": 1.0}, tasks(), CPU, rate=0.1)
    size = 16

    def both() -> dict[str, Tensor]:
        loss = weighting.tasks.query_loss(net, size, rng(1))  # the same task each time
        return {"helps": loss, "harms": 5 - loss}

    for _ in range(3):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        weighting.total(both())
        weighting.learn(net, before, both, size, rng(1))
    assert weighting.weights()["helps"] > 1.1
    assert weighting.weights()["harms"] < 0.9


def test_trying_leaves_no_trace_in_running_statistics() -> None:
    net = backbone()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with unchanged(net):
        net(torch.rand(4, 3, 16, 16))
        assert not torch.equal(net.bn.running_mean, before["bn.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["uncertainty", "learned"])
def test_what_was_learned_comes_back_from_its_state(kind: str) -> None:
    def new() -> Uncertainty | Learned:
        return Uncertainty(GIVEN, CPU) if kind == "uncertainty" else Learned(GIVEN, tasks(), CPU, rate=0.1)

    def advance(weighting: Uncertainty | Learned, step: int) -> None:
        weighting.total(losses(1, 2 + step, 3)).backward()
        weighting.step()
        if isinstance(weighting, Learned):
            net = backbone()
            start = [parameter.detach().clone() for parameter in net.parameters()]

            def of_weights() -> dict[str, Tensor]:
                return {name: power * net.conv.weight.square().sum() for power, name in enumerate(GIVEN, 1)}

            weighting.learn(net, start, of_weights, 16, rng(step))

    unbroken, broken = new(), new()
    for step in range(4):
        advance(unbroken, step)
        advance(broken, step)
        fresh = new()
        fresh.restore(broken.state())
        broken = fresh
    assert broken.weights() == unbroken.weights()
    assert broken.weights() != new().weights()


def test_kmeans_finds_clusters_that_are_there() -> None:
    centres = nn.functional.normalize(torch.randn(3, 8, generator=rng()), dim=1)
    truth = torch.arange(60) % 3
    features = nn.functional.normalize(centres[truth] + 0.05 * torch.randn(60, 8, generator=rng(1)), dim=1)
    found = [kmeans(features, 3, rng(seed)) for seed in range(5)]
    pure = [all(len(set(part[truth == k].tolist())) == 1 for k in range(3)) for part in found]
    assert any(pure)  # from at least one of five starts
    assert torch.equal(found[0], kmeans(features, 3, rng(0)))


def test_a_task_is_of_whole_clusters_and_no_image_is_in_it_twice() -> None:
    held = tasks(60)
    held.query_loss(backbone(), 16, rng())
    rows, way = held._draw(rng(3))
    assert len(set(rows.tolist())) == len(rows)
    own = held.clusters[rows].reshape(way, -1)
    assert way >= 2
    assert all(len(set(row.tolist())) == 1 for row in own)
    assert len({int(row[0]) for row in own}) == way


def test_clusters_are_made_anew_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held, net, made = tasks(60), backbone(), 0
    cluster = held._cluster

    def counted(*given: object) -> None:
        nonlocal made
        made += 1
        cluster(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(held, "_cluster", counted)
    monkeypatch.setattr(heldout, "REFRESH", 3)
    for step in range(7):
        held.query_loss(net, 16, rng(step))
    assert made == 3
    assert net.training


def test_too_few_images_to_hold_out_are_refused() -> None:
    with pytest.raises(DataError, match="need 300 images or more"):
        tasks(29)
