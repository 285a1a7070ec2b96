"""A dataset larger than memory, pretrained on and evaluated, with its memory watched.

python tests/harness/stream_harness.py [--images 80000] [--side 96] [--cap 1500]

Makes a Parquet set of JPEGs (2.2 GB of pixels by default) and one of 1,000 images, makes the same run on both, and samples the anonymous memory
of each process: what cannot be given back to the system, unlike the pages of a mapped file. The run on the large set gets a limit on its
writable memory (RLIMIT_DATA): what the small run reserved, and the cap. The network sees images averaged over blocks of 8 by 8 pixels,
so that a core needs about five minutes for one epoch and the evaluation; views are made at full size. Linux only.
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


def write_set(folder, images, side, classes=10):
    """Parquet files of discs: the class is the colour, and place, size and noise differ; 2,000 images at most are the test set. From 10,000 images on they repeat."""
    rng = np.random.default_rng(images)
    y, x = np.mgrid[:side, :side]
    colours = rng.integers(60, 256, (classes, 3))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    folder.mkdir(parents=True)
    made = []
    for split, n in (("test", min(2000, images // 6)), ("train", images - min(2000, images // 6))):
        with pq.ParquetWriter(folder / f"{split}.parquet", pa.schema([("img", kind), ("label", pa.int64())])) as out:
            for start in range(0, n, 2000):
                rows = np.arange(start, min(n, start + 2000))
                blobs = []
                for i in rows:
                    if len(made) >= 10_000:
                        blobs.append({"bytes": made[i % 10_000], "path": str(i)})
                        continue
                    cx, cy, r = rng.uniform(0.3, 0.7, 2).tolist() + [rng.uniform(0.15, 0.3)]
                    disc = ((x / side - cx) ** 2 + (y / side - cy) ** 2 < r * r)[..., None]
                    im = disc * colours[i % classes] + rng.integers(0, 60, (side // 8 + 1, side // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:side, :side]
                    buffer = io.BytesIO()
                    Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
                    blobs.append({"bytes": buffer.getvalue(), "path": str(i)})
                    made.append(buffer.getvalue())
                out.write_table(pa.table({"img": pa.array(blobs, kind), "label": pa.array(rows % classes)}))


def watched(command, limit=None, env=None):
    """Run a command; its exit status, output, seconds and the largest memory figures seen (bytes)."""
    start, peak = time.perf_counter(), {"RssAnon": 0, "RssFile": 0, "VmData": 0}
    cap = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env, preexec_fn=cap) as process:
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
            command = [sys.executable, "-c", RUN, "--dataset", name, "--data_dir", tmp, "--home", f"{tmp}/home", "--loss", "barlow", "--preset", "cpu", "--image_size", str(a.side),
                       "--train_size", "0", "--epochs", "1", "--width", "8", "--policy", "digits", "--batch_size", "256", "--projector_dim", "32", "--projector_hidden", "32", "--data_memory", "50", "--device", "cpu"]
            limit = report["small"]["peak"]["VmData"] + report["cap_bytes"] if name == "large" else None
            status, text, seconds, peak = watched(command, limit, env)
            print(text, flush=True)
            assert status == 0, f"exit status {status}"
            (record,) = [r for p in Path(tmp, "home/data/runs").glob("*.json") if (r := json.loads(p.read_text()))["config"]["dataset"] == name]
            report[name] = {"made_seconds": round(made, 1), "seconds": round(seconds, 1), "peak": peak, "limit": limit, "parquet_bytes": sum(p.stat().st_size for p in Path(tmp, name).iterdir()),
                            "train_images_per_second": record["provenance"]["images_per_second"], "metrics": {k: v for k, v in record["metrics"].items() if "linear_logreg" in k or "knn5" in k},
                            "cache_bytes": sum(p.stat().st_size for p in Path(tmp, "home/data/cache").glob("*"))}
            if name == "large":
                again = watched(command, limit, env)
                report["second_start_seconds"], report["second_status"] = round(again[2], 1), again[0]
    report["growth_bytes"] = report["large"]["peak"]["RssAnon"] - report["small"]["peak"]["RssAnon"]
    print(json.dumps(report, indent=1))
    assert report["growth_bytes"] < report["cap_bytes"], "the run on the large set needs more memory than the cap"


if __name__ == "__main__":
    main()
