"""Measuring encoders: chance where there is nothing, the same encoder for everybody, one record a measurement."""
import ast
import dataclasses
import io
import json
import linecache
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from pid_ssl.experiments import downstream
from pid_ssl.evaluate import labels as evaluate_labels
from pid_ssl.config import Config, guarded
from pid_ssl.data import DataError, ViewMaker, load_dataset
from pid_ssl.data.dense import digit_scenes
from pid_ssl.experiments.downstream import (
    DownstreamConfig, command, downstream_config, downstream_id, load_downstream, load_measured, run_downstream)
from pid_ssl.experiments.recipe import every_record, plan, select
from pid_ssl.evaluate import accuracies, calibrate_batchnorm, evaluate_encoder, extract_features, knn_accuracy
from pid_ssl.evaluate.labels import finetune, label_draw, light_policy, low_label
from pid_ssl.evaluate.views import audit_encoder, two_view_readout
from pid_ssl.figures import Gallery
from pid_ssl.figures.downstream import downstream_table, measures
from pid_ssl.records import CheckpointError, save_checkpoint
from pid_ssl.models import SmallResNet, build_encoder
from pid_ssl.experiments.pretrain import pretrain

HEADER = dict(loss="barlow", dataset="whole", encoder="small", image_size=16, width=8, seed=3, train_size=0,
              policy="cifar", epochs=1, beta=0.25)


def views(data, policy="digits"):
    return ViewMaker(policy, data.mean, data.std)


def light(data):
    v = views(data)
    v.policy = light_policy(v.policy)
    return v


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    return calibrate_batchnorm(SmallResNet(8, 1), digits.images["train"], views(digits)).eval()


