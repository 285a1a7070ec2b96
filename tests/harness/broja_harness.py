"""Solves generated tables by BROJA, of the kinds that a random table is not, and counts those that end above a gap;
and the first of them by a solver that shares nothing with ours.

    python tests/harness/broja_harness.py [tables] [tables of the other solver] [seed]

The default, 100,000 tables one by one and again in batches, 2,500 of them by the other solver, takes some minutes of a
core and writes `data/benchmarks/broja_check.json`; `tests/pid/test_pid_broja.py` runs a part of it. The other solver is
Clarabel (`pip install clarabel`), an interior-point method for cones written in Rust, on the exponential-cone form of
the problem.
"""
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BITS = 1e-7


def noise(rng, shape):
    """Uniform or random, with or without holes, of mass 1."""
    x = rng.random(shape) if rng.random() < 0.5 else np.ones(shape)
    if rng.random() < 0.3:
        x = x * (rng.random(shape) < 0.6)
    return x / max(x.sum(), 1e-300)


def mixed(p, rng):
    """A share of noise, from 1e-1 to 1e-9."""
    share = 10 ** rng.uniform(-9, -1)
    return (1 - share) * p / p.sum() + share * noise(rng, p.shape)


def uniform(rng, n1, n2, nt):
    return rng.random((n1, n2, nt))


def sparse(rng, n1, n2, nt):
    return rng.random((n1, n2, nt)) ** rng.integers(1, 9) * (rng.random((n1, n2, nt)) < rng.uniform(0.15, 0.7))


def zero_rows(rng, n1, n2, nt):
    p = rng.random((n1, n2, nt))
    p[rng.integers(n1)] = 0
    if n2 > 2:
        p[:, rng.integers(n2)] = 0
    if nt > 2 and rng.random() < 0.5:
        p[..., rng.integers(nt)] = 0
    return p


def near_redundant(rng, n1, n2, nt):
    p, n = np.zeros((n1, n2, nt)), min(n1, n2, nt)
    p[range(n), range(n), range(n)] = rng.dirichlet(np.ones(n))
    return mixed(p, rng)


def shared_symbol(rng, n1, n2, nt):
    """The kind that went round in circles: a fair symbol that both sources and the target show, and noise."""
    n = min(n1, n2, nt, 4)
    p = np.zeros((n, n, n))
    p[range(n), range(n), range(n)] = 1 / n
    x, share = rng.random((n, n, n)), rng.choice([0.1, 0.03, 0.01, 0.003, 1e-4, 1e-6, 1e-8])
    return (1 - share) * p + share * x / x.sum()


def near_unique(rng, n1, n2, nt):
    p = np.zeros((n1, n2, nt))
    for i in range(n1):
        p[i, :, i % nt] = rng.dirichlet(np.ones(n2)) / n1
    return mixed(p, rng)


def near_copy(rng, n1, n2, nt):
    p = np.zeros((n1, n2, nt))
    for i in range(n1):
        p[i, i % n2] = rng.random(nt)
    return mixed(p, rng)


def near_xor(rng, n1, n2, nt):
    p = np.zeros((n1, n2, nt))
    for i, j in np.ndindex(n1, n2):
        p[i, j, (i + j) % nt] = rng.random() if rng.random() < 0.5 else 1
    return mixed(p, rng)


def tiny_marginals(rng, n1, n2, nt):
    """Down to 1e-12."""
    p = rng.random((n1, n2, nt))
    for axis, n in enumerate(p.shape):
        small = 10.0 ** rng.uniform(-12 * (rng.random(n) < 0.4), 0)
        p = p * np.expand_dims(small, [a for a in range(3) if a != axis])
    return p


def two_classifiers(rng, n1, n2, nt):
    """Both nearly always right, with errors of their own or in common."""
    n, wrong = min(n1, n2, nt), 10 ** rng.uniform(-9, -1)
    t = rng.dirichlet(3 * np.ones(n))
    shares = wrong, wrong * rng.uniform(0.3, 3)
    a, b = (np.eye(n) * (1 - x) + x * rng.dirichlet(np.ones(n), n) for x in shares)
    p = np.einsum("t,ta,tb->abt", t, a, b)
    if rng.random() < 0.5:
        p = 0.7 * p + 0.3 * np.einsum("t,ta,ab->abt", t, a, np.eye(n))
    return p


KINDS = (uniform, sparse, zero_rows, near_redundant, shared_symbol, near_unique, near_copy, near_xor, tiny_marginals,
         two_classifiers)


