"Gaussian decompositions: the closed form against searches, invariances, precision, refusals"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pid_ssl.pid import (gaussian_information, gaussian_mi, gaussian_mi_bias, pid_gaussian, sample_covariance,
                         scalar_information)
from pid_ssl.pid.gaussian import union_coupling, union_objective, whitened_channels

CHECKS = settings(max_examples=60, deadline=None, derandomize=True)
dims3 = st.tuples(*[st.integers(1, 4)] * 3)
seeds = st.integers(0, 2**31)


def random_cov(seed, d, samples=2):
    x = torch.randn(d, samples * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / x.shape[-1]


def union(cov, dims):
    pid = pid_gaussian(cov, dims, "broja")
    return pid.joint - pid.synergy


@CHECKS
@given(dims3, seeds)
def test_atoms_order_and_consistency(dims, seed):
    cov = random_cov(seed, sum(dims))
    broja, mmi = pid_gaussian(cov, dims, "broja"), pid_gaussian(cov, dims, "mmi")
    assert broja.atoms.min() >= -1e-9 and mmi.atoms.min() >= -1e-9
    assert broja.redundancy <= mmi.redundancy + 1e-9
    for pid in (broja, mmi):
        for read, expected in zip((pid.i1, pid.i2, pid.joint), gaussian_information(cov, dims)):
            assert abs(read - expected) < 1e-9
    if dims[2] == 1:  # Barrett 2015: one target coordinate
        assert (broja.atoms - mmi.atoms).abs().max() < 1e-9


@CHECKS
@given(dims3, seeds)
def test_no_coupling_does_better_and_one_does_as_well(dims, seed):
    cov = random_cov(seed, sum(dims))
    h1, h2 = whitened_channels(cov, dims)
    least = union(cov, dims)
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(200, dims[0], dims[1], generator=g, dtype=torch.float64)
    k = k / torch.linalg.matrix_norm(k, 2)[:, None, None] * torch.rand(200, 1, 1, generator=g, dtype=torch.float64)
    assert union_objective(h1, h2, 0.999 * k).min() >= least - 1e-9
    best = union_coupling(h1, h2)
    assert torch.linalg.matrix_norm(best, 2) <= 1 + 1e-8
    assert abs(union_objective(h1, h2, (1 - 1e-9) * best) - least) < 1e-6


@CHECKS
@given(dims3, seeds)
def test_invariance_under_coordinates_and_swap(dims, seed):
    d1, d2, dt = dims
    cov = random_cov(seed, d1 + d2 + dt)
    g = torch.Generator().manual_seed(seed + 1)
    frames = []
    for d in dims:
        turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
        frames.append(turn @ torch.diag(0.5 + torch.rand(d, generator=g, dtype=torch.float64)))
    m = torch.block_diag(*frames)
    swap = torch.cat([torch.arange(d1, d1 + d2), torch.arange(d1), torch.arange(d1 + d2, d1 + d2 + dt)])
    for measure in ("broja", "mmi"):
        pid = pid_gaussian(cov, dims, measure).atoms
        assert (pid - pid_gaussian(m @ cov @ m.mT, dims, measure).atoms).abs().max() < 1e-8
        swapped = pid_gaussian(cov[swap][:, swap], (d2, d1, dt), measure).atoms
        assert (pid - swapped[[0, 2, 1, 3]]).abs().max() < 1e-8


@CHECKS
@given(seeds)
def test_scalar_formulas_are_the_determinants(seed):
    cov = random_cov(seed, 3)
    sd = torch.diagonal(cov).sqrt()
    r = cov / sd / sd[:, None]
    read = torch.stack(scalar_information(r[0, 2], r[1, 2], r[0, 1]))
    assert (read - torch.stack(gaussian_information(cov, (1, 1, 1)))).abs().max() < 1e-9


def test_batch_shape():
    cov = torch.stack([random_cov(s, 6) for s in range(6)]).view(2, 3, 6, 6)
    for measure in ("mmi", "broja"):
        pid = pid_gaussian(cov, (1, 2, 3), measure)
        assert pid.redundancy.shape == pid.gap.shape == (2, 3) and (0 <= pid.gap).all() and (pid.gap < 1e-10).all()
        assert (pid.atoms[1, 2] - pid_gaussian(cov[1, 2], (1, 2, 3), measure).atoms).abs().max() < 1e-12


def conditioned(seed, d, condition):
    "Covariance with eigenvalues from 1 to 1 / condition"
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return q @ torch.diag(torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)) @ q.mT


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e12])
def test_the_gap_covers_rounding(condition):
    "Against determinants of 60 digits"
    import mpmath

    for seed in range(10):
        cov = conditioned(seed, 4, condition)
        cov = (cov + cov.mT) / 2
        with mpmath.workdps(60):
            block = lambda rows: mpmath.matrix(cov[rows][:, rows].tolist())  # noqa: B023
            det = lambda *rows: mpmath.log(mpmath.det(block(list(rows))))  # noqa: B023
            i1, i2 = ((det(z) + det(2, 3) - det(z, 2, 3)) / 2 for z in (0, 1))
            exact = [float(x) for x in (i1, i2, (det(0, 1) + det(2, 3) - det(0, 1, 2, 3)) / 2)]
        pid = pid_gaussian(cov, (1, 1, 2))
        assert max(abs(read - x) for read, x in zip((pid.i1, pid.i2, pid.joint), exact)) <= pid.gap < 1e-13 * condition


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_float32(condition):
    for seed in range(20):
        for dims in ((1, 1, 1), (2, 3, 2), (8, 8, 8)):
            cov = conditioned(seed, sum(dims), condition)
            for measure in ("mmi", "broja"):
                exact, single = (pid_gaussian(c, dims, measure).atoms for c in (cov, cov.float()))
                assert (exact - single).abs().max() < 1e-3
        cov = conditioned(seed, 3, condition)
        sd = torch.diagonal(cov).sqrt()
        r = cov / sd / sd[:, None]
        exact, single = (torch.stack(scalar_information(c[0, 2], c[1, 2], c[0, 1])) for c in (r, r.float()))
        assert single.dtype == torch.float32 and (exact - single).abs().max() < 1e-3


