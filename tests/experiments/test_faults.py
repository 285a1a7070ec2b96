"""Whatever stops a run (a kill, a signal, a full disk, a damaged file, a second start), it ends where the undisturbed
run does, and nothing earlier is lost.
"""
import io
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from fault_harness import ARGS, Run, killed, undisturbed, wait_until_stopped
from PIL import Image

from pid_ssl.records import RecordError, load_checkpoint, load_record


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def whole(reference):
    return reference[0]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "home")


@pytest.fixture
def half(run, reference):
    """A run that was killed with two checkpoints on disk."""
    points = reference[1]
    status, _ = run.start("kill_at", next(i for i, p in enumerate(points, 1) if p.startswith("mkdir epoch-000003")))
    assert status == -signal.SIGKILL and not run.records
    assert [p.name for p in run.checkpoints] == ["epoch-000001", "epoch-000002"]
    return run


def test_killed_at_writes_and_renames(reference, tmp_path):
    """Every rename, a sample of opens, half-done writes, syncs and removals; data/benchmarks/faults.json has all."""
    whole, points = reference
    at = [i for i, p in enumerate(points, 1) if p.startswith("replace") or i % 16 == 5]
    wrong = {points[i - 1]: w for i in at for hits, w in [killed(Run(tmp_path / str(i)), whole, i)] if w or not hits}
    assert not wrong and len(at) > 10


def test_killed_between_the_renames_of_a_replaced_checkpoint(reference, tmp_path):
    """A finished run made again: at every moment there is a record, and its weights are there after the next start."""
    whole, _ = reference
    first = Run(tmp_path / "first", force=True)
    shutil.copytree(whole.home, first.home)
    status, text = first.start("list_points", str(tmp_path / "points"))
    points = json.loads((tmp_path / "points").read_text())
    assert status == 0 and first.faults(whole) == []
    at = points.index(next(p for p in points if p.startswith("replace final.tmp"))) + 1
    assert points[at - 2].startswith("replace final"), "the old one was moved aside just before"
    again = Run(tmp_path / "again", force=True)
    shutil.copytree(whole.home, again.home)
    assert again.start("kill_at", at)[0] == -signal.SIGKILL
    assert load_record(again.records[0]).status == "finished", "the earlier record is whole"
    status, text = again.start()
    assert status == 0 and "resumed after epoch 3" in text and again.faults(whole) == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_stops(number, status, run, whole):
    """In the middle of the second epoch: the step is finished, saved, and the next start goes on with the next one."""
    got, text = run.start("signal_at", 2, int(number))
    assert got == status and not run.records
    assert f"stopped by {number.name}" in text and "saved after epoch 1 of 3, step 1 of " in text
    assert "Traceback" not in text
    (folder,) = run.checkpoints[-1:]
    header = load_checkpoint(folder)[1]
    assert (header["epoch"], header["step"]) == (1, 3)
    got, text = run.start()
    assert got == 0 and "resumed after epoch 1 of 3, step 1 of " in text and run.faults(whole) == []


LAB = dict(optimizer="muon", muon_steps=3, amp="on", image_size=16, early_size=8, early_share=0.5)  # of the lab preset


@pytest.mark.parametrize("given", [dict(optimizer="sgd", form="relation"), LAB], ids=str)
def test_every_optimizer_is_put_back(given, tmp_path):
    """AdamW, and a teacher instead of the relation's heads, are what all other tests use."""
    whole, points = undisturbed(tmp_path, **given)
    run = Run(tmp_path / "home", **given)
    kills, wrong = killed(run, whole, next(i for i, p in enumerate(points, 1) if p.startswith("mkdir epoch-000003")))
    assert kills == 1 and not wrong


def test_not_finite_at_a_step(run, whole):
    status, text = run.start("nan_at", 3)
    assert status == 3 and "pid: epoch 2, step 2 of 2: not finite: loss" in text
    assert "embeddings 100% finite" in text and "Traceback" not in text
    (path,) = run.records
    record = load_record(path)
    assert record.status == "failed" and "step 2 of 2" in record.provenance["failure"]
    assert len(record.history) == 1 and not record.metrics
    assert [p.name for p in run.checkpoints] == ["epoch-000001"], "the last finite one"
    status, text = run.start()
    assert status == 0 and "failed before (pid: epoch 2" in text and run.faults(whole) == []


def test_two_starts_at_once(run, whole, reference):
    first = run.begin("pause_at", next(i for i, p in enumerate(reference[1], 1) if p.startswith("mkdir epoch-000002")))
    wait_until_stopped(first.pid)
    second = Run(run.home, **run.args)
    second.log = run.log.with_name("second.log")
    status, text = second.start()
    assert status == 5 and f"is being made by process {first.pid} on" in text and "wait for it or stop it" in text
    assert "epoch 1" not in text
    os.kill(first.pid, signal.SIGCONT)
    first.join(600)
    assert first.exitcode == 0 and run.faults(whole) == []
    assert second.start()[0] == 0 and "is finished" in second.log.read_text()


