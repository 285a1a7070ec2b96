"""Losses against float64 computations written another way, and what a user's loop relies on."""

import contextlib
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from pid_ssl.losses import target as losses_pid
from pid_ssl.config import ConfigError
from pid_ssl.losses import (
    BYOL,
    LOSSES,
    NTXent,
    PIDBarlowTwins,
    PIDLoss,
    PIDWMSE,
    RunningMean,
    VICReg,
    WMSE,
    BarlowTwins,
    cross_correlation,
    standardise,
)
from pid_ssl.losses.target import explained
from pid_ssl.pid import pid_gaussian, scalar_atoms, scalar_information

torch.manual_seed(0)
Z1, Z2, T, T2 = (torch.randn(64, 12, dtype=torch.float64) + 0.5 for _ in range(4))
PID = ["pid", "pid_barlow", "pid_wmse"]


def make(name, d=12, **kwargs):
    """A loss by its registry name, its networks small and always the same."""
    torch.manual_seed(0)
    if name == "byol":
        kwargs = {"dim": d, "hidden": 32} | kwargs
    if name == "pid":
        kwargs = {"estimator": "coordinate", "covariance_momentum": 0.0} | kwargs
    if kwargs.get("estimator") == "infonce":
        kwargs = {"dim": d, "width": 32} | kwargs
    return LOSSES[name](**kwargs)


def l_beta(beta, estimator="coordinate", shrinkage=0.01, **kwargs):
    """The objective of one batch alone: no running correlations."""
    return PIDLoss(beta, estimator, shrinkage, covariance_momentum=0.0, **kwargs)


def value_and_grad(loss, z1, z2, *targets, seed=0, context=contextlib.nullcontext()):
    """Value and gradient of both views; W-MSE draws its sub-batches from `seed`."""
    torch.manual_seed(seed)
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    with context:
        value = loss(z1, z2, *targets)
    return value.detach(), *torch.autograd.grad(value, (z1, z2))


