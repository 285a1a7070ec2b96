"""A reader who doubts a number makes it again from the committed record alone, and looks where the two differ."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fault_harness import ARGS
from PIL import Image

from pid_ssl.__main__ import main
from pid_ssl.config import Config, ConfigError, guarded
from pid_ssl.experiments import controlled, sweep
from pid_ssl.experiments.controlled import ControlledConfig, run_controlled
from pid_ssl.experiments.downstream import DownstreamConfig, downstream_config, run_downstream
from pid_ssl.experiments.pretrain import pretrain
from pid_ssl.paper.reproduce import behind, circumstances, command, comparison, reproduce
from pid_ssl.records import load_record


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with nothing in it but what makes it one."""
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    monkeypatch.chdir(folder)
    return folder


def publish(project, recipes=(), **figures):
    """A manifest, and no weights: they are not committed."""
    entries = {k: {"runs": v, "files": {}, "recipes": list(recipes)} for k, v in figures.items()}
    (project / "figures").mkdir(exist_ok=True)
    (project / "figures/manifest.json").write_text(json.dumps(entries))
    shutil.rmtree(project / "data/checkpoints", ignore_errors=True)


@pytest.fixture
def call(capfd):
    """The command, in this process."""
    def run(*args):
        capfd.readouterr()
        status = guarded(command, list(map(str, args)))
        return status, *capfd.readouterr()
    return run


@pytest.fixture
def here(monkeypatch):
    """What would be started is run in this process: seconds less for each, where that is not what is tested."""
    def work(runs, workers, total):
        for run in runs:
            assert main(run.command[3:]) == 0, run.name
    monkeypatch.setattr(sweep, "_work", work)
    few = dict(PROBE_PAIRS={"train": 200, "val": 100, "test": 100}, AUDIT_PAIRS=200, PROBE_STEPS=20, AUDIT_STEPS=20)
    for name, value in few.items():
        monkeypatch.setattr(controlled, name, value)


def images(folder, shift):
    for split, n in (("train", 40), ("test", 10)):
        for c in (0, 1):
            (folder / split / str(c)).mkdir(parents=True)
            for i in range(n):
                colour = (100 * c + i + shift, 3 * i, 60)
                Image.new("RGB", (8, 8), colour).save(folder / split / str(c) / f"{i}.png")


@pytest.fixture
def toys(tmp_path):
    """Two copies of a dataset that are not the same, and a short run on one of them."""
    images(tmp_path / "mine/toys", 0)
    images(tmp_path / "theirs/toys", 1)
    given = ARGS | dict(loss="barlow", epochs=1, dataset="toys", image_size=8)
    return lambda home, **more: pretrain(Config(**given | more, home=str(home), data_dir=str(tmp_path / "mine")))


def measure(project, run, **more):
    return run_downstream(DownstreamConfig(run=run.run_id, home=str(project), threads=1, **more))


def test_a_figure_again_and_what_was_changed_by_hand(project, tmp_path, call, here):
    run = pretrain(Config(**ARGS, home=str(project)))
    tasks = [measure(project, run, task=t, weights=w) for t, w in (
        ("classify", "pretrained"), ("classify", "untrained"), ("two_view", "pretrained"))]
    small = dict(steps=2, batch_size=16, image_size=16, drawings=1, width=4, dim=8, fusion=8)
    arm = run_controlled(ControlledConfig(arm="barlow", **small, home=str(project), threads=1))
    path = project / f"data/downstream/{tasks[1].run_id}.json"
    record = load_record(path, downstream_config)
    record.metrics["test_knn5_euclidean"] += 0.5
    record.save(path.parent)
    publish(project, all=[run.run_id, arm.run_id, *(t.run_id for t in tasks)])
    status, out, err = call("all", "--home", tmp_path / "again", "--workers", 2)
    assert status == 0, out + err
    rows = list(csv.DictReader((tmp_path / "again/reproduced.csv").read_text().splitlines()))
    (wrong,) = [r for r in rows if r["difference"] != "0.0"]
    assert (wrong["record"], wrong["metric"]) == (record.run_id, "test_knn5_euclidean")
    assert float(wrong["difference"]) == pytest.approx(-0.5)
    assert len(rows) == sum(len(r.metrics) for r in (run, arm, *tasks))
    assert f"{len(rows) - 1} of {len(rows)} numbers are the same" in out
    assert not list(project.glob("data/checkpoints/*")), "nothing is made among what is committed"
    assert load_record(path, downstream_config).metrics == record.metrics


