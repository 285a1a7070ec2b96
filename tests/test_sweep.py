"""A sweep on one machine through submitit: one record a run, nothing run twice, an interrupted job goes on."""
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fault_harness import ARGS

from pid_ssl.config import Config, ConfigError, resolve
from pid_ssl.data import load_dataset
from pid_ssl.runs import load_record, load_records, lock_run, run_id
from pid_ssl.runs_sweep import Job, submit_sweep

pytest.importorskip("submitit", reason="extra slurm")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
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
