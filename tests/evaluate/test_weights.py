"""Committed weights: those of the runs whose records they name, small, and as good as the records say."""
import hashlib
import json
import os

import pytest
from conftest import ROOT

from pid_ssl.config import from_dict
from pid_ssl.data import ViewMaker, load_dataset
from pid_ssl.evaluate import evaluate_encoder
from pid_ssl.models import WEIGHTS, exported, load_encoder, weights_folder
from pid_ssl.records import load_record, run_id


def record_of(name):
    header = json.loads((weights_folder(name) / "header.json").read_text())
    return header, load_record(ROOT / f"data/runs/{header['record']['run_id']}.json")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_tied_to_their_record_by_hashes(name):
    header, record = record_of(name)
    data = (ROOT / f"data/weights/{name}/encoder.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == header["sha256"]["encoder.safetensors"] == exported(name)[1]["sha256"]
    assert header["record"] == {"run_id": record.run_id, "checksum": record.provenance["checksum"]}
    assert header["config"] == record.config and header["epoch"] == record.config["epochs"]
    assert run_id(from_dict(header["config"]), record.provenance["dataset_hash"], "cpu") == record.run_id


def test_the_pair_is_small_and_the_headline_one():
    there = {p.parent.name for p in (ROOT / "data/weights").glob("*/*")}
    assert there == set(WEIGHTS) and sum(p.stat().st_size for p in (ROOT / "data/weights").glob("*/*")) < 5e6
    ours, theirs = (record_of(name)[1].config for name in ("pid_cifar10", "barlow_cifar10"))
    assert {k: ours[k] for k in ("loss", "form", "views", "w_s")} == dict(loss="pid", form="relation", views=4, w_s=4.0)
    same = "dataset", "train_size", "image_size", "policy", "encoder", "width", "seed"
    assert all(ours[name] == theirs[name] for name in same)


@pytest.mark.skipif("PID_SSL_WEIGHTS" not in os.environ, reason="opt-in, needs our copy of CIFAR-10: PID_SSL_WEIGHTS=1")
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_accuracies_are_those_of_the_record(name):
    encoder, config = load_encoder(name)
    data = load_dataset(config["dataset"], config["image_size"], config["train_size"])
    about = exported(name)[1]
    assert (about["mean"], about["std"]) == (data.mean.tolist(), data.std.tolist())
    found = evaluate_encoder(encoder, data, ViewMaker(config["policy"], data.mean, data.std), "test")
    metrics = record_of(name)[1].metrics
    for key, value in found.items():
        assert value == pytest.approx(metrics[key], abs=0.1 if "linear_logreg" in key else 0), key
