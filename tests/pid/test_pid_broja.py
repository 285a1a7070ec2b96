"BROJA where random tables do not lead: generated tables of many kinds, single ones, batches"
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "harness"))
from broja_harness import KINDS, compared, summary, tables  # noqa: E402

from pid_ssl.pid import pid_discrete  # noqa: E402
from pid_ssl.pid.broja import _solve_batch, _solve_each  # noqa: E402


@pytest.mark.parametrize("one_by_one", [True, False])
def test_no_generated_table_is_left_unsolved(one_by_one):
    "400 of the 100,000 of tests/harness/broja_harness.py"
    found = summary(400, 3, one_by_one)
    assert {row["tables"] for row in found.values()} == {400 // len(KINDS)} and len(found) == len(KINDS)
    assert not any(row["above"] for row in found.values())


def test_a_solver_that_shares_nothing_with_ours_agrees():
    "100 of the 2,500 of tests/harness/broja_harness.py"
    pytest.importorskip("clarabel")
    found = compared(100, 3).values()
    assert max(row["largest_difference_bits"] for row in found) <= 1e-6
    unsolved = [left["tables"] for row in found for left in row["unsolved"].values()]
    assert sum(unsolved) <= 30


def test_the_two_ways_agree():
    "Other arithmetic, another matrix, another language: one value"
    compared = 0
    for _, p in tables(80, 5):
        p1, p2 = p.sum(1)[None], p.sum(0)[None]
        if (p1 > 1e-13).all() and (p2 > 1e-13).all():
            values = [way(p1, p2, 1e-9, 60) for way in (_solve_batch, _solve_each)]
            if all(gap <= 1e-9 for *_, gap, _ in values):
                q1, q2 = (q for q, *_ in values)
                entropy = [(torch.xlogy(q, q).sum() - torch.xlogy(q.sum(-1), q.sum(-1)).sum()) for q in (q1, q2)]
                assert abs(entropy[0] - entropy[1]) < 1e-6
                compared += 1
    assert compared > 30


def test_a_table_that_went_round_in_circles():
    p = torch.tensor([[[0.46, 0.02], [0.02, 0]], [[0, 0.02], [0.03, 0.45]]], dtype=torch.float64)
    for pid in (pid_discrete(p, base=2), pid_discrete(p.expand(6, 2, 2, 2), base=2)):
        assert pid.gap.max() < 2e-9
        assert (pid.redundancy - 0.5641).abs().max() < 5e-5 and (pid.synergy - 0.0030).abs().max() < 5e-5
