"""Barlow Twins, VICReg and NT-Xent against lightly's, value and gradient; and how both differ from the papers' text.

The conventions of the two sides are the same, those of the authors' code, so no input or weight is converted:
- Barlow Twins: batch norm's variance (divisor n, eps 1e-5), c divided by n. It is equation 2 of the paper up to eps;
  the paper's pseudo-code divides by the standard deviation with divisor n - 1, so its correlations are (n - 1)/n of
  these and never reach 1.
- VICReg: variance and covariance with divisor n - 1, eps 1e-4 under the root, mean squared error over n and d, half
  of the two hinges. Equations 5 and 6 sum the squared error over d and both hinges: lambda there is lambda/d here, mu
  is mu/2. The published weights 25, 25, 1 are those of the code.
- NT-Xent: cosine similarities, mean of the 2n cross-entropies over 2n - 1 candidates, as in equation 1.
"""

import math

import pytest
import torch

theirs = pytest.importorskip("lightly.loss", reason='pip install -e ".[parity]" -c tests/constraints.txt')

from pid_ssl.losses import BarlowTwins, NTXent, VICReg, cross_correlation, standardise

PAIRS = {
    "barlow": (BarlowTwins(), theirs.BarlowTwinsLoss()),
    "barlow, lambda": (BarlowTwins(lambda_param=0.3), theirs.BarlowTwinsLoss(lambda_param=0.3)),
    "vicreg": (VICReg(), theirs.VICRegLoss()),
    "vicreg, weights": (
        VICReg(sim_coeff=3, std_coeff=20, cov_coeff=2),
        theirs.VICRegLoss(lambda_param=3, mu_param=20, nu_param=2),
    ),
    "simclr": (NTXent(), theirs.NTXentLoss()),
    "simclr, temperature": (NTXent(temperature=0.1), theirs.NTXentLoss(temperature=0.1)),
}


def views(n, d, dtype=torch.float64):
    """Correlated views with means and unequal scales, some below 1 and some above: every term of every loss is at
    work."""
    g = torch.Generator().manual_seed(n + d)
    image, *noise = (torch.randn(n, d, generator=g, dtype=dtype) for _ in range(3))
    scale = torch.linspace(0.3, 2, d, dtype=dtype)
    return [(scale * (image + 0.7 * e) + 0.4).requires_grad_() for e in noise]


@pytest.mark.parametrize("n, d", [(4, 3), (16, 64), (64, 8), (256, 128)])
@pytest.mark.parametrize("name", PAIRS)
def test_same_value_and_gradient(name, n, d):
    values, grads = [], []
    for loss in PAIRS[name]:
        z = views(n, d)
        value = loss(*z)
        values.append(value.item())
        grads.append(torch.cat(torch.autograd.grad(value, z)))
    assert math.isclose(*values, rel_tol=1e-5)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_barlow_twins_of_the_paper():
    """Equation 2 is the correlation itself; Algorithm 1 has (n - 1)/n of it."""
    n = 12
    x, y = (z.detach() for z in views(n, 5))
    ours = cross_correlation(standardise(x, eps=0), standardise(y, eps=0))
    x, y = x - x.mean(0), y - y.mean(0)
    equation = x.T @ y / (x.square().sum(0).sqrt()[:, None] * y.square().sum(0).sqrt())
    pseudo_code = (x / x.std(0)).T @ (y / y.std(0)) / n
    assert torch.allclose(ours, equation, rtol=1e-12) and torch.allclose(pseudo_code, (n - 1) / n * ours, rtol=1e-12)


def test_vicreg_of_the_paper():
    x, y = (z.detach() for z in views(32, 6))
    n, d = x.shape
    s = ((x - y) ** 2).sum(1).mean()
    v = [torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (x, y)]
    c = [(torch.cov(z.T) ** 2).fill_diagonal_(0).sum() / d for z in (x, y)]
    assert min(v) > 0
    want = 25 / d * s + 25 / 2 * sum(v) + sum(c)
    assert math.isclose(VICReg()(x, y), want, rel_tol=1e-12)
