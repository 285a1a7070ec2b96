"""A dataset larger than memory, pretrained on and evaluated, with its memory watched.

python tests/harness/stream_harness.py [--images 80000] [--side 96] [--cap 1500]

Makes a Parquet set of JPEGs (2.2 GB of pixels by default) and one of 1,000 images, makes the same run on both, and
samples the anonymous memory of each process: what cannot be given back to the system, unlike a mapped file's pages.
The run on the large set gets a limit on its writable memory (RLIMIT_DATA): what the small run reserved, and the cap.
The network sees images averaged over blocks of 8 by 8 pixels, so that a core needs about five minutes for one epoch and
the evaluation; views are made at full size. Linux only.
"""
import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from torch import nn
from pid_ssl import evaluate
from pid_ssl.experiments import training as trainers_base
from pid_ssl.models import SmallResNet
def build_encoder(name, image_size, channels, width):
    net = nn.Sequential(nn.AvgPool2d(8), SmallResNet(width, channels))
    net.num_features = net[1].num_features
    return net
trainers_base.build_encoder = build_encoder
evaluate.RAW_VALUES = 0  # the small run would be measured on raw pixels, the large one is not
from pid_ssl.trainers import main
sys.exit(main(sys.argv[1:]))
"""


def disc(rng, side, colour):
    """A disc of a colour as the bytes of a JPEG: place, size and noise differ."""
    y, x = np.mgrid[:side, :side]
    cx, cy, r = rng.uniform(0.3, 0.7, 2).tolist() + [rng.uniform(0.15, 0.3)]
    inside = ((x / side - cx) ** 2 + (y / side - cy) ** 2 < r * r)[..., None]
    blocks = rng.integers(0, 60, (side // 8 + 1, side // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    image = Image.fromarray((inside * colour + blocks[:side, :side]).clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_set(folder, images, side, classes=10):
    """Parquet files of discs: the class is the colour; at most 2,000 are for testing; from 10,000 on they repeat."""
    rng = np.random.default_rng(images)
    colours = rng.integers(60, 256, (classes, 3))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("img", kind), ("label", pa.int64())])
    folder.mkdir(parents=True)
    made, test = [], min(2000, images // 6)
    for split, n in (("test", test), ("train", images - test)):
        with pq.ParquetWriter(folder / f"{split}.parquet", schema) as out:
            for start in range(0, n, 2000):
                rows, blobs = np.arange(start, min(n, start + 2000)), []
                for i in rows:
                    if len(made) < 10_000:
                        made.append(disc(rng, side, colours[i % classes]))
                        blobs.append({"bytes": made[-1], "path": str(i)})
                    else:
                        blobs.append({"bytes": made[i % 10_000], "path": str(i)})
                out.write_table(pa.table({"img": pa.array(blobs, kind), "label": pa.array(rows % classes)}))


def watched(command, limit=None, env=None):
    """Run a command; its exit status, output, seconds and the largest memory figures seen (bytes)."""
    start, peak = time.perf_counter(), {"RssAnon": 0, "RssFile": 0, "VmData": 0}
    cap = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    with tempfile.TemporaryFile("w+") as out:
        with subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env, preexec_fn=cap) as process:
            while process.poll() is None:
                try:
                    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                        name, _, value = line.partition(":")
                        if name in peak:
                            peak[name] = max(peak[name], int(value.split()[0]) * 1024)
                except OSError:
                    pass
                time.sleep(0.03)
        out.seek(0)
        return process.returncode, out.read(), time.perf_counter() - start, peak


def command(name, folder, side):
    """The run on a set: one epoch of a small network."""
    given = dict(dataset=name, data_dir=folder, home=f"{folder}/home", loss="barlow", preset="cpu", device="cpu")
    given |= dict(image_size=side, train_size=0, epochs=1, width=8, policy="digits", batch_size=256)
    given |= dict(projector_dim=32, projector_hidden=32, data_memory=50)
    return [sys.executable, "-c", RUN, *(str(part) for k, v in given.items() for part in (f"--{k}", v))]


def size(folder):
    return sum(p.stat().st_size for p in Path(folder).glob("*"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--cap", type=int, default=1500, help="MB of anonymous memory beyond the small run's")
    a = parser.parse_args()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("IN_TEST", None)
    report = {"images": a.images, "decoded_bytes": a.images * 3 * a.side**2, "cap_bytes": a.cap * 10**6}
    with tempfile.TemporaryDirectory() as tmp:
        for name, n in (("small", 1000), ("large", a.images)):
            t = time.perf_counter()
            write_set(Path(tmp) / name, n, a.side)
            made = time.perf_counter() - t
            limit = report["small"]["peak"]["VmData"] + report["cap_bytes"] if name == "large" else None
            status, text, seconds, peak = watched(command(name, tmp, a.side), limit, env)
            print(text, flush=True)
            assert status == 0, f"exit status {status}"
            records = [json.loads(p.read_text()) for p in Path(tmp, "home/data/runs").glob("*.json")]
            (record,) = [r for r in records if r["config"]["dataset"] == name]
            report[name] = {
                "made_seconds": round(made, 1),
                "seconds": round(seconds, 1),
                "peak": peak,
                "limit": limit,
                "parquet_bytes": size(f"{tmp}/{name}"),
                "train_images_per_second": record["provenance"]["images_per_second"],
                "metrics": {k: v for k, v in record["metrics"].items() if "linear_logreg" in k or "knn5" in k},
                "cache_bytes": size(f"{tmp}/home/data/cache"),
            }
            if name == "large":
                again = watched(command(name, tmp, a.side), limit, env)
                report["second_start_seconds"], report["second_status"] = round(again[2], 1), again[0]
    report["growth_bytes"] = report["large"]["peak"]["RssAnon"] - report["small"]["peak"]["RssAnon"]
    print(json.dumps(report, indent=1))
    assert report["growth_bytes"] < report["cap_bytes"], "the run on the large set needs more memory than the cap"


if __name__ == "__main__":
    main()
