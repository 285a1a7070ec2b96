"""Measures what an oracle with the clean image tells of each parameter of a policy.

    python tests/harness/oracle_harness.py DATASET POLICY SIDE IMAGES

The committed record, `data/benchmarks/oracle_cifar10.json`, is of `cifar10 cifar 16 2048`; it takes two minutes.
"""
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(dataset, policy, side, number):
    import torch

    from pid_ssl.data import load_dataset
    from pid_ssl.data.oracle import CANDIDATES, pixel_oracle
    from pid_ssl.records import device_name, git_state

    torch.set_num_threads(1)
    data = load_dataset(dataset, image_size=int(side))
    told = pixel_oracle(data.images["test"][:int(number)], policy)
    origin = dict(device=device_name("cpu"), threads=1, data=data.note, date=datetime.date.today().isoformat(),
                  versions={p: version(p) for p in ("torch", "numpy")})
    about = dict(dataset=dataset, policy=policy, image_size=int(side), images=int(number), candidates=CANDIDATES)
    record = dict(provenance=origin | git_state(ROOT), about=about, nats={k: list(v) for k, v in told.items()})
    path = ROOT / f"data/benchmarks/oracle_{dataset}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