@pytest.fixture(scope="module")
def nothing(digits):
    """Labels without a relation to the images."""
    g = torch.Generator().manual_seed(1)
    shuffled = lambda y: y[torch.randperm(len(y), generator=g)]
    return dataclasses.replace(digits, labels={s: shuffled(y) for s, y in digits.labels.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs of one seed in a folder of their own."""
    home = tmp_path_factory.mktemp("home")
    given = dict(dataset="digits", epochs=1, width=8, seed=5, home=str(home), threads=1)
    return home, *(pretrain(Config(loss=loss, **given)) for loss in ("barlow", "simclr"))


@pytest.fixture
def colour(tmp_path):
    """Two datasets of 16 pixels in colour, the second of other brightness, and an encoder for the first."""
    rng = np.random.default_rng(0)
    for name, n, shift in (("whole", 200, 0), ("bright", 120, 90)):
        for split, m in (("train", n), ("test", 60)):
            y = np.arange(m) % 4
            blobs = []
            for c in y:
                im = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(shift)
                im[4 * c:4 * c + 4] += 60
                buffer = io.BytesIO()
                Image.fromarray(im).save(buffer, "PNG")
                blobs.append({"bytes": buffer.getvalue(), "path": ""})
            (tmp_path / "sets" / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"img": blobs, "label": y}), tmp_path / "sets" / name / f"{split}.parquet")
    digit_scenes(tmp_path / "sets", (12, 6, 6))
    (tmp_path / "sets/digit-scenes").rename(tmp_path / "sets/scenes")
    torch.manual_seed(0)
    encoder = build_encoder("small", 16, 3, 8)
    home = tmp_path / "home"
    folder = home / "data/checkpoints" / ("a" * 16) / "final"
    save_checkpoint(folder, {"encoder": encoder.state_dict()}, {"config": HEADER})
    return dict(run="a" * 16, home=str(home), data_dir=str(tmp_path / "sets"), threads=1), encoder


def at_chance(values, n=360, classes=10):
    error = 100 * (1 / classes * (1 - 1 / classes) / n) ** 0.5
    return all(abs(v - 100 / classes) < 4 * error for v in values)


def test_shuffled_labels_score_at_chance(net, nothing):
    frozen = evaluate_encoder(net, nothing, views(nothing))
    paired = two_view_readout(net, nothing, views(nothing))
    few = low_label(net, nothing, light(nothing), 0.1, draws=2, epochs=5, batch_size=32)
    for measured in (frozen, paired, few):
        assert at_chance([v for k, v in measured.items() if not k.endswith(("gain", "_C"))])
    assert at_chance(finetune(net, nothing, light(nothing), epochs=2).values())


def test_shuffled_labels_have_no_atoms(net, digits, nothing):
    """Inside the null: at most twice as far from its mean as its 95th percentile, where the true labels lie outside."""
    options = dict(codes=8, components=8, permutations=100, replicates=5)
    real, shuffled = (audit_encoder(net, d, views(d), **options) for d in (digits, nothing))

    def away(audit, name):
        value, mean, high = (audit[f"test_pid_broja_labels_{name}_bits{end}"] for end in ("", "_null_mean", "_null_95"))
        return (value - mean) / (high - mean)

    for name in ("redundancy", "unique1", "unique2", "synergy", "i1", "i2", "joint"):
        assert away(shuffled, name) < 2, name
    assert away(real, "i1") > 2
    low, value, high = (real[f"test_pid_broja_labels_i1_bits{end}"] for end in ("_low", "", "_high"))
    assert low < value < high


def test_pairs_of_independent_noise_gain(digits):
    """Views that differ by noise alone: two of them tell more than one, and U2 + S is where that comes from."""
    noisy = ViewMaker("digits", digits.mean, digits.std)
    noisy.policy = dataclasses.replace(noisy.policy, rotate=0, translate=0, zoom=0, jitter=0, noise=0.8)
    pixels = nn.Flatten()
    out = two_view_readout(pixels, digits, noisy)
    clean, pair, *single = (out[f"test_linear_{name}"] for name in ("clean", "pair", "view1", "view2"))
    assert out["test_linear_pair_gain"] > 3 and clean > pair > max(single)
    audit = audit_encoder(pixels, digits, noisy, codes=4, components=8, permutations=20, replicates=5)
    assert audit["test_pid_gaussian_image_synergy_nats_low"] > 0.1


def test_draws_are_stratified_and_paired(digits):
    y = digits.labels["train"]
    a = label_draw(y, 0.1, 2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(a, label_draw(y, 0.1, 2)), "no random state but the draw's own"
    assert len(set(a.tolist())) == len(a) and torch.equal(label_draw(y, 1.), torch.arange(len(y)))
    assert (y[a].bincount() - 0.1 * y.bincount()).abs().max() <= 0.5


def test_fine_tuning_leaves_the_encoder_alone(net, digits):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = (finetune(net, digits, light(digits), epochs=1) for _ in range(2))
    assert a == b and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training


@pytest.fixture
def resnet(tmp_path):
    """A checkpoint of a ResNet-18 whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 16, 1).train()
    encoder(torch.randn(32, 1, 16, 16))
    folder = tmp_path / "data/checkpoints" / ("b" * 16) / "final"
    header = HEADER | dict(dataset="digits", encoder="resnet18", train_size=200)
    save_checkpoint(folder, {"encoder": encoder.state_dict()}, {"config": header})
    encoder, data, _, _ = load_measured(DownstreamConfig(run="b" * 16, home=str(tmp_path)))
    images = data.images["test"][:64]
    x = torchvision.transforms.functional.normalize(images.float() / 255, data.mean.tolist(), data.std.tolist())
    return load_file(folder / "encoder.safetensors"), x, extract_features(encoder, images, views(data, "none"))


def test_same_features_through_torchvision(resnet):
    weights, x, features = resnet
    plain = torchvision.models.resnet18()
    plain.conv1, plain.maxpool, plain.fc = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), features, atol=1e-5) and features.std(0).max() > 0.01


