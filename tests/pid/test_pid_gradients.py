"gradcheck in float64 for every differentiable path"
import pytest
import torch
from torch.autograd import gradcheck

from pid_ssl.pid import (InfoNCECritics, coordinate_correlations, gaussian_information, gaussian_mi, pid_discrete,
                         pid_gaussian, pid_samples, sample_covariance, scalar_atoms, scalar_information)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 2, 4), (2, 4, 3)])
@pytest.mark.parametrize("measure", ["broja", "wb", "mmi"])
def test_discrete(measure, shape):
    "Through softmax logits, inside the simplex"
    def atoms(logits):
        return pid_discrete(logits.flatten(1).softmax(-1).view_as(logits), measure, tol=1e-12).atoms
    assert gradcheck(atoms, randn(2, *shape, seed=3), eps=1e-5, atol=1e-6, rtol=1e-5)


def test_broja_with_vanishing_cells():
    "Copies with a little noise: most cells of the minimiser are empty, the value is still smooth"
    eye = torch.eye(3, dtype=torch.float64)
    logits = (4 * eye[:, :, None] * eye[None]).requires_grad_()
    jitter = randn(3, 3, 3, seed=5).detach()
    def atoms(x):
        return pid_discrete((x + jitter).flatten().softmax(0).view(3, 3, 3), tol=1e-12).atoms
    assert gradcheck(atoms, logits, eps=1e-5, atol=1e-6, rtol=1e-5)


def test_impossible_entries_get_finite_gradients():
    p = torch.zeros(2, 2, 2, dtype=torch.float64)
    p[0, 0, 0] = p[1, 1, 1] = 0.5
    p.requires_grad_()
    for measure in ("broja", "wb", "mmi"):
        (grad,) = torch.autograd.grad(pid_discrete(p, measure).atoms.sum(), p)
        assert grad.isfinite().all()


@pytest.mark.parametrize("measure", ["mmi", "broja"])
def test_gaussian(measure):
    dims = (2, 3, 3)
    def atoms(x):
        return pid_gaussian(x @ x.mT / 20, dims, measure).atoms
    assert gradcheck(atoms, randn(2, 8, 20), eps=1e-6, atol=1e-6)


def test_gaussian_broja_with_equal_eigenvalues():
    "Target coordinates that are alike: eigenvalues coincide, the sum over them stays differentiable"
    one = torch.tensor([[2.0, 0.5, 1], [0.5, 1.5, 0.7], [1, 0.7, 1]], dtype=torch.float64)
    cov = torch.kron(one, torch.eye(3, dtype=torch.float64))
    def atoms(direction):
        return pid_gaussian(cov + 0.1 * (direction + direction.mT), (3, 3, 3), "broja").atoms
    assert gradcheck(atoms, torch.zeros(9, 9, dtype=torch.float64, requires_grad=True), atol=1e-6)


def test_informations():
    assert gradcheck(lambda x: gaussian_information(x @ x.mT, (2, 1, 2)), randn(5, 9))
    assert gradcheck(lambda x: gaussian_mi(x @ x.mT, 2, 3), randn(5, 9))


def test_scalars():
    r = torch.tensor([[0.3, 0.5, 0.2], [-0.4, 0.6, 0.1], [0.9, 0.85, 0.8]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda r: scalar_information(*r.unbind(-1)), r)
    assert gradcheck(lambda r: scalar_atoms(r[:, 0], r[:, 1]), r)


def test_correlations_and_covariances():
    assert gradcheck(coordinate_correlations, (randn(7, 3), randn(7, 3, seed=1), randn(7, 3, seed=2)))
    for how in ("none", "ledoit_wolf", "oas", 0.3):
        assert gradcheck(lambda x: sample_covariance(x, how), randn(9, 3))


@pytest.mark.parametrize("options", [
    dict(estimator="coordinate"), dict(estimator="coordinate", reduce="mean", eps=1e-2),
    dict(estimator="gaussian"), dict(estimator="gaussian", measure="broja"),
    dict(estimator="gaussian", bias_correct=True),
    dict(estimator="gaussian", shrinkage="ledoit_wolf"), dict(estimator="gaussian", shrinkage="oas", measure="broja"),
], ids=str)
def test_samples(options):
    z = (randn(14, 2), randn(14, 2, seed=1), randn(14, 2, seed=2))
    assert gradcheck(lambda *x: pid_samples(*x, **options).atoms, z, atol=1e-6)


def test_critics():
    torch.manual_seed(0)
    critics = InfoNCECritics(2, 3, 2, width=8).double()
    for p in critics.parameters():
        p.requires_grad_(False)
    assert gradcheck(critics, (randn(6, 2), randn(6, 3, seed=1), randn(6, 2, seed=2)))
