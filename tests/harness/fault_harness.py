"""Stop, kill, starve and damage a small run on digits, then start it again: does it end where the undisturbed run does?

`test_faults.py` does a part of it. As a program it does the whole, or the parts that are named (killed_at_points,
killed_while_replacing, killed_at_random, long_run, fuzz), and writes `data/benchmarks/faults.json`:
    OMP_NUM_THREADS=1 python tests/harness/fault_harness.py [PART ...]
"""
import builtins
import ctypes
import io
import json
import multiprocessing.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARGS = dict(loss="pid", form="target", epochs=3, width=4, train_size=64, batch_size=32, threads=1)
ARGS |= dict(projector_dim=8, projector_hidden=8)

# one process imports torch, every run is forked from it
context = multiprocessing.get_context("forkserver")
# a run loads these when it starts
LATER = ["torchvision.models.resnet", "sklearn.model_selection", "sklearn.linear_model"]
context.set_forkserver_preload(["pid_ssl.trainers", *LATER, "fault_harness"])


class Points:
    """Count every open for writing, write, sync, rename and removal under a folder; at the `at`-th do `act`."""

    def __init__(self, home, at=None, act=lambda: os.kill(os.getpid(), signal.SIGKILL), before=None):
        self.home, self.at, self.act, self.before, self.names = str(home), at, act, before, []
        for name in ("replace", "mkdir", "unlink", "rmdir", "fsync"):
            setattr(os, name, self.counted(name, getattr(os, name)))
        self.open = io.open
        builtins.open = io.open = self.opened

    def point(self, name):
        self.names.append(name)
        if len(self.names) == self.at:
            self.act()

    def counted(self, name, function):
        def call(path, *args, **kwargs):
            self.point(f"{name} {Path(str(path)).name}")
            return function(path, *args, **kwargs)

        return call

    def opened(self, path, mode="r", *args, **kwargs):
        if isinstance(path, int) or not set(mode) & set("wax+") or not str(path).startswith(self.home):
            return self.open(path, mode, *args, **kwargs)
        self.point(f"open {Path(path).name}")
        return Half(self, self.open(path, mode, *args, **kwargs))


