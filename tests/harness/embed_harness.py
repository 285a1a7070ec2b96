"""`pid_ssl embed` of many images: memory beside that of fewer, images a second, and the same file after every kill.

    nice python tests/harness/embed_harness.py [--images 100000] [--fewer 10000] [--out data/benchmarks/embed.json]

Makes JPEGs of 32 by 32 pixels, as one Parquet file with a single row group and as a folder of files, and embeds them
with an encoder that comes with the package. Peak memory is what the system says of the process when it has ended. Then
the larger Parquet file is embedded again in processes that are killed (SIGKILL): soon after the start, at several
places on the way, and while the parts are joined; the command that is left alone in the end has to leave the same
bytes, and nothing beside them. About ten minutes on one core.
"""
import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pid_ssl.models import WEIGHTS
from pid_ssl.records import device_name, git_state

ROOT = Path(__file__).resolve().parents[2]
SIDE, ENCODER, DIFFERENT = 32, WEIGHTS[1], 5_000
KILLS = 6  # on the way, beside one soon after the start and one while parts are joined


def jpegs(number):
    """Images as the bytes of JPEGs; from `DIFFERENT` on they repeat."""
    rng, made = np.random.default_rng(0), []
    for _ in range(min(number, DIFFERENT)):
        blocks = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        buffer = io.BytesIO()
        Image.fromarray(blocks).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return [made[i % len(made)] for i in range(number)]


def write_images(folder, number):
    """The same images as a Parquet file and as files, a thousand in a folder; both paths."""
    rows = [{"bytes": data, "path": str(i)} for i, data in enumerate(jpegs(number))]
    pq.write_table(pa.table({"image": pa.array(rows)}), folder / f"{number}.parquet", row_group_size=number)
    for i, row in enumerate(rows):
        at = folder / str(number) / f"{i // 1000:03d}"
        at.mkdir(parents=True, exist_ok=True)
        (at / f"{i:06d}.jpg").write_bytes(row["bytes"])
    return {"Parquet": folder / f"{number}.parquet", "folder": folder / str(number)}


def started(images, out):
    """The command, running."""
    given = dict(encoder=ENCODER, images=images, out=out, device="cpu", threads=1)
    command = [sys.executable, "-m", "pid_ssl", "embed", *(f"--{k}={v}" for k, v in given.items())]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def embedded(images, out):
    """The command, left alone: seconds and memory."""
    begin = time.perf_counter()
    _, status, used = os.wait4(started(images, out).pid, 0)
    assert status == 0, f"exit status {status}"
    cpu = used.ru_utime + used.ru_stime
    return dict(seconds=round(time.perf_counter() - begin, 1), processor_seconds=round(cpu, 1),
                peak_memory_bytes=used.ru_maxrss * 1024)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def until(process, condition):
    """Wait for a condition, then kill; whether the process was still at work."""
    while process.poll() is None and not condition():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def killed(images, out, seconds):
    """Kill the command again and again; a row a kill, and whether the file is the same in the end."""
    parts, rows = out.with_name(f"{out.name}.parts"), []
    there = lambda: len(list(parts.glob("*.parquet")))
    for share in (0.02, *[1 / (KILLS + 1)] * KILLS):
        begin, before = time.perf_counter(), there()
        late = lambda: time.perf_counter() - begin > share * seconds and (there() > before or share < 0.1)
        if not until(started(images, out), late):
            break
        rows.append(dict(seconds=round(time.perf_counter() - begin, 2), parts=there(), file=out.exists()))
    begin = time.perf_counter()
    if until(started(images, out), lambda: (parts / "joined").exists()):
        rows.append(dict(seconds=round(time.perf_counter() - begin, 2), parts=there(), file=out.exists(), joining=True))
    last = embedded(images, out)
    return rows, dict(last, left=sorted(p.name for p in out.parent.iterdir() if p != out))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--fewer", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "data/benchmarks/embed.json")
    given, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as tmp:
        for number in (given.fewer, given.images):
            for form, images in write_images(Path(tmp), number).items():
                out = Path(tmp) / f"{form}-{number}"
                row = dict(form=form, images=number) | embedded(images, out)
                row |= dict(images_per_second=round(number / row["seconds"], 1), file_bytes=out.stat().st_size)
                rows.append(row)
                print(rows[-1], flush=True)
        (Path(tmp) / "again").mkdir()
        whole, again = Path(tmp) / f"Parquet-{given.images}", Path(tmp) / "again/features.parquet"
        kills, last = killed(Path(tmp) / f"{given.images}.parquet", again, rows[-2]["seconds"])
        end = dict(sha256=digest(again), sha256_undisturbed=digest(whole), left_beside=last["left"])
    about = dict(processor=device_name("cpu"), threads=1, side=SIDE, encoder=ENCODER, load=round(os.getloadavg()[0], 1))
    about |= dict(git_state(), date=time.strftime("%Y-%m-%d"))
    given.out.write_text(json.dumps(dict(rows=rows, kills=kills, after_kills=end, provenance=about), indent=1) + "\n")
    print(json.dumps(dict(kills=kills, **end), indent=1))
    assert end["sha256"] == end["sha256_undisturbed"] and not end["left_beside"], "another file after kills"


if __name__ == "__main__":
    main()
