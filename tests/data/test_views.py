"""Batched views against torchvision v2 applied to one image after another: the same operation on the same numbers, and
the same distribution of what is drawn.

Seeds are fixed, so a test passes or fails for good; p-values below 1e-4 count as a difference.
"""

import functools

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pid_ssl.data import views
from pid_ssl.data import load_dataset
from pid_ssl.data.views import (
    POLICIES,
    Policy,
    ViewMaker,
    affine_parameters,
    draw_colour,
    gaussian_blur,
    jitter_colour,
    resample,
)

SIDE = 32
CROP = Policy(crop=(0.08, 1.0), flip=0.5, boxes="pixels")
COLOUR = Policy(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, gray=0.2)


@functools.cache
def images():
    """Smooth colour images with edges: not every machine has photographs."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(
        torch.rand(64, 3, 6, 6, generator=g), size=(SIDE, SIDE), mode="bicubic", align_corners=False
    )
    x[:, :, 10:20, 5:25] = torch.rand(64, 3, 1, 1, generator=g)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def boxes(policy, n, seed=0):
    """Width, height, left, top in pixels, and whether flipped."""
    theta = affine_parameters(n, policy, torch.Generator().manual_seed(seed), SIDE)
    w, h = theta[:, 0, 0].abs() * SIDE, theta[:, 1, 1] * SIDE
    return (
        w,
        h,
        (theta[:, 0, 2] + 1) / 2 * SIDE - w / 2,
        (theta[:, 1, 2] + 1) / 2 * SIDE - h / 2,
        (theta[:, 0, 0] < 0).float(),
    )


def test_crop_of_a_box_is_torchvisions():
    x = images().float() / 255
    theta = affine_parameters(len(x), CROP, torch.Generator().manual_seed(3), SIDE)
    ours, theirs = resample(x, theta, CROP), []
    for image, w, h, left, top, flipped in zip(x, *boxes(CROP, len(x), seed=3)):
        out = tv.resized_crop(
            image, round(top.item()), round(left.item()), round(h.item()), round(w.item()), [SIDE, SIDE], antialias=True
        )
        theirs.append(tv.horizontal_flip(out) if flipped else out)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=1e-4)  # coordinates in float32


@functools.cache
def torchvisions_boxes(n, area):
    torch.manual_seed(1)
    draw, image = v2.RandomResizedCrop(SIDE, scale=area), torch.zeros(3, SIDE, SIDE)
    rows = [draw.make_params([image]) for _ in range(n)]
    return tuple(np.array([r[k] for r in rows]) for k in ("width", "height", "left", "top"))


def same_histogram(a, b):
    """p of a chi-square test that two samples of whole numbers are draws of one distribution; rare values are put
    together."""
    values = np.union1d(a, b)
    table = np.array([[np.sum(s == v) for v in values] for s in (a, b)])
    rare = table.sum(0) < 20
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1, keepdims=True)] if rare.any() else [table])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.6, 1.0)])
def test_boxes_have_torchvisions_distribution(area):
    n = 20_000
    ours = [v.round().int().numpy() for v in boxes(Policy(crop=area, flip=0.5, boxes="pixels"), n)]
    w, h, left, top = torchvisions_boxes(n, area)
    for name, a, b in (
        ("area", ours[0] * ours[1], w * h),
        ("width", ours[0], w),
        ("height", ours[1], h),
        ("left", ours[2], left),
        ("top", ours[3], top),
    ):
        assert same_histogram(a, b) > 1e-4, name
    assert stats.ks_2samp(np.log(ours[0] / ours[1]), np.log(w / h)).pvalue > 1e-4, "aspect"
    assert stats.binomtest(int(ours[4].sum()), n, 0.5).pvalue > 1e-4, "flip"


def test_the_comparison_of_boxes_can_fail():
    """Boxes that are cut at the border, where torchvision draws again, fail the comparison."""
    w, h, *_ = (v.round().int().numpy() for v in boxes(Policy(crop=(0.6, 1.0)), 20_000))
    theirs = torchvisions_boxes(20_000, (0.6, 1.0))
    assert same_histogram(w, theirs[0]) < 1e-4 and same_histogram(w * h, theirs[0] * theirs[1]) < 1e-4


def test_jitter_has_torchvisions_distribution():
    """Mean and spread of each channel, and how channels go together, over 3,000 views of one image; ours in batches of
    two, which share the order of the operations."""
    image, n = images()[7].float() / 255, 3000
    theirs = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)])
    torch.manual_seed(0)
    b = torch.stack([theirs(image) for _ in range(n)])
    g = torch.Generator().manual_seed(0)
    a = torch.cat([jitter_colour(image.expand(2, -1, -1, -1), draw_colour(2, COLOUR, g)) for _ in range(n // 2)])
    for name, of in colour_statistics().items():
        assert stats.ks_2samp(of(a), of(b)).pvalue > 1e-4, name
    other = Policy(**{**COLOUR.__dict__, "hue": 0.15})
    c = torch.cat([jitter_colour(image.expand(2, -1, -1, -1), draw_colour(2, other, g)) for _ in range(n // 2)])
    assert min(stats.ks_2samp(of(c), of(b)).pvalue for of in colour_statistics().values()) < 1e-4, (
        "half as much hue again fails the comparison"
    )


def colour_statistics():
    # to five digits: a fifth of the images is left alone, up to rounding errors that differ
    out = {f"mean of channel {c}": lambda x, c=c: x[:, c].mean((1, 2)) for c in range(3)}
    out |= {f"spread of channel {c}": lambda x, c=c: x[:, c].std((1, 2)) for c in range(3)}
    out |= {
        f"channels {c}, {d}": lambda x, c=c, d=d: (x[:, c] - x[:, d]).std((1, 2)) for c, d in ((0, 1), (0, 2), (1, 2))
    }
    # hue, seen in one patch of one colour: which way the channels differ
    out["hue of a patch"] = lambda x: torch.atan2(
        3**0.5 * (x[:, 1] - x[:, 2])[:, 12:18, 8:20].mean((1, 2)),
        (2 * x[:, 0] - x[:, 1] - x[:, 2])[:, 12:18, 8:20].mean((1, 2)),
    )
    return {k: lambda x, f=f: np.round(f(x).double().numpy(), 5) for k, f in out.items()}


def recipe(policy):
    """A policy with torchvision's transforms, one image at a time."""
    reach = max(1, SIDE // 20)
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=policy.crop, antialias=True),
            v2.RandomHorizontalFlip(policy.flip),
            v2.RandomApply(
                [v2.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)], p=policy.jitter
            ),
            v2.RandomGrayscale(policy.gray),
            v2.RandomApply([v2.GaussianBlur(2 * reach + 1, policy.blur_sigma)], p=policy.blur),
            v2.RandomSolarize(0.5, p=policy.solarize),
        ]
    )


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_whole_views_have_torchvisions_distribution(name):
    """Pixel means and covariance over 2,000 views of one image, pixel by pixel, and the law along random and principal
    directions."""
    image, n = images()[11], 2000
    torch.manual_seed(2)
    transform = recipe(POLICIES[name])
    b = torch.stack([transform(image.float() / 255) for _ in range(n)]).flatten(1).double()
    make = ViewMaker(name, [0.0] * 3, [1.0] * 3, seed=5)
    a = torch.cat([make(image.expand(2, -1, -1, -1)) for _ in range(n // 2)]).flatten(1).double()
    torch.manual_seed(0)
    se = ((a.var(0) + b.var(0)) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() / se).max() < 5.2, (
        "means: 5.2 is what the largest of 3,072 reaches once in 1,600 times"
    )
    g = torch.Generator().manual_seed(0)
    directions = torch.cat(
        [torch.randn(a.shape[1], 20, generator=g, dtype=torch.float64), torch.svd_lowrank(b - b.mean(0), q=10)[2]], 1
    )
    for i, (x, y) in enumerate(zip((a @ directions).T, (b @ directions).T)):
        assert stats.ks_2samp(x.numpy(), y.numpy()).pvalue > 1e-5, i
    # covariance of each pixel with ten others, by the standard error of a mean of products
    i, j = torch.randint(0, a.shape[1], (2, 3000), generator=g)
    products = [(x - x.mean(0))[:, i] * (x - x.mean(0))[:, j] for x in (a, b)]
    z = (products[0].mean(0) - products[1].mean(0)) / ((products[0].var(0) + products[1].var(0)) / n).sqrt()
    assert z.abs().max() < 5.2


def test_blur_is_torchvisions():
    x, sigma = images()[:4].float() / 255, torch.tensor([0.1, 0.5, 1.0, 2.0])
    theirs = torch.stack([tv.gaussian_blur(v, [3, 3], [s.item()] * 2) for v, s in zip(x, sigma)])
    torch.testing.assert_close(gaussian_blur(x, sigma), theirs, rtol=0, atol=1e-6)
    large = torch.nn.functional.interpolate(x, size=(96, 96))
    theirs = torch.stack([tv.gaussian_blur(v, [9, 9], [s.item()] * 2) for v, s in zip(large, sigma)])
    torch.testing.assert_close(gaussian_blur(large, sigma), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "operation, factor, theirs",
    [
        ("brightness", 1.3, tv.adjust_brightness),
        ("contrast", 0.7, tv.adjust_contrast),
        ("saturation", 1.4, tv.adjust_saturation),
        ("hue", 0.08, tv.adjust_hue),
    ],
)
def test_one_colour_operation_is_torchvisions(operation, factor, theirs, monkeypatch):
    x, amount = images()[:8].float() / 255, factor if operation == "hue" else factor - 1
    # every draw comes out at the end of its range
    monkeypatch.setattr(
        views, "_uniform", lambda n, lo, hi, g: torch.full((n,), max(lo, hi) if amount > 0 else min(lo, hi))
    )
    ours = jitter_colour(x, draw_colour(8, Policy(jitter=1.0, **{operation: abs(amount)}), torch.Generator()))
    torch.testing.assert_close(ours, torch.stack([theirs(v, factor) for v in x]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"none"}))
def test_same_seed_same_views(name):
    data = load_dataset("digits").images["train"][:16] if name == "digits" else images()[:16]
    make = lambda seed: ViewMaker(name, [0.5] * data.shape[1], [0.25] * data.shape[1], seed)
    one, two, three = make(1), make(1), make(2)
    first = one(data)
    assert torch.equal(first, two(data)) and not torch.equal(first, three(data)) and not torch.equal(first, one(data))
    state = one.state()
    fourth = one(data)
    three.load_state(state)
    assert torch.equal(three(data), fourth), "goes on where a checkpoint left it"
    shares = torch.cat(
        [
            ViewMaker(name, [0.5] * data.shape[1], [0.25] * data.shape[1], 1, share=(rank, 4))(part)
            for rank, part in enumerate(data.chunk(4))
        ]
    )
    assert torch.equal(shares, first), "an image's view does not depend on the number of processes"
