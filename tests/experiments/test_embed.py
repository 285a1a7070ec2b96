"""`pid_ssl embed`: the same file however often it was killed, in bounded memory, from folders and from Parquet."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from pid_ssl.config import Config
from pid_ssl.experiments import embed as room
from pid_ssl.experiments.embed import EmbedConfig, embed
from pid_ssl.trainers import pretrain

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A trained encoder, and 300 photographs in nested folders, one of them of a name that is no UTF-8."""
    root = tmp_path_factory.mktemp("embed")
    for i, image in enumerate(RNG.integers(0, 256, (300, 10, 14, 3), dtype=np.uint8)):
        at = root / "photographs" / f"{i % 4}"
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(at / f"{i:03d}.png")
    os.rename(root / "photographs/0/000.png", os.fsencode(root / "photographs/0/0") + b"\xff.png")
    config = Config(dataset="photographs", labels="none", loss="barlow", preset="cpu", image_size=8, width=4, epochs=1,
                    threads=1, projector_dim=8, batch_size=64, train_size=0, data_dir=str(root), home=str(root))
    run = pretrain(config).run_id
    return dict(run=run, home=str(root), images=str(root / "photographs"), device="cpu", threads=1)


def made(given, tmp_path, **more):
    return embed(EmbedConfig(**{**given, "out": str(tmp_path / "out.parquet"), **more}))


def test_a_folder_and_the_same_images_as_parquet_give_the_same_features(given, tmp_path):
    one = pq.read_table(made(given, tmp_path))
    names = one["file"].to_pylist()
    assert len(names) == 300 == len(set(names)) and "0/0\\xff.png" in names and one.schema.names == ["file", "features"]
    found = sorted((os.fsencode(p) for p in (tmp_path / given["images"]).rglob("*.png")), key=os.fsdecode)
    rows = [{"bytes": open(p, "rb").read(), "path": ""} for p in found]
    (tmp_path / "sets").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"image": pa.array(rows[150 * i : 150 * i + 150])}), tmp_path / f"sets/{i}.parquet")
    two = pq.read_table(made(given, tmp_path, images=str(tmp_path / "sets"), out=str(tmp_path / "two.parquet")))
    assert two.schema.names == ["file", "row", "features"] and two["row"].to_pylist() == [*range(150), *range(150)]
    assert two["features"].to_pylist() == one["features"].to_pylist()


SLOW = """
import sys, time
from pid_ssl.experiments import embed as room
room.PART, part = 32, room._part
def slow(*given):
    time.sleep(0.2)
    return part(*given)
room._part = slow
room.command(sys.argv[1:])
"""


def test_killed_twice_and_stopped_once_it_is_the_same_file(given, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PART", 32)
    whole = made(given, tmp_path).read_bytes()
    out = tmp_path / "killed.parquet"
    argv = [f"--{k}={v}" for k, v in given.items()] + [f"--out={out}"]
    for number, least in ((signal.SIGKILL, 2), (signal.SIGTERM, 4), (signal.SIGKILL, 6)):
        process = subprocess.Popen([sys.executable, "-c", SLOW, *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        parts = tmp_path / "killed.parquet.parts"
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.parquet"))) < least and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate()
        assert process.returncode != 0 and not out.exists()
    before = {p.name for p in parts.glob("*.parquet")}
    assert 6 <= len(before) < 10
    calls, part = [], room._part
    monkeypatch.setattr(room, "_part", lambda *a: calls.append(1) or part(*a))
    made(given, tmp_path, out=str(out))
    assert out.read_bytes() == whole and len(calls) == 10 - len(before) and not parts.exists()
    made(given, tmp_path, out=str(out))
    assert len(calls) == 10 - len(before), "a file that is there is not made again"
    assert json.loads(pq.read_schema(out).metadata[b"pid_ssl"])["images"] == 300


def test_a_broken_image_is_named_and_its_part_made_once_it_is_gone(given, tmp_path):
    images = tmp_path / "mine"
    images.mkdir()
    Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(images / "a.png")
    (images / "b.jpg").write_bytes(b"no image")
    argv = [f"--{k}={v}" for k, v in (given | {"images": images, "out": tmp_path / "out.parquet"}).items()]
    done = subprocess.run([sys.executable, "-m", "pid_ssl", "embed", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "b.jpg: not a readable image" in done.stderr and "Traceback" not in done.stderr
    (images / "b.jpg").unlink()
    assert pq.read_table(made(given, tmp_path, images=str(images)))["file"].to_pylist() == ["a.png"]


def test_memory_does_not_grow_with_the_number_of_images(given, tmp_path):
    """6,000 images of a Parquet file in parts of 500: what is held at a time is a part's features and a batch."""
    image = tmp_path / "one.png"
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image)
    row = {"bytes": image.read_bytes(), "path": ""}
    for name, n in (("few", 500), ("many", 6000)):
        pq.write_table(pa.table({"image": pa.array([row] * n)}), tmp_path / f"{name}.parquet", row_group_size=500)
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)"
    used = {}
    for name in ("few", "many"):
        argv = [f"--{k}={v}" for k, v in (given | {"images": tmp_path / f"{name}.parquet"}).items()]
        start = "import sys\nfrom pid_ssl.experiments import embed as room\nroom.PART = 500\n"
        code = f"{start}room.command(sys.argv[1:])\n{peak}"
        done = subprocess.run([sys.executable, "-c", code, *argv, f"--out={tmp_path / name}.out"], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        used[name] = int(done.stdout.split()[-1])
    assert used["many"] < used["few"] + 40, used