def test_bias_is_what_independent_samples_read():
    g = torch.Generator().manual_seed(0)
    for d1, d2, n in ((1, 1, 20), (4, 2, 30), (8, 8, 64)):
        x = torch.randn(2000, n, d1 + d2, generator=g, dtype=torch.float64)
        x = x - x.mean(1, keepdim=True)
        read = gaussian_mi(x.mT @ x / (n - 1), d1, d2)
        assert abs(read.mean() - gaussian_mi_bias(d1, d2, n)) < 5 * read.std() / 2000**0.5
        assert abs(gaussian_mi_bias(d1, d2, n, base=2) * math.log(2) - gaussian_mi_bias(d1, d2, n)) < 1e-12


def test_shrinkage_lowers_information_and_saves_singular_covariances():
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="singular"):
        gaussian_mi(sample_covariance(x)[0], 15, 15)
    for how in ("ledoit_wolf", "oas", 0.5):
        cov, alpha = sample_covariance(x, how)
        assert 0 < alpha <= 1 and gaussian_mi(cov, 15, 15).isfinite()
    read = [gaussian_mi(sample_covariance(x, a)[0], 15, 15) for a in (0.1, 0.3, 0.9, 1.0)]
    assert read == sorted(read, reverse=True) and abs(read[-1]) < 1e-12


def test_ledoit_wolf_and_oas_against_scikit_learn():
    "Same intensity on standardised data, where their target, the scaled identity, is our diagonal"
    from sklearn.covariance import ledoit_wolf_shrinkage, oas

    x = torch.randn(40, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cumsum(1)
    y = (x - x.mean(0)) / x.std(0, unbiased=False)
    theirs = ledoit_wolf_shrinkage(y.numpy(), assume_centered=True), oas(y.numpy(), assume_centered=True)[1]
    for how, intensity in zip(("ledoit_wolf", "oas"), theirs):
        assert sample_covariance(x, how)[1].item() == pytest.approx(intensity, abs=0.03)


GOOD = random_cov(0, 3)


@pytest.mark.parametrize("cov,dims,message", [
    (GOOD + torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]]), (1, 1, 1), "cov is not symmetric"),
    (GOOD * math.nan, (1, 1, 1), "NaN"),
    (GOOD[:2], (1, 1, 1), "need square"),
    (GOOD, (1, 1, 2), "add up to 4, but cov is 3 x 3"),
    (GOOD, (3, 0, 0), "positive block sizes"),
    (GOOD, (1, 2), "need 3 positive block sizes"),
    (torch.tensor([[1, 0, 0.9], [0, 1, 0.9], [0.9, 0.9, 1.0]]), (1, 1, 1), r"\(Z1, Z2, T\) is indefinite"),
    (torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1.0]]), (1, 1, 1), r"\(Z1, Z2\) is singular.*shrink"),
    (torch.tensor([[1, 0, 1.0], [0, 1, 0], [1, 0, 1]]), (1, 1, 1), r"\(Z1, T\) is singular"),
    (torch.diag(torch.tensor([1.0, 0, 1])), (1, 1, 1), "Z2 has a variance of 0"),
])
def test_invalid_covariances(cov, dims, message):
    for measure in ("mmi", "broja"):
        with pytest.raises(ValueError, match=message):
            pid_gaussian(cov, dims, measure)


def test_invalid_numbers():
    with pytest.raises(ValueError, match="needs n > 4"):
        gaussian_mi_bias(2, 2, 4)
    with pytest.raises(ValueError, match="d1=0"):
        gaussian_mi_bias(0, 2, 10)
    with pytest.raises(ValueError, match="choose from mmi, broja"):
        pid_gaussian(GOOD, (1, 1, 1), "wb")
    with pytest.raises(ValueError, match="choose from none, ledoit_wolf, oas"):
        sample_covariance(torch.randn(10, 2), "lw")
