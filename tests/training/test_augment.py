from __future__ import annotations

import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch")

import torch
from torch import Tensor

from training.augment import AUGMENTATIONS, Augmentation, Characters, Photos, close, mixed, turned_hue

CHANNELS = {"photos": 3, "strong": 3, "snapshots": 3, "characters": 1}
KINDS = pytest.mark.parametrize("name", list(CHANNELS))
STILL = Characters(rotate=0, shear=0, scale=0, shift=0, elastic=0, stroke=0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(name: str, n: int = 6, side: int = 24) -> Tensor:
    return torch.rand(n, CHANNELS[name], side, side, generator=rng(9))


def strokes(n: int = 8) -> Tensor:
    """A dark cross on white paper, n times."""
    page = torch.ones(n, 1, 28, 28)
    page[:, :, 12:15, 6:22] = 0
    page[:, :, 6:22, 12:15] = 0
    return page


def ink(pages: Tensor) -> Tensor:
    """How much of each page is dark, [n]."""
    return (1 - pages).mean(dim=(1, 2, 3))


def test_the_table_holds_every_kind() -> None:
    assert set(AUGMENTATIONS) == set(CHANNELS)


@KINDS
@pytest.mark.parametrize("size", [16, 24, 40])
def test_views_have_the_size_asked_for_and_stay_between_black_and_white(name: str, size: int) -> None:
    images = batch(name)
    images[0], images[1] = 0, 1
    views = AUGMENTATIONS[name](images, size, rng())
    assert views.shape == (6, CHANNELS[name], size, size)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1


@KINDS
def test_the_generator_alone_decides(name: str) -> None:
    augment, images = AUGMENTATIONS[name], batch(name)
    first = augment(images, 24, rng(1))
    torch.rand(5)  # nothing is drawn from the global generator
    assert torch.equal(first, augment(images, 24, rng(1)))
    assert not torch.equal(first, augment(images, 24, rng(2)))


@KINDS
def test_images_of_one_batch_and_two_draws_from_one_generator_differ(name: str) -> None:
    augment, images = AUGMENTATIONS[name], batch(name, 1).expand(5, -1, -1, -1)
    generator = rng()
    first, second = augment(images, 24, generator), augment(images, 24, generator)
    assert all((first[i] - first[j]).abs().max() > 0.05 for i in range(5) for j in range(i))
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 0.05


@KINDS
def test_the_images_given_are_left_as_they_are(name: str) -> None:
    images = batch(name)
    before = images.clone()
    AUGMENTATIONS[name](images, 24, rng())
    assert torch.equal(images, before)


def test_characters_without_any_strength_are_the_same() -> None:
    images = batch("characters")
    torch.testing.assert_close(STILL(images, 24, rng()), images, rtol=0, atol=1e-5)


def test_photos_without_any_strength_keep_their_colours() -> None:
    """The shape of the crop varies even then, so colour is seen on plain pictures."""
    colours = torch.rand(40, 3, 1, 1, generator=rng(3))
    views = Photos(crop=1, colour=0, grey=0)(colours.expand(-1, -1, 20, 20), 20, rng())
    torch.testing.assert_close(views, colours.expand(-1, -1, 20, 20), rtol=0, atol=1e-5)


def test_photos_are_cut_less_the_larger_the_smallest_crop() -> None:
    """On a ramp from left to right, the range that is left tells how wide the crop was."""
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)

    def width(crop: float) -> Tensor:
        views = Photos(crop=crop, colour=0, grey=0)(ramp, 64, rng())
        return views.amax(dim=(1, 2, 3)) - views.amin(dim=(1, 2, 3))

    assert width(1.0).min() > 0.8  # the square root of 3/4
    assert width(0.1).min() < 0.4
    assert width(0.1).mean() < width(0.5).mean() < width(1.0).mean()


def test_photos_are_mirrored_half_of_the_time_and_never_upside_down() -> None:
    side = torch.linspace(0, 1, 32)
    still = Photos(crop=1, colour=0, grey=0)
    across = still(side.expand(400, 3, 32, 32), 32, rng())
    rises = (across[:, 0, 16, -1] > across[:, 0, 16, 0]).float().mean()
    assert 0.4 < rises < 0.6
    down = still(side[:, None].expand(400, 3, 32, 32), 32, rng())
    assert (down[:, 0, -1, 16] > down[:, 0, 0, 16]).all()


def test_grey_photos_have_three_equal_channels_at_the_rate_asked_for() -> None:
    images = batch("photos", 200)

    def share(grey: float) -> float:
        views = Photos(colour=0, grey=grey)(images, 16, rng())
        return float(((views.amax(dim=1) - views.amin(dim=1)).amax(dim=(1, 2)) < 1e-5).float().mean())

    assert share(0) == 0
    assert 0.2 < share(0.3) < 0.4
    assert share(1) == 1


