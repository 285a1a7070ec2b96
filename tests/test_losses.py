"""Losses against float64 computations written another way, and what a user's loop relies on."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pid_ssl.losses import LOSSES, NTXent, PIDBarlowTwins, PIDLoss, VICReg, WMSE, BarlowTwins

torch.manual_seed(0)
Z1, Z2, T = (torch.randn(64, 12, dtype=torch.float64) + 0.5 for _ in range(3))


def corr(x, y):
    x, y = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(), (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    return torch.einsum("ni,nj->ij", x, y) / len(x)


def test_barlow_twins():
    c = corr(Z1, Z2)
    want = sum((1 - c[i, j]) ** 2 if i == j else 0.01 * c[i, j] ** 2 for i in range(12) for j in range(12))
    assert math.isclose(BarlowTwins(0.01)(Z1, Z2), want, rel_tol=1e-12)


def test_vicreg():
    n, d = Z1.shape
    want = 25 * ((Z1 - Z2) ** 2).mean()
    for z in (Z1, Z2):
        want += 25 / 2 * torch.clamp(1 - torch.sqrt(z.var(0) + 1e-4), min=0).mean()
        cov = torch.cov(z.T)
        want += (cov**2).sum() / d - (cov.diagonal() ** 2).sum() / d
    assert math.isclose(VICReg()(Z1, Z2), want, rel_tol=1e-12)


def test_nt_xent():
    z = torch.cat([Z1, Z2])
    z = z / z.norm(dim=1, keepdim=True)
    n, total = len(Z1), 0.0
    for i in range(2 * n):
        s = torch.exp(z @ z[i] / 0.5)
        total += -torch.log(s[(i + n) % (2 * n)] / (s.sum() - s[i]))
    assert math.isclose(NTXent(0.5)(Z1, Z2), total / (2 * n), rel_tol=1e-12)


def test_wmse_whitens_each_view():
    """One sub-batch: by eigenvectors instead of Cholesky, the distance after normalising differs only by a rotation per view, so compare through W itself."""
    loss = WMSE(whitening_size=64)(Z1, Z2)
    want = 0
    whitened = []
    for z in (Z1, Z2):
        c = torch.cov(z.T)
        w = torch.linalg.inv(torch.linalg.cholesky(c))
        whitened.append((z - z.mean(0)) @ w.T)
        assert torch.allclose(torch.cov(whitened[-1].T), torch.eye(12, dtype=torch.float64), atol=1e-10)
    a, b = (w / w.norm(dim=1, keepdim=True) for w in whitened)
    want = ((a - b) ** 2).sum(1).mean()
    assert math.isclose(loss, want, rel_tol=1e-10)


def test_pid_loss_is_the_combination_of_its_terms():
    for beta in (-1.0, 0.0, 0.7, 1.5):
        for estimator in ("coordinate", "gaussian"):
            loss = PIDLoss(beta, estimator, decorrelation=0.3)
            value, t = loss(Z1, Z2, T), loss.terms
            assert math.isclose(value, -t["i12"] + beta * (t["i1"] + t["i2"] - t["i12"]) + 0.3 * t["feature_redundancy"], rel_tol=1e-9)
    # beta = -1 is single-view prediction: the views meet only in the decorrelation term
    loss = PIDLoss(-1.0, decorrelation=0.0)
    grad = torch.autograd.grad(loss(Z1.requires_grad_(), Z2, T), Z1)[0]
    other = torch.autograd.grad(loss(Z1, Z2.roll(1, 0), T), Z1)[0]
    Z1.requires_grad_(False)
    assert torch.allclose(grad, other, atol=1e-12)


def test_pid_barlow_at_zero_is_barlow_twins():
    for lam in (0.005, 0.1):
        assert PIDBarlowTwins(lam, w_t=0, kappa=0)(Z1, Z2, T).item() == BarlowTwins(lam)(Z1, Z2).item()


def test_target_draws_lower_what_the_target_explains():
    """c_T below 1 raises the agreement asked for: a1 a2 / c_T, never above 1."""
    loss = PIDBarlowTwins(kappa=1.0)
    z = T + 0.5 * torch.randn_like(T)
    loss(z, z, T)
    sure = loss.terms["tau"].clone()
    loss(z, z, T, T + torch.randn_like(T))
    assert sure < loss.terms["tau"] <= 1 and loss.terms["c_t"] < 1


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([1e-4, 1.0, 1e4]), shift=st.floats(-100, 100), seed=st.integers(0, 100))
def test_gradients_are_finite(name, scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    z1, z2, t = (scale * torch.randn(128, 16, generator=g) + shift * scale for _ in range(3))
    z1.requires_grad_()
    LOSSES[name]()(z1, z2, t).backward()
    assert z1.grad.isfinite().all()


@pytest.mark.parametrize("name", ["barlow", "wmse", "pid", "pid_barlow"])
def test_scale_and_shift_do_not_matter(name):
    torch.manual_seed(1)
    a = LOSSES[name]()(*(torch.cat([x, x.roll(1, 0)]) for x in (Z1, Z2, T)))
    torch.manual_seed(1)
    b = LOSSES[name]()(*(100 * torch.cat([x, x.roll(1, 0)]) + 3 for x in (Z1, Z2, T)))
    assert math.isclose(a, b, rel_tol=1e-4)