def test_same_features_through_timm(resnet):
    timm = pytest.importorskip("timm")
    weights, x, features = resnet
    plain = timm.create_model("resnet18", num_classes=0)
    plain.conv1, plain.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), features, atol=1e-5)


def test_measures_what_the_run_reported(trained):
    home, barlow, _ = trained
    for weights, prefix in (("pretrained", ""), ("untrained", "control_"), ("pixels", "raw_")):
        asked = DownstreamConfig(run=barlow.run_id, weights=weights, home=str(home), threads=1)
        metrics = run_downstream(asked).metrics
        assert metrics == {k: barlow.metrics[prefix + k] for k in metrics} and len(metrics) == 4, weights


def test_one_record_for_one_measurement(trained, monkeypatch):
    home, barlow, simclr = trained
    ask = lambda run, **more: run_downstream(DownstreamConfig(run=run.run_id, home=str(home), threads=1, **more))
    first = ask(barlow, weights="untrained")
    assert ask(simclr, weights="untrained").run_id == first.run_id, "the control does not depend on the objective"
    assert ask(simclr).run_id != ask(barlow).run_id
    with pytest.warns(UserWarning, match="fraction = 0.2 has no effect: task 'classify' does not read it"):
        assert ask(barlow, fraction=0.2).run_id == ask(barlow).run_id
    few = [ask(barlow, task="low_label", fraction=f, draws=1, epochs=1) for f in (0.05, 0.1)]
    assert few[0].run_id != few[1].run_id

    def again(measured):
        raise RuntimeError("measured again")
    monkeypatch.setitem(downstream.TASKS, "classify", again)
    assert ask(barlow, weights="untrained").metrics == first.metrics
    with pytest.raises(RuntimeError, match="measured again"):
        ask(barlow, force=True)
    found = load_downstream(home / "data/downstream", task="low_label", encoder_loss="barlow", fraction=(0.05, 0.1))
    assert [(r.run_id, r.metrics) for r in found] == sorted((r.run_id, r.metrics) for r in few)
    assert not load_downstream(home / "data/downstream", encoder_loss="wmse")
    assert str(home) not in (home / "data/downstream" / f"{first.run_id}.json").read_text(), "no folder of this machine"


def test_two_view_and_audit_records(trained):
    home, barlow, _ = trained
    small = dict(codes=4, components=4, permutations=20, replicates=3)
    cases = ("two_view", "mlp_pair_gain", {}), ("audit", "pid_broja_labels_synergy_bits_null_95", small)
    for task, key, more in cases:
        asked = DownstreamConfig(run=barlow.run_id, home=str(home), threads=1, task=task, eval_on="val", **more)
        record = run_downstream(asked)
        assert f"val_{key}" in record.metrics and all(k.startswith("val_") for k in record.metrics)
        assert record.provenance["encoder"]["loss"] == "barlow" and record.config["policy"] == "digits"
        assert record.provenance["dataset_note"].startswith("scikit-learn digits")


def test_transfer_keeps_the_normalisation_of_pretraining(colour):
    asked, encoder = colour
    record = run_downstream(DownstreamConfig(**asked, task="transfer", dataset="bright"))
    whole, bright = (load_dataset(n, 16, data_dir=asked["data_dir"]) for n in ("whole", "bright"))
    as_pretrained = evaluate_encoder(encoder.eval(), bright, views(whole, "none"))
    assert record.metrics == as_pretrained, "mean and deviation of the pretraining images"
    assert (bright.mean - whole.mean).min() > 0.2 and record.config["train_size"] == 0
    few = dict(train_size=60, epochs=2, batch_size=16)
    tuned = run_downstream(DownstreamConfig(**asked, task="finetune", dataset="bright", **few))
    assert tuned.provenance["images"]["train"] == 60 and set(tuned.metrics) == {"test_finetune"}


