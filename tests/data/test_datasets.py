"""Datasets in the form in which they are handed out, bad content, and images on the disk instead of in memory.

The files here are tiny ones in each dataset's own format; torchvision's checksums are switched off for them,
by name, where a test says so.
"""
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
from conftest import ROOT
from PIL import Image

from pid_ssl.data import stream as data_stream
from pid_ssl.config import Config, ConfigError, resolve
from pid_ssl.data import DATASETS, DataError, load_dataset, open_source
from pid_ssl.trainers import Pretraining, main, pretrain

RNG = np.random.default_rng(0)


def pictures(n, side=8):
    return RNG.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def cifar(root, name):
    folder = root / DATASETS[name].marker
    folder.mkdir()
    x, y = pictures(60, 32), [i % 3 for i in range(60)]
    flat = x.transpose(0, 3, 1, 2).reshape(60, -1)
    key = "labels" if name == "cifar10" else "fine_labels"
    files = {"test_batch" if name == "cifar10" else "test": slice(40, 60)}
    batches = {f"data_batch_{i + 1}": slice(8 * i, 8 * i + 8) for i in range(5)}
    files |= batches if name == "cifar10" else {"train": slice(0, 40)}
    for file, rows in files.items():
        (folder / file).write_bytes(pickle.dumps({"data": flat[rows], key: y[rows]}))
    meta, names = ("batches.meta", "label_names") if name == "cifar10" else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({names: ["a", "b", "c"]}))
    return x[40:], y[40:]


def stl10(root, name="stl10"):
    folder = root / "stl10_binary"
    folder.mkdir()
    x = pictures(75, 96)
    column_major = x.transpose(0, 3, 2, 1)  # as the authors store it
    y = np.arange(45) % 3 + 1
    for file, rows in (("train_X", slice(0, 30)), ("test_X", slice(30, 45)), ("unlabeled_X", slice(45, 75))):
        column_major[rows].tofile(folder / f"{file}.bin")
    y[:30].astype(np.uint8).tofile(folder / "train_y.bin")
    y[30:].astype(np.uint8).tofile(folder / "test_y.bin")
    return x[30:45], list(y[30:] - 1)


def svhn(root, name="svhn"):
    x, y = pictures(140, 32), np.arange(140) % 10 + 1  # the digit 0 is stored as 10
    for split, rows in (("train", slice(0, 100)), ("test", slice(100, 140))):
        values = {"X": x[rows].transpose(1, 2, 3, 0), "y": y[rows, None].astype(np.uint8)}
        scipy.io.savemat(root / f"{split}_32x32.mat", values)
    return x[100:], list(y[100:] % 10)


