"""Folders as people have them: an image is read once, in its split and class, or said to be left out, or it stops."""
import json
import os
import random
import re
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_datasets import folders, parquet, pictures

from pid_ssl.data import DataError, load_dataset, open_source
from pid_ssl.data.files import SUFFIXES

TWO = {"a": 20, "b": 20}


def counts(root):
    source = open_source("mine", str(root))
    return [None if y is None else np.bincount(y).tolist() for y in source.labels.values()]


PAIRS = [("train", "test"), ("Train", "TEST"), ("training", "eval"), ("TRAINING", "Val")]


@pytest.mark.parametrize("train, test", PAIRS)
def test_splits_in_any_case_of_letters(train, test, tmp_path):
    folders(tmp_path / "mine", **{train: TWO, test: {"a": 5, "b": 4}})
    assert sorted(counts(tmp_path)) == [[5, 4], [20, 20]]


AMBIGUOUS = {
    "a split beside classes": (dict(test={"a": 3}), TWO, "mine/a: neither a split nor in one, beside test"),
    "an unknown sibling": (dict(train=TWO, extra=TWO), {}, "mine/extra: neither a split nor in one, beside train"),
    "no training images": (dict(test=TWO, val=TWO), {}, "mine/train: no such folder beside test, val"),
    "two names of a split": (dict(train=TWO, val=TWO, valid=TWO), {}, "val/ and valid/ both stand for validation"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_can_be_taken_in_two_ways_stops(case, tmp_path):
    splits, classes, message = AMBIGUOUS[case]
    folders(tmp_path / "mine", **splits)
    folders(tmp_path, mine=classes)
    with pytest.raises(DataError, match=message):
        open_source("mine", str(tmp_path))


def test_hidden_folders_are_left_out_and_counted(tmp_path):
    mine = folders(tmp_path / "mine", train=TWO, test={"a": 5, "b": 4})
    folders(mine, **{".ipynb_checkpoints": {"a": 3}, "__MACOSX": {"a": 1}})
    folders(mine / "train/a", **{".ipynb_checkpoints": {"": 2}})
    folders(mine / "train", **{"@eaDir": {"": 3}})
    Image.fromarray(pictures(1)[0]).save(mine / "train/b/._0.png")
    with pytest.warns(UserWarning, match="10 hidden images skipped"):
        assert sorted(counts(tmp_path)) == [[5, 4], [20, 20]]


def test_a_validation_folder_beside_test_is_named(tmp_path):
    folders(tmp_path / "mine", train=TWO, test=TWO, val=TWO)
    with pytest.warns(UserWarning, match="mine/val: not read beside test; validation is carved from training images"):
        assert counts(tmp_path) == [[20, 20], [20, 20]]


def test_links_are_followed_and_circles_stop(tmp_path):
    folders(tmp_path / "elsewhere", far={"c": 30})
    mine = folders(tmp_path / "mine", train=TWO)
    (mine / "train/c").symlink_to(tmp_path / "elsewhere/far/c")
    assert [20, 20, 30] in counts(tmp_path)
    (mine / "train/a/round").symlink_to(mine / "train")
    with pytest.raises(DataError, match="a/round: a link to a folder that it lies in"):
        counts(tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    mine = folders(tmp_path / "mine", train=TWO)
    os.rename(mine / "train/a/0.png", os.fsencode(mine / "train/a") + b"/\xff.png")
    assert len(load_dataset("mine", data_dir=str(tmp_path)).labels["train"]) == 28


def named(path, names, labels):
    """A Parquet file that says what its classes are called; each image's brightness is its class's name."""
    parquet(path, labels)
    table = pq.read_table(path)
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), path)


def test_a_class_is_its_name_in_every_file(tmp_path):
    mine = tmp_path / "mine"
    for i, names in enumerate((["a", "b", "c"], ["c", "a", "b"])):
        named(mine / f"train-{i:05d}-of-00002.parquet", names, [names.index(n) for n in "aabbbcccc"])
    named(mine / "test.parquet", ["b", "c", "a", "d"], [0, 1, 2, 2])
    source = open_source("mine", str(tmp_path))
    assert source.labels["train"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2] * 2 and source.names == ("a", "b", "c")
    assert source.labels["test"].tolist() == [1, 2, 0, 0]
    named(mine / "test.parquet", ["b", "c", "a", "d"], [0, 3])
    with pytest.raises(DataError, match="test.parquet: class 'd' is not, or not once, among .*accepted: a, b, c"):
        open_source("mine", str(tmp_path))
    named(mine / "test.parquet", ["b", "c"], [0, 2])
    with pytest.raises(DataError, match="test.parquet: label 2, but 2 names of classes"):
        open_source("mine", str(tmp_path))


def test_numbered_shards_and_null_images(tmp_path):
    for i in range(3):
        parquet(tmp_path / f"mine/train/{i:04d}.parquet", np.arange(20) % 2)
    parquet(tmp_path / "mine/test/0000.parquet", np.arange(10) % 2)
    assert [[30, 30], [5, 5]] == counts(tmp_path)
    path = tmp_path / "mine/train/0001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3]["img"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match="0001.parquet: row 3 is not a readable image .null, no bytes."):
        load_dataset("mine", data_dir=str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match="2 of 2 shards of train .00000, 00002."):
        open_source("mine", str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_train_size_keeps_every_class(tmp_path):
    tail = {f"{i:02d}": n for i, n in enumerate([200, 60, 12, 4, 3, 2])}
    folders(tmp_path / "mine", train=tail, test={"00": 1})
    for size in (6, 7, 12, 40, 200):
        y = load_dataset("mine", train_size=size, data_dir=str(tmp_path)).labels["train"]
        assert len(y) == size and (y.bincount(minlength=6) > 0).all()


NAMES = ["train", "Test", "val", "dev", "a", "b", ".hidden", "__pycache__", "extra", "train.old", "x y", "é"]
HIDDEN = (".hidden", "__pycache__", "._0.png")


def tree(rng, mine, image):
    """A tree of folders at random; the parts of the paths of its images."""
    for _ in range(rng.randint(0, 24)):
        at = mine.joinpath(*rng.choices(NAMES, k=rng.randint(0, 3)))
        at.mkdir(parents=True, exist_ok=True)
        name = rng.choice(["0.png", "1.PNG", "2.png", "._0.png", "notes.txt"])
        if not (at / name).exists():
            os.link(image, at / name)
    return [p.relative_to(mine).parts for p in mine.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]


def classes(there, split):
    """How many images that nobody hid lie in each folder of a split; "" is the dataset's own folder."""
    inside = [p[1:] if split else p for p in there if not split or p[0] == split]
    return Counter(p[0] for p in inside if len(p) > 1 and not set(p) & set(HIDDEN))


@pytest.mark.parametrize("labels", ["auto", "none"])
@pytest.mark.parametrize("block", range(5))
def test_odd_folders_end_in_the_right_count_or_a_clear_error(block, labels, tmp_path):
    """500 trees at random: an image is read in its split and class, or counted by a warning, or its split is named."""
    Image.fromarray(pictures(1)[0]).save(tmp_path / "one.png")
    for seed in range(100 * block, 100 * block + 100):
        mine = tmp_path / f"{seed}/mine"
        mine.mkdir(parents=True)
        there = tree(random.Random(seed), mine, tmp_path / "one.png")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                source = open_source("mine", str(tmp_path / str(seed)), labels=labels)
            except DataError as e:
                assert "; accepted: " in str(e)
                continue
        words = [str(w.message) for w in said]
        left = sum(int(n) for w in words for n in re.findall(r": (\d+) (?:hidden images?|images? not in a)", w))
        unread = [w.split(": ")[0] for w in words if "not read beside" in w]
        away = sum(str(mine / parts[0]) in unread for parts in there)
        read = {split: y for split, y in source.labels.items() if y is not None}
        assert sum(map(len, read.values())) + left + away == len(there), (seed, words)
        tops = {p[0] for p in there}
        stored = {"train": "train" if "train" in tops else "", "test": next(iter({"Test", "val", "dev"} & tops), "")}
        stored["test"] = "Test" if "Test" in tops else stored["test"]
        for split, y in read.items() if source.labelled else ():
            assert Counter(source.names[i] for i in y) == classes(there, stored[split]), (seed, split)


def test_what_no_file_is_behind_stops(tmp_path):
    mine = folders(tmp_path / "mine", train=TWO)
    for name, make in (("gone.png", lambda p: p.symlink_to("nowhere")), ("pipe.png", os.mkfifo)):
        make(mine / "train/a" / name)
        with pytest.raises(DataError, match=f"train/a/{name}: a pipe, a device or a link to nothing; accepted: files"):
            counts(tmp_path)
        (mine / "train/a" / name).unlink()
    assert [20, 20] in counts(tmp_path)