def test_lock_of_a_killed_process_does_not_block(run, whole, reference):
    first = run.begin("pause_at", 20)
    wait_until_stopped(first.pid)
    first.kill()
    first.join()
    assert run.start()[0] == 0 and run.faults(whole) == []


def test_file_size_limit(half, whole):
    """An earlier checkpoint is on disk; the next one does not fit."""
    before = {p: p.read_bytes() for p in half.home.rglob("epoch-00000[12]/*")}
    status, text = half.start("small_files", 8192)
    assert status == 4 and "cannot be written (File too large); raise the limit" in text and "Traceback" not in text
    assert before and all(p.read_bytes() == data for p, data in before.items()) and not half.records
    assert not list(half.home.rglob("*.tmp-*"))
    assert half.start()[0] == 0 and half.faults(whole) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
@pytest.mark.parametrize("name", ["teacher.safetensors", "header.json"])
def test_full_disk(name, run, whole):
    status, text = run.start("full_disk", name)
    assert status == 4 and "No space left on device); free space on that disk" in text
    assert "epoch-000001" in text and "Traceback" not in text
    assert not run.checkpoints and not run.records
    assert run.start()[0] == 0 and run.faults(whole) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gives up root's rights by a Linux call")
def test_read_only_folder_is_found_before_training(run):
    run.home.mkdir()
    status, text = run.start("read_only")
    assert status == 4 and str(run.home) in text and "Permission denied); make it writable" in text
    assert "epoch" not in text and "Traceback" not in text and not list(run.home.iterdir())


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "bit"])
@pytest.mark.parametrize("name", ["encoder.safetensors", "optimizer.safetensors", "header.json"])
def test_damaged_checkpoint(name, how, half, whole):
    """The one before is taken; with that damaged too the run says so and leaves both alone."""
    older, newer = half.checkpoints
    if name == "header.json" and how == "bit":
        # the flip that still is JSON
        (newer / name).write_text((newer / name).read_text().replace('"step": 4', '"step": 6'))
    else:
        damage(newer / name, how)
    if how == "cut":
        both = Run(half.home.with_name("both"))
        shutil.copytree(half.home, both.home)
        (both.home / older.relative_to(half.home) / name).unlink()
        status, text = both.start()
        assert status == 2 and "none of 2 checkpoints can be used" in text and str(both.home) in text
        assert len(both.checkpoints) == 2
    status, text = half.start()
    assert status == 0 and f"{newer.name}/{name}" in text and "resumed after epoch 1" in text, text
    assert half.faults(whole) == []


