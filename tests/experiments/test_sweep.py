"""Sweeps, on this machine and through submitit: one record a run, nothing run twice, what is interrupted goes on."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT
from fault_harness import ARGS
from PIL import Image

from pid_ssl.config import Config, ConfigError, resolve
from pid_ssl.data import load_dataset
from pid_ssl.experiments.pretrain import pretrain
from pid_ssl.experiments.sweep import Job, SweepFailed, expand, run_sweep, submit_sweep
from pid_ssl.records import load_records, lock_run, run_id


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="extra slurm")
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    return {**ARGS, "epochs": 1, "device": "cpu", "home": str(tmp_path / "home")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the job's process in /proc")
def test_each_run_once_although_one_is_interrupted(sweep, tmp_path, capsys):
    """SIGUSR2 is what the cluster sends before it takes the node back: that job is put into the queue again."""
    sweep |= dict(seed=[0, 1], epochs=30)
    jobs = submit_sweep(sweep, tmp_path / "logs", cluster="local")
    config = resolve(Config(**sweep | dict(seed=0)))
    rid = run_id(config, load_dataset("digits", train_size=64).content_hash, "cpu")
    wait_for(lambda: list(tmp_path.glob(f"home/data/checkpoints/{rid}/epoch-*")))
    (task,) = Path(f"/proc/{jobs[0].job_id}/task/{jobs[0].job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    assert [j.result() for j in jobs] == ["finished"] * 2
    assert "stopped by SIGTERM" in jobs[0].stderr(), "the run saved the step it was in"
    first, second = sorted(load_records(tmp_path / "home/data/runs"), key=lambda r: r.config["seed"])
    assert (first.run_id, first.config["seed"], second.config["seed"]) == (rid, 0, 1)
    assert first.provenance["resumed_after_epoch"] > 0 and len(first.history) == 30
    assert submit_sweep(sweep, tmp_path / "logs", cluster="local") == []
    assert "2 runs, 2 finished, 0 submitted" in capsys.readouterr().out


def test_a_bad_setting_is_found_before_anything_is_submitted(sweep, tmp_path):
    with pytest.raises(ConfigError, match="batch_size: got 65; accepted: at most train_size = 64"):
        submit_sweep(sweep | dict(batch_size=[32, 65]), tmp_path / "logs", cluster="local")
    assert not (tmp_path / "logs").exists() and not (tmp_path / "home").exists()


def test_failure_and_lock_of_a_job(sweep, capfd):
    with pytest.raises(RuntimeError, match="exit status 2: error: dataset: got 'elsewhere'"):
        Job(Config(**sweep | dict(dataset="elsewhere")))()
    config = Config(**sweep)
    with lock_run(config, run_id(resolve(config), load_dataset("digits").content_hash, "cpu")):
        assert Job(config)() == "locked"


# ---- on this machine -------------------------------------------------------------------------------------------------

TINY = {**ARGS, "epochs": 25}  # long enough to be met in the middle


def write(path, sweep):
    """A sweep file; its runs are all in `home` beside it."""
    path.write_text(json.dumps(sweep | dict(home=str(path.parent / "home"))))
    return path


def begin(file, *args):
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "pid_ssl", "sweep", str(file), *args], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(file, *args):
    process = begin(file, *args)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for(what, process=None):
    deadline = time.time() + 300
    while not (found := what()):
        assert time.time() < deadline and (process is None or process.poll() is None), "it never came"
        time.sleep(0.01)
    return found


def results(folder):
    return {r.run_id: (r.metrics, r.history) for r in load_records(folder / "data/runs")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of two runs, made one after the other in this process."""
    home = tmp_path_factory.mktemp("undisturbed")
    sweep = TINY | dict(loss=["barlow", "pid"])
    for config in expand(sweep | dict(home=str(home))):
        pretrain(config)
    return sweep, results(home)