def exact(cov, d=1, n=64, seed=0):
    """(n, d) for each variable of `cov`: in every coordinate the sample covariance is `cov` to rounding, across
    coordinates 0."""
    values, vectors = torch.linalg.eigh(torch.as_tensor(cov, dtype=torch.float64))
    x = torch.randn(n, len(values) * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(x - x.mean(0))[0].view(n, len(values), d) * n**0.5
    return ((vectors * values.clamp(min=0).sqrt()) @ q).unbind(1)


def views(a1, a2, c, **kwargs):
    """z1, z2, t with corr(z1, t), corr(z2, t), corr(z1, z2) as given."""
    return exact([[1, c, a1], [c, 1, a2], [a1, a2, 1]], **kwargs)


def corr(x, y):
    x, y = ((v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt() for v in (x, y))
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
    """One sub-batch: by eigenvectors instead of Cholesky, the distance after normalising differs only by a rotation
    per view, so compare through W itself."""
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


@pytest.mark.parametrize("size, iters, eps", [(64, 1, 0.0), (30, 1, 0.0), (24, 3, 0.0), (24, 2, 0.1)])
def test_wmse_over_sub_batches(size, iters, eps):
    """Random disjoint sub-batches, a remainder left out, partitions averaged; NumPy, one row at a time."""
    torch.manual_seed(5)
    loss = WMSE(size, iters, eps)(Z1, Z2)
    torch.manual_seed(5)
    total, count = 0.0, 0
    for _ in range(iters):
        order = torch.randperm(64).numpy()
        for start in range(0, 64 - size + 1, size):
            white = []
            for z in (Z1, Z2):
                z = z.numpy()[order[start : start + size]]
                w = np.linalg.inv(np.linalg.cholesky(np.cov(z.T) + eps * np.eye(12)))
                white.append([w @ row for row in z - z.mean(0)])
            for x, y in zip(*white):
                total += np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2)
                count += 1
    assert math.isclose(loss, total / count, rel_tol=1e-10)


@pytest.mark.parametrize("name", ["wmse", "pid_wmse"])
def test_wmse_refuses_a_singular_sub_batch(name):
    flat = Z1.clone()
    flat[:, 5] = 0
    with pytest.raises(ValueError, match="sub-batch of 64 samples in 12 dimensions is singular"):
        make(name)(flat, Z2, T)
    with pytest.raises(ConfigError, match="whitening_size: got 20; accepted: at least twice the dimension, so from 24"):
        make(name, whitening_size=20)(Z1, Z2, T)
    # one value in every row stays 0 after whitening; all else is what eps makes of it
    assert make(name, eps=1e-3)(flat, Z2, T).isfinite()


def test_byol():
    loss = make("byol").double().requires_grad_(False)
    first, norm, _, last = loss.predictor
    # the views go through the predictor together: its batch norm sees 2n rows
    h = torch.cat([Z1, Z2]) @ first.weight.T + first.bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    p = h.clamp(min=0) @ last.weight.T + last.bias
    cos = lambda x, y: (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    want = (2 - 2 * cos(p[:64], T2)).mean() + (2 - 2 * cos(p[64:], T)).mean()
    assert math.isclose(loss(Z1, Z2, T, T2), want, rel_tol=1e-12)


@pytest.mark.parametrize("name", ["byol", *PID])
def test_targets_get_no_gradient(name):
    z1, z2, t, t2 = (x.clone().requires_grad_() for x in (Z1, Z2, T, T2))
    make(name).double()(z1, z2, t, t2).backward()
    assert z1.grad.abs().sum() > 0 and z2.grad.abs().sum() > 0 and t.grad is None and t2.grad is None


def test_pid_loss_is_the_combination_of_its_terms():
    for beta in (-1.0, 0.0, 0.7, 1.5):
        for estimator in ("coordinate", "gaussian"):
            loss = PIDLoss(beta, estimator, decorrelation=0.3)
            value, t = loss(Z1, Z2, T), loss.terms
            want = -t["i12"] + beta * (t["i1"] + t["i2"] - t["i12"]) + 0.3 * t["feature_redundancy"]
            assert math.isclose(value, want, rel_tol=1e-9)
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


def beta_objective(p, beta):
    return (beta - 1) * p.redundancy - p.unique1 - p.unique2 - (1 + beta) * p.synergy


@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("shrinkage", [0.01, 0.2])
def test_l_beta_is_made_of_atoms(beta, shrinkage):
    """(beta - 1) R - U1 - U2 - (1 + beta) S, atoms from `pid_gaussian` on the shrunk correlations; with it R - S = I1
    + I2 - I12."""
    z1, z2, t = Z1[:, :4] + 2 * T[:, :4], Z2[:, :4] + Z1[:, :4] + T[:, :4], T[:, :4]
    r = corr(torch.cat([z1, z2, t], 1), torch.cat([z1, z2, t], 1))

    # gaussian: every entry is shrunk, the diagonal topped up
    loss = l_beta(beta, "gaussian", shrinkage, decorrelation=0.0)
    p = pid_gaussian((1 - shrinkage) * r + shrinkage * torch.eye(12, dtype=r.dtype), (4, 4, 4), "mmi")
    assert math.isclose(loss(z1, z2, t), beta_objective(p, beta), rel_tol=1e-9)
    i1, i2, i12 = (loss.terms[k] for k in ("i1", "i2", "i12"))
    assert math.isclose(p.redundancy - p.synergy, i1 + i2 - i12, rel_tol=1e-9)

    # coordinate: a diagonal of 1, everything else shrunk
    triples = r.view(3, 4, 3, 4).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    triples = torch.where(torch.eye(3) == 1, 1.0, (1 - shrinkage) * triples)
    p = pid_gaussian(triples, (1, 1, 1), "mmi")
    for reduction, k in (("sum", 1), ("mean", 4)):
        loss = l_beta(beta, "coordinate", shrinkage, decorrelation=0.0, reduction=reduction)
        assert math.isclose(loss(z1, z2, t), beta_objective(p, beta).sum() / k, rel_tol=1e-9)
    i1, i2, i12 = (loss.terms[k] for k in ("i1", "i2", "i12"))
    assert math.isclose((p.redundancy - p.synergy).sum(), i1 + i2 - i12, rel_tol=1e-9)


@pytest.mark.parametrize("a, c", [(0.3, 0.09), (0.6, 0.36), (0.6, 0.8), (0.8, 0.5), (0.9, 1.0), (-0.5, 0.3)])
def test_exchangeable_scalars(a, c):
    """R = -1/2 ln(1 - a^2), S = 1/2 ln[(1 - a^2)(1 + c)/(1 + c - 2a^2)] of the shrunk correlations; 1e-5 is
    standardise's eps."""
    eps = 0.05
    for estimator in ("coordinate", "gaussian"):
        k = (1 - eps) / (1 + 1e-5)
        k = k if estimator == "coordinate" else k / (k + eps)
        redundancy = -0.5 * math.log(1 - (k * a) ** 2)
        synergy = 0.5 * math.log((1 - (k * a) ** 2) * (1 + k * c) / (1 + k * c - 2 * (k * a) ** 2))
        assert np.allclose([redundancy, synergy], scalar_atoms(k * a, k * c), rtol=1e-12)
        for beta in (-1.0, 0.3, 2.0):
            loss = l_beta(beta, estimator, eps, decorrelation=0.0)
            want = (beta - 1) * redundancy - (1 + beta) * synergy
            assert math.isclose(loss(*views(a, a, c)), want, rel_tol=1e-8, abs_tol=1e-12)
        i1, i12 = loss.terms["i1"], loss.terms["i12"]
        assert math.isclose(i1, redundancy, rel_tol=1e-8)
        assert math.isclose(i12 - i1, synergy, rel_tol=1e-6, abs_tol=1e-12)


# what encoders can reach


def nets(x, d, seed):
    """d random nonlinear functions of the columns of x."""
    g = torch.Generator().manual_seed(seed)
    w1, w2 = (torch.randn(k, m, generator=g, dtype=torch.float64) for k, m in ((x.shape[1], 16), (16, d)))
    return torch.sin(torch.tanh(1.5 * x @ w1 / x.shape[1] ** 0.5) @ w2 / 2)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_agreement_is_bounded_by_what_the_target_explains(noise):
    """c >= a^2/c_T: both views of one image through one encoder, their noise independent; the target a function of the
    image, or noisy."""
    n, d, g = 100_000, 24, torch.Generator().manual_seed(1)
    image, *e = (torch.randn(n, 3, generator=g, dtype=torch.float64) for _ in range(5))
    t, t2 = (nets(torch.cat([image, noise * x], 1), d, seed=2) for x in e[2:])
    mean = (t + t2) / 2
    # a third of the encoders are unrelated to the target, the others are functions of a noisy look at it
    z1, z2 = (
        torch.cat(
            [
                nets(torch.cat([image, x], 1), 8, seed=3),
                torch.sin(2 * mean[:, 8:16] + 0.5 * x[:, :1]),
                mean[:, 16:] + 0.5 * x[:, :1],
            ],
            1,
        )
        if not noise
        else nets(torch.cat([image, 0.3 * x], 1), d, seed=2)
        for x in e[:2]
    )
    x1, x2, s1, s2 = map(standardise, (z1, z2, t, t2))
    a1, a2, c, c_t = ((p * q).mean(0) for p, q in ((x1, s1), (x2, s1), (x1, x2), (s1, s2)))
    assert (c_t > 0.999).all() if not noise else (0.2 < c_t).all() and (c_t < 0.95).all()
    assert (a1 * a2).max() > 0.25
    excess = c - a1 * a2 / c_t
    assert excess.min() > -5 / n**0.5
    if not noise:  # signal plus noise: equality
        assert excess[16:].abs().max() < 5 / n**0.5 and excess[:8].min() > 0.01
    # two policies, each showing half of what the target is: below the floor
    x1, x2, s1 = map(standardise, (image[:, :1], image[:, 1:2], image[:, :1] + image[:, 1:2]))
    a1, a2, c = ((p * q).mean(0) for p, q in ((x1, s1), (x2, s1), (x1, x2)))
    assert (c - a1 * a2).item() < -0.4


def settle(beta, shrinkage, teacher, start):
    """corr(z1, z2) where descent on L_beta ends for z_i = cos(angle) image + sin(angle) noise_i, a scalar.
    The target is the image, or a third such view by the encoder of this step, no gradient through it."""
    image, e1, e2, e3 = exact(torch.eye(4))
    angle = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    loss = l_beta(beta, shrinkage=shrinkage, decorrelation=0.0)
    optimiser = torch.optim.Rprop([angle], lr=0.1, step_sizes=(1e-9, 0.3))
    for _ in range(60):
        z1, z2, z3 = (angle.cos() * image + angle.sin() * e for e in (e1, e2, e3))
        optimiser.zero_grad()
        loss(z1, z2, z3.detach() if teacher else image).backward()
        optimiser.step()
    return angle.cos().item() ** 2


def test_where_beta_leads_with_a_target_free_of_noise():
    for beta, start in ((1.3, 0.1), (1.5, 1.3), (2.0, 0.2), (2.0, 1.4)):
        assert math.isclose(settle(beta, 1e-5, False, start), 1 / beta, rel_tol=1e-3)
    # up to 1 the guard stops it, and from about 1/2 the guard stops it before a = 1
    u = 1 - torch.linspace(0, 0.5, 500_001, dtype=torch.float64)
    for beta, eps in ((-1.0, 0.01), (0.0, 0.01), (0.4, 0.01), (0.75, 0.01), (1.0, 0.01), (1.0, 1e-4)):
        k = (1 - eps) / (1 + 1e-5)
        redundancy, synergy = scalar_atoms(k * u.sqrt(), k * u)
        want = u[((beta - 1) * redundancy - (1 + beta) * synergy).argmin()].item()
        got = settle(beta, eps, False, 1.0)
        assert math.isclose(got, want, abs_tol=1e-5)
        assert (want == 1) == (beta < 0.5)
    assert math.isclose(1 - got, (2 * (1 - k)) ** 0.5, rel_tol=0.05)


@pytest.mark.parametrize("start", [0.05, 1.2])
def test_where_beta_leads_with_a_teacher(start):
    """a = c = 1/(2 beta) beyond beta = 1/2, with the teacher held still within a step and copied after it."""
    for beta in (0.55, 0.75, 1.0, 1.5):
        assert math.isclose(settle(beta, 1e-6, True, start), 1 / (2 * beta), rel_tol=1e-3)
    assert settle(0.4, 1e-6, True, start) > 0.999


# baselines inside


@pytest.mark.parametrize(
    "arguments",
    [
        dict(w_t=0, kappa=0),
        dict(w_t=0, kappa=0, pairing="mean"),
        dict(),
        dict(w_t=2, kappa=1, excess="one_sided", pairing="cross"),
    ],
)
def test_pid_barlow_has_barlow_twins_inside(arguments):
    """Bit for bit, at weights 0 or at strength 0, in both precisions."""
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype) for x in (Z1, Z2, T, T2)]
        loss = PIDBarlowTwins(0.1, **arguments)
        loss.strength = 1.0 if arguments.get("w_t") == 0 else 0.0
        for ours, theirs in zip(value_and_grad(loss, *inputs), value_and_grad(BarlowTwins(0.1), *inputs[:2])):
            assert torch.equal(ours, theirs)
    loss.strength = 0.0
    assert not loss.wants_target and loss(Z1, Z2) == BarlowTwins(0.1)(Z1, Z2)


