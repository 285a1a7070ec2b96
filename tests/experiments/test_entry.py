"""The two ways in, papermill and the command line, as a user meets them."""
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
import torch
from click.testing import CliRunner
from conftest import ROOT, random_images
from papermill.cli import papermill

from pid_ssl.config import Config, as_arguments
from pid_ssl.records import load_records
from pid_ssl.trainers import main, pretrain


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", *args], cwd=cwd, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})


def records(home):
    return list(home.rglob("*.json"))


@pytest.fixture
def datasets(tmp_path):
    """A folder of Parquet datasets: whole, cut short, and one that lacks its files."""
    rng = np.random.default_rng(0)
    for name in ("whole", "cut"):
        folder = tmp_path / "datasets" / name
        folder.mkdir(parents=True)
        for split, n in (("train", 200), ("test", 40)):
            table = pa.table({"img": random_images(rng, n), "label": np.arange(n) % 4})
            pq.write_table(table, folder / f"{split}.parquet")
    path = tmp_path / "datasets/cut/train.parquet"
    path.write_bytes(path.read_bytes()[:-500])
    (tmp_path / "datasets/empty").mkdir()
    return tmp_path / "datasets"


BAD = {
    "loss": (["--loss", "lossx"], ["loss", "'lossx'", "barlow, wmse"]),
    "epochs 0": (["--epochs", "0"], ["epochs", "0", "from 1"]),
    "epochs negative": (["--epochs=-2"], ["epochs", "-2", "from 1"]),
    "epochs text": (["--epochs", "many"], ["epochs", "'many'", "an integer"]),
    "no files": (["--dataset", "empty"], ["train.parquet", "no such file"]),
    "no folder": (["--dataset", "elsewhere"], ["dataset", "'elsewhere'", "accepted"]),
    "cut short": (["--dataset", "cut", "--preset", "digits"], ["train.parquet", "not a readable Parquet"]),
    "batch": (["--dataset", "whole", "--preset", "digits", "--batch_size", "512"], ["batch_size", "512", "180"]),
    "projector": (["--projector_dim", "1"], ["projector_dim", "1", "from 2"]),
    "device": (["--device", "cuda"], ["device", "'cuda'", "cpu"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_stops_before_any_work(case, home, datasets, capsys):
    args, words = BAD[case]
    if case == "device" and torch.cuda.is_available():
        args, words = ["--device", "mps"], ["device", "'mps'", "cpu"]
    assert main([*args, "--data_dir", str(datasets), "--home", str(home)]) == 2 and not records(home)
    message = capsys.readouterr().err
    assert all(w in message for w in words), message


def test_command_line_exit_code(home):
    out = run("pid_ssl.trainers", "--loss", "lossx", "--home", str(home))
    assert out.returncode == 2 and not records(home)
    assert "loss: got 'lossx'; accepted: barlow" in out.stderr and "Traceback" not in out.stderr


REFUSED = {
    "a name": (("lossx", "pid"), ["lossx", "did you mean 'loss'"]),
    "a choice": (("loss", "lossx"), ["loss", "'lossx'", "barlow"]),
    "a number": (("epochs", "0"), ["epochs", "got 0", "from 1"]),
    "a type": (("force", "true"), ["force", "'true'", "True or False"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_papermill_refuses_bad_parameters(case, home, tmp_path):
    """papermill's own command line, in this process; the notebook's kernel is another."""
    given, words = REFUSED[case]
    options = ["--no-progress-bar", "-p", *given, "-p", "home", str(home)]
    notebook = str(ROOT / "nbs/run_experiment.ipynb")
    out = CliRunner().invoke(papermill, [notebook, str(tmp_path / "o.ipynb"), *options])
    assert out.exit_code != 0 and not records(home)
    assert all(w in str(out.exception) for w in words), out.output[-2000:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A home for one run: whoever comes second finds it finished, and its page shows the same."""
    return tmp_path_factory.mktemp("shared") / "home"


@pytest.mark.parametrize("cwd, path", [(".", "nbs/run_experiment.ipynb"), ("nbs", "run_experiment.ipynb")])
def test_papermill_to_standard_output(cwd, path, shared, monkeypatch):
    """No output path, standard output not a terminal: the executed notebook is what is printed."""
    monkeypatch.delenv("IN_TEST", raising=False)
    given = dict(loss="pid", epochs=1, width=8, home=shared)
    out = run("papermill", path, *(x for k, v in given.items() for x in ("-p", k, str(v))), cwd=ROOT / cwd)
    assert out.returncode == 0, out.stderr[-2000:]
    data = [o.get("data", {}) for c in json.loads(out.stdout)["cells"] for o in c.get("outputs", [])]
    assert any("image/png" in d for d in data), "curves"
    assert any("untrained network" in "".join(d.get("text/html", "")) for d in data), "the final table"
    assert len(load_records(shared / "data/runs", loss="pid")) == 1


def test_killed_run_resumes_to_the_same_metrics(home, tmp_path):
    """SIGKILL somewhere in the middle, start again: the numbers of the run that was left alone."""
    given = dict(loss="pid", epochs=16, width=4, train_size=128, batch_size=32, threads=1)
    command = [sys.executable, "-m", "pid_ssl.trainers", *as_arguments(given | dict(home=home))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 100
    while not list(home.rglob("epoch-000003")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((home / "data").glob("runs/*.json")), "killed before it finished"
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0 and "resumed after epoch" in out.stdout, out.stderr
    whole = pretrain(Config(**given, home=str(tmp_path / "other")))
    (resumed,) = load_records(home / "data/runs")
    assert resumed.metrics == whole.metrics and resumed.history == whole.history
    assert not list(home.rglob("epoch-*")) and not list(home.rglob("*tmp*"))
