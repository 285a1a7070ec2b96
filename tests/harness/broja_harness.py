"""Solves generated tables by BROJA, of the kinds that a random table is not, and counts those that end above a gap.

    python tests/harness/broja_harness.py [tables] [seed] [1 for one by one, 0 for batches of a shape]

The default, 100,000 tables one by one, takes some minutes of a core; `tests/pid/test_pid_broja.py` runs a part of it.
"""
import sys
import time
from collections import Counter
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


def unsolved(count, seed=0, one_by_one=True):
    """(kind, gap in bits, table) of each that ends above the limit, and how many there were of each kind."""
    from pid_ssl.pid import pid_discrete

    groups, seen, left = {}, Counter(), []
    for i, (kind, p) in enumerate(tables(count, seed)):
        seen[kind] += 1
        groups.setdefault(i if one_by_one else tuple(p.shape), []).append((kind, p))
    for group in groups.values():
        gaps = pid_discrete(torch.stack([p for _, p in group]), base=2).gap
        left += [(kind, gap, p) for (kind, p), gap in zip(group, gaps.tolist()) if not gap <= LIMIT_BITS]
    return left, seen


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    count, seed, single = [*map(int, sys.argv[1:]), *(100_000, 0, 1)[len(sys.argv) - 1:]]
    start = time.process_time()
    left, seen = unsolved(count, seed, bool(single))
    bad = Counter(kind for kind, *_ in left)
    for kind, of in seen.items():
        print(f"{kind:16} {bad[kind]} of {of} above {LIMIT_BITS:g} bits")
    for kind, gap, p in left[:5]:
        print(kind, f"{gap:.1e}", p.tolist())
    print(f"{time.process_time() - start:.0f} s of processor time")
    sys.exit(bool(left))
