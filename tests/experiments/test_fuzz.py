"""Generated input: configs and argument lists, records, checkpoints and Parquet files that were changed somewhere.

Only documented exceptions, each naming the field or the file. PID_SSL_FUZZ=1 makes 5,000 configs and argument lists,
1,000 records, 500 checkpoints and 500 Parquet files instead of the few that CI makes.
"""
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import random_images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from pid_ssl.config import Config, ConfigError, from_dict, resolve
from pid_ssl.data import DataError, Dataset, load_dataset
from pid_ssl.experiments.resume import load_state, save_state
from pid_ssl.records import STATUSES, CheckpointError, RecordError, RunRecord, load_record
from pid_ssl.trainers import Pretraining, parse_args

FULL = bool(os.environ.get("PID_SSL_FUZZ"))
COUNTS = Counter()  # examples made, and how they ended


def examples(full, few):
    return settings(max_examples=full if FULL else few, derandomize=not FULL, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
numbers = st.one_of(st.integers(-(10**300), 10**300), st.integers(-5, 5000), st.floats(), st.floats(-1, 2))
single = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
several = lambda s: st.one_of(st.lists(s, max_size=3), st.dictionaries(st.text(max_size=4), s, max_size=3))
junk = st.recursive(single, several, max_leaves=4)


def likely(name):
    """Values that a field accepts, and its ends and what lies just beyond."""
    m = FIELDS[name].metadata
    parts = [st.just(FIELDS[name].default)]
    if m["choices"]:
        parts.append(st.sampled_from(m["choices"]))
    for end in (m["lo"], m["hi"]):
        if end is not None:
            near = [math.nextafter(end, math.inf), math.nextafter(end, -math.inf)]
            parts += [st.sampled_from([end, end - 1, end + 1, float(end), *near])]
    if m["lo"] is not None and FIELDS[name].type in (int, "int"):
        parts.append(st.integers(m["lo"], min(m["hi"] or 4096, 4096)))
    elif m["lo"] is not None:
        parts.append(st.floats(m["lo"], min(m["hi"] or 10.0, 10.0)))
    return st.one_of(*parts)


def given_fields(names):
    """Values for these fields, most of them likely, and now and then a field that does not exist."""
    known = st.fixed_dictionaries({n: st.one_of(likely(n), likely(n), likely(n), junk) for n in names})
    other = st.one_of(st.just({}), st.just({}), st.dictionaries(st.text(max_size=8), junk, max_size=1))
    return st.builds(lambda known, other: {**known, **other}, known, other)


configs = st.lists(st.sampled_from(list(FIELDS)), max_size=6, unique=True).flatmap(given_fields)


def in_range(config):
    """Every value is one that its field's metadata allows, checked here once more."""
    for name, f in FIELDS.items():
        v, m = getattr(config, name), f.metadata
        if v is None:
            assert f.default is None, name
            continue
        kind = f.type if isinstance(f.type, str) else f.type.__name__
        assert type(v).__name__ == kind, name
        assert not m["choices"] or v in m["choices"], name
        assert kind != "float" or math.isfinite(v), name
        assert (m["lo"] is None or v >= m["lo"]) and (m["hi"] is None or v <= m["hi"]), name
        assert not m["pattern"] or not set(v) & set("/\\\0"), name


def accepted_or_named(make, names):
    try:
        config = make()
        in_range(config)
        for device in ("cpu", "cuda"):
            in_range(resolve(config, device))
        COUNTS["accepted"] += 1
    except ConfigError as e:
        assert e.name in names and str(e).startswith(f"{e.name}: got ") and "; accepted: " in str(e)


@examples(3000, 300)
@given(configs)
def test_configs(given_values):
    COUNTS["configs"] += 1
    accepted_or_named(lambda: from_dict(given_values), {*FIELDS, *given_values})


odd = ["true", "--force", "--", "-p", "pid", "1e400", "0x10", "nan", "None"]
word = st.one_of(numbers.map(str), st.text(max_size=8), st.sampled_from(odd))


def given_option(name):
    """An option with a value that it may accept, with another word, or the word alone."""
    joined, parted = likely(name).map(lambda v: [f"--{name}={v}"]), likely(name).map(lambda v: [f"--{name}", str(v)])
    return st.one_of(joined, parted, word.map(lambda v: [f"--{name}", v]), word.map(lambda v: [v]))


argument = st.sampled_from(list(FIELDS)).flatmap(given_option)


@examples(2000, 100)
@given(st.lists(argument, max_size=4))
def test_argument_lists(parts):
    COUNTS["configs"] += 1
    argv = [a for part in parts for a in part if not a.startswith("-h") and not "--help".startswith(a[:3] or "x")]
    err = io.StringIO()
    try:
        with _quiet(err):
            accepted_or_named(lambda: parse_args(argv), set(FIELDS))
    except SystemExit as e:  # argparse's own: an unknown argument, a missing value
        assert e.code == 2 and "error: " in err.getvalue() and ("argument" in err.getvalue())


def _quiet(err):
    import contextlib

    return contextlib.redirect_stderr(err)


@cache
def folder():
    import atexit
    import shutil

    path = Path(mkdtemp(prefix="pid_ssl-fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


# a change to bytes, at a relative place
byte_change = st.tuples(st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 0.999999), st.integers(0, 255))


def change_bytes(data, change):
    how, at, value = change
    at = int(at * len(data))
    if how == "cut":
        return data[:at]
    if how == "insert":
        return data[:at] + bytes([value]) * (value + 1) + data[at:]
    if how == "flip":
        return data[:at] + bytes(x ^ (1 << value % 8) for x in data[at : at + 1]) + data[at + 1 :]
    return data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]


# a change to a JSON value: a path of choices, then what to do there
place = st.lists(st.integers(0, 50), min_size=1, max_size=3)
json_change = st.tuples(place, st.sampled_from(["set", "delete", "add"]), junk)


def change_json(value, change):
    path, how, new = change
    value = node = copy.deepcopy(value)
    for i, step in enumerate(path):
        if not isinstance(node, (dict, list)) or not node:
            break
        key = list(node)[step % len(node)] if isinstance(node, dict) else step % len(node)
        if i == len(path) - 1 or not isinstance(node[key], (dict, list)) or not node[key]:
            if how == "set":
                node[key] = new
            elif how == "delete":
                del node[key]
            elif isinstance(node, dict):
                node[f"{key}x"] = new
            else:
                node.insert(key, new)
            break
        node = node[key]
    return value


@cache
def record():
    metrics = {"test_linear_logreg": 95.5, "test_pid_coordinate_i1": 0.5}
    history, provenance = [{"epoch": 1, "lr": 0.1, "loss": 2.5}], {"device": "cpu", "versions": {"torch": "2"}}
    config = dataclasses.asdict(resolve(Config()))
    return dataclasses.asdict(RunRecord("0" * 16, "finished", config, metrics, history, provenance))


@cache
def record_file():
    return RunRecord(**record()).save(folder() / "signed").read_text()


@examples(1000, 150)
@given(st.lists(st.one_of(json_change, byte_change), min_size=1, max_size=2), st.booleans())
def test_records(changes, signed):
    COUNTS["records"] += 1
    value = record()
    if signed:
        value = json.loads(record_file())
    whole = value
    for c in changes:
        if isinstance(c[0], list):
            value = change_json(value, c)
    try:
        data = json.dumps(value).encode()
    except ValueError:
        return  # an integer that Python does not write
    for c in changes:
        if not isinstance(c[0], list):
            data = change_bytes(data, c)
    path = folder() / f"{'0' * 16}.json"
    path.write_bytes(data)
    try:
        r = load_record(path)
    except RecordError as e:
        assert str(e).startswith(f"{path}: ") and "accepted: " in str(e)
    else:
        COUNTS["records read"] += 1
        in_range(from_dict(r.config))
        # what the run signed is what is read; a record that lost its checksum is one from before there were any
        assert not (signed and "checksum" in r.provenance) or dataclasses.asdict(r) == whole
        assert r.status in STATUSES and r.run_id == path.stem and all(math.isfinite(v) for v in r.metrics.values())


@cache
def checkpoint():
    """A run's state after an epoch and a step, and the files of its checkpoint."""
    sizes = dict(epochs=3, width=4, batch_size=16, projector_dim=4, projector_hidden=4)
    config = resolve(Config(loss="pid", form="target", **sizes))
    state = Pretraining(config, load_dataset("digits", train_size=48), "cpu")
    state.history.append(state.epoch())
    assert state.epoch(lambda: True) is None
    path = save_state(state, folder() / "checkpoints")
    return state, path, {p.name: p.read_bytes() for p in path.iterdir()}


FILES = ("encoder", "projector", "optimizer", "random", "teacher", "loss")
ways = st.sampled_from(["drop", "rename", "shape", "dtype", "empty"])
tensor_change = st.tuples(st.sampled_from(FILES), st.integers(0, 30), ways)
names = [*(f"{f}.safetensors" for f in FILES), "header.json"]
file_change = st.tuples(st.sampled_from(names), st.one_of(byte_change, st.just("remove")), st.booleans())
changes = dict(tensors=tensor_change, header=json_change, file=file_change)


def change_tensors(data, at, how):
    tensors = load(data)
    name = sorted(tensors)[at % len(tensors)]
    t = tensors.pop(name)
    if how == "rename":
        tensors[name + "x"] = t
    elif how == "shape":
        tensors[name] = t.flatten().repeat(2)
    elif how == "dtype":
        tensors[name] = t.to(torch.float16)
    elif how == "empty":
        tensors[name] = t.flatten()[:0].clone()
    return save(tensors)


@examples(500, 60)
@given(st.one_of([st.tuples(st.just(kind), change) for kind, change in changes.items()]))
def test_checkpoints(change):
    COUNTS["checkpoints"] += 1
    state, path, whole = checkpoint()
    files, (kind, c) = dict(whole), change
    header = json.loads(files["header.json"])
    signed = True  # a stranger can write checksums that fit
    if kind == "tensors":
        files[f"{c[0]}.safetensors"] = change_tensors(files[f"{c[0]}.safetensors"], c[1], c[2])
    elif kind == "file" and c[1] == "remove":
        del files[c[0]]
    elif kind == "file":
        files[c[0]], signed = change_bytes(files[c[0]], c[1]), c[2]
    if kind == "header":
        files["header.json"] = json.dumps(change_json(header, c)).encode()
    elif signed and "header.json" in files and (kind != "file" or c[0] != "header.json"):
        header["sha256"] = {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n != "header.json"}
        files["header.json"] = json.dumps(header).encode()
    for old in path.iterdir():
        old.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_state(state, path.parent)
        except CheckpointError as e:
            assert str(path) in str(e)
        else:
            COUNTS["checkpoints read"] += 1
            assert state.step == 4 and len(state.history) == 1 and len(state.log) == 1


@cache
def parquet():
    rng = np.random.default_rng(0)
    out = {}
    (folder() / "mine").mkdir()
    for split, n in (("train", 40), ("test", 12)):
        out[split] = random_images(rng, n), [i % 4 for i in range(n)]
    return out


def parquet_bytes(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


whole_numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-2, 50))
values = st.one_of(st.none(), whole_numbers, st.binary(max_size=30), st.floats(), st.text(max_size=3))
value_change = st.tuples(st.sampled_from(["label", "bytes", "img", "column"]), st.integers(0, 11), values)