@pytest.mark.parametrize("pairing", ["draw", "mean", "cross"])
def test_pid_wmse_has_wmse_inside(pairing):
    for weights, strength in ((dict(w_t=0, w_r=0), 1.0), (dict(), 0.0)):
        loss = PIDWMSE(32, 2, pairing=pairing, **weights)
        loss.strength = strength
        plain = value_and_grad(WMSE(32, 2), Z1, Z2, seed=3)
        for ours, theirs in zip(value_and_grad(loss, Z1, Z2, T, T2, seed=3), plain):
            assert torch.equal(ours, theirs)


def test_pid_loss_has_a_redundancy_phase():
    """Barlow Twins with the weight of decorrelation, or L_beta at -1; halfway is halfway."""
    for estimator in ("gaussian", "coordinate"):
        loss = l_beta(0.5, estimator, phase_one="barlow", decorrelation=0.1)
        loss.strength = 0.0
        for ours, theirs in zip(value_and_grad(loss, Z1, Z2), value_and_grad(BarlowTwins(0.1), Z1, Z2)):
            assert torch.equal(ours, theirs)
    full = l_beta(0.5, decorrelation=0.1)(Z1, Z2, T)
    loss.strength = 0.25
    off = 0.1 * loss.terms["feature_redundancy"]
    want = 0.25 * (full - off) + 0.75 * (BarlowTwins(0.1)(Z1, Z2) - off)
    assert math.isclose(loss(Z1, Z2, T) - off, want, rel_tol=1e-9)
    loss = l_beta(0.5, phase_one="beta")
    loss.strength = 0.25
    assert math.isclose(loss(Z1, Z2, T), l_beta(-1 + 0.25 * 1.5)(Z1, Z2, T), rel_tol=1e-9) and loss.wants_target


