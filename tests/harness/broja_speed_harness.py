"""Times BROJA decompositions: single tables beside BROJA_2PID and dit's cone, batches beside dit's cone, and tables of
8 values and more beside an earlier commit.

    python tests/harness/broja_speed_harness.py CHECKOUT

CHECKOUT holds the commit to compare with (`git worktree add CHECKOUT COMMIT`). Needs `pip install "pid_ssl[bench]"`
and BROJA_2PID (Makkeh, Theis and Vicente) by that name, or as `idtxl.synergy_tartu`, which carries it. Writes
`data/benchmarks/broja_speed.json`. Sides take turns on every table, so that whatever else the machine does meets all
of them; of every table the least time of a side counts, of which the median over tables is recorded.
"""
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {2: 20, 3: 20, 4: 20, 6: 6, 8: 2}  # values of each variable: tables of each kind
KINDS = "dense", "sparse"
LARGER = ((8, 8, 8, 1), (12, 12, 12, 1), (16, 16, 16, 1), (8, 8, 50, 1), (8, 8, 8, 100), (12, 12, 12, 20))


def random_tables(n, sizes, sparse, seed=0):
    "Uniform on the simplex; the sparse ones with half of the entries zero"
    rng = np.random.default_rng([seed, *sizes, sparse])
    p = rng.exponential(size=(n, *sizes))
    if sparse:
        p *= rng.random(p.shape) < 0.5
    return p / p.sum((1, 2, 3), keepdims=True)


def broja_2pid():
    "The module, and where it came from"
    for name in ("BROJA_2PID", "broja2pid.BROJA_2PID", "idtxl.synergy_tartu"):
        try:
            return importlib.import_module(name), name
        except ImportError:
            pass
    raise SystemExit("BROJA_2PID is not installed")


def sides():
    "{name: (what a table is turned into beforehand, the timed call, redundancy, unique1, unique2, synergy in bits)}"
    from dit import Distribution
    from dit.algorithms.broja_method import broja_solve_bivariate

    from pid_ssl.pid import pid_discrete

    other = broja_2pid()[0]

    def as_dict(p):
        return {(t, i, j): float(v) for (i, j, t), v in np.ndenumerate(p) if v > 0}

    def as_distribution(p):
        where = np.argwhere(p)
        return Distribution([tuple(map(int, o)) for o in where], p[tuple(where.T)])

    def cone(d):
        return broja_solve_bivariate(d, [(0,), (1,)], (2,), method="cone")[0]

    return {"pid_ssl": (torch.from_numpy, lambda p: pid_discrete(p, base=2), lambda r: r.atoms.tolist()),
            "BROJA_2PID": (as_dict, other.pid, lambda r: [r[k] for k in ("SI", "UIY", "UIZ", "CI")]),
            "dit cone": (as_distribution, cone, lambda r: [None, r[(0,)], r[(1,)], None])}


def differences(found):
    "Largest difference in bits of an atom from ours, by side"
    ours = found["pid_ssl"]
    unlike = lambda theirs: max(abs(a - b) for a, b in zip(ours, theirs) if b is not None)
    return {side: unlike(atoms) for side, atoms in found.items() if side != "pid_ssl"}


def single(rounds=5):
    "Rows: size, kind, tables, median milliseconds by side, ratio to ours, failures, largest difference"
    rows, ways = [], sides()
    for n, count in SIZES.items():
        for kind in KINDS:
            tables = random_tables(count, (n, n, n), kind == "sparse")
            least, failed, unlike = {side: [] for side in ways}, dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
            for p in tables:
                given = {side: prepare(p) for side, (prepare, *_) in ways.items()}
                best, found = dict.fromkeys(ways, np.inf), {}
                for turn in range(rounds if n < 8 else 2):
                    for side in list(ways)[:: 1 if turn % 2 else -1]:
                        start = time.process_time()
                        try:
                            result = ways[side][1](given[side])
                        except Exception:  # a solver that stops on a table is counted, not timed
                            continue
                        best[side] = min(best[side], time.process_time() - start)
                        found[side] = ways[side][2](result)
                for side, seconds in best.items():
                    failed[side] += side not in found
                    least[side] += [seconds] * (side in found)
                for side, size in differences(found).items():
                    unlike[side] = max(unlike[side], float(size))
            ms = {side: 1e3 * float(np.median(times)) for side, times in least.items()}
            rows.append(dict(size=[n, n, n], kind=kind, tables=count, ms=ms, failed=failed,
                             ratio={side: ms[side] / ms["pid_ssl"] for side in ways if side != "pid_ssl"},
                             largest_difference_bits={k: v for k, v in unlike.items() if k != "pid_ssl"}))
            print(rows[-1], flush=True)
    return rows


