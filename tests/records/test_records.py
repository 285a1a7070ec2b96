"""Committed evidence: every record is whole, has the id its config gives it, and every table is made from it."""
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from pid_ssl import figures
from pid_ssl.config import LOSS_NAMES, from_dict
from pid_ssl.records import load_record, load_records, run_id

# committed ones only: a reader's own runs in the same folder are nobody's claim
TRACKED = subprocess.run(["git", "ls-files", "data/runs"], cwd=ROOT, capture_output=True, text=True).stdout.split()
RECORDS = [ROOT / name for name in TRACKED]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder with the committed records."""
    folder = tmp_path_factory.mktemp("runs")
    for path in RECORDS:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_record(path):
    record = load_record(path)
    p = record.provenance
    # an id that no longer follows from its config would make every old run be run again
    assert run_id(from_dict(record.config), p["dataset_hash"], p["device"]) == record.run_id
    assert record.status == "finished" and len(record.history) == record.config["epochs"]
    assert p["image_passes"] and p["device_name"] and p["dataset_note"] and not p["git_dirty"]
    assert not any("seconds" in k for k in record.metrics), "metrics hold no timing"
    assert not re.search(r'"/|"[A-Z]:\\\\', json.dumps(record.config)), "no path of somebody's machine"


def mean(records, loss, key):
    rows = [{re.sub(r"knn\d+", "knn", k): v for k, v in r.metrics.items()} for r in records if r.config["loss"] == loss]
    return sum(row[key] for row in rows) / len(rows)


def test_the_first_command_trains():
    """README's first command has no committed record: the reader watches it train instead of being shown ours."""
    first = dict(dataset="digits", seed=0, eval_on="test")
    assert not any(first.items() <= load_record(path).config.items() for path in RECORDS)


KEYS = ("test_linear_logreg", "test_knn_euclidean", "test_knn_cosine")


def test_every_loss_beats_the_untrained_network_on_cifar10(committed):
    records = figures.matching(load_records(committed, preset="cpu", dataset="cifar10", eval_on="test"))
    losses = {r.config["loss"] for r in records}
    assert losses >= {"barlow", "wmse", "vicreg", "simclr", "pid", "pid_barlow"}
    for loss in losses:
        for key in KEYS:
            assert mean(records, loss, key) > mean(records, loss, f"control_{key}"), (loss, key)


def test_every_loss_reads_digits_as_well_as_raw_pixels(committed):
    records = figures.matching(load_records(committed, preset="digits", dataset="digits", eval_on="test"))
    for loss in LOSS_NAMES:
        assert len({r.config["seed"] for r in records if r.config["loss"] == loss}) >= 3
        assert mean(records, loss, KEYS[0]) >= mean(records, loss, f"raw_{KEYS[0]}") - 1.5, loss