def test_strength_scales_the_weights():
    for s in (0.25, 0.6):
        for whole, part in (
            (PIDBarlowTwins(w_t=0.8, kappa=0.9), PIDBarlowTwins(w_t=0.8 * s, kappa=0.9 * s)),
            (PIDWMSE(64, w_t=0.8, w_r=0.9), PIDWMSE(64, w_t=0.8 * s, w_r=0.9 * s)),
        ):
            whole.strength = s
            assert math.isclose(whole(Z1, Z2, T, T2), part(Z1, Z2, T, T2), rel_tol=1e-9)


# orderings


@pytest.mark.parametrize(
    "name, arguments",
    [("pid", dict(beta=b, estimator=e)) for e in ("coordinate", "gaussian") for b in (-1.0, 0.25, 0.9)]
    + [("pid_barlow", dict(kappa=k, excess=e)) for k, e in ((0.5, "two_sided"), (1.0, "two_sided"), (1.0, "one_sided"))]
    + [("pid_wmse", {}), ("barlow", {}), ("wmse", {}), ("vicreg", {}), ("simclr", {})],
)
def test_collapse_and_noise_are_worse_than_prediction(name, arguments):
    """Predictive views, on the floor at a = 0.8, before independent noise, and before a constant (which W-MSE
    refuses)."""
    loss = make(name, d=16, **arguments)
    z1, z2, t = views(0.8, 0.8, 0.64, d=16, n=512)
    good, noise = loss(z1, z2, t), loss(*views(0, 0, 0, d=16, n=512))
    assert good < noise - 1e-3
    flat = torch.ones_like(t)
    if "wmse" in name:
        with pytest.raises(ValueError, match="singular"):
            loss(flat, flat, t)
    else:
        assert good < loss(flat, flat, t) - 1e-3
        if name == "pid":
            assert loss(flat, flat, t).abs() < 1e-9 and noise.abs() < 1e-9


def test_agreement_beyond_the_target():
    """The same a, c = 1 against the floor c = a^2."""
    copies, floor = (views(0.8, 0.8, c, d=16, n=512) for c in (1.0, 0.64))
    for estimator in ("coordinate", "gaussian"):
        for beta in (-0.9, 0.0, 0.5, 1.0, 2.0):
            loss = l_beta(beta, estimator, 1e-4, decorrelation=0.0)
            value, t = loss(*copies), loss.terms
            synergy = t["i12"] - t["i1"]
            assert synergy.abs() < 1e-2 * t["i1"] and math.isclose(t["i1"], t["i2"], rel_tol=1e-9)
            better, t2 = loss(*floor), loss.terms
            assert math.isclose(t["i1"], t2["i1"], rel_tol=1e-9)
            assert math.isclose(t2["i12"] - t2["i1"], 16 * 0.5 * math.log(1.64), rel_tol=1e-2)
            assert better < value - 0.1 * (1 + beta)
        loss = l_beta(-1.0, estimator, decorrelation=0.0)
        assert math.isclose(loss(*copies), loss(*floor), rel_tol=1e-9)
    for excess in ("two_sided", "one_sided"):
        loss = PIDBarlowTwins(kappa=1.0, excess=excess)
        assert loss(*floor) < loss(*copies) - 1 and loss.terms["invariance"] > 1
        loss(*floor)
        assert loss.terms["invariance"] < 1e-6
    assert PIDBarlowTwins(kappa=0.0)(*copies) < PIDBarlowTwins(kappa=0.0)(*floor)
    # the penalty outweighs the agreement that it taxes only beyond w_r = 1
    for w_r, ahead in ((0.3, copies), (2.0, floor)):
        loss = PIDWMSE(512, w_r=w_r)
        values = {id(x): loss(*x) for x in (copies, floor)}
        assert min(values, key=values.get) == id(ahead)
    assert loss.terms["excess"] < 0.05
    loss(*copies)
    assert loss.terms["excess"] > 0.5