def stop(process, number, wait=60):
    """Send the signal; neither the sweep nor anything it started is left."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=wait)
    gone, alive = psutil.wait_procs(family, timeout=wait)
    assert not alive, "left running"
    return process.returncode, out, err


def interrupted(file, home, number, pattern):
    """Start a sweep and stop it by a signal once there is such a file."""
    process = begin(file, "--workers", "2", "--no-notebooks")
    wait_for(lambda: list(home.glob(pattern)), process)
    status, _, err = stop(process, number)
    assert status == 128 + number and f"stopped by {number.name}: " in err and "the same call goes on" in err, err


def killed(file, log):
    """Kill a sweep while one of its processes hangs; that one is left, and keeps its run."""
    process = begin(file, "--workers", "2", "--no-notebooks")
    wait_for(lambda: log.exists() and log.read_text().count("\nepoch ") > 3, process)
    family = psutil.Process(process.pid).children()
    orphan = next(p for p in family if "--loss=barlow" in p.cmdline())
    orphan.suspend()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs([p for p in family if p != orphan], timeout=60)[1], "left running"
    return orphan


def test_an_interrupted_sweep_ends_with_the_same_records(undisturbed, tmp_path):
    """Stopped as a run starts and as one has saved, then killed, and then let be."""
    sweep, want = undisturbed
    file, home = write(tmp_path / "sweep.json", sweep), tmp_path / "home"
    interrupted(file, home, signal.SIGTERM, "data/sweeps/*/*.log")
    interrupted(file, home, signal.SIGINT, "data/checkpoints/*/epoch-*")
    orphan = killed(file, home / "data/sweeps/sweep/loss=barlow.log")
    assert len(results(home)) < 2, "interrupted before it was done"

    process = begin(file, "--workers", "2", "--no-notebooks")
    lines = iter(process.stdout.readline, "")
    said = next(x for x in lines if x.startswith("locked: "))
    assert "loss=barlow: run" in said and f"process {orphan.pid} " in said and "coming back to it" in said
    wait_for(lambda: len(results(home)) == 1, process)  # the other is made meanwhile
    orphan.resume()
    assert [x for x in lines if "finished in" in x][-1].startswith("[2/2] loss=barlow: ")
    assert process.wait(60) == 0, process.stderr.read()
    assert results(home) == want and not orphan.is_running()
    configs = [r.config for r in load_records(home / "data/runs")]
    assert len(configs) == 2, "and a record names no folder of this machine:"
    assert all(c["home"] is None and c["data_dir"] is None for c in configs)
    assert not list(home.rglob("epoch-*")) and not list(home.rglob("*tmp*"))


ROUNDS = int(os.environ.get("PID_SSL_SWEEP_ROUNDS", "0"))
SECONDS = float(os.environ.get("PID_SSL_SWEEP_SECONDS", "30"))
WHY = "PID_SSL_SWEEP_ROUNDS sweeps, each interrupted up to three times within PID_SSL_SWEEP_SECONDS"


@pytest.mark.skipif(not ROUNDS, reason=WHY)
@pytest.mark.parametrize("round", range(ROUNDS))
def test_interrupted_at_random(undisturbed, tmp_path, round):
    sweep, want = undisturbed
    file, home, rng = write(tmp_path / "sweep.json", sweep), tmp_path / "home", random.Random(round)
    how = ["--workers", str(rng.choice([1, 2, 3])), "--notebooks" if round % 4 == 3 else "--no-notebooks"]
    for _ in range(rng.choice([1, 2, 3])):
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
        seconds = rng.uniform(0, SECONDS)
        process, end = begin(file, *how), time.time() + seconds
        while time.time() < end and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        status, out, err = stop(process, number)
        there = f"{len(results(home))} of {len(want)} records"
        print(f"round {round}: {number.name} after {seconds:.2f} s, status {status}, {there}")
    status, out, err = finish(file, *how)
    assert status == 0, err
    assert results(home) == want
    assert not list(home.rglob("epoch-*")) and not list(home.rglob("*.tmp-*"))


def test_what_was_fitted_to_a_small_set_is_known_again(tmp_path, capsys):
    """The preset's sizes are too large for 120 pictures: the record has others than the recipe, and is its record."""
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)):
        (tmp_path / f"mine/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"mine/{i % 2}/{i}.png")
    small = dict(dataset="mine", preset="cpu", image_size=8, width=4, projector_dim=8, projector_hidden=8, epochs=1,
                 data_dir=str(tmp_path), home=str(tmp_path / "home"), threads=1, device="cpu")
    runs = {**small, "loss": ["barlow", "vicreg"]}
    first, again = run_sweep(runs, notebooks=False), run_sweep(runs, notebooks=False)
    assert [r.run_id for r in first] == [r.run_id for r in again]
    assert first[0].config["train_size"] == 0
    assert first[0].provenance["asked"] == {"train_size": None, "batch_size": None}
    assert "2 runs, 2 finished" in capsys.readouterr().out
    measured = run_sweep(dict(experiment="downstream", task="classify", encoders=runs, threads=1, home=small["home"],
                              data_dir=small["data_dir"]), notebooks=False)
    assert [r.config["run"] for r in measured] == [r.run_id for r in first]
    told = {k: first[0].config[k] for k in ("train_size", "batch_size")}
    assert run_sweep({**small, "loss": "barlow", **told}, notebooks=False)[0].run_id == first[0].run_id


def test_one_encoder_that_fails_keeps_no_other_from_being_measured(tmp_path):
    encoders = {**ARGS, "epochs": 1, "dataset": ["digits", "elsewhere"], "device": "cpu"}
    recipe = dict(experiment="downstream", task="classify", threads=1, device="cpu", home=str(tmp_path),
                  encoders={**encoders, "home": str(tmp_path)})
    with pytest.raises(SweepFailed, match="not found under") as failed:
        run_sweep(recipe, notebooks=False)
    assert failed.value.failures["1 measurements"].startswith("the runs whose encoders they measure")
    assert len(list(tmp_path.glob("data/downstream/*.json"))) == 1, "that of the other"


def test_notebooks_of_a_sweep(tmp_path):
    """The notebook of an interrupted run shows where it stopped, the finished one what came out."""
    file, home = write(tmp_path / "sweep.json", TINY), tmp_path / "home"
    process = begin(file, "--notebooks")
    wait_for(lambda: list(home.glob("data/checkpoints/*/epoch-*")), process)
    status, out, err = stop(process, signal.SIGINT)
    assert status == 130, err
    (page,) = home.glob("data/sweeps/sweep/*.ipynb")
    assert "stopped by SIGTERM: run" in page.read_text()
    status, out, err = finish(file, "--notebooks")
    assert status == 0, err
    assert "untrained network" in page.read_text()
    ((_, history),) = results(home).values()
    assert len(history) == TINY["epochs"]