@examples(500, 60)
@example("train", ("column", 1, None))
@example("test", ("column", 1, None))
@given(st.sampled_from(["train", "test"]), st.one_of(byte_change, value_change))
def test_parquet(split, change):
    COUNTS["parquet"] += 1
    files = {}
    for s, (blobs, labels) in parquet().items():
        columns = {"img": list(blobs), "label": list(labels)}
        if s == split and change[0] in ("label", "bytes", "img", "column"):
            what, at, value = change
            try:
                if what == "label":
                    columns["label"][at] = value
                    columns["label"] = pa.array(columns["label"], from_pandas=False)
                elif what == "bytes":
                    columns["img"][at] = {"bytes": value, "path": ""}
                    columns["img"] = pa.array(columns["img"])
                elif what == "img":
                    columns["img"] = pa.array([value] * len(labels))
                else:
                    del columns["label" if at % 2 else "img"]
            except (pa.ArrowException, OverflowError):
                return  # not a column that Parquet could hold
            files[s] = parquet_bytes(columns)
        else:
            files[s] = parquet_bytes(columns)
            if s == split:
                files[s] = change_bytes(files[s], change)
    for s, data in files.items():
        (folder() / "mine" / f"{s}.parquet").write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = load_dataset("mine", 8, data_dir=str(folder()))
    except DataError as e:
        assert f"{split}.parquet: " in str(e) or str(e).startswith(("dataset 'mine': ", "dataset 'mine', validation: "))
    else:
        COUNTS["parquet read"] += 1
        assert isinstance(d, Dataset) and all(x.dtype == torch.uint8 for x in d.images.values())
        assert all(x.shape[1:] == (3, 8, 8) for x in d.images.values())
        assert all(0 <= y.min() and y.max() < d.classes <= 40 for y in d.labels.values())
