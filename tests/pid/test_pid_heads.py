"Small heads on held-out samples read known answers, labels and numbers, linear and not"
import json
import math
import warnings

import pytest
import torch

from pid_ssl.config import project_root
from pid_ssl.pid import pid_samples
from pid_ssl.pid.heads import cross_fit, normal_scores
from pid_ssl.pid.samples import recommended


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, d, a, seed=0):
    "Views with corr(z_i, t) = a in every coordinate, independent given t"
    t, *noise = torch.randn(3, n, d, generator=generator(seed))
    return *(a * t + math.sqrt(1 - a * a) * e for e in noise), t


@pytest.mark.parametrize("seed", range(3))
def test_exclusive_or_is_one_bit_of_synergy(seed):
    a, b = torch.randint(2, (2, 1000), generator=generator(seed))
    z = [2.0 * x.unsqueeze(1) - 1 + 0.1 * torch.randn(1000, 1, generator=generator(10 + seed)) for x in (a, b)]
    found = pid_samples(*z, a ^ b, "heads", base=2, seed=seed)
    assert abs(found.synergy - 1) < 0.05 and found.atoms[:3].abs().max() < 0.05, found


@pytest.mark.parametrize("change", [lambda t: t, torch.exp, lambda t: t**3])
def test_a_gaussian_channel_whatever_rising_function_is_applied(change):
    z1, z2, t = gaussian(4000, 1, 0.6)
    found = pid_samples(z1, z2, change(t), "heads", base=2)
    alone, both = (-math.log2(1 - r) / 2 for r in (0.36, 2 * 0.36 / 1.36))
    assert abs(found.i1 - alone) < 0.06 and abs(found.i2 - alone) < 0.06 and abs(found.joint - both) < 0.06


def test_several_numbers_one_after_the_other():
    "Two coordinates whose sum is told by the first source and whose difference by the second"
    a, b, *noise = torch.randn(4, 4000, 1, generator=generator())
    z1, z2 = a + 0.5 * noise[0], b + 0.5 * noise[1]
    found = pid_samples(z1, z2, torch.cat([a + b, a - b], 1), "heads", base=2)
    told = math.log2(1 + 4) / 2
    assert abs(found.i1 - told) < 0.1 and abs(found.i2 - told) < 0.1 and abs(found.joint - 2 * told) < 0.15, found


def test_the_sign_of_a_product():
    "A number that is large where two signs agree: each source alone tells nothing, together one bit, less the edges"
    signs = torch.randint(2, (2, 4000, 1), generator=generator()) * 2.0 - 1
    z, t = torch.randn(3, 4000, 1, generator=generator(1)).split([2, 1])
    z, t = signs + 0.1 * z, signs.prod(0) + 0.2 * t[0]
    found = pid_samples(*z, t, "heads", base=2)
    assert 0.8 < found.synergy < 1.02 and found.atoms[:3].abs().max() < 0.05, found


def test_nothing_is_told_of_what_is_not_there():
    z1, z2, t = torch.randn(3, 2000, 2, generator=generator())
    for target in (t[:, :1], t[:, 0] > 0):
        assert cross_fit(z1, z2, target.float() if target.ndim > 1 else target.long()).mean(0).abs().max() < 0.03


def test_interval_holds_what_more_would_bring():
    z = gaussian(400, 1, 0.6)
    found = pid_samples(*z, "heads", interval="jackknife", replicates=5, steps=60)
    half = cross_fit(*z, steps=60, share=0.5).mean(0)
    low, high = found.interval["joint"]
    assert low < found.joint < high and high - found.joint >= (found.joint - half[2]).abs()


def test_seeds_repeat_and_leave_the_global_generator_alone():
    z, before = gaussian(200, 1, 0.5), torch.random.get_rng_state()
    first, again, other = (cross_fit(*z, steps=10, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state()) and first.shape == (200, 3)


def test_what_cannot_be_read_is_said():
    z1, z2, t = gaussian(200, 1, 0.5)
    few, labels = [x[:30] for x in (z1, z2, t)], (z1[:, 0] > 0, z2, t)
    for given, options, words in ((labels, {}, "z1 holds labels"), (few, {}, "n=30"),
                                  ((z1, z2, t), {"folds": 1}, "folds=1"), ((z1, z2, t), {"hidden": 0}, "hidden=0")):
        with pytest.raises(ValueError, match=words), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid_samples(*given, "heads", **options)
    assert normal_scores(t).std() == pytest.approx(1, abs=0.02)