@pytest.mark.parametrize("estimator", ["coordinate", "gaussian"])
def test_degenerate_cases_are_seen_in_the_terms(estimator):
    loss = l_beta(0.25, estimator, 1e-3, decorrelation=0.0)
    # T copied from view 1, view 2 unrelated: unique information only
    loss(*views(1, 0, 0, d=4))
    i1, i2, i12 = (loss.terms[k].item() for k in ("i1", "i2", "i12"))
    assert i1 > 4 * 2 and i2 < 1e-9 and math.isclose(i12, i1, rel_tol=1e-6)
    # view 2 is the noise of view 1: I2 = 0, and together they know T
    loss(*views(0.5**0.5, 0, 0.5**0.5, d=4))
    i1, i2, i12 = (loss.terms[k].item() for k in ("i1", "i2", "i12"))
    assert math.isclose(i1, 4 * 0.5 * math.log(2), rel_tol=1e-2) and i2 < 1e-9 and i12 > 5 * i1
    # L_beta calls that good, which is why unequal views are warned about; the re-calibrated losses do not
    good = views(0.8, 0.8, 0.64, d=4)
    assert loss(*views(0.5**0.5, 0, 0.5**0.5, d=4)) < loss(*good)
    for other in (PIDBarlowTwins(), PIDWMSE(64)):
        assert other(*good) < other(*views(0.5**0.5, 0, 0.5**0.5, d=4))


def test_infonce_sees_xor():
    """T is the sign of the product: nothing in one view, ln 2 in both, all of it synergy; correlations see nothing."""
    loss = l_beta(0.0, "infonce", decorrelation=0.0, dim=1, width=32)
    optimiser, g = torch.optim.Adam(loss.parameters(), 5e-3), torch.Generator().manual_seed(0)
    for _ in range(200):
        z1, z2 = (torch.randn(256, 1, generator=g).sign() for _ in range(2))
        optimiser.zero_grad()
        loss(z1, z2, z1 * z2).backward()
        optimiser.step()
    assert loss.terms["i12"] > 0.6 and loss.terms["i1"].abs() < 0.05 and loss.terms["i2"].abs() < 0.05
    loss = l_beta(0.0, "gaussian", decorrelation=0.0)
    loss(z1, z2, z1 * z2)
    assert loss.terms["i12"] < 0.05


# gradients


def small(seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(16, 3, generator=g, dtype=torch.float64)
    z1, z2, t, t2 = (image + torch.randn(16, 3, generator=g, dtype=torch.float64) for _ in range(4))
    return z1.requires_grad_(), z2.requires_grad_(), t, t2


def check(loss, z1, z2, *targets):
    def f(*z):
        torch.manual_seed(0)
        return loss(*z, *targets)

    return gradcheck(f, (z1, z2), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(estimator=e, pairing=p)
        for e, ps in (
            ("coordinate", ("draw", "mean", "cross")),
            ("gaussian", ("draw", "mean")),
            ("infonce", ("draw", "mean")),
        )
        for p in ps
    ]
    + [dict(reduction="mean", shrinkage=0.1), dict(estimator="gaussian", reduction="mean")],
    ids=str,
)
def test_gradients_of_pid_loss(arguments):
    """infonce: its critics held still, the gradient of the embeddings is that of the value."""
    loss = make("pid", 3, beta=0.7, decorrelation=0.3, **arguments).double().requires_grad_(False)
    z1, z2, t, t2 = small()
    assert check(loss, z1, z2, t, t2)
    if "pairing" not in arguments or arguments["pairing"] == "draw":
        assert check(loss, z1, z2, t)
    for loss.strength, loss.phase_one in ((0.4, "beta"), (0.4, "barlow"), (0.0, "barlow")):
        assert check(loss, z1, z2, t, t2)


@pytest.mark.filterwarnings("ignore:.*policies")
@pytest.mark.parametrize("pairing", ["draw", "mean", "cross"])
@pytest.mark.parametrize("name", ["pid_barlow", "pid_wmse"])
def test_gradients_of_recalibrated_losses(name, pairing, monkeypatch):
    """What the target explains is a stop-gradient: held at its value, the loss passes; and its gradient is the loss's
    own."""
    z1, z2, t, t2 = small()
    z2 = (0.7 * z1 + 0.3 * z2).detach().requires_grad_()  # in excess of the target
    for options in ({}, {"excess": "one_sided"}, {"tau": "constant"}) if name == "pid_barlow" else ({},):
        for strength in (1.0, 0.6):
            loss = make(name, pairing=pairing, **options)
            loss.strength = strength
            values, real = [], losses_pid.explained
            with monkeypatch.context() as m:
                m.setattr(losses_pid, "explained", lambda *x: values.append(real(*x)) or values[-1])
                before = value_and_grad(loss, z1, z2, t, t2)
                m.setattr(losses_pid, "explained", lambda *x: values[0])
                assert check(loss, z1, z2, t, t2)
                for x, y in zip(before, value_and_grad(loss, z1, z2, t, t2)):
                    assert torch.equal(x, y)
            assert bool(values) == (options != {"tau": "constant"})
            if name == "pid_wmse":
                assert loss.terms["excess"] > 0.05


