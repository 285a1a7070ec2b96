"""Are the splits of a dataset alike? Mean and spread of its pixels, and how far neighbouring ones differ: a copy whose
splits were scaled in two ways shows in the last.

    python tests/harness/split_harness.py [--out data/benchmarks/splits.json]

Every dataset of images that a result is told on, at the sizes it is used at; two minutes on one core.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pid_ssl.data import load_dataset
from pid_ssl.records import device_name, git_state

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"cifar10": (32, 16), "imagenette-96": (32, 16), "tiny-imagenet-32": (32, 16)}
IMAGES = 5_000  # of a split, or all


def described(images):
    """Of pixels from 0 to 255: mean, standard deviation, mean distance of horizontal and vertical neighbours."""
    x = images[:IMAGES].double()
    apart = torch.cat([x.diff(dim=2).abs().flatten(), x.diff(dim=3).abs().flatten()])
    return {"images": len(x), "mean": x.mean().item(), "deviation": x.std().item(), "neighbours": apart.mean().item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "data/benchmarks/splits.json")
    given = parser.parse_args()
    rows, notes = [], []
    for name, sides in SIDES.items():
        for side in sides:
            data = load_dataset(name, side, 0)
            rows += [dict(dataset=name, side=side, split=s, **described(x)) for s, x in data.images.items()]
            print(*rows[-len(data.images) :], sep="\n", flush=True)
        notes.append(data.note)
    about = dict(device="cpu", processor=device_name("cpu"), versions=dict(torch=torch.__version__), **git_state())
    about |= dict(data=", ".join(notes), date=time.strftime("%Y-%m-%d"))
    given.out.write_text(json.dumps(dict(rows=rows, provenance=about), indent=1) + "\n")


if __name__ == "__main__":
    main()
