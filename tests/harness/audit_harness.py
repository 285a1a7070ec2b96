"""Audits two trained encoders on the same images and writes what each tells, and the difference.

    python tests/harness/audit_harness.py CHECKPOINTS RUN RUN

CHECKPOINTS is the folder of a home that holds the checkpoints of the runs, `data/checkpoints`. The committed record,
`data/benchmarks/audit_cifar10.json`, is of tuned Barlow Twins and PID with four views, both seed 0, as registered:
runs b1ac76456dba9727 and 8455dedefc6b336b, which `pid_ssl reproduce comparison_relation_cifar10` makes again.
"""
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(folder, *runs):
    import torch

    from pid_ssl.data import load_dataset
    from pid_ssl.evaluate import audit, compare
    from pid_ssl.models import load_encoder
    from pid_ssl.records import device_name, git_state

    torch.set_num_threads(1)
    found = []
    for run in runs:
        encoder, config = load_encoder(Path(folder) / run / "final")
        found.append(audit(encoder, config["dataset"], name=config["loss"], size=config["image_size"]))
    origin = dict(device=device_name("cpu"), threads=1, runs=list(runs), data=load_dataset(config["dataset"]).note,
                  date=datetime.date.today().isoformat(), versions={p: version(p) for p in ("torch", "numpy")})
    record = dict(provenance=origin | git_state(ROOT)) | compare(*found).record()
    path = ROOT / f"data/benchmarks/audit_{config['dataset']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(compare(*found).table().round(3).to_string())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