def test_gradient_of_crossed_targets_with_the_lift():
    """Crossed targets that no one correlation matrix has: c is lifted by a stop-gradient."""
    z1, z2 = small()[:2]
    z2 = (z2 - z1).detach().requires_grad_()
    t1, t2 = (
        z + 0.1 * torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for z in (z2.detach(), z1.detach())
    )

    def parts(z1, z2):
        x1, x2, s1, s2 = map(standardise, (z1, z2, t1, t2))
        return ((x1 * s2).mean(0) + (x2 * s1).mean(0)) / 2, (x1 * x2).mean(0)

    a, c = (x.detach() for x in parts(z1, z2))
    lift = (2 * a**2 - 1 + 1e-3 - c).clamp(min=0)
    assert (lift > 0.1).all()

    def frozen(z1, z2):
        a, c = parts(z1, z2)
        i1, i2, i12 = scalar_information(0.99 * a, 0.99 * a, 0.99 * (c + lift))
        return (-i12 + 0.7 * (i1 + i2 - i12)).sum()

    assert gradcheck(frozen, (z1, z2))
    loss = l_beta(0.7, pairing="cross", decorrelation=0.0)
    for x, y in zip(value_and_grad(frozen, z1, z2), value_and_grad(loss, z1, z2, t1, t2)):
        assert torch.allclose(x, y, rtol=1e-9)


@pytest.mark.parametrize("name", ["barlow", "wmse", "vicreg", "simclr", "byol"])
def test_gradients_of_baselines(name):
    assert check(make(name, 3).double().requires_grad_(False), *small())


