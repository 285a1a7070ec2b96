"""Images without labels, from folder to record: what is read, what is recorded, and what is refused before training."""
import dataclasses
import json
import subprocess
import sys
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from pid_ssl.__main__ import main
from pid_ssl.config import Config, ConfigError, identity, resolve
from pid_ssl.data import DataError, load_dataset, open_source
from pid_ssl.evaluate import evaluate_encoder
from pid_ssl.experiments.downstream import DownstreamConfig, run_downstream
from pid_ssl.figures.page import Watch, plot_neighbours
from pid_ssl.figures.runs import results_table, run_table
from pid_ssl.models import SmallResNet, load_encoder
from pid_ssl.records import checkpoint_folder, load_record, run_id, runs_folder, save_checkpoint
from pid_ssl.trainers import pretrain

PICTURES = (load_digits().images * 255 / 16).round().astype(np.uint8)
LABELS = load_digits().target


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The digits as one folder, as nested folders, and 400 of them by class."""
    root = tmp_path_factory.mktemp("data")
    for i, (picture, y) in enumerate(zip(PICTURES[:400], LABELS)):
        for at in (root / "flat", root / "nested" / f"{i % 3}" / "deep", root / "classes" / str(y)):
            at.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).convert("RGB").save(at / f"{i:04d}.png")
    images = [{"bytes": (root / f"flat/{i:04d}.png").read_bytes(), "path": ""} for i in range(400)]
    pq.write_table(pa.table({"image": pa.array(images)}), root / "rows.parquet")
    (root / "shards").mkdir()
    for i in range(2):
        table = pa.table({"image": pa.array(images[200 * i : 200 * i + 200])})
        pq.write_table(table, root / f"shards/train-{i:05d}-of-00002.parquet")
    return root


@pytest.mark.parametrize("name, labels", [("flat", "auto"), ("nested", "none"), ("classes", "none"), ("rows", "auto"),
                                          ("rows.parquet", "auto"), ("shards", "auto")])
def test_every_image_is_read_once(name, labels, data):
    read = load_dataset(name, data_dir=str(data), labels=labels)
    assert read.labels == {} and read.classes == 0 and not read.labelled
    assert {s: len(x) for s, x in read.images.items()} == {"train": 288, "val": 32, "test": 80}
    rows = np.concatenate([x[:, 0].numpy() for x in read.images.values()]).reshape(400, -1)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, PICTURES[:400].reshape(400, -1)))


def test_what_is_a_class_is_said(data):
    assert open_source("classes", str(data)).labelled
    with pytest.raises(DataError, match="images without labels: .*, or at any depth with labels none"):
        open_source("nested", str(data))
    with pytest.raises(ConfigError, match="labels: got 'some'; accepted: auto, none"):
        Config(labels="some")
    with pytest.raises(DataError, match="or with images without labels, or a file nothere.parquet"):
        open_source("nothere", str(data))
    assert not {"labels", "probe_dataset"} & set(identity(resolve(Config())))


CONFIG = Config(dataset="flat", loss="pid", preset="cpu", image_size=8, width=4, epochs=2, threads=1, projector_dim=8)


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    return dataclasses.replace(CONFIG, data_dir=str(data), home=str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def record(config):
    with pytest.warns(UserWarning, match="flat has 288 training images, too few for the preset's train_size 10240"):
        return pretrain(config)


def test_a_run_without_labels_records_what_needs_none(config, record):
    assert (record.config["train_size"], record.config["batch_size"]) == (0, 64)
    rank = {"test_rankme", "control_test_rankme"}
    assert rank == {k for k in record.metrics if "pid_coordinate" not in k}
    assert all(1 <= record.metrics[k] <= 16 for k in rank)
    assert record.provenance["accuracies"] == "not measured: no labels" and "collapse" not in record.provenance
    assert "val_untrained_rankme" in record.history[0] and "val_rankme" in record.history[-1]
    assert load_record(runs_folder(config) / f"{record.run_id}.json").metrics == record.metrics
    assert run_table(record).loc["untrained network", "rankme"] == round(record.metrics["control_test_rankme"], 2)


@pytest.mark.filterwarnings("ignore:flat has")
def test_a_probe_dataset_gives_the_accuracies_of_the_same_encoder(config, record):
    probed = dataclasses.replace(config, probe_dataset="classes")
    found = pretrain(probed)
    read = load_dataset("classes", 8, data_dir=config.data_dir)
    fitted = resolve(dataclasses.replace(probed, train_size=0, batch_size=64))
    made = run_id(fitted, found.provenance["dataset_hash"], "cpu", read.content_hash)
    assert found.run_id == made and found.provenance["probe_hash"] == read.content_hash
    assert found.history == record.history
    encoder = load_encoder(checkpoint_folder(config, found.run_id) / "final")[0]
    watch = Watch(probed)
    again = evaluate_encoder(encoder, read, watch.views, "test")
    assert again == {k: found.metrics[k] for k in again} and "raw_test_linear_logreg" in found.metrics
    assert not watch.labels and plot_neighbours(encoder, watch, 2, 3)
    with pytest.warns(UserWarning, match=f"records {record.run_id}: no accuracies, .*; left out"):
        assert len(results_table([record, found])) == 3
    with pytest.raises(ValueError, match="no accuracies, their images have no labels; accepted"):
        results_table([record])


@pytest.mark.filterwarnings("ignore:classes has")
def test_labels_that_a_run_left_out_can_be_measured(config):
    run = pretrain(dataclasses.replace(config, dataset="classes", labels="none"))
    given = dict(run=run.run_id, home=config.home, data_dir=config.data_dir, threads=1, device="cpu")
    assert run_downstream(DownstreamConfig(task="classify", **given)).metrics["test_linear_logreg"] > 50
    with pytest.raises(ConfigError, match="dataset: got 'flat'; accepted: one with labels; flat has none"):
        run_downstream(DownstreamConfig(task="transfer", dataset="flat", **given))


def test_the_command_says_what_is_missing_before_it_trains(config):
    given = ["--dataset", "flat", "--data_dir", config.data_dir, "--home", config.home, "--probe_dataset", "rows"]
    done = subprocess.run([sys.executable, "-m", "pid_ssl", "pretrain", *given, "--preset", "cpu", "--image_size", "8"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "probe_dataset: got 'rows'; accepted: a labelled dataset" in done.stderr
    assert "Traceback" not in done.stderr and "epoch" not in done.stdout


def test_a_collapse_is_said_in_log_and_record(config, monkeypatch):
    low = {"rankme": 1.0, "spread": 0.5, "embedding_rankme": 8.0, "embedding_spread": 0.5}
    monkeypatch.setattr("pid_ssl.experiments.pretrain.spectrum", lambda *given: low)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pretrain(dataclasses.replace(config, seed=1, epochs=3))
    assert [s.split(":")[0] for s in found.provenance["collapse"]] == ["epoch 1", "epoch 3"]
    warned = [str(w.message) for w in said if "the run has collapsed: rankme 1 (untrained" in str(w.message)]
    assert warned == found.provenance["collapse"]


def test_features_worse_than_the_untrained_networks_are_said(tmp_path, monkeypatch):
    """A run with labels whose features are read badly, while it trains and in the end."""
    def poor(*given):
        metrics = evaluate_encoder(*given)
        return metrics if given[4] else dict.fromkeys(metrics, 0.0)

    monkeypatch.setattr("pid_ssl.experiments.pretrain.readings", lambda *given: {"knn5": 1.0})
    monkeypatch.setattr("pid_ssl.experiments.pretrain.evaluate_encoder", poor)
    given = Config(loss="barlow", epochs=5, width=4, train_size=256, threads=1, projector_dim=8, home=str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pretrain(given)
    watched, end = found.provenance["collapse"]
    assert watched.startswith("epoch 5: below the untrained network: 5-NN accuracy 1.0 (")
    assert end.startswith("in the end: below the untrained network: test_linear_logreg 0.0 (")
    assert [str(w.message) for w in said if "untrained network:" in str(w.message)] == [watched, end]
    assert found.history[0]["val_untrained_knn5"] > 30


def test_a_dataset_without_labels_is_audited_as_the_run_read_it(data, tmp_path, capsys):
    header = {"config": dict(encoder="small", image_size=8, width=8, loss="pid", dataset="nested", labels="none"),
              "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint(tmp_path / "final", {"encoder": SmallResNet(8, 3).state_dict()}, header)
    options = ["--data_dir", str(data), "--folder", str(tmp_path), "--pairs", "300"]
    assert main(["audit", str(tmp_path / "final"), *options]) == 0
    capsys.readouterr()
    told = json.loads((tmp_path / "audit.json").read_text())
    assert "label" not in told["bits"] and told["about"]["images"] == {"fit": 288, "held": 80}
    assert told["about"]["normalise"] == [header["mean"], header["std"]], "what the encoder was trained with"
    for wrong in (["--split", "tets"], ["--size", "-5"]):
        assert main(["audit", str(tmp_path / "final"), *options, *wrong]) == 2
        assert f"{wrong[0][2:]}: got" in capsys.readouterr().err