def gtsrb(root, name="gtsrb"):
    base = root / "gtsrb"
    train, test = base / "GTSRB/Training", base / "GTSRB/Final_Test/Images"
    test.mkdir(parents=True)
    x, rows = pictures(30, 20), ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, im in enumerate(x):
        if i < 20:
            (train / f"{i % 2:05d}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(im).save(train / f"{i % 2:05d}/{i:05d}.ppm")
            (train / f"{i % 2:05d}/GT-{i % 2:05d}.csv").write_text("")
        else:
            Image.fromarray(im).save(test / f"{i:05d}.ppm")
            rows.append(f"{i:05d}.ppm;20;20;1;1;18;18;{i % 2}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return x[20:], [i % 2 for i in range(20, 30)]


def imagenette(root, name="imagenette"):
    x = pictures(60, 24)
    for i, im in enumerate(x):
        folder = root / "imagenette2-160" / ("train" if i < 40 else "val") / ("n01440764", "n02102040")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(folder / f"{i}.JPEG", format="PNG")  # lossless, to compare
    order = [*range(40, 60, 2), *range(41, 60, 2)]
    return x[order], [i % 2 for i in order]


FORMS = {"cifar10": cifar, "cifar100": cifar, "stl10": stl10, "svhn": svhn, "gtsrb": gtsrb, "imagenette": imagenette}


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision without its checksums."""
    for module in ("cifar", "stl10", "svhn"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: os.path.exists(path))


@pytest.mark.parametrize("name", FORMS)
def test_torchvision_forms(name, tmp_path, unchecked):
    x, y = FORMS[name](tmp_path, name)
    with pytest.warns(UserWarning, match=f"dataset '{name}': .* known are {DATASETS[name].counts[0]}"):
        d = load_dataset(name, data_dir=str(tmp_path))
    assert torch.equal(d.images["test"], torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert d.labels["test"].tolist() == list(y)
    assert d.note.startswith(DATASETS[name].note) and d.images["train"].shape[1] == 3


def test_real_checksums_refuse_other_files(tmp_path):
    for name in ("cifar10", "cifar100", "stl10", "svhn"):
        FORMS[name](tmp_path, name)
        refused = f"{DATASETS[name].marker}: torchvision refuses it .*--dataset {name} --download"
        with pytest.raises(DataError, match=refused):
            load_dataset(name, data_dir=str(tmp_path))


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "digits"])
def test_missing_set_says_where_and_how(name, tmp_path, monkeypatch, capsys):
    assert main(["--dataset", name, "--data_dir", str(tmp_path), "--home", str(tmp_path / "home")]) == 2
    message = capsys.readouterr().err
    how = "unzip -q" if name == "tiny_imagenet" else f"python -m pid_ssl.trainers --dataset {name} --download"
    assert message.count("\n") == 1 and all(w in message for w in (f"got {name!r}", str(tmp_path), how))


def test_unlabelled_images_are_pretrained_on_and_never_evaluated(tmp_path, unchecked):
    stl10(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = load_dataset("stl10", 32, data_dir=str(tmp_path))
        some = load_dataset("stl10", 32, train_size=40, data_dir=str(tmp_path))
        few = load_dataset("stl10", 32, train_size=9, data_dir=str(tmp_path))
        mapped = load_dataset("stl10", 32, data_dir=str(tmp_path), data_memory=0, cache_dir=tmp_path / "cache")
        with pytest.raises(ConfigError, match="train_size: got 58; accepted: from 3 to 57"):
            load_dataset("stl10", 32, train_size=58, data_dir=str(tmp_path))
    assert {s: len(x) for s, x in d.images.items()} == {"pretrain": 57, "train": 27, "val": 3, "test": 15}
    assert len(d.labels["train"]) == 27
    assert torch.equal(d.pretraining[:27], d.images["train"])
    assert len(some.pretraining) == 40 and len(some.images["train"]) == 27
    assert len(few.pretraining) == 9 and few.labels["train"].bincount().tolist() == [3, 3, 3]
    assert all(torch.equal(mapped.images[s], d.images[s]) for s in d.images)
    given = dict(loss="barlow", dataset="stl10", preset="cpu", image_size=32, train_size=0, batch_size=16, width=4)
    state = Pretraining(resolve(Config(**given)), d, "cpu")
    assert len(state.images) == 57 and state.steps == 3


def folders(root, **splits):
    """Image folder from split -> class -> number of images."""
    for split, classes in splits.items():
        for c, n in classes.items():
            (root / split / c).mkdir(parents=True)
            for i, im in enumerate(pictures(n)):
                Image.fromarray(im).save(root / split / c / f"{i}.png")
    return root


def test_image_folder_without_a_test_folder_is_split_as_the_digits_are(tmp_path):
    folders(tmp_path / "mine", train={"a": 50, "b": 50})
    folders(tmp_path, bare={"a": 50, "b": 50})
    for name in ("mine", "bare"):
        d = load_dataset(name, data_dir=str(tmp_path))
        counts = {s: y.bincount().tolist() for s, y in d.labels.items()}
        assert counts == {"train": [36, 36], "val": [4, 4], "test": [10, 10]}


A20B20 = {"a": 20, "b": 20}
BAD = {
    "class of test unknown to train": (
        dict(train=A20B20, test={"a": 5, "c": 5}),
        "mine/test/c: no class of the training images; accepted: a, b",
    ),
    "empty class": (dict(train={**A20B20, "c": 0}), "mine/train/c: a class folder without an image"),
    "one class": (
        dict(train={"a": 20}, test={"a": 5}),
        "mine/train: all 20 images have label 0; accepted: at least 2 classes",
    ),
    "one image of a class": (
        dict(train={"a": 20, "b": 1}, test={"a": 5, "b": 5}),
        "dataset 'mine', validation: cannot split 21 images of 2 classes: class b has 1 image; "
        "accepted: at least 2 images of each class",
    ),
    "fewer images than validation needs": (
        dict(train={"a": 4, "b": 4, "c": 4}, test={"a": 1}),
        "dataset 'mine', validation: cannot split 12 images of 3 classes into 10 and 2, fewer images than classes; "
        "accepted: at least 21 images",
    ),
    "fewer images than the test set needs": (
        dict(train={"a": 3, "b": 3, "c": 3}),
        "dataset 'mine', test: cannot split 9 images of 3 classes into 7 and 2, fewer images than classes; "
        "accepted: at least 11 images",
    ),
    "nothing": (dict(train={}), "mine.*: no such file"),
}


@pytest.mark.filterwarnings("ignore:.*classes have no image here")
@pytest.mark.parametrize("case", BAD)
def test_bad_image_folders(case, tmp_path):
    splits, message = BAD[case]
    folders(tmp_path / "mine", **splits).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message):
        load_dataset("mine", data_dir=str(tmp_path))


def test_unreadable_images_stop_and_other_files_are_counted(tmp_path):
    mine = folders(tmp_path / "mine", train={"a": 20, "b": 20}, val={"a": 5, "b": 5})
    for name in ("a/readme.txt", "b/.DS_Store", "notes.md"):
        (mine / "train" / name).write_text("x")
    with pytest.warns(UserWarning, match="mine: 3 files that are no image skipped"):
        d = load_dataset("mine", data_dir=str(tmp_path))
    assert d.note == "mine; its val folder stands for test; 3 files skipped"
    assert sum(len(x) for x in d.images.values()) == 50
    data = (mine / "train/b/7.png").read_bytes()
    (mine / "train/b/7.png").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning), pytest.raises(DataError, match="train/b/7.png: not a readable image"):
        load_dataset("mine", data_dir=str(tmp_path))


@pytest.mark.parametrize("value", [np.uint16(40_000), np.int32(70_000), np.float32(0.5)], ids=lambda v: v.dtype.name)
@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_images_of_more_than_8_bits_are_refused_and_not_clipped(value, form, tmp_path):
    mine, image = tmp_path / "mine", Image.fromarray(np.full((8, 8), value))
    if form == "folder":
        folders(mine, train={"a": 20, "b": 20}, test={"a": 5, "b": 5})
        image.save(mine / "train/b/deep.tif")
        where = "train/b/deep.tif: not a readable image"
    else:
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        for split in ("train", "test"):
            parquet(mine / f"{split}.parquet", np.arange(20) % 2)
        rows = pq.read_table(mine / "train.parquet").to_pylist()
        rows[3]["img"]["bytes"] = buffer.getvalue()
        pq.write_table(pa.Table.from_pylist(rows), mine / "train.parquet")
        where = "train.parquet: row 3 is not a readable image"
    why = rf"\(pixel format {image.mode}, more than 8 bits a channel\); accepted: .* with 8 bits a channel"
    with pytest.raises(DataError, match=f"{where} {why}"):
        load_dataset("mine", data_dir=str(tmp_path))


def test_every_train_size_from_an_image_a_class_up(tmp_path):
    folders(tmp_path / "mine", train={"a": 20, "b": 12, "c": 8}, test={"a": 2, "b": 2, "c": 2})
    whole = load_dataset("mine", data_dir=str(tmp_path))
    names = {im.numpy().tobytes(): i for i, im in enumerate(whole.images["train"])}
    counts = whole.labels["train"].bincount()
    assert counts.sum() == 36
    for size in range(3, 37):
        some = load_dataset("mine", train_size=size, data_dir=str(tmp_path))
        assert len({names[im.numpy().tobytes()] for im in some.images["train"]}) == size, "images of train, each once"
        assert (some.labels["train"].bincount() - counts * size / 36).abs().max() <= 1
    for size in (1, 2, 37):
        with pytest.raises(ConfigError, match=f"train_size: got {size}; accepted: from 3 to 36"):
            load_dataset("mine", train_size=size, data_dir=str(tmp_path))


def test_an_image_outside_of_the_class_folders_is_said(tmp_path):
    mine = folders(tmp_path / "mine", train={"a": 20, "b": 20}, val={"a": 5, "b": 5})
    (mine / "train/a/0.png").rename(mine / "train/lost.png")
    with pytest.warns(UserWarning, match="mine: 1 image not in a class folder skipped .*train/lost.png") as said:
        assert len(load_dataset("mine", data_dir=str(tmp_path)).images["train"]) == 35
    assert not [w for w in said if "no image" in str(w.message)]


def test_classes_without_test_images_are_said(tmp_path):
    folders(tmp_path / "mine", train={"a": 20, "b": 20, "c": 20}, test={"b": 5})
    with pytest.warns(UserWarning, match="mine/test: 2 of 3 classes have no image here"):
        assert load_dataset("mine", data_dir=str(tmp_path)).classes == 3


def parquet(path, labels, column="img", side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    blobs = []
    for im in pictures(len(labels), side):
        buffer = io.BytesIO()
        Image.fromarray(im).save(buffer, "PNG")
        blobs.append({"bytes": buffer.getvalue(), "path": ""})
    pq.write_table(pa.table({column: blobs, "label": labels}), path, row_group_size=17)


def test_parquet_shards_and_names(tmp_path):
    labels = np.arange(60) % 3
    for i in range(2):
        parquet(tmp_path / f"mine/data/train-{i:05d}-of-00002-0a1b2c.parquet", labels[30 * i : 30 * i + 30], "image")
    parquet(tmp_path / "mine/data/valid-00000-of-00001.parquet", labels[:12], "image")
    d = load_dataset("mine", data_dir=str(tmp_path))
    assert d.note == "mine; its valid split stands for test"
    assert len(d.images["train"]) == 54 and len(d.images["test"]) == 12
    parquet(tmp_path / "mine/data/test-00000-of-00001.parquet", labels[:9], "image")
    assert len(load_dataset("mine", data_dir=str(tmp_path)).images["test"]) == 9
    parquet(tmp_path / "mine/data/train-00001-of-00002.parquet", labels, "picture")
    with pytest.raises(DataError, match="3 of 2 shards of train"):
        load_dataset("mine", data_dir=str(tmp_path))
    (tmp_path / "mine/data/train-00001-of-00002-0a1b2c.parquet").unlink()
    with pytest.raises(DataError, match="00001-of-00002.parquet: column img is missing among picture, label"):
        load_dataset("mine", data_dir=str(tmp_path))


def test_single_class_parquet(tmp_path):
    parquet(tmp_path / "mine/train.parquet", np.zeros(20, int))
    parquet(tmp_path / "mine/test.parquet", np.zeros(5, int))
    with pytest.raises(DataError, match="train.parquet: all 20 images have label 0"):
        load_dataset("mine", data_dir=str(tmp_path))


def test_content_hashes_are_those_of_the_records():
    """The hash is part of every run id: a reader that hashed otherwise would orphan the committed records."""
    hashes = {"digits": set(), "cifar10": set()}
    for path in (ROOT / "data/runs").glob("*.json"):
        record = json.loads(path.read_text())
        hashes.get(record["config"]["dataset"], set()).add(record["provenance"]["dataset_hash"])
    assert {open_source("digits").content_hash} == hashes["digits"]
    try:
        source = open_source("cifar10")
    except DataError:
        return  # not on this machine
    if "JPEG q75" in source.note:
        assert {source.content_hash} == hashes["cifar10"]


def test_the_same_run_from_memory_and_from_the_disk(home):
    given = dict(loss="pid_barlow", image_size=16, epochs=2, width=4, train_size=400)
    kept = pretrain(Config(**given, home=str(home), data_memory=1000))
    assert not (home / "data/cache").exists()
    elsewhere = home / "elsewhere"  # where no record knows what raw pixels give
    mapped = pretrain(Config(**given, home=str(elsewhere), data_memory=0))
    assert len(list((elsewhere / "data/cache").iterdir())) == 3
    assert (mapped.run_id, mapped.metrics, mapped.history) == (kept.run_id, kept.metrics, kept.history)


def test_full_disk_is_said_before_training(home, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert main(["--data_memory", "0", "--home", str(home)]) == 4
    assert "data/cache: cannot be written (No space left on device); free space" in capsys.readouterr().err
    assert not list((home / "data/cache").iterdir()) and not (home / "data/runs").exists()


def killed(path):
    def chunks():
        yield np.zeros((2, 1, 8, 8), np.uint8)
        os.kill(os.getpid(), signal.SIGKILL)

    data_stream.mapped_images(path, {}, (4, 1, 8, 8), chunks)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_writer_leaves_no_file_under_the_name(tmp_path):
    path = tmp_path / "cache/x"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    assert left.name.startswith("x.tmp-")
    os.utime(left, (0, 0))
    x = data_stream.mapped_images(path, {}, (4, 1, 8, 8), lambda: [np.ones((4, 1, 8, 8), np.uint8)])
    assert x.sum() == 256 and [p.name for p in path.parent.iterdir()] == ["x"]


MEMORY = """
import json, sys
import torch
from pid_ssl import data
from pid_ssl.evaluate import extract_features
torch.set_num_threads(1)
data.WHOLE_SUMS = 0  # as for a set of more values
folder, net = sys.argv[1], torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())
def anonymous():
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1])*1024
def held(limit):
    before = anonymous()
    d = data.load_dataset('mine', 128, data_dir=folder, data_memory=limit, cache_dir=folder + '/cache')
    views = data.ViewMaker('none', d.mean, d.std)
    seen = sum(len(d.pretraining[r]) for r in torch.randperm(len(d.pretraining)).split(64))
    features = extract_features(net, d.pretraining, views, 64)
    return anonymous() - before, seen, features.double().sum().item()
data.load_dataset('digits')  # what is imported on the way is not counted
print(json.dumps([held(0), held(1000)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_images_take_no_memory(tmp_path):
    """78 MB of pixels, read in random order and embedded: in memory they stay allocated; mapped, less than a tenth."""
    parquet(tmp_path / "mine/train.parquet", np.arange(1500) % 4)
    parquet(tmp_path / "mine/test.parquet", np.arange(80) % 4)
    # allocators that give back at once what is freed: what is measured is what is held
    allocators = {"MALLOC_MMAP_THRESHOLD_": "65536", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    env, command = {**os.environ, "PYTHONPATH": str(ROOT), **allocators}, [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    (mapped, *same), (kept, *as_well) = json.loads(done.stdout)
    pixels = 1580 * 3 * 128**2
    assert same == as_well and kept > pixels > 10 * mapped, (mapped, kept, pixels)