@pytest.mark.parametrize(
    "name, arguments",
    [(n, {}) for n in LOSSES] + [("pid", dict(estimator="gaussian")), ("pid", dict(estimator="infonce"))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_outside(name, arguments, dtype):
    inputs = [x.float() for x in (Z1, Z2, T, T2)]
    coarse = [x.to(dtype) for x in inputs]
    run = lambda inputs, **context: value_and_grad(make(name, **arguments), *inputs, **context)
    assert all(torch.equal(x, y) for x, y in zip(run(inputs, context=torch.autocast("cpu", dtype=dtype)), run(inputs)))
    value = run(coarse, context=torch.autocast("cpu", dtype=dtype))[0]
    assert value == run([x.float() for x in coarse])[0] and value.dtype == torch.float32


@pytest.mark.parametrize("beta", [0.5, 2.0, 3.0])
def test_infonce_moves_encoder_and_critics_apart(beta):
    """The encoder's gradient is affine in beta; the critics climb the sum of their bounds at any beta."""

    def grads(beta):
        loss = make("pid", beta=beta, estimator="infonce", decorrelation=0.0).double()
        z1, z2 = (z.clone().requires_grad_() for z in (Z1, Z2))
        loss(z1, z2, T).backward()
        return torch.cat([z1.grad, z2.grad]), [p.grad for p in loss.parameters()], loss

    (g0, *_), (g1, *_), (g, critics, loss) = grads(0.0), grads(1.0), grads(beta)
    assert torch.allclose(g, g0 + beta * (g1 - g0), rtol=1e-9, atol=1e-12) and (g1 - g0).norm() > 0.1 * g0.norm()
    climb = -loss.critics(*map(standardise, (Z1, Z2, T))).mean(0).sum()
    for got, want, again in zip(critics, torch.autograd.grad(climb, list(loss.parameters())), grads(0.0)[1]):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12) and torch.allclose(got, again, rtol=1e-9, atol=1e-12)


# running correlations


def test_running_mean():
    """Plain average at first, exponential afterwards; the gradient is that of the last input."""
    mean, seeded = RunningMean(0.75), lambda k: torch.Generator().manual_seed(k)
    batches = [torch.randn(3, 3, generator=seeded(k)).requires_grad_() for k in range(6)]
    want = torch.zeros(3, 3)
    for k, x in enumerate(batches):
        m = min(0.75, k / (k + 1))
        want = m * want + (1 - m) * x.detach()
        got = mean(x)
        assert torch.allclose(got, want, atol=1e-6)
        (grad,) = torch.autograd.grad(got.square().sum(), x)
        assert torch.allclose(grad, 2 * want, atol=1e-6)
        if k < 4:
            assert torch.allclose(got, torch.stack(batches[: k + 1]).mean(0), atol=1e-6)
    mean.eval()
    before = mean.mean.clone()
    mean(batches[0])
    assert torch.equal(mean.mean, before)
    x = batches[0]
    assert RunningMean(0.0)(x) is x


@pytest.mark.parametrize("estimator", ["coordinate", "gaussian", "infonce"])
def test_running_correlations_of_pid_loss(estimator, tmp_path):
    batches = [[x.roll(7 * k, 0) + 0.5 * Z1 for x in (Z1, Z2, T)] for k in range(4)]
    new = lambda: make("pid", estimator=estimator, covariance_momentum=0.9, beta=0.5).double()
    loss = new()
    for z in batches[:3]:
        loss(*z)
    # three steps are averaged plainly
    x = [[standardise(v) for v in z] for z in batches[:3]]
    if estimator == "gaussian":
        want = torch.stack([cross_correlation(torch.cat(v, 1), torch.cat(v, 1)) for v in x]).mean(0)
    else:
        want = torch.stack([cross_correlation(v[0], v[1]) for v in x]).mean(0)
        single = torch.stack([torch.stack([(v[0] * v[2]).mean(0), (v[1] * v[2]).mean(0)]) for v in x]).mean(0)
        assert torch.allclose(loss.single.mean, single, atol=1e-12)
    assert torch.allclose(loss.pair.mean, want, atol=1e-12)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    again = new()
    again.load_state_dict(torch.load(tmp_path / "loss.pt"))
    for x, y in zip(value_and_grad(again, *batches[3]), value_and_grad(loss, *batches[3])):
        assert torch.equal(x, y)
    # and back to a loss that has seen nothing
    again.load_state_dict(new().state_dict())
    assert again(*batches[3]) == new()(*batches[3]) != loss(*batches[3])


# several processes

SHARED = {
    "barlow": {},
    "pid_barlow": {},
    "pid": dict(estimator="gaussian"),
    "simclr": {},
    "vicreg": {},
    "pid_wmse": {},
    "byol": {},
    "pid infonce": dict(estimator="infonce"),
}


def shared_step(name, rank=0, world=1):
    """Gradients of a linear encoder and of the loss's own networks, from this process's share of the batch."""
    g = torch.Generator().manual_seed(2)
    x1, x2, t, t2 = (torch.randn(24, k, generator=g, dtype=torch.float64).chunk(world)[rank] for k in (6, 6, 4, 4))
    torch.manual_seed(1)
    encoder, loss = torch.nn.Linear(6, 4).double(), make(name.split()[0], 4, **SHARED[name]).double()
    model = torch.nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    value = loss(*model(torch.cat([x1, x2])).chunk(2), t, t2)
    value.backward()
    return [value.detach(), *(p.grad for p in (*encoder.parameters(), *loss.parameters()))]


def shared_worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({name: shared_step(name, rank, world) for name in SHARED}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path):
    torch.multiprocessing.spawn(shared_worker, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name in SHARED:
            for x, y in zip(got[name], shared_step(name), strict=True):
                assert torch.allclose(x, y, rtol=1e-6, atol=1e-9), (name, rank)


# policies and pairings


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("pid", {}),
        ("pid", dict(estimator="gaussian")),
        ("pid_barlow", {}),
        ("pid_wmse", {}),
        ("pid_barlow", dict(pairing="cross")),
    ],
)
def test_different_policies_are_noticed(name, arguments, seed):
    g = torch.Generator().manual_seed(seed)

    def calls(noise1, noise2):
        loss = make(name, **arguments)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            for _ in range(200):
                image = torch.randn(64, 8, generator=g)
                z1, z2, t1, t2 = (image + s * torch.randn(64, 8, generator=g) for s in (noise1, noise2, noise1, noise2))
                loss(z1, z2, t1, t2)
        return [str(w.message) for w in caught if "policies" in str(w.message)]

    assert not calls(0.7, 0.7)
    # crossed targets hide it: z1 with t(v2) has all four noises' worth, as z2 with t(v1) has
    assert len(calls(0.3, 2.0)) == (0 if arguments.get("pairing") == "cross" else 1)


def test_explained_is_between_0_and_1():
    """Whatever sampling error makes of correlations near 0: a quotient of two of them once blew the loss up."""
    a1, a2, c_t = torch.meshgrid(*[torch.tensor([-1, -0.3, -1e-4, 0, 1e-9, 0.01, 0.5, 1])] * 3, indexing="ij")
    e = explained(a1, a2, c_t)
    assert e.min() == 0 and e.max() == 1
    for name in ("pid_barlow", "pid_wmse"):
        for seed in range(5):
            z = torch.randn(4, 256, 16, generator=torch.Generator().manual_seed(seed))
            assert make(name)(*z) < 3 * 16


def simulated(n=100_000):
    """Two views of an image, and the teacher's embeddings of four: views 1, 2, and two nobody else sees; skewed, not
    Gaussian."""
    g = torch.Generator().manual_seed(0)
    image, *noise = (torch.rand(n, 4, generator=g, dtype=torch.float64) ** 2 for _ in range(5))
    v = [image + 0.8 * e for e in noise]
    return [x + 0.1 * x**2 for x in v[:2]], [x.sqrt() for x in v], 5 / n**0.5


def test_mean_of_draws_by_spearman_brown():
    _, (t1, t2, t3, t4), tolerance = simulated()
    s1, s2, c_t = PIDBarlowTwins(pairing="mean").targets(t1, t2)
    mean, other = (standardise(standardise(x) + standardise(y)) for x, y in ((t1, t2), (t3, t4)))
    assert torch.allclose(s1, mean) and torch.equal(s1, s2)
    assert torch.allclose(c_t, (mean * other).mean(0), atol=tolerance)
    single = PIDBarlowTwins().targets(t1, t2)[2]
    assert torch.allclose(single, (standardise(t1) * standardise(t3)).mean(0), atol=tolerance)
    assert (c_t > single + 0.1).all()