def batch(parts=10):
    "1,000 tables of 4x4x4, half of them sparse: all at once here; dit's part by part, ours before each part"
    from pid_ssl.pid import pid_discrete

    tables = np.concatenate([random_tables(500, (4, 4, 4), sparse) for sparse in (False, True)])
    prepare, cone, _ = sides()["dit cone"]
    cone(prepare(tables[0]))
    ours, theirs, unique = [], [], []
    for part in np.split(tables, parts):
        for _ in range(3):
            start = time.process_time()
            found = pid_discrete(torch.from_numpy(tables), base=2)
            ours.append(time.process_time() - start)
        start = time.process_time()
        results = [cone(prepare(p)) for p in part]
        theirs.append(time.process_time() - start)
        unique += [[r[(0,)], r[(1,)]] for r in results]
    mine = torch.stack([found.unique1, found.unique2], -1)
    unlike = (mine - torch.tensor(np.array(unique, dtype=float))).abs().max().item()
    return dict(tables=1000, sparse=500, size=[4, 4, 4], pid_ssl_s=float(np.median(ours)), pid_ssl_least_s=min(ours),
                dit_cone_s=sum(theirs), ratio=sum(theirs) / float(np.median(ours)), largest_difference_bits=unlike,
                largest_gap_bits=found.gap.max().item())


def larger_here(rounds=5):
    "Least processor seconds of each of `LARGER` by the package that is imported, and its largest gap"
    from pid_ssl.pid import pid_discrete

    torch.set_num_threads(1)
    out = []
    for *size, count in LARGER:
        p, times = torch.from_numpy(random_tables(count, tuple(size), True)), []
        for _ in range(rounds):
            start = time.process_time()
            gap = pid_discrete(p, base=2).gap.max().item()
            times.append(time.process_time() - start)
        out.append((min(times), gap))
    return out


def larger(checkout, turns=5):
    "Rows: size, seconds before and now, ratio; each turn in a process of its own"
    seen = {"before": [], "now": []}
    for turn in range(turns):
        for side in ("before", "now")[:: 1 if turn % 2 else -1]:
            root = str(checkout if side == "before" else ROOT)
            paths = os.pathsep.join([root, str(ROOT / "tests/harness"), os.environ.get("PYTHONPATH", "")])
            code = "import json, broja_speed_harness as h; print(json.dumps(h.larger_here()))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root,
                                  env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
            seen[side].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for k, (*size, count) in enumerate(LARGER):
        before, now = (min(turn[k][0] for turn in seen[side]) for side in ("before", "now"))
        rows.append(dict(size=size, tables=count, before_s=before, now_s=now, ratio=before / now,
                         largest_gap_bits=seen["now"][0][k][1]))
        print(rows[-1], flush=True)
    return rows


def provenance(checkout):
    import datetime
    import platform
    from importlib.metadata import version

    from pid_ssl.records import device_name

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    name = broja_2pid()[1]
    carrier = next((d for d in ("idtxl", "idtxl-uv") if name.startswith("idtxl") and has(d)), None)
    load, cores, origin = os.getloadavg()[0], os.cpu_count(), f"as in {carrier} {version(carrier)}" if carrier else name
    busy = f"load {load:.0f} on {cores} cores when it began: all sides are slower than on an idle machine"
    return dict(load_before=load, device=device_name("cpu"), cores=cores, threads=1, broja_2pid=origin,
                date=datetime.date.today().isoformat(), python=platform.python_version(), before=commit.stdout.strip(),
                versions={p: version(p) for p in ("torch", "numpy", "dit", "ecos")},
                note=f"BROJA_2PID {origin}" + f"; {busy}" * (load > cores / 2))


def has(package):
    from importlib.metadata import PackageNotFoundError, version
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    checkout = Path(sys.argv[1]).resolve()
    record = dict(provenance=provenance(checkout), single=single(), batch=batch(), larger=larger(checkout))
    record["load_after"] = os.getloadavg()[0]
    print(json.dumps(record["batch"]))
    (ROOT / "data/benchmarks/broja_speed.json").write_text(json.dumps(record, indent=1) + "\n")