def test_a_dense_folder_of_ones_own(colour):
    """Class names from classes.txt, and the figures read the metrics of any set."""
    asked, _ = colour
    folder = Path(asked["data_dir"]) / "scenes"
    (folder / "classes.txt").write_text("background\nzero\none\n")
    record = run_downstream(DownstreamConfig(**asked, task="segmentation", dataset="scenes", epochs=1))
    assert {f"test_scenes_frozen_iou_{n}" for n in ("background", "zero", "one")} <= set(record.metrics)
    assert measures([record]).measure.tolist() == ["scenes mIoU, frozen"]


def test_raw_pixels_are_a_column(trained, tmp_path):
    """Through the cells of make_figures, as a user's recipe gives records: of an encoder, of its control, of pixels."""
    home, barlow, _ = trained
    encoders = dict(loss="barlow", dataset="digits", epochs=1, width=8, seed=5, device="cpu")
    mine = dict(experiment="downstream", device="cpu", weights=["pretrained", "untrained", "pixels"], encoders=encoders)
    for planned in plan(mine):
        run_downstream(dataclasses.replace(planned.config, run=barlow.run_id, home=str(home), threads=1))
    cells = json.loads((ROOT / "nbs/make_figures.ipynb").read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    records = select(mine, every_record(home / "data"))
    assert len(records) == 3
    space = {"gallery": Gallery(tmp_path / "figures"), "pretrained": ["digits"], "recorded": lambda *names: records}
    opening = ast.parse(next(s for s in sources if "Gallery(figures)" in s))
    opening.body = [n for n in opening.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    exec(compile(opening, "<imports>", "exec"), space)
    (code,) = [s for s in sources if "gallery.add(f'downstream_results_{slug}'" in s]
    linecache.cache["<after>"] = (len(code), None, code.splitlines(True), "<after>")
    exec(compile(code, "<after>", "exec"), space)
    lines = (tmp_path / "figures/files/downstream_results_digits.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    raw = f"{barlow.metrics['raw_test_linear_logreg']:.1f}"
    assert rows[0][-1] == "raw pixels" and raw in {row[-1] for row in rows[1:]}
    found = load_downstream(home / "data/downstream", task="classify")
    table = downstream_table([r for r in found if r.config["weights"] != "untrained"])
    assert table["raw pixels"][0] == raw


def name_of(r, **changed):
    made = r.provenance
    return downstream_id(downstream_config(r.config | changed), made["dataset_hash"], made["encoder"], made["device"])


def test_ids_of_committed_records():
    """Nothing that was added since has changed what a record is called, so none is measured again."""
    records = load_downstream(ROOT / "data/downstream")
    for r in records:
        assert name_of(r) == r.run_id
    tuned = next(r for r in records if r.config["task"] == "low_label")
    assert name_of(tuned, policy="cifar") == tuned.run_id != name_of(tuned, policy="byol")


def test_fine_tuning_takes_the_geometry_of_the_policy_of_the_run(trained, monkeypatch):
    home = trained[0]
    here, seen = dict(home=str(home), threads=1), []
    turned = pretrain(Config(loss="barlow", dataset="digits", policy="none", epochs=1, width=8, seed=5, **here))

    def look(encoder, dataset, views, **more):
        seen.append(views.policy)
        return {"test_finetune": 1.0}
    monkeypatch.setattr(downstream, "finetune", look)
    ask = lambda run: run_downstream(DownstreamConfig(run=run.run_id, task="finetune", weights="untrained", **here))
    assert ask(trained[1]).run_id != ask(turned).run_id, "controls of the same weights, augmented differently"
    assert seen == [light_policy(downstream.POLICIES[p]) for p in ("digits", "none")]


def test_mapped_images_are_kept_below_home(colour, trained, monkeypatch, capsys, tmp_path):
    asked, _ = colour
    kept = run_downstream(DownstreamConfig(**asked, task="transfer", dataset="bright"))
    mapped = run_downstream(DownstreamConfig(**asked, task="transfer", dataset="bright", data_memory=0, force=True))
    assert (mapped.run_id, mapped.metrics) == (kept.run_id, kept.metrics)
    assert len(list((Path(asked["home"]) / "data/cache").iterdir())) == 6
    (tmp_path / "other/data").mkdir(parents=True)
    (tmp_path / "other/data/checkpoints").symlink_to(trained[0] / "data/checkpoints")
    (tmp_path / "other/data/cache").write_text("a file where the folder should be")
    there = ["--home", str(tmp_path / "other"), "--data_memory", "0", "--threads", "1"]
    with pytest.warns(UserWarning, match="data/cache/.* cannot be used"):
        assert guarded(command, ["--run", trained[1].run_id, *there]) == 4
    message = capsys.readouterr().err
    assert "data/cache" in message and "cannot be written" in message and message.count("\n") == 1


def test_fine_tuning_on_all_labels_copies_no_images(net, digits, monkeypatch):
    seen = []

    def look(encoder, images, *rest, **more):
        seen.append(images)
        return nn.Sequential(encoder, nn.Linear(32, 10)).eval()
    monkeypatch.setattr(evaluate_labels, "fit_classifier", look)
    finetune(net, digits, light(digits))
    assert seen[0].data_ptr() == digits.images["train"].data_ptr()


def test_neighbours_agree_with_scikit_learn():
    """An odd number of neighbours and two classes: no vote is tied, and neither are distances of Gaussian numbers."""
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(300, 5)).astype(np.float32), rng.normal(size=(200, 5)).astype(np.float32)
    y, truth = (x[:, 0] + rng.normal(size=300) > 0).astype(int), (q[:, 0] > 0).astype(int)
    for k in (1, 5, 31):
        theirs = KNeighborsClassifier(k, algorithm="brute").fit(x, y).score(q, truth)
        assert knn_accuracy(*map(torch.from_numpy, (x, y, q, truth)), k) == pytest.approx(100 * theirs)


BAD = {
    "no run": ([], ["run", "16 hexadecimal digits"]),
    "not an id": (["--run", "../x"], ["run", "'../x'", "16 hexadecimal digits"]),
    "no checkpoint": (["--run", "f" * 16], ["f" * 16, "no checkpoint", "pretrain it again", "home"]),
    "task": (["--task", "lowlabel"], ["task", "'lowlabel'", "low_label"]),
    "own dataset": (["--task", "transfer"], ["dataset", "'auto'", "another dataset than digits"]),
    "channels": (["--task", "transfer", "--dataset", "whole"],
                 ["dataset", "'whole'", "images of 1 channels", "these have 3"]),
    "no dataset": (["--task", "transfer", "--dataset", "elsewhere"], ["dataset", "'elsewhere'", "accepted"]),
    "no image of a class": (["--task", "low_label", "--fraction", "0.001"],
                            ["fraction", "class 0", "at least one image a class"]),
    "fraction": (["--task", "low_label", "--fraction", "2"], ["fraction", "2", "1.0"]),
    "components": (["--task", "audit", "--components", "33"], ["components", "33", "1 to 32"]),
    "train_size": (["--train_size", "5000"], ["train_size", "5000", "1293"]),
    "fewer than classes": (["--train_size", "3"], ["train_size", "3", "from 10 to 1293"]),
    "equal views": (["--task", "two_view", "--policy", "none"],
                    ["two views of an image are the same", "a policy that changes images"]),
    "no class names": (["--task", "segmentation", "--dataset", "scenes"],
                       ["scenes/classes.txt", "no such file", "one a line"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_record(case, trained, colour, capsys):
    args, words = BAD[case]
    before = set((trained[0] / "data/downstream").glob("*"))
    known = [] if "--run" in args or case == "no run" else ["--run", trained[1].run_id]
    here = ["--home", str(trained[0]), "--data_dir", colour[0]["data_dir"], "--threads", "1"]
    assert guarded(command, [*known, *args, *here]) == 2
    message = capsys.readouterr().err
    assert all(w in message for w in words) and len(message.splitlines()) == 1, message
    assert set((trained[0] / "data/downstream").glob("*")) == before


def test_a_folder_that_takes_no_record(trained, tmp_path, monkeypatch):
    """Found out before the work."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/checkpoints").symlink_to(trained[0] / "data/checkpoints")
    (tmp_path / "data/downstream").write_text("a file where the folder should be")
    monkeypatch.setitem(downstream.TASKS, "classify", None)
    assert guarded(command, ["--run", trained[1].run_id, "--home", str(tmp_path), "--threads", "1"]) == 4


def test_stopped_by_a_signal(trained, monkeypatch, capsys):
    monkeypatch.setitem(downstream.TASKS, "classify", lambda measured: os.kill(os.getpid(), signal.SIGTERM))
    before = set((trained[0] / "data/downstream").glob("*"))
    here = ["--home", str(trained[0]), "--threads", "1"]
    assert guarded(command, ["--run", trained[1].run_id, *here, "--force"]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err and set((trained[0] / "data/downstream").glob("*")) == before


def test_damaged_encoder(colour):
    asked, _ = colour
    path = next(p for p in Path(asked["home"]).rglob("encoder.safetensors"))
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match="encoder.safetensors: checksum differs"):
        run_downstream(DownstreamConfig(**asked))


def test_labels_that_mean_no_classes(net, digits):
    one = dataclasses.replace(digits, labels={s: torch.zeros_like(y) for s, y in digits.labels.items()})
    high = dataclasses.replace(digits, labels={**digits.labels, "train": digits.labels["train"] + 1})
    low = dataclasses.replace(digits, labels={**digits.labels, "test": digits.labels["test"] - 1})
    cases = ((one, "train has the class 0 only; accepted: at least two classes"),
             (high, "train has values from 1 to 10; accepted: 0 to 9"), (low, "test has values from -1 to 8"))
    for data, words in cases:
        for measure in (low_label, finetune, two_view_readout):
            with pytest.raises(DataError, match=words):
                measure(net, data, light(data))
    with pytest.raises(DataError, match="at least two classes"):
        accuracies({s: x.flatten(1).float() for s, x in one.images.items()}, one.labels)
    with pytest.raises(DataError, match="class 4 is none; accepted: at least one image a class"):
        label_draw(torch.arange(10).repeat(50)[torch.arange(10).repeat(50) != 4], 0.1)


def test_settings_were_chosen_on_validation():
    """The settings in use have the best mean over the encoders with which all of them were tried."""
    records = every_record(ROOT / "data")
    for name, fraction in (("few", 0.01), ("many", 0.1)):
        tried = {}
        for r in select("finetuning_cifar10", records, fraction=fraction):
            setting = tuple(r.config[k] for k in ("epochs", "lr", "encoder_lr"))
            tried.setdefault(r.config["run"], {})[setting] = r.metrics[f"val_finetune_{100 * fraction:g}pct"]
        settings = set().union(*tried.values())
        whole = [t for t in tried.values() if set(t) == settings]
        assert len(settings) >= 4 and whole
        best = max(settings, key=lambda s: sum(t[s] for t in whole))
        assert best == tuple(downstream.FINETUNE[name][k] for k in ("epochs", "lr", "encoder_lr"))


def test_papermill_refuses_an_unknown_name(tmp_path):
    given = ["nbs/run_downstream.ipynb", str(tmp_path / "o.ipynb"), "-p", "fractoin", "0.1"]
    out = subprocess.run([sys.executable, "-m", "papermill", *given, "-p", "home", str(tmp_path)], cwd=ROOT, text=True,
                         capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.returncode != 0 and "fractoin" in out.stderr and "the parameters are run, task" in out.stderr
    assert not (tmp_path / "data").exists()