def test_crossed_targets_estimate_a_third_view():
    (z1, z2), (t1, t2, t3, _), tolerance = simulated()
    third, cross = (l_beta(0.5, pairing=p, decorrelation=0.0) for p in ("draw", "cross"))
    third(z1, z2, t3), cross(z1, z2, t1, t2)
    for k in ("a1", "a2"):
        assert math.isclose(third.terms[k], cross.terms[k], abs_tol=tolerance)
    for k in ("i1", "i2", "i12"):
        assert math.isclose(third.terms[k], cross.terms[k], rel_tol=0.05)
    # the teacher's embedding of the same view shares its noise
    own = l_beta(0.5, decorrelation=0.0)
    own(z1, z2, t1)
    assert own.terms["a1"] > third.terms["a1"] + 0.2


BAD_WEIGHTS = (-1, math.nan, math.inf, "x", None, True)
BAD_SIZES = (0, -1, 2.5, math.nan, math.inf, "x", None, True)
BAD = [
    (name, field, value)
    for name, fields in {
        "barlow": ["lambda_param"],
        "wmse": ["eps"],
        "vicreg": ["sim_coeff", "std_coeff", "cov_coeff"],
        "simclr": ["temperature"],
        "pid": ["decorrelation"],
        "pid_barlow": ["lambda_param", "w_t"],
        "pid_wmse": ["w_t", "w_r", "eps"],
    }.items()
    for field in fields
    for value in BAD_WEIGHTS
]
BAD += [
    (name, field, value)
    for name, fields in {
        "wmse": ["whitening_size", "whitening_iters"],
        "pid_wmse": ["whitening_size", "whitening_iters"],
        "byol": ["dim", "hidden"],
    }.items()
    for field in fields
    for value in BAD_SIZES
]
BAD += [("simclr", "temperature", 0), ("wmse", "whitening_size", 3)]
BAD += [("pid", "beta", v) for v in (11, math.nan, "x", None, True)] + [
    ("pid", "shrinkage", v) for v in (0, 1, math.nan, "x", None, True)
]
BAD += [("pid", "covariance_momentum", v) for v in (-0.1, 1, math.nan, "x", None, True)] + [
    ("pid_barlow", "kappa", v) for v in (-0.1, 1.1, math.nan, "x", None, True)
]
BAD += [
    (name, field, v)
    for name, fields in {
        "pid": ["estimator", "reduction", "phase_one", "pairing"],
        "pid_barlow": ["tau", "excess", "pairing"],
        "pid_wmse": ["pairing"],
    }.items()
    for field in fields
    for v in ("x", None, 1)
]


def refuses(name, field, value, **others):
    with pytest.raises(ConfigError) as error:
        LOSSES[name](**{field: value}, **others)
    assert error.value.name == field and f"{field}: got {value!r}; accepted: " in str(error.value)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_arguments(name):
    cases = [c for c in BAD if c[0] == name]
    assert cases
    for case in cases:
        refuses(*case)
    if name == "pid":
        for value in BAD_SIZES:
            refuses(name, "dim", value, estimator="infonce")
            refuses(name, "width", value, estimator="infonce", dim=4)
        for estimator in ("gaussian", "infonce"):
            refuses(name, "pairing", "cross", estimator=estimator, dim=4)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_inputs(name):
    loss = make(name)
    for bad, message in (
        ((Z1[0], Z2[0]), r"z1, z2: got shapes \(12,\)"),
        ((Z1, Z2[:-1]), r"z1, z2: got shapes \(64, 12\) and \(63, 12\)"),
        ((Z1[:1], Z2[:1]), "z1: got a batch of 1"),
        ((Z1, Z2, T[:-1]), r"target: got shape \(63, 12\)"),
        ((Z1, Z2, T, T[:, 1:]), r"target2: got shape \(64, 11\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*bad)
    if loss.needs_target:
        with pytest.raises(ValueError, match="target: got None"):
            loss(Z1, Z2)
    else:
        assert value_and_grad(loss, Z1, Z2)[0] == value_and_grad(loss, Z1, Z2, T)[0]


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([1e-4, 1.0, 1e4]), shift=st.floats(-100, 100), seed=st.integers(0, 100))
def test_gradients_are_finite(name, scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    z1, z2, t = (scale * torch.randn(128, 16, generator=g) + shift * scale for _ in range(3))
    z1.requires_grad_()
    make(name, 16)(z1, z2, t, t.flip(0)).backward()
    assert z1.grad.isfinite().all()


@pytest.mark.parametrize("name", ["barlow", "wmse", *PID])
def test_scale_and_shift_do_not_matter(name):
    torch.manual_seed(1)
    a = LOSSES[name]()(*(torch.cat([x, x.roll(1, 0)]) for x in (Z1, Z2, T)))
    torch.manual_seed(1)
    b = LOSSES[name]()(*(100 * torch.cat([x, x.roll(1, 0)]) + 3 for x in (Z1, Z2, T)))
    assert math.isclose(a, b, rel_tol=1e-4)
