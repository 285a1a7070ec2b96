"""The list of runs for a GPU, rehearsed whole on a CPU: stopped, gone on with, finished; none is called GPU."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pid_ssl.experiments.gpu import finished, kit, kit_rows, step_speeds
from pid_ssl.records import load_records

pytestmark = pytest.mark.skipif(not (ROOT / "nbs/sweeps").exists(), reason="recipes are in a clone")


def rehearse(home, *more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("IN_TEST", None)
    command = [sys.executable, "-m", "pid_ssl", "gpu", "--rehearse", "--home", str(home), *more]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def test_the_whole_list_in_two_goes(tmp_path):
    """The first is out of time somewhere in it; the second finishes, and a third finds nothing to do."""
    first = rehearse(tmp_path, "--minutes", "0.4")
    assert first.returncode == 0 and "the time is up" in first.stdout, first.stderr
    some = {r.run_id for r in load_records(tmp_path / "data/runs")}
    second = rehearse(tmp_path)
    assert second.returncode == 0, second.stderr
    steps = kit(str(tmp_path), True)
    done = finished(steps, tmp_path)
    assert len(done) == 2 * len(steps) == 90
    records = load_records(tmp_path / "data/runs")
    assert len(records) == 45 and some < {r.run_id for r in records}
    assert {r.provenance["device"] for r in records} == {"cpu"}, "none is called GPU"
    assert step_speeds(tmp_path) == {}
    (speed,) = (tmp_path / "data/benchmarks").iterdir()
    assert speed.name.startswith("cpu_speed_") and json.loads(speed.read_text())["provenance"]["device"] == "cpu"
    assert all((row["runs"], row["transfers"]) == ("3 of 3", "3 of 3") for row in kit_rows(steps, {}, done))
    third = rehearse(tmp_path)
    assert third.returncode == 0 and "gone through" not in third.stdout
    assert "3 of 3" in third.stdout and len(load_records(tmp_path / "data/runs")) == 45


def test_without_a_gpu_nothing_is_begun(tmp_path):
    """One line says what is lacking."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pid_ssl", "gpu", "--home", str(tmp_path)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: device: got 'cpu'; accepted: cuda: torch finds no CUDA GPU here")
    assert not list(tmp_path.iterdir())
