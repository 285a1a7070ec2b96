"""Mean error and coverage of the estimators of `pid_samples` on known distributions, into `pid_intervals.json`.

    python tests/harness/estimator_harness.py [DRAWS [ESTIMATOR | "ESTIMATOR: DISTRIBUTION" ...]]

Rows that have fewer draws are gone on with; heads of many draws are trained at once, which changes no draw's samples.
"""
import json
import math
import os
import sys
import time
import warnings

import torch

from pid_ssl.config import project_root
from pid_ssl.pid import pid_discrete, pid_samples, scalar_information
from pid_ssl.pid.heads import folded, normal_scores, told_nats
from pid_ssl.pid.samples import NAMES, _told, confidence_interval, named

RECORD = project_root() / "data/benchmarks/pid_intervals.json"
KNOWN = "redundancy", "unique1", "unique2", "synergy", "joint"
F64 = torch.float64


def atoms(i1, i2, i12):
    "By minimum mutual information, in bits"
    least, most = min(i1, i2), max(i1, i2)
    return dict(zip(KNOWN, (least, i1 - least, i2 - least, i12 - most, i12)))


def gaussian(d, a, c):
    "Views with correlation a to the target and c to each other, in every coordinate"
    factor = torch.linalg.cholesky(torch.tensor([[1, c, a], [c, 1, a], [a, a, 1]], dtype=F64) + 1e-12 * torch.eye(3))
    truth = [d * i.item() / math.log(2) for i in scalar_information(*torch.tensor([a, a, c], dtype=F64))]
    return lambda n, g: (factor @ torch.randn(d, 3, n, generator=g, dtype=F64)).permute(1, 2, 0), atoms(*truth)


def exclusive_or(noise=0.3):
    "Label: whether two signs differ, each seen through noise"
    def draw(n, g):
        signs = torch.randint(2, (2, n), generator=g)
        z = 2.0 * signs - 1 + noise * torch.randn(2, n, generator=g)
        return z[0, :, None], z[1, :, None], signs[0] ^ signs[1]
    x = torch.linspace(-4, 4, 1601, dtype=F64)
    weight = sum(torch.exp(-(x - s) ** 2 / 2 / noise**2) for s in (-1, 1))
    up = torch.sigmoid(2 * x / noise**2)
    differ = up[:, None] * (1 - up) + (1 - up[:, None]) * up
    left = (torch.special.entr(differ) + torch.special.entr(1 - differ)) / math.log(2)
    return draw, atoms(0, 0, 1 - (weight @ left @ weight / weight.sum() ** 2).item())


def product(noise=0.5):
    "Target: the product of two numbers, and noise"
    def draw(n, g):
        z1, z2, e = torch.randn(3, n, 1, generator=g)
        return z1, z2, z1 * z2 + noise * e
    u, y = torch.linspace(-8, 8, 2001, dtype=F64), torch.linspace(-40, 40, 8001, dtype=F64)
    weight, variance = torch.exp(-(u**2) / 2) / torch.exp(-(u**2) / 2).sum(), u**2 + noise**2
    density = torch.exp(-y[:, None] ** 2 / 2 / variance) @ (weight / (2 * math.pi * variance).sqrt())
    total = torch.special.entr(density).sum() * (y[1] - y[0])
    normal = lambda v: torch.log(2 * math.pi * math.e * v) / 2
    alone, both = total - weight @ normal(variance), total - normal(torch.tensor(noise**2, dtype=F64))
    return draw, atoms(*(i.item() / math.log(2) for i in (alone, alone, both)))


def classes(d, k=3, apart=1.5):
    "Label: one of k classes, at places of their own in each view, seen through noise"
    places = torch.randn(2, k, d, generator=torch.Generator().manual_seed(99))
    places = apart * places / places.norm(dim=-1, keepdim=True)
    def draw(n, g):
        t = torch.randint(k, (n,), generator=g)
        return *(p[t] + torch.randn(n, d, generator=g) for p in places), t
    *z, t = draw(200_000, torch.Generator().manual_seed(12345))
    fit = [-(torch.cdist(x, p) ** 2) / 2 for x, p in zip(z, places)]
    right = [f.log_softmax(-1).gather(1, t[:, None]).double().mean().item() for f in (*fit, sum(fit))]
    return draw, atoms(*((math.log(k) + r) / math.log(2) for r in right))


def table(pmf):
    "Labels all three, drawn from a table"
    pmf = torch.as_tensor(pmf, dtype=F64) / pmf.double().sum()
    truth = pid_discrete(pmf, base=2)
    def draw(n, g):
        cells = torch.multinomial(pmf.flatten(), n, replacement=True, generator=g)
        return torch.stack(torch.unravel_index(cells, pmf.shape))
    return draw, {name: getattr(truth, name).item() for name in KNOWN}


COPY = torch.zeros(4, 4, 4).index_put((torch.arange(4),) * 3, torch.tensor(0.25))
RANDOM = torch.distributions.Dirichlet(torch.full((8, 8 * 4), 0.3)).sample
NEAR = 0.97 * COPY + 0.03 / 64
torch.manual_seed(0)
TABLE = (RANDOM() / 8).view(8, 8, 4)
TABLES = {"copied labels": (COPY, 250), "nearly copied labels": (NEAR, 1000), "table of 256 cells": (TABLE, 512)}
GAUSSIAN = {"Gaussian": lambda d: gaussian(d, 0.5, 0.25), "near-redundant": lambda d: gaussian(d, 0.8, 0.99)}