class Half:
    """A file whose writes go in two halves, a point between them."""

    def __init__(self, points, file):
        self.points, self.file = points, file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.points.point(f"write {Path(str(self.file.name)).name}")
        return self.file.write(data[len(data) // 2 :])


# what a child does to itself before it starts


def kill_at(home, at):
    Points(home, at)


def pause_at(home, at):
    Points(home, at, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def list_points(home, file):
    points = Points(home)
    multiprocessing.util.Finalize(None, lambda: Path(file).write_text(json.dumps(points.names)), exitpriority=1)


def at_step(step, act):
    """Call `act` when a step is about to be made; what it returns, if anything, is the loss."""
    from pid_ssl.experiments.pretrain import Pretraining

    real = Pretraining.batch_loss

    def batch_loss(self, images):
        loss = real(self, images)
        return act(loss) if self.step == step else loss

    Pretraining.batch_loss = batch_loss


def signal_at(home, step, number):
    at_step(step, lambda loss: os.kill(os.getpid(), number) or loss)


def nan_at(home, step):
    at_step(step, lambda loss: loss * float("nan"))


def small_files(home, size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full_disk(home, name):
    """Files of this name are on a full device."""
    real = io.open

    def opened(path, mode="r", *args, **kwargs):
        full = "w" in mode and Path(str(path)).name == name
        return real("/dev/full" if full else path, mode, *args, **kwargs)

    builtins.open = opened


def read_only(home):
    """Nobody may write to `home`; root could, so it gives that right up (CAP_DAC_OVERRIDE)."""
    Path(home).chmod(0o555)
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(version, sets) == 0
        sets[0] &= ~(1 << 1)
        assert libc.capset(version, sets) == 0


def clock_back(home, seconds):
    real, gmtime = time.time, time.gmtime
    time.time = lambda: real() - seconds
    time.gmtime = lambda s=None: gmtime(time.time() if s is None else s)


def watch(home, file):
    """Note resident memory and open files after every epoch."""
    from pid_ssl.experiments import pretrain as trainers

    real, rows = trainers.save_state, []

    def save_state(state, folder):
        out = real(state, folder)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        rows.append((state.step, resident, len(os.listdir("/proc/self/fd"))))
        return out

    trainers.save_state = save_state
    multiprocessing.util.Finalize(None, lambda: Path(file).write_text(json.dumps(rows)), exitpriority=1)


KNOWN = (watch, kill_at, pause_at, list_points, signal_at, nan_at, small_files, full_disk, read_only, clock_back)
FAULTS = {f.__name__: f for f in KNOWN}


def child(home, args, log, fault, parameters):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    os.environ.pop("IN_TEST", None)
    # a shell that starts the tests in the background has SIGINT ignored, and a run respects that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pid_ssl.config import as_arguments
    from pid_ssl.trainers import main

    if fault:
        FAULTS[fault](home, *parameters)
    sys.exit(main(as_arguments({**ARGS, **args, "home": home})))


class Run:
    """One run in a home of its own, started as often as it takes."""

    def __init__(self, home, **args):
        self.home, self.args, self.log = Path(home), args, Path(f"{home}.log")

    def begin(self, fault=None, *parameters):
        self.log.unlink(missing_ok=True)
        process = context.Process(target=child, args=(str(self.home), self.args, str(self.log), fault, parameters))
        process.start()
        return process

    def start(self, fault=None, *parameters, limit=1800):
        """Exit status (negative: the signal that ended it) and output."""
        process = self.begin(fault, *parameters)
        process.join(limit)
        assert process.exitcode is not None, "hangs"
        return process.exitcode, self.log.read_text()

    @property
    def records(self):
        return sorted((self.home / "data/runs").glob("*"))

    @property
    def checkpoints(self):
        return sorted((self.home / "data/checkpoints").glob("*/*-*"))

    def result(self):
        from pid_ssl.records import load_checkpoint, load_record

        (path,) = self.records
        record = load_record(path)
        load_checkpoint(self.home / "data/checkpoints" / record.run_id / "final")
        return record.status, record.metrics, record.history

    def faults(self, whole):
        """What differs from the undisturbed run, after the last start."""
        left = [p.name for p in self.home.rglob("*") if re.search(r"\.(tmp|old)-|^epoch-", p.name)]
        out = [f"left behind: {left}"] if left else []
        if self.result() != whole.result():
            out.append("another result")
        return out


def wait_until_stopped(pid):
    """Until SIGSTOP has taken effect."""
    deadline = time.time() + 600
    while time.time() < deadline and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.02)


def undisturbed(folder, **args):
    """The run left alone, and the points at which it can be killed."""
    whole = Run(Path(folder) / "whole", **args)
    status, text = whole.start("list_points", str(Path(folder) / "points.json"))
    assert status == 0, text
    return whole, json.loads((Path(folder) / "points.json").read_text())


def killed(run, whole, at, again=None):
    """Kill a run at a point, and its second start at the point `again` if it gets there; then let it finish.

    Returns how often it was killed, and what is wrong in the end.
    """
    kills = sum(run.start("kill_at", i)[0] == -signal.SIGKILL for i in (at, again) if i)
    status, text = run.start()
    return kills, [f"exit status {status}: {text}"] if status else run.faults(whole)


def killed_after(run, whole, seconds):
    process = run.begin()
    process.join(seconds)
    hit = process.exitcode is None
    process.kill()
    process.join()
    status, text = run.start()
    return hit, [f"exit status {status}: {text}"] if status else run.faults(whole)


# the parts of the table


def trials(folder, whole, names, home=None, **args):
    """Kill at every point in `names` (number -> name) twice, the second time once more somewhere in the next start."""
    draw = random.Random(0)
    out = dict(enumerated=len(names), trials=0, kills=0, wrong={})
    for i, name in names.items():
        for again in (None, draw.randint(1, 50)):
            run = Run(folder / f"at-{i}-{again}", **args)
            if home:
                shutil.copytree(home, run.home)
            kills, wrong = killed(run, whole, i, again)
            out["trials"] += 1
            out["kills"] += kills
            if wrong or not kills:
                out["wrong"][f"{i} {name.split('.tmp')[0]}, {again}"] = wrong
            shutil.rmtree(run.home)
    return out


def killed_at_points(folder):
    """At every open, half-done write, sync, rename and removal, twice each."""
    whole, points = undisturbed(folder)
    return trials(folder, whole, dict(enumerate(points, 1)))


def killed_while_replacing(folder):
    """A finished run made again, from the moment its weights are replaced."""
    whole, _ = undisturbed(folder)
    first = Run(folder / "first", force=True)
    shutil.copytree(whole.home, first.home)
    first.start("list_points", str(folder / "again.json"))
    points = dict(enumerate(json.loads((folder / "again.json").read_text()), 1))
    start = next(i for i, p in points.items() if p.startswith("mkdir final"))
    return trials(folder, whole, {i: p for i, p in points.items() if i >= start}, home=whole.home, force=True)


def killed_at_random(folder):
    """At 40 random times between the start and the end of the run."""
    whole, _ = undisturbed(folder)
    seconds = time.perf_counter()
    Run(folder / "timed").start()
    seconds = time.perf_counter() - seconds
    random.seed(0)
    out = dict(trials=0, kills=0, wrong={})
    while out["kills"] < 40:
        out["trials"] += 1
        run = Run(folder / str(out["trials"]))
        hit, wrong = killed_after(run, whole, random.uniform(0, seconds))
        out["kills"] += hit
        if wrong:
            out["wrong"][out["trials"]] = wrong
        shutil.rmtree(run.home)
    return out


def long_run(folder):
    """Three runs of 10,336 steps in 32 epochs: growth of memory and open files in the second half.

    The allocator settles during the first half; with each epoch a row of the history is added, and kept. Errors are the
    spread over runs.
    """
    import numpy as np

    slopes = []
    for i in range(3):
        run = Run(folder / f"long-{i}", epochs=32, train_size=0, batch_size=4)
        status, text = run.start("watch", str(folder / "watch.json"), limit=None)
        assert status == 0, text
        step, memory, files = np.array(json.loads((folder / "watch.json").read_text()), float).T
        rest = step > step[-1] / 2
        slopes.append([np.polyfit(step[rest], y[rest], 1)[0] for y in (memory, files)])
    out = dict(runs=len(slopes), steps=int(step[-1]), steps_counted=int(step[-1] - step[~rest][-1]), epochs=len(step))
    out |= dict(resident_bytes=int(memory[-1]), open_files=int(files[-1]))
    for name, values in zip(("resident_bytes_per_step", "open_files_per_step"), np.transpose(slopes)):
        out[name] = round(values.mean(), 3)
        out[f"{name}_standard_error"] = round(values.std(ddof=1) / len(values) ** 0.5, 3)
    return out


def fuzz(folder):
    """All generated examples of test_fuzz.py, in process."""
    os.environ["PID_SSL_FUZZ"] = "1"
    import test_fuzz

    for name in ("configs", "argument_lists", "records", "checkpoints", "parquet"):
        getattr(test_fuzz, f"test_{name}")()
    return dict(test_fuzz.COUNTS)


PARTS = (killed_at_points, killed_while_replacing, killed_at_random, long_run, fuzz)


def provenance():
    import platform
    from importlib.metadata import version

    from pid_ssl.config import source_hash
    from pid_ssl.records import device_name

    versions = {p: version(p) for p in ("torch", "numpy", "safetensors", "pyarrow", "hypothesis")}
    return dict(device=device_name("cpu"), threads=1, date=time.strftime("%Y-%m-%d", time.gmtime()),
                python=platform.python_version(), source_hash=source_hash(), versions=versions, run=ARGS)


def main(names):
    path = ROOT / "data/benchmarks/faults.json"
    for part in [globals()[n] for n in names] or PARTS:
        table = json.loads(path.read_text()) if path.exists() else {}
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = part(Path(folder))
        seconds = round(time.perf_counter() - begun)
        about = " ".join(part.__doc__.split())
        table[part.__name__] = {"what": about, **result, "seconds": seconds, "provenance": provenance()}
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(json.dumps({part.__name__: table[part.__name__]}, indent=1), flush=True)


if __name__ == "__main__":
    import fault_harness  # under its own name, as the children know it

    fault_harness.main(sys.argv[1:])
