"Properties of discrete decompositions on random tables, dense and sparse"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pid_ssl.pid import discrete_information, pid_discrete
from pid_ssl.pid import broja as pid_broja
from pid_ssl.pid.broja import conditional_entropy, round_to_marginals, solve_broja

CHECKS = settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.tuples(*[st.integers(1, 4)] * 3)
dense = st.floats(1e-3, 1)
sparse = st.one_of(st.just(0.0), st.just(0.0), st.floats(1e-3, 1), st.sampled_from([1e-6, 1e-9, 1e-12, 0.25, 0.5]))


@st.composite
def tables(draw, entries=st.sampled_from([dense, sparse])):
    p = draw(arrays(np.float64, draw(shapes), elements=draw(entries)))
    if p.sum() < 1e-3:
        p.flat[0] += 1
    return torch.from_numpy(p / p.sum())


def numpy_information(p):
    "Mutual information in bits of a two-way table, the textbook sum"
    q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    keep = p > 0
    return (p[keep] * np.log2(p[keep] / q[keep])).sum()


@CHECKS
@given(tables())
def test_atoms_are_nonnegative_and_consistent(p):
    q = p.numpy()
    informations = [numpy_information(x) for x in (q.sum(1), q.sum(0), q.reshape(-1, q.shape[-1]))]
    for measure in ("broja", "wb", "mmi"):
        pid = pid_discrete(p, measure, base=2)
        assert pid.atoms.min() >= -1e-6
        assert 0 <= pid.gap <= 1e-6
        for read, expected in zip((pid.i1, pid.i2, pid.joint), informations):
            assert abs(read - expected) < 1e-9


@CHECKS
@given(tables())
def test_order_of_the_measures(p):
    broja, wb, mmi = (pid_discrete(p, m) for m in ("broja", "wb", "mmi"))
    assert broja.unique1 >= wb.unique1 - 1e-6 and broja.unique2 >= wb.unique2 - 1e-6
    assert broja.redundancy <= wb.redundancy + 1e-6
    assert wb.redundancy <= mmi.redundancy + 1e-9


@CHECKS
@given(tables(), st.randoms(use_true_random=False))
def test_swap_and_relabelling(p, random):
    shuffled = p
    for axis, n in enumerate(p.shape):
        shuffled = shuffled.index_select(axis, torch.tensor(random.sample(range(n), n)))
    for measure in ("broja", "wb", "mmi"):
        pid, moved, swapped = (pid_discrete(x, measure) for x in (p, shuffled, p.transpose(0, 1)))
        assert (pid.atoms - moved.atoms).abs().max() < 1e-6
        assert (pid.atoms - swapped.atoms[[0, 2, 1, 3]]).abs().max() < 1e-6


@CHECKS
@given(tables())
def test_certificate_by_hand(p):
    "The two bounds recomputed in NumPy from what the solver returns"
    s = solve_broja(p.sum(1)[None], p.sum(0)[None])
    q, a, b = s.q[0].numpy(), s.a[0].numpy(), s.b[0].numpy()
    p1, p2 = p.sum(1).numpy(), p.sum(0).numpy()
    assert q.min() >= 0 and abs(q.sum(1) - p1).max() < 1e-12 and abs(q.sum(0) - p2).max() < 1e-12
    possible = (p1 > 0)[:, None] & (p2 > 0)[None]
    assert (np.exp(a[:, None] + b[None]) * possible).sum(-1).max() <= 1 + 1e-12  # dual feasible
    lower = (a * p1).sum() + (b * p2).sum()
    assert s.value[0] - lower == pytest.approx(s.gap[0].item(), abs=1e-12)
    assert conditional_entropy(p) >= lower - 1e-12  # the table itself is a candidate


def test_against_a_grid():
    "Two bits and a bit: two free numbers, one for each target value, searched exhaustively"
    generator = torch.Generator().manual_seed(0)
    for zeros in (0, 0, 2, 3):
        p = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
        p.view(-1)[torch.randperm(8, generator=generator)[:zeros]] = 0
        p = p / p.sum()
        grids = []
        for t in (0, 1):
            row, column, total = p[0, :, t].sum(), p[:, 0, t].sum(), p[..., t].sum()
            least = (row + column - total).clamp_min(0)
            x = least + torch.linspace(0, 1, 401, dtype=torch.float64) * (torch.minimum(row, column) - least)
            cells = torch.stack([x, row - x, column - x, total - row - column + x], -1)
            grids.append(cells.clamp_min(0).view(-1, 2, 2))
        q = torch.stack(torch.broadcast_tensors(grids[0][:, None], grids[1][None]), -1)
        best = conditional_entropy(q).min()
        value = solve_broja(p.sum(1)[None], p.sum(0)[None]).value[0]
        assert value - 1e-9 <= best <= value + 1e-3