QUANTISED = dict(estimator="quantised", permutations=5)


def cases():
    "Estimator, options, distribution, d, its draw and truth, n: the fewest samples that are recommended"
    for name, make in GAUSSIAN.items():
        for d, n in ((1, 250), (4, 1000), (16, 4000)):
            yield "gaussian, bias-corrected", dict(estimator="gaussian", bias_correct=True), name, d, make(d), n
        for d, n in ((1, 250), (4, 1000), (16, 8000)):
            yield "gaussian", dict(estimator="gaussian"), name, d, make(d), n
        for d, n in ((1, 250), (4, 1000), (16, 16_000)):
            yield "coordinate", dict(estimator="coordinate"), name, d, make(d), n
        yield "quantised", QUANTISED, name, 1, make(1), 4000
    for name, (pmf, n) in TABLES.items():
        yield "quantised, labels", QUANTISED, name, 0, table(pmf), n
    yield "heads, labels", dict(estimator="heads"), "exclusive or", 1, exclusive_or(), 1000
    yield "heads, labels", dict(estimator="heads"), "three classes", 4, classes(4), 2000
    yield "heads, labels", dict(estimator="heads"), "three classes", 16, classes(16), 16_000
    yield "heads, numbers", dict(estimator="heads"), "Gaussian", 1, GAUSSIAN["Gaussian"](1), 4000
    yield "heads, numbers", dict(estimator="heads"), "near-redundant", 1, GAUSSIAN["near-redundant"](1), 4000
    yield "heads, numbers", dict(estimator="heads"), "product", 1, product(), 4000
    yield "infonce", dict(estimator="infonce", steps=200), "Gaussian", 1, GAUSSIAN["Gaussian"](1), 1000


def by_heads(draw, n, seeds):
    "What `pid_samples` does with `heads`, for several draws in one training"
    whole, folds = [], []
    for at, seed in enumerate(seeds):
        z1, z2, t = draw(n, torch.Generator().manual_seed(seed))
        order, *rows = folded(n, 4, torch.Generator().manual_seed(seed))
        t = normal_scores(t[order]) if t.is_floating_point() else t[order]
        whole.append((z1[order], z2[order], t))
        folds.append([r + at * len(order) for r in rows])
    data, rows = ([torch.cat(x) for x in zip(*parts)] for parts in (whole, folds))
    full, less = (told_nats(*data, *rows, seed=seeds[0], share=s).view(len(seeds), -1, 3) for s in (1, 0.5))
    for nats, fewer, seed in zip(full, less, seeds):
        result, run, to_come = _told(nats, 2, lambda: fewer)
        read = lambda i: named(run(i))
        interval = confidence_interval(read, len(nats), "jackknife", seed=seed, to_come=to_come(), minima=1)
        yield result._replace(interval=interval)


def one_by_one(options, draw, n, seeds):
    "`pid_samples` of each draw"
    for seed in seeds:
        z = draw(n, torch.Generator().manual_seed(seed))
        yield pid_samples(*z, base=2, interval="jackknife", seed=seed, **options)


def measured(options, draw, truth, n, seeds):
    "Sums of the errors in bits, and how many 95 % intervals hold the truth, by atom"
    heads = options["estimator"] == "heads"
    found = list(by_heads(draw, n, seeds) if heads else one_by_one(options, draw, n, seeds))
    read = torch.stack([named(p) for p in found]).double()
    error = {k: (read[:, NAMES.index(k)].sum() - len(found) * truth[k]).item() for k in KNOWN}
    holds = lambda low, high, value: (low <= value + 1e-9).item() and (value - 1e-9 <= high).item()
    return error, {k: sum(holds(*p.interval[k], truth[k]) for p in found) for k in KNOWN}


def record():
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"unit": "bits", "level": 0.95, "rows": []}


def main(draws=200, only=(), together=20):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for way, options, name, d, (draw, truth), n in cases():
        key = {"estimator": way, "distribution": name, "d": d, "n": n}
        mine = lambda row: key.items() <= row.items()
        new = key | {"options": options, "truth": truth, "draws": 0, "s": 0.0}
        new |= {what: dict.fromkeys(KNOWN, 0) for what in ("mean_error", "covered")}
        row = next(filter(mine, record()["rows"]), new)
        wanted = not only or way in only or f"{way}: {name}" in only
        while wanted and row["draws"] < draws:
            done, start = row["draws"], time.process_time()
            error, inside = measured(options, draw, truth, n, range(done, min(done + together, draws)))
            row["draws"] = min(done + together, draws)
            row["s"] = (row["s"] * done + time.process_time() - start) / row["draws"]
            for k in KNOWN:
                row["mean_error"][k] = (row["mean_error"][k] * done + error[k]) / row["draws"]
                row["covered"][k] += inside[k]
            kept = record()  # others may have written
            kept["rows"] = [r for r in kept["rows"] if not mine(r)] + [row]
            kept["provenance"] = {"device": "cpu", "threads": 1, "date": time.strftime("%Y-%m-%d"),
                                  "versions": {"torch": torch.__version__.split("+")[0]}}
            beside = RECORD.with_suffix(f".{os.getpid()}")  # whole or not at all
            beside.write_text(json.dumps(kept, indent=1) + "\n")
            beside.replace(RECORD)
            short = {k: f"{row['mean_error'][k]:+.3f} {row['covered'][k] / row['draws']:.0%}" for k in KNOWN}
            print(way, name, f"d={d} n={n} {row['draws']} draws, {row['s']:.2f} s", short, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:])