@pytest.mark.parametrize("how", ["cut", "bit of a name", "bit of a number"])
def test_damaged_record(how, tmp_path, whole):
    run = Run(tmp_path / "home")
    shutil.copytree(whole.home, run.home)
    (path,) = run.records
    if how == "cut":
        damage(path, "cut")
    elif how == "bit of a name":
        path.write_text(path.read_text().replace('"status"', '"statuS"'))
    else:  # still a record, and a number that nobody measured
        found = re.search(r'"test_linear_logreg": (\d)', path.read_text())
        path.write_text(path.read_text()[: found.start(1)] + str(int(found[1]) ^ 1) + path.read_text()[found.end(1) :])
    data = path.read_bytes()
    with pytest.raises(RecordError, match=path.name):
        load_record(path)
    status, text = run.start()
    assert status == 2 and str(path) in text and "Traceback" not in text
    assert path.read_bytes() == data, "not overwritten unasked"
    run.args["force"] = True
    assert run.start()[0] == 0 and run.faults(whole) == []


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with the Parquet dataset `mine`: 80 and 40 noisy images of 4 classes, as JPEG, which has no checksum."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "mine").mkdir()
    for split, n in (("train", 80), ("test", 40)):
        labels, blobs = np.arange(n) % 4, []
        for label in labels:
            buffer = io.BytesIO()
            pixels = np.clip(60 * label + rng.integers(0, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
            blobs.append({"bytes": buffer.getvalue(), "path": ""})
        pq.write_table(pa.table({"img": blobs, "label": labels}), folder / f"mine/{split}.parquet", compression="none")
    return folder


def test_damaged_parquet_file(images, tmp_path):
    """A run that was killed half way is started again on a damaged file, then on the whole one: nothing is lost."""
    given = dict(dataset="mine", preset="digits", image_size=8, policy="cifar", data_dir=str(images), train_size=0)
    whole, points = undisturbed(tmp_path, **given)
    run = Run(tmp_path / "home", **given)
    at = next(i for i, p in enumerate(points, 1) if p.startswith("mkdir epoch-000003"))
    assert run.start("kill_at", at)[0] == -signal.SIGKILL
    path = images / "mine/train.parquet"
    data, before = path.read_bytes(), [p.name for p in run.checkpoints]
    damage(path, "cut")
    status, text = run.start()
    assert status == 2 and f"{path}: not a readable Parquet image file" in text and "Traceback" not in text
    path.write_bytes(data.replace(b"\xff\xd8\xff", b"\xff\xd9\xff", 1))  # a bit in the mark that opens a JPEG
    status, text = run.start()
    assert status == 2 and re.search(rf"{re.escape(str(path))}: row \d+ is not a readable image", text)
    assert "Traceback" not in text
    assert [p.name for p in run.checkpoints] == before
    path.write_bytes(data)
    status, text = run.start()
    assert status == 0 and "resumed after epoch 2" in text and run.faults(whole) == []
    # a bit among the coefficients of a JPEG makes another image, not an unreadable one:
    # what is left to say is that the data is not that of the record
    at = data.index(b"\xff\xda") + 40
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    status, text = run.start()
    assert status == 0 and "dataset 'mine' has the content hash" in text
    assert f"(such as {whole.records[0].stem})" in text and len(run.records) == 2
    path.write_bytes(data)


def test_interrupt_of_a_notebook_kernel(tmp_path):
    """The button in JupyterLab: the cell ends with RunInterrupted, and run again ends where a run left alone does."""
    from jupyter_client.manager import start_new_kernel

    cell = f"record = pretrain(Config(**{ARGS | dict(epochs=40)!r}, home=home))"
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)

    def execute(code, interrupt_at=None):
        text, pressed = [], []

        def output(message):
            text.append(message["content"].get("text", ""))
            if interrupt_at and interrupt_at in "".join(text) and not pressed:
                pressed.append(True)
                manager.interrupt_kernel()

        return client.execute_interactive(code, output_hook=output, timeout=300)["content"], "".join(text)

    try:
        setup = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pid_ssl.config import Config
from pid_ssl.trainers import pretrain
home = {str(tmp_path / 'home')!r}
"""
        assert execute(setup)[0]["status"] == "ok"
        reply, text = execute(cell, interrupt_at="epoch 3/40")
        assert reply["ename"] == "RunInterrupted" and "stopped by SIGINT" in reply["evalue"]
        assert "the same call goes on there" in reply["evalue"] and "epoch 40/40" not in text
        assert Run(tmp_path / "home").checkpoints
        reply, text = execute(cell)
        assert reply["status"] == "ok" and "resumed after epoch" in text
        assert execute(f"again, home = record, {str(tmp_path / 'alone')!r}")[0]["status"] == "ok"
        assert execute(cell)[0]["status"] == "ok"
        reply, text = execute("assert (again.metrics, again.history) == (record.metrics, record.history)")
        assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_clock_set_back_between_start_and_resume(half, whole):
    status, text = half.start("clock_back", 400 * 86_400)
    assert status == 0 and "resumed after epoch 2" in text and half.faults(whole) == []


UNPICKLED = r"torch\.load\b|import pickle|pickle\.loads?\b|allow_pickle=True|(?<![.\w])eval\(|yaml\.load\("


def test_nothing_is_unpickled():
    for path in (*(ROOT / "pid_ssl").rglob("*.py"), *(ROOT / "nbs").rglob("*.ipynb")):
        assert not re.search(UNPICKLED, path.read_text()), path.name


TABLE = ROOT / "data/benchmarks/faults.json"


@pytest.mark.skipif(not TABLE.exists(), reason="made by python tests/harness/fault_harness.py")
def test_committed_table():
    """What the whole harness found, on the machine named in the file."""
    table = json.loads(TABLE.read_text())
    for name in ("killed_at_points", "killed_while_replacing", "killed_at_random"):
        asked = 2 * table[name]["enumerated"] if "enumerated" in table[name] else 40
        assert table[name]["kills"] >= asked and not table[name]["wrong"], name
    long = table["long_run"]
    assert long["steps_counted"] >= 5000 and long["open_files_per_step"] == 0
    growth = long["resident_bytes_per_step"] * long["steps_counted"]
    assert growth < 2e-4 * long["resident_bytes"], "memory does not grow"
    for name, least in dict(configs=5000, records=1000, checkpoints=500, parquet=500).items():
        assert table["fuzz"][name] >= least, name
    assert not re.search(r'"/|"[A-Z]:\\\\', TABLE.read_text()), "no path of somebody's machine"
