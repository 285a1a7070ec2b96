"Atoms against values that at least two other implementations agree on; where they come from is in pid_reference.json"
import json
import math
from pathlib import Path

import pytest
import torch

from pid_ssl.pid import (gaussian_information, gaussian_mi_bias, pid_discrete, pid_gaussian, scalar_atoms,
                         scalar_information)

REFERENCE = json.loads((Path(__file__).parent / "pid_reference.json").read_text())
TOLERANCE = {"wb": 1e-9, "mmi": 1e-9, "broja": 1e-6}


def table(rows):
    p = torch.zeros([1 + max(int(r[k]) for r in rows) for k in range(3)], dtype=torch.float64)
    for z1, z2, t, value in rows:
        p[int(z1), int(z2), int(t)] += value
    return p


def assert_atoms(pid, expected, tolerance):
    assert (pid.atoms - torch.tensor(expected, dtype=torch.float64)).abs().max() <= tolerance


@pytest.mark.parametrize("measure", TOLERANCE)
@pytest.mark.parametrize("name", REFERENCE["discrete"])
def test_discrete(name, measure):
    row = REFERENCE["discrete"][name]
    pid = pid_discrete(table(row["pmf"]), measure, base=2)
    assert_atoms(pid, row[measure], TOLERANCE[measure])
    assert 0 <= pid.gap <= 1e-6


@pytest.mark.parametrize("base", [math.e, 2])
@pytest.mark.parametrize("measure,tolerance", [("mmi", 1e-9), ("broja", 1e-4)])
@pytest.mark.parametrize("name", REFERENCE["gaussian"])
def test_gaussian(name, measure, tolerance, base):
    row = REFERENCE["gaussian"][name]
    pid = pid_gaussian(torch.tensor(row["cov"], dtype=torch.float64), row["dims"], measure, base)
    assert_atoms(pid, [v / math.log(base) for v in row[measure]], tolerance)


@pytest.mark.parametrize("row", REFERENCE["bias"], ids=lambda r: f"{r['d1']}-{r['d2']}-{r['n']}")
def test_bias(row):
    assert abs(gaussian_mi_bias(row["d1"], row["d2"], row["n"]) - row["bias_nats"]) <= 1e-9


@pytest.mark.parametrize("row", REFERENCE["exchangeable"], ids=lambda r: f"{r['a']}-{r['c']}")
def test_exchangeable_scalars(row):
    redundancy, synergy = scalar_atoms(row["a"], row["c"])
    assert abs(redundancy - row["R_nats"]) <= 1e-9 and abs(synergy - row["S_nats"]) <= 1e-9
    i1, i2, i12 = scalar_information(*(torch.tensor(x, dtype=torch.float64) for x in (row["a"], row["a"], row["c"])))
    assert abs(i1 - row["R_nats"]) <= 1e-9 and abs(i12 - i1 - row["S_nats"]) <= 1e-9


@pytest.mark.parametrize("row", REFERENCE["co_information"], ids=lambda r: f"{r['rho']}-{r['sigma_y']}")
def test_co_information(row):
    "T = Z1 + Z2 + noise, with corr(Z1, Z2) = rho: S - R is published"
    rho, noise = row["rho"], row["sigma_y"] ** 2
    rows = [[1, rho, 1 + rho], [rho, 1, 1 + rho], [1 + rho, 1 + rho, 2 + 2 * rho + noise]]
    cov = torch.tensor(rows, dtype=torch.float64)
    pid = pid_gaussian(cov, (1, 1, 1))
    assert abs(pid.redundancy - row["R_nats"]) <= 1e-9 and abs(pid.synergy - row["S_nats"]) <= 1e-9
    i1, i2, i12 = gaussian_information(cov, (1, 1, 1))
    assert abs((i12 - i1 - i2) - row["published_S_minus_R_nats"]) <= 1e-3
