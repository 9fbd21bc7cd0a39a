from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.torch


@pytest.fixture
def bytenet(torch: ModuleType) -> Any:
    """models.bytenet, which needs torch; weights come from a fixed seed."""
    from models import bytenet as found

    torch.manual_seed(0)
    return found


@pytest.fixture
def net(bytenet: Any, torch: ModuleType) -> Any:
    """A trunk whose layers are not the identities they start as."""
    made = bytenet.ByteNet(bytenet.SHAPES["tiny-bytes"])
    for layer in made.layers:
        torch.nn.init.normal_(layer.mix.weight, std=0.3)
    return made.eval()


def texts(torch: ModuleType, n: int, length: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (n, length), dtype=torch.uint8, generator=generator)


def test_a_place_knows_its_byte_and_those_within_reach_before_it_alone(net: Any, torch: ModuleType) -> None:
    given, reach = texts(torch, 1, 24), net.shape.reach
    assert reach == 1 + 2 * (1 + 2)
    before = net.places(given)[-1]
    for at in (0, 10, 23):
        changed = given.clone()
        changed[0, at] = 255 - changed[0, at]
        moved = (net.places(changed)[-1] - before).abs().amax(dim=(0, 1)) > 1e-6
        assert moved[at]
        assert not moved[:at].any()
        assert not moved[at + reach :].any()


def test_what_lies_behind_the_end_does_not_count(bytenet: Any, net: Any, torch: ModuleType) -> None:
    extractor, given = bytenet.TextExtractor(net), texts(torch, 2, 12)
    longer = torch.nn.functional.pad(given, (0, 30))
    with torch.inference_mode():
        assert torch.allclose(extractor(given), extractor(longer), atol=1e-6)


def test_features_have_the_size_that_the_shape_says_and_unit_length(bytenet: Any, net: Any, torch: ModuleType) -> None:
    extractor, given = bytenet.TextExtractor(net, torch.full((net.shape.dim,), 0.2)), texts(torch, 3, 24)
    with torch.inference_mode():
        pooled, features = net(given), extractor(given)
    assert pooled.shape == features.shape == (3, net.shape.dim) == (3, 16 * 3)
    assert (pooled >= 0).all()
    assert features.square().sum(dim=1).sqrt().tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