def test_colour_changes_photos_only_as_strongly_as_asked() -> None:
    plain = torch.full((300, 3, 16, 16), 0.5)
    moved = (Photos(colour=0.2, grey=0)(plain, 16, rng()) - 0.5).abs().amax(dim=(1, 2, 3))
    assert moved.max() <= 0.5 * 0.2 + 1e-5
    assert moved.max() > 0.5 * 0.2 * 0.8


def test_characters_stay_dark_on_light_with_paper_around_them() -> None:
    pages = strokes(64)
    views = Characters()(pages, 28, rng())
    assert (ink(views) > 0.4 * ink(pages)).all()
    assert (ink(views) < 2 * ink(pages)).all()
    assert views.amin(dim=(1, 2, 3)).max() < 0.3  # each has ink left
    corners = torch.cat([views[..., :2, :2], views[..., -2:, -2:]])
    assert corners.min() > 0.95


def test_stroke_width_goes_both_ways_from_what_was_drawn() -> None:
    pages = strokes(100)
    bolder = Characters(rotate=0, shear=0, scale=0, shift=0, elastic=0, stroke=0.8)
    amount = ink(bolder(pages, 28, rng()))
    assert amount.min() < 0.8 * ink(pages)[0]
    assert amount.max() > 1.2 * ink(pages)[0]


@pytest.mark.parametrize(
    "only",
    [
        Characters(rotate=15, shear=0, scale=0, shift=0, elastic=0, stroke=0),
        Characters(rotate=0, shear=0.3, scale=0, shift=0, elastic=0, stroke=0),
        Characters(rotate=0, shear=0, scale=0.2, shift=0, elastic=0, stroke=0),
        Characters(rotate=0, shear=0, scale=0, shift=0.12, elastic=0, stroke=0),
        Characters(rotate=0, shear=0, scale=0, shift=0, elastic=0.1, stroke=0),
        Characters(rotate=0, shear=0, scale=0, shift=0, elastic=0, stroke=0.5),
    ],
    ids=["rotate", "shear", "scale", "shift", "elastic", "stroke"],
)
def test_each_strength_does_something_of_its_own(only: Augmentation) -> None:
    pages = strokes()
    changed = (only(pages, 28, rng()) - pages).abs().amax(dim=(1, 2, 3))
    assert changed.max() > 0.1
    assert len(set(changed.tolist())) > 1


def test_a_mixed_image_is_of_two_classes_by_how_much_of_each_is_seen() -> None:
    n = 6
    images = torch.arange(n).float()[:, None, None, None].expand(n, 3, 20, 20) / n  # each of one colour
    labels = torch.arange(n) % 4
    rng, mixes = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        found, shares = mixed(images, labels, 4, rng)
        assert shares.shape == (n, 4)
        for image, share in zip((found * n).round().long(), shares, strict=True):
            seen = torch.bincount(labels[image[0].flatten()], minlength=4) / image[0].numel()
            torch.testing.assert_close(share, seen)
        mixes += bool((shares.max(dim=1).values < 1).any())
    assert 4 <= mixes <= 16


def test_a_turned_hue_leaves_greys_and_brings_red_to_green_to_blue() -> None:
    grey = torch.full((3,), 0.4)
    for matrix in turned_hue(torch.tensor([0.0, 0.1, -0.3, 0.5])):
        torch.testing.assert_close(matrix @ grey, grey)
    third = turned_hue(torch.tensor([1 / 3]))[0]
    torch.testing.assert_close(third @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(turned_hue(torch.ones(1))[0], torch.eye(3), atol=1e-6, rtol=0)


def test_the_hue_of_a_coloured_page_changes_and_that_of_a_grey_one_does_not() -> None:
    augment = Photos(colour=0, grey=0, hue=0.2)
    red = torch.zeros(8, 3, 16, 16)
    red[:, 0] = 0.5
    views = augment(red, 16, rng())
    assert views[:, 1:].amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(augment(torch.full((8, 3, 16, 16), 0.5), 16, rng()), torch.full((8, 3, 16, 16), 0.5))


def test_a_detail_shows_less_of_a_photo_than_any_view_and_characters_stay_whole() -> None:
    """Of a ramp from black to white, the part that is seen is as wide as its span of greys."""
    strong = AUGMENTATIONS["strong"]
    assert isinstance(strong, Photos)
    plain = Photos(crop=strong.crop, colour=0, grey=0)
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    spans = [
        (views.amax(dim=(1, 2, 3)) - views.amin(dim=(1, 2, 3)))
        for views in (plain(ramp, 16, rng()), close(plain)(ramp, 16, rng()))
    ]
    assert spans[0].min() > 0.8 * spans[1].min()
    assert spans[1].max() < spans[0].mean()
    assert close(AUGMENTATIONS["characters"]) == AUGMENTATIONS["characters"]