def test_stopped_and_started_again(project, tmp_path, call, request):
    run = pretrain(Config(**ARGS | dict(epochs=30), home=str(project)))
    publish(project, long=[run.run_id])
    args = ("long", "--home", tmp_path / "again")
    first = subprocess.Popen([sys.executable, "-m", "pid_ssl", "reproduce", *map(str, args)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list(tmp_path.glob("again/data/checkpoints/*/epoch-*")):
        assert first.poll() is None and time.time() < deadline, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert "goes on" in first.communicate(timeout=120)[1] and first.returncode == 143
    assert not (tmp_path / "again/reproduced.csv").exists() and not list(tmp_path.glob("again/data/runs/*.json"))
    request.getfixturevalue("here")
    status, out, err = call(*args)
    assert status == 0 and f"{len(run.metrics)} of {len(run.metrics)} numbers are the same" in out, out + err


def test_another_copy_of_the_data(project, tmp_path, toys, here):
    """Run ids differ then; the encoder that is measured is that of the new run, and the difference is named."""
    run = toys(project)
    task = measure(project, run, data_dir=str(tmp_path / "mine"))
    publish(project, toys=[task.run_id])
    plan = behind(["toys"], project)
    made = reproduce(plan, tmp_path / "again", data_dir=str(tmp_path / "theirs"))
    assert made[run.run_id].run_id != run.run_id == next(iter(plan.records))
    assert made[task.run_id].config["run"] == made[run.run_id].run_id
    assert set(comparison(plan, made).record) == {task.run_id}
    (said,) = circumstances(plan, made)
    hashes = [r.provenance["dataset_hash"][:16] for r in (task, made[task.run_id])]
    assert said.startswith("data: ") and all(h in said for h in hashes)


def test_what_cannot_be_made_is_said(project, tmp_path, toys, call):
    run = toys(project)
    publish(project, toys=[run.run_id], lost=["0" * 16])
    for args, status, message in (
        (["toys", "--home", tmp_path / "again"], 1, "dataset: got 'toys'"),
        (["toys", "--home", project], 2, "home: got"),
        (["lost", "--home", tmp_path / "again"], 2, "record 0000000000000000 is not in"),
        (["toys", "--home", tmp_path / "again", "--workers", "0"], 2, "workers: got 0"),
        (["toy", "--plan"], 2, "did you mean toys?"),
    ):
        ended, out, err = call(*args)
        assert ended == status and message in err, out + err
    assert not list(project.glob("data/checkpoints/*"))
    ended, out, err = call(run.run_id, "--home", tmp_path / "again", "--data_dir", tmp_path / "mine")  # by its id
    assert ended == 0 and out.count("the same to the last digit") == 1, out + err


def test_from_the_recipe(project, tmp_path, call, here):
    """A figure's recipe gives its records again; a recipe is a name too; one that lacks a record is refused."""
    runs = [pretrain(Config(**ARGS | dict(loss="barlow", epochs=1, seed=s), home=str(project))) for s in (0, 1)]
    task = measure(project, runs[0])
    folder = project / "nbs/sweeps"
    folder.mkdir(parents=True)
    settings = {k: v for k, v in ARGS.items() if k != "threads"} | {"loss": "barlow", "epochs": 1, "device": "cpu"}
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items()]
    (folder / "few.toml").write_text("\n".join([*lines, "seed = [0, 1]"]))
    (folder / "tasks.toml").write_text('experiment = "downstream"\nencoders = "few"\n[[block]]\nencoders = {seed = 0}')
    publish(project, ["few"], both=[r.run_id for r in runs])
    assert call("both", "--home", tmp_path / "again")[0] == 0
    plan = behind(["tasks"], project)
    assert plan.asked == {task.run_id} and set(plan.records) == {task.run_id, runs[0].run_id}
    assert call("tasks", "--home", tmp_path / "again")[1].count("the same to the last digit") == 1
    (folder / "few.toml").write_text("\n".join([*lines, "seed = 0"]))
    status, out, err = call("both", "--plan")
    assert status == 2 and runs[1].run_id in err and "few" in err


def test_few_labels_from_before_the_policy_was_recorded(project, tmp_path, here):
    run = pretrain(Config(**ARGS | dict(loss="barlow", epochs=1), home=str(project)))
    task = measure(project, run, task="low_label", fraction=0.05, draws=1, epochs=1)
    task.config["policy"] = "auto"
    task.save(project / "data/downstream")
    publish(project, few=[task.run_id])
    plan = behind(["few"], project)
    made = reproduce(plan, tmp_path / "again")
    assert (comparison(plan, made).difference == 0).all()
    started = made[task.run_id].provenance["started"]
    assert reproduce(plan, tmp_path / "again")[task.run_id].provenance["started"] == started, "made once"


def test_a_home_with_a_history(project, tmp_path, toys, call, here):
    """Another copy of the data, deleted weights, a control measured through another run, no place to write."""
    control = dict(weights="untrained", data_dir=str(tmp_path / "mine"))
    task = measure(project, toys(project), **control)
    publish(project, control=[task.run_id])
    plan, home = behind(["control"], project), tmp_path / "again"
    other = toys(home, loss="vicreg")
    measure(home, other, **control)
    made = reproduce(plan, home, data_dir=str(tmp_path / "mine"))
    assert made[task.run_id].metrics == task.metrics and made[task.run_id].config["run"] == other.run_id
    with pytest.raises(ConfigError, match="home: got .* was made from another copy of toys"):
        reproduce(plan, home, data_dir=str(tmp_path / "theirs"))
    shutil.rmtree(home / "data/checkpoints")
    shutil.rmtree(home / "data/downstream")
    assert reproduce(plan, home, data_dir=str(tmp_path / "mine"))[task.run_id].metrics == task.metrics
    (tmp_path / "file").touch()
    status, out, err = call("control", "--home", tmp_path / "file" / "home")
    assert "cannot be written" in err and status == 4
