"""What a reader who doubts a number does: make it again from the committed record alone, and look where the two differ."""
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

from pid_ssl.config import Config, ConfigError
from pid_ssl.experiments.controlled import ControlledConfig, controlled_config, controlled_id, run_controlled
from pid_ssl.experiments.downstream import DownstreamConfig, downstream_config, resolve_downstream, run_downstream
from pid_ssl.paper.reproduce import _measurement, _same, behind, circumstances, comparison, reproduce
from pid_ssl.records import RunRecord, load_record
from pid_ssl.experiments.pretrain import pretrain


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with nothing in it but what makes it one."""
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def publish(project, **figures):
    """A manifest, and no weights: they are not committed."""
    (project / "figures").mkdir(exist_ok=True)
    (project / "figures/manifest.json").write_text(json.dumps({k: {"runs": v, "files": {}} for k, v in figures.items()}))
    shutil.rmtree(project / "data/checkpoints", ignore_errors=True)


def command(project, *args, **kw):
    return subprocess.Popen([sys.executable, "-m", "pid_ssl.paper.reproduce", *map(str, args)], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def test_a_figure_again_and_what_was_changed_by_hand(project, tmp_path):
    run = pretrain(Config(**ARGS, home=str(project)))
    tasks = [run_downstream(DownstreamConfig(run=run.run_id, task=t, weights=w, home=str(project), threads=1)) for t, w in (("classify", "pretrained"), ("classify", "untrained"), ("two_view", "pretrained"))]
    arm = run_controlled(ControlledConfig(arm="barlow", steps=2, batch_size=16, image_size=16, drawings=1, width=4, dim=8, fusion=8, home=str(project), threads=1))
    path = project / f"data/downstream/{tasks[1].run_id}.json"
    record = load_record(path, downstream_config)
    record.metrics["test_knn5_euclidean"] += 0.5
    record.save(path.parent)
    publish(project, all=[run.run_id, arm.run_id, *(t.run_id for t in tasks)])
    done = command(project, "all", "--home", tmp_path / "again", "--workers", 2)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err
    rows = list(csv.DictReader(open(tmp_path / "again/reproduced.csv")))
    (wrong,) = [r for r in rows if r["difference"] != "0.0"]
    assert (wrong["record"], wrong["metric"], float(wrong["difference"])) == (record.run_id, "test_knn5_euclidean", pytest.approx(-0.5))
    assert len(rows) == sum(len(r.metrics) for r in (run, arm, *tasks)) and f"{len(rows) - 1} of {len(rows)} numbers are the same" in out
    assert not list(project.glob("data/checkpoints/*")) and load_record(path, downstream_config).metrics == record.metrics, "nothing committed is touched"


def test_stopped_and_started_again(project, tmp_path):
    run = pretrain(Config(**ARGS | dict(epochs=30), home=str(project)))
    publish(project, long=[run.run_id])
    args = ("long", "--home", tmp_path / "again")
    first = command(project, *args)
    deadline = time.time() + 120
    while not list(tmp_path.glob("again/data/checkpoints/*/epoch-*")):
        assert first.poll() is None and time.time() < deadline, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert "goes on" in first.communicate(timeout=120)[1] and first.returncode == 143
    assert not (tmp_path / "again/reproduced.csv").exists() and not list(tmp_path.glob("again/data/runs/*.json"))
    second = command(project, *args)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and f"{len(run.metrics)} of {len(run.metrics)} numbers are the same" in out, out + err


def images(folder, shift):
    for split, n in (("train", 40), ("test", 10)):
        for c in (0, 1):
            (folder / split / str(c)).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (100 * c + i + shift, 3 * i, 60)).save(folder / split / str(c) / f"{i}.png")


def test_another_copy_of_the_data(project, tmp_path):
    """Run ids differ then; the encoder that is measured is that of the new run, and the difference is named."""
    images(tmp_path / "mine/toys", 0)
    images(tmp_path / "theirs/toys", 1)
    config = Config(**ARGS | dict(loss="barlow", epochs=1), dataset="toys", image_size=8, home=str(project), data_dir=str(tmp_path / "mine"))
    run = pretrain(config)
    task = run_downstream(DownstreamConfig(run=run.run_id, home=str(project), data_dir=str(tmp_path / "mine"), threads=1))
    publish(project, toys=[task.run_id])
    plan = behind(["toys"], project)
    made = reproduce(plan, tmp_path / "again", data_dir=str(tmp_path / "theirs"))
    assert made[run.run_id].run_id != run.run_id == plan.runs[0].run_id
    assert made[task.run_id].config["run"] == made[run.run_id].run_id and set(comparison(plan, made).record) == {task.run_id}
    (said,) = circumstances(plan, made)
    assert said.startswith("data: ") and task.provenance["dataset_hash"][:16] in said and made[task.run_id].provenance["dataset_hash"][:16] in said


def test_what_cannot_be_made_is_said(project, tmp_path):
    images(tmp_path / "mine/toys", 0)
    run = pretrain(Config(**ARGS | dict(loss="barlow", epochs=1), dataset="toys", image_size=8, home=str(project), data_dir=str(tmp_path / "mine")))
    publish(project, toys=[run.run_id], lost=["0" * 16])
    for args, status, message in (
        (["toys", "--home", tmp_path / "again"], 1, "dataset: got 'toys'"),
        (["toys", "--home", project], 2, "home: got"),
        (["lost", "--home", tmp_path / "again"], 2, "record 0000000000000000 is not in"),
        (["toys", "--home", tmp_path / "again", "--workers", "0"], 2, "workers: got 0"),
        (["toy", "--plan"], 2, "did you mean toys?"),
    ):
        done = command(project, *args)
        out, err = done.communicate(timeout=120)
        assert done.returncode == status and message in err, out + err
    assert not list(project.glob("data/checkpoints/*"))
    done = command(project, run.run_id, "--home", tmp_path / "again", "--data_dir", tmp_path / "mine")  # by the id of a record
    assert done.communicate(timeout=120)[0].count("the same to the last digit") == 1 and done.returncode == 0


@pytest.mark.parametrize("folder", ("downstream", "controlled"))
def test_every_committed_measurement_would_be_found_again(folder):
    """What a record asks for today, filled in as today, is what `reproduce` looks for: those from before a field existed too."""
    for path in sorted((ROOT / "data" / folder).glob("*.json")):
        if folder == "controlled":
            record = load_record(path, controlled_config)
            assert controlled_id(controlled_config({k: v for k, v in record.config.items() if k not in ("home", "threads")})) == record.run_id
            continue
        record = load_record(path, downstream_config)
        asked = _measurement(record, record.config["run"])
        run = load_record(ROOT / f"data/runs/{asked.run}.json").config
        resolved = resolve_downstream(asked, run, record.provenance["images"]["train"])
        assert _same(_measurement(RunRecord("0" * 16, "finished", vars(resolved)), asked.run), asked), path.stem


def test_few_labels_from_before_the_policy_was_recorded(project, tmp_path):
    run = pretrain(Config(**ARGS | dict(loss="barlow", epochs=1), home=str(project)))
    task = run_downstream(DownstreamConfig(run=run.run_id, task="low_label", fraction=0.05, draws=1, epochs=1, home=str(project), threads=1))
    path = project / f"data/downstream/{task.run_id}.json"
    task.config["policy"] = "auto"
    task.save(path.parent)
    publish(project, few=[task.run_id])
    plan = behind(["few"], project)
    made = reproduce(plan, tmp_path / "again")
    assert (comparison(plan, made).difference == 0).all()
    started = made[task.run_id].provenance["started"]
    assert reproduce(plan, tmp_path / "again")[task.run_id].provenance["started"] == started, "made once"


def test_a_home_with_a_history(project, tmp_path):
    """Records of another copy of the data, weights that were deleted, a control that was measured through another run, a folder that cannot be written."""
    images(tmp_path / "mine/toys", 0)
    images(tmp_path / "theirs/toys", 1)
    here = {**ARGS, "epochs": 1, "dataset": "toys", "image_size": 8}
    runs = {loss: pretrain(Config(**here | dict(loss=loss), home=str(project), data_dir=str(tmp_path / "mine"))) for loss in ("barlow", "vicreg")}
    task = run_downstream(DownstreamConfig(run=runs["barlow"].run_id, weights="untrained", home=str(project), data_dir=str(tmp_path / "mine"), threads=1))
    publish(project, control=[task.run_id])
    plan, home = behind(["control"], project), tmp_path / "again"
    other = pretrain(Config(**here | dict(loss="vicreg"), home=str(home), data_dir=str(tmp_path / "mine")))
    run_downstream(DownstreamConfig(run=other.run_id, weights="untrained", home=str(home), data_dir=str(tmp_path / "mine"), threads=1))
    made = reproduce(plan, home, data_dir=str(tmp_path / "mine"))
    assert made[task.run_id].metrics == task.metrics and made[task.run_id].config["run"] == other.run_id
    with pytest.raises(ConfigError, match="home: got .* was made from another copy of toys"):
        reproduce(plan, home, data_dir=str(tmp_path / "theirs"))
    shutil.rmtree(home / "data/checkpoints")
    shutil.rmtree(home / "data/downstream")
    assert reproduce(plan, home, data_dir=str(tmp_path / "mine"))[task.run_id].metrics == task.metrics
    (tmp_path / "file").touch()
    done = command(project, "control", "--home", tmp_path / "file" / "home")
    assert "cannot be written" in done.communicate(timeout=120)[1] and done.returncode == 4
