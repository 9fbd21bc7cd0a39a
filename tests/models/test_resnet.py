from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.torch


@pytest.fixture
def resnet(torch: ModuleType) -> Any:
    """models.resnet, which needs torch; weights come from a fixed seed."""
    from models import resnet as found

    torch.manual_seed(0)
    return found


def images(torch: ModuleType, n: int, side: int = 28, channels: int = 3) -> Any:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, side, side, channels), dtype=torch.uint8, generator=generator)


def lived_in(torch: ModuleType, backbone: Any) -> Any:
    """The same network with batch statistics that are not those of a new one."""
    generator = torch.Generator().manual_seed(2)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.running_mean, module.bias.data):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            for value in (module.running_var, module.weight.data):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return backbone.eval()


def test_bytes_of_images_become_features_of_unit_length_in_every_shape(resnet: Any, torch: ModuleType) -> None:
    for name, shape in resnet.SHAPES.items():
        extractor = resnet.ImageExtractor(resnet.ResNet(shape)).eval()
        with torch.inference_mode():
            features = extractor(images(torch, 3, channels=shape.channels))
        assert features.shape == (3, shape.dim), name
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_the_features_are_as_long_as_the_last_stage_is_wide(resnet: Any) -> None:
    assert resnet.Shape(width=64, blocks=(2, 2, 2, 2)).dim == 512
    assert resnet.SHAPES["tiny"].dim == 8


def test_an_image_has_the_same_features_alone_and_among_others(resnet: Any, torch: ModuleType) -> None:
    extractor = resnet.ImageExtractor(lived_in(torch, resnet.ResNet(resnet.SHAPES["tiny"]))).eval()
    batch = images(torch, 5)
    with torch.inference_mode():
        together = extractor(batch)
        alone = torch.cat([extractor(image[None]) for image in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_height_width_and_colours_are_told_apart(resnet: Any, torch: ModuleType) -> None:
    extractor = resnet.ImageExtractor(lived_in(torch, resnet.ResNet(resnet.SHAPES["tiny"]))).eval()
    batch = images(torch, 1)
    with torch.inference_mode():
        features = extractor(batch)
        for other in (batch.transpose(1, 2), batch.flip(3)):
            assert (extractor(other) - features).abs().max() > 1e-4


def test_the_centre_is_taken_from_every_feature(resnet: Any, torch: ModuleType) -> None:
    extractor = resnet.ImageExtractor(resnet.ResNet(resnet.SHAPES["tiny"]), torch.full((8,), 0.5))
    pooled = torch.rand(4, 8)
    expected = torch.nn.functional.normalize(pooled.sqrt() - 0.5, dim=1)
    torch.testing.assert_close(extractor.normalise(pooled), expected, rtol=1e-3, atol=1e-3)


def test_a_map_of_zeros_has_a_finite_feature_and_gradient(resnet: Any, torch: ModuleType) -> None:
    pooled = torch.zeros(1, 8, requires_grad=True)
    features = resnet.ImageExtractor(resnet.ResNet(resnet.SHAPES["tiny"])).normalise(pooled)
    features.sum().backward()
    assert torch.isfinite(features).all()
    assert torch.isfinite(pooled.grad).all()


def test_the_input_is_standardised_inside_the_network(resnet: Any, torch: ModuleType) -> None:
    backbone = lived_in(torch, resnet.ResNet(resnet.SHAPES["tiny"]))
    x = torch.rand(2, 3, 28, 28)
    with torch.inference_mode():
        before = backbone(x)
        backbone.mean.copy_(torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1))
        backbone.scale.fill_(2.0)
        after = backbone(((x - 0.5) * 4) / 2 + backbone.mean)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_every_weight(resnet: Any, torch: ModuleType) -> None:
    extractor = resnet.ImageExtractor(resnet.ResNet(resnet.SHAPES["tiny"])).train()
    extractor(images(torch, 4))[:, 0].sum().backward()
    for name, weight in extractor.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_folding_the_normalisation_away_leaves_the_features(resnet: Any, torch: ModuleType) -> None:
    for name in ("tiny", "tiny-grey", "resnet18"):
        shape = resnet.SHAPES[name]
        backbone = lived_in(torch, resnet.ResNet(shape))
        folded = resnet.fold(copy.deepcopy(backbone))
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        x = torch.rand(2, shape.channels, 28, 28)
        with torch.inference_mode():
            torch.testing.assert_close(folded(x), backbone(x), rtol=1e-3, atol=1e-3)
