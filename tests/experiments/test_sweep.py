"""Sweeps, on this machine and through submitit: one record a run, nothing run twice, what is interrupted goes on."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from fault_harness import ARGS

from pid_ssl.config import Config, ConfigError, resolve
from pid_ssl.data import load_dataset
from pid_ssl.records import load_record, load_records, lock_run, run_id
from pid_ssl.experiments.sweep import Job, expand, read_sweep, submit_sweep
from pid_ssl.experiments.pretrain import pretrain


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="extra slurm")
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return {**ARGS, "epochs": 1, "device": "cpu", "home": str(tmp_path / "home")}


def test_each_run_once(sweep, tmp_path, capsys):
    sweep |= dict(seed=[0, 1])
    jobs = submit_sweep(sweep, tmp_path / "logs", cluster="local")
    assert [j.result() for j in jobs] == ["finished"] * 2
    records = load_records(tmp_path / "home/data/runs")
    assert sorted(r.config["seed"] for r in records) == [0, 1]
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the job's process in /proc")
def test_an_interrupted_job_goes_on(sweep, tmp_path):
    """What the cluster does before it takes the node back."""
    (job,) = submit_sweep(sweep | dict(epochs=30), tmp_path / "logs", cluster="local")
    deadline = time.time() + 300
    while time.time() < deadline and not list(tmp_path.glob("home/data/checkpoints/*/epoch-*")):
        time.sleep(0.05)
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    assert job.result() == "finished"
    (path,) = tmp_path.glob("home/data/runs/*.json")
    record = load_record(path)
    assert record.provenance["resumed_after_epoch"] > 0 and len(record.history) == 30
    assert "stopped by SIGTERM" in job.stderr(), "the run saved the step it was in"


# ---- on this machine -------------------------------------------------------------------------------------------------

TINY = {**ARGS, "epochs": 25}  # long enough to be met in the middle


def write(path, sweep):
    """A sweep file; its runs are all in `home` beside it."""
    path.write_text(json.dumps(sweep | dict(home=str(path.parent / "home"))))
    return path


def begin(file, *args):
    return subprocess.Popen([sys.executable, "-m", "pid_ssl.experiments.sweep", str(file), *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "PYTHONPATH": str(ROOT)})


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
    """The results of four runs, made one after the other in this process."""
    home = tmp_path_factory.mktemp("undisturbed")
    sweep = TINY | dict(loss=["barlow", "pid"], seed=[0, 1])
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


def test_an_interrupted_sweep_ends_with_the_same_records(undisturbed, tmp_path):
    """Stopped as a run starts and as one has saved, then killed; one of the killed sweep's processes hangs and keeps its run."""
    sweep, want = undisturbed
    file, home = write(tmp_path / "sweep.json", sweep), tmp_path / "home"
    for number, pattern in ((signal.SIGTERM, "data/sweeps/*/*.log"), (signal.SIGINT, "data/checkpoints/*/epoch-*")):
        process = begin(file, "--workers", "2", "--no-notebooks")
        wait_for(lambda: list(home.glob(pattern)), process)
        status, out, err = stop(process, number)
        assert status == 128 + number and f"stopped by {number.name}: " in err and "the same call goes on" in err, err
    process = begin(file, "--workers", "2", "--no-notebooks")
    log = home / "data/sweeps/sweep/loss=barlow_seed=0.log"
    wait_for(lambda: log.read_text().count("\nepoch ") > 3, process)
    family = psutil.Process(process.pid).children()
    orphan = next(p for p in family if "--loss=barlow" in p.cmdline() and not any(x.startswith("--seed") for x in p.cmdline()))
    orphan.suspend()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs([p for p in family if p != orphan], timeout=60)[1], "left running"
    assert len(results(home)) < 4, "interrupted before it was done"

    process = begin(file, "--workers", "2", "--no-notebooks")
    lines = iter(process.stdout.readline, "")
    said = next(x for x in lines if x.startswith("locked: "))
    assert "loss=barlow_seed=0: run" in said and f"process {orphan.pid} " in said and "coming back to it" in said
    wait_for(lambda: len(results(home)) == 3, process)  # the others are made meanwhile
    orphan.resume()
    assert [x for x in lines if "finished in" in x][-1].startswith("[4/4] loss=barlow_seed=0: ")
    assert process.wait(60) == 0, process.stderr.read()
    assert results(home) == want and not orphan.is_running()
    configs = [r.config for r in load_records(home / "data/runs")]
    assert len(configs) == 4 and all(c["home"] is None and c["data_dir"] is None for c in configs), "a record names no folder of this machine"
    assert not list(home.rglob("epoch-*")) and not list(home.rglob("*tmp*"))


ROUNDS, SECONDS = int(os.environ.get("PID_SSL_SWEEP_ROUNDS", "0")), float(os.environ.get("PID_SSL_SWEEP_SECONDS", "30"))


@pytest.mark.skipif(not ROUNDS, reason="PID_SSL_SWEEP_ROUNDS sweeps, each interrupted up to three times within PID_SSL_SWEEP_SECONDS")
@pytest.mark.parametrize("round", range(ROUNDS))
def test_interrupted_at_random(undisturbed, tmp_path, round):
    sweep, want = undisturbed
    file, home, rng = write(tmp_path / "sweep.json", sweep), tmp_path / "home", random.Random(round)
    how = ["--workers", str(rng.choice([1, 2, 3])), "--notebooks" if round % 4 == 3 else "--no-notebooks"]
    for _ in range(rng.choice([1, 2, 3])):
        number, seconds = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP]), rng.uniform(0, SECONDS)
        process, end = begin(file, *how), time.time() + seconds
        while time.time() < end and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        status, out, err = stop(process, number)
        print(f"round {round}: {number.name} after {seconds:.2f} s, status {status}, {len(results(home))} of {len(want)} records")
    status, out, err = finish(file, *how)
    assert status == 0, err
    assert results(home) == want
    assert not list(home.rglob("epoch-*")) and not list(home.rglob("*.tmp-*"))


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


RECIPES = {"ablations_cifar10": "ablations_cifar10", "cifar10": "results_cifar10", "digits": "results_digits",
           "beta_cifar10": "beta_curve_cifar10", "beta_digits": "beta_curve_digits",
           "imagenette-96": "results_imagenette_96", "tiny-imagenet-32": "results_tiny_imagenet_32"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_runs_of_its_table(name):
    """Of the committed records, exactly those that the table was made from."""
    runs = json.loads((ROOT / "figures/manifest.json").read_text())[RECIPES[name]]["runs"]
    (data,) = {load_record(ROOT / f"data/runs/{i}.json").provenance["dataset_hash"] for i in runs}
    assert {run_id(resolve(c), data, c.device) for c in expand(read_sweep(ROOT / f"nbs/sweeps/{name}.toml"))} == set(runs)