def tables(count, seed=0):
    """(kind, table) of every kind in turn, from 2x2x2 to 6x6x6."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        shape = rng.integers(2, 7, 3) if rng.random() < 0.6 else [rng.integers(2, 5)] * 3
        p = kind(rng, *map(int, shape))
        p = p if p.sum() > 1e-200 else np.ones(p.shape)
        yield kind.__name__, torch.from_numpy(p / p.sum())


def gaps(count, seed=0, one_by_one=True):
    """(kind, gap in bits, table) of every table."""
    from pid_ssl.pid import pid_discrete

    groups = {}
    for i, (kind, p) in enumerate(tables(count, seed)):
        groups.setdefault(i if one_by_one else tuple(p.shape), []).append((kind, p))
    for group in groups.values():
        found = pid_discrete(torch.stack([p for _, p in group]), base=2).gap
        yield from ((kind, gap, p) for (kind, p), gap in zip(group, found.tolist()))


def summary(count, seed, one_by_one):
    """{kind: tables, largest gap in bits, tables above the limit}."""
    out = {}
    for kind, gap, p in gaps(count, seed, one_by_one):
        row = out.setdefault(kind, dict(tables=0, largest_gap_bits=0.0, above=0))
        row["tables"] += 1
        row["largest_gap_bits"] = max(row["largest_gap_bits"], gap)
        if not gap <= LIMIT_BITS:
            row["above"] += 1
            print(kind, f"{gap:.1e}", p.tolist())
    return out


# the other solver


def cone_problem(p1, p2):
    """The problem in the form min c x, b - A x in the cones: (z1, z2, t) of entries, and c, A, b, cones.

    An entry has two unknowns, q and u; u <= q ln(w / q) is that (u, q, w) lies in the exponential cone."""
    import clarabel
    from scipy import sparse

    index = np.argwhere((p1[:, None] > 0) & (p2[None] > 0))
    i, j, t = index.T
    n = len(index)
    number1, number2 = (np.cumsum(p > 0).reshape(p.shape) - 1 for p in (p1, p2))
    rows = np.concatenate([number1[i, t], (p1 > 0).sum() + number2[j, t]])
    equal = sparse.coo_matrix((np.ones(2 * n), (rows, np.tile(np.arange(n), 2))))
    same_cell = (i[:, None] == i) & (j[:, None] == j)
    a, b = np.nonzero(same_cell)
    e = np.arange(n)
    rows = np.concatenate([3 * e, 3 * e + 1, 3 * a + 2])
    columns = np.concatenate([n + e, e, b])
    cone = sparse.coo_matrix((-np.ones(len(rows)), (rows, columns)), shape=(3 * n, 2 * n))
    A = sparse.vstack([sparse.hstack([equal, sparse.coo_matrix((equal.shape[0], n))]), cone]).tocsc()
    b = np.concatenate([p1[p1 > 0], p2[p2 > 0], np.zeros(3 * n)])
    cones = [clarabel.ZeroConeT(equal.shape[0])] + [clarabel.ExponentialConeT()] * n
    return index, np.concatenate([np.zeros(n), -np.ones(n)]), A, b, cones


def by_cone(p):
    """Redundancy, unique1, unique2, synergy in bits by Clarabel, and the status it ends with."""
    import clarabel
    from scipy import sparse

    p = p.numpy()
    p1, p2 = p.sum(1), p.sum(0)
    _, c, A, b, cones = cone_problem(p1, p2)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    # its default, 1e-8, leaves atoms of nearly redundant tables wrong by more than 1e-6 bits
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-9
    found = clarabel.DefaultSolver(sparse.csc_matrix((len(c), len(c))), c, A, b, cones, settings).solve()
    entropy = lambda x: -sum(v * math.log2(v) for v in np.ravel(x) if v > 0)
    t = entropy(p.sum((0, 1)))
    i1, i2, i12 = (entropy(x.sum(-1)) + t - entropy(x) for x in (p1, p2, p))
    union = found.obj_val / math.log(2) + t
    return [i1 + i2 - union, union - i2, union - i1, i12 - union], str(found.status)


def compared(count, seed=0):
    """{kind: tables, those the other solver left unsolved by status, largest difference in bits of an atom}."""
    from pid_ssl.pid import pid_discrete

    out = {}
    for kind, p in tables(count, seed):
        row = out.setdefault(kind, dict(tables=0, unsolved={}, largest_difference_bits=0.0, above=0))
        row["tables"] += 1
        theirs, status = by_cone(p)
        difference = max(abs(a - b) for a, b in zip(theirs, pid_discrete(p, base=2).atoms.tolist()))
        if status != "Solved":
            left = row["unsolved"].setdefault(status, dict(tables=0, largest_difference_bits=0.0))
            left["tables"] += 1
            left["largest_difference_bits"] = max(left["largest_difference_bits"], difference)
            continue
        row["largest_difference_bits"] = max(row["largest_difference_bits"], difference)
        if not difference <= 1e-6:
            row["above"] += 1
            print(kind, f"differs by {difference:.1e}", p.tolist())
    return out


def provenance(seed):
    import datetime
    from importlib.metadata import version

    from pid_ssl.records import device_name

    return dict(device=device_name("cpu"), cores=os.cpu_count(), threads=torch.get_num_threads(), seed=seed,
                date=datetime.date.today().isoformat(), limit_bits=LIMIT_BITS,
                versions={p: version(p) for p in ("torch", "numpy", "clarabel")})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    count, others, seed = [*map(int, sys.argv[1:]), *(100_000, 2500, 0)[len(sys.argv) - 1:]]
    start = time.process_time()
    record = dict(provenance=provenance(seed), one_by_one=summary(count, seed, True),
                  batches=summary(count, seed, False), other_solver=compared(others, seed))
    record["processor_s"] = time.process_time() - start
    print(json.dumps(record, indent=1))
    if count == 100_000:
        (ROOT / "data/benchmarks/broja_check.json").write_text(json.dumps(record, indent=1) + "\n")
    rows = [row for part in ("one_by_one", "batches", "other_solver") for row in record[part].values()]
    sys.exit(any(row["above"] for row in rows))