def test_uneven_tables_are_solved():
    "Entries from 1 down to 1e-20, most of them zero, all alphabets of the batch at once"
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 2, 2), (4, 4, 4), (2, 7, 3)):
        p = torch.rand(500, *shape, generator=generator, dtype=torch.float64) ** 20
        p = p * (torch.rand(p.shape, generator=generator) < 0.4)
        p = p[p.sum((1, 2, 3)) > 0]
        p = p / p.sum((1, 2, 3), keepdim=True)
        pid = pid_discrete(p)
        assert pid.gap.max() <= 1e-6 and pid.atoms.min() >= -1e-6


def test_batch_shape_and_independence_of_the_batch():
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(3, 4, 3, 2, 5, generator=generator, dtype=torch.float64)
    p = p / p.sum((-1, -2, -3), keepdim=True)
    pid = pid_discrete(p)
    assert pid.redundancy.shape == pid.gap.shape == (3, 4) and pid.atoms.shape == (3, 4, 4)
    assert (pid.atoms[2, 1] - pid_discrete(p[2, 1]).atoms).abs().max() < 1e-8
    assert pid_discrete(p[:0]).redundancy.shape == (0, 4)


def test_conditionally_independent_bits():
    "Two looks at one bit through independent noise: everything either knows is redundant"
    p = torch.zeros(2, 2, 2, dtype=torch.float64)
    for t in (0, 1):
        look = torch.tensor([0.9, 0.1] if t == 0 else [0.1, 0.9], dtype=torch.float64)
        p[..., t] = 0.5 * look[:, None] * look[None]
    pid = pid_discrete(p, base=2)
    i1, _, i12 = discrete_information(p)
    assert abs(pid.redundancy - i1 / math.log(2)) < 1e-8 and pid.unique1.abs() < 1e-8
    assert abs(pid.synergy - (i12 - i1) / math.log(2)) < 1e-8


def test_rounding_keeps_what_is_right():
    p = torch.full((2, 3, 2), 1 / 12, dtype=torch.float64)
    assert torch.allclose(round_to_marginals(p, p.sum(1), p.sum(0)), p, atol=1e-16)


@pytest.mark.parametrize("bad,message", [
    (torch.full((2, 2, 2), 0.2), "sums to 1.6"),
    (torch.tensor([[[1.5, -0.5]]]), "negative entry -0.5"),
    (torch.tensor([[[math.nan, 1.0]]]), "NaN"),
    (torch.full((2, 2), 0.25), r"shape \(2, 2\): need \(..., n1, n2, nt\)"),
    (torch.zeros(2, 0, 2), "at least one value"),
])
def test_invalid_tables(bad, message):
    for measure in ("broja", "wb", "mmi"):
        with pytest.raises(ValueError, match=message):
            pid_discrete(bad, measure)


def test_invalid_options():
    p = torch.full((2, 2, 2), 1 / 8)
    with pytest.raises(ValueError, match="measure='iccs': choose from broja, wb, mmi"):
        pid_discrete(p, "iccs")
    with pytest.raises(ValueError, match="base=1"):
        pid_discrete(p, base=1)


def hard_tables(kind, n1, n2, nt, count=6):
    g = torch.Generator().manual_seed(7)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    if kind == "sparse":
        p = rand(count, n1, n2, nt) ** 8 * (rand(count, n1, n2, nt) < 0.3)
    elif kind == "function":  # of the sources, on some of their cells
        t = torch.randint(nt, (count, n1, n2), generator=g)
        on = (rand(count, n1, n2, 1) < 0.7).index_fill(1, torch.tensor([0]), True)
        p = torch.nn.functional.one_hot(t, nt) * (rand(count, n1, n2, 1) * on)
    elif kind == "copy":  # the second source is the first, but for next to nothing
        slip = rand(count, 1, 1, 1) ** 8
        same = torch.eye(n1, n2, dtype=torch.float64)[None, :, :, None]
        p = (same * (1 - slip) + slip / n2) * rand(count, n1, 1, nt) ** 8
    return p / p.sum((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("shape", [(2, 2, 24), (8, 8, 20), (5, 9, 40), (9, 3, 17)])
@pytest.mark.parametrize("kind", ["sparse", "function", "copy"])
def test_both_newton_matrices_solve_hard_tables(kind, shape, monkeypatch):
    p = hard_tables(kind, *shape)
    made = {}
    for name in ("_Newton", "_Wide"):
        with monkeypatch.context() as m:
            m.setattr(pid_broja, "_Newton", getattr(pid_broja, name))
            m.setattr(pid_broja, "_Wide", getattr(pid_broja, name))
            made[name] = solve_broja(p.sum(2), p.sum(1))
    assert max(u.gap.max() for u in made.values()) < 1e-8 and made["_Wide"].gap.max() < 1e-9
    assert (made["_Newton"].value - made["_Wide"].value).abs().max() < 1e-8


def test_many_values_of_the_target_take_the_wide_matrix(monkeypatch):
    monkeypatch.setattr(pid_broja, "_Newton", None)
    p = hard_tables("sparse", 4, 4, 200, count=1)
    assert solve_broja(p.sum(2), p.sum(1)).gap.max() < 1e-9
