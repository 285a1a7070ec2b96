"""The tables say what the code does: constructors have the defaults of their rows, errors a status."""
import dataclasses
import importlib
import inspect
import json
import pkgutil

import pytest
from conftest import ROOT

import pid_ssl
from pid_ssl.config import (EXIT_STATUS, LOSS_TABLE, METRICS, TASK_TABLE, Config, as_arguments, exit_meaning,
                            exit_status, from_dict, metric_end, read_args, resolve, tasks_that_read, told)
from pid_ssl.experiments.downstream import DownstreamConfig

MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages(pid_ssl.__path__, "pid_ssl.")]
RUNS = sorted((ROOT / "data/runs").glob("*.json"))


@pytest.mark.parametrize("name", LOSS_TABLE)
def test_constructors_have_the_defaults_of_their_row(name):
    row = LOSS_TABLE[name]
    module, kind = row.implementation.split(":")
    signature = inspect.signature(getattr(importlib.import_module(f"pid_ssl.{module}"), kind))
    defaults = {k: p.default for k, p in signature.parameters.items()}
    assert {k: defaults[k] for k in row.defaults()} == row.defaults()
    assert set(row.arguments(resolve(Config(loss=name)))) <= set(defaults)


def test_every_error_has_an_exit_status():
    errors = {v for m in MODULES for v in vars(m).values() if inspect.isclass(v) and issubclass(v, BaseException)}
    own = {e.__name__ for e in errors if e.__module__.startswith("pid_ssl")}
    known = {e.__name__ for e in errors if any(t.__name__ in EXIT_STATUS for t in e.__mro__)}
    assert own <= known
    assert all(exit_meaning(row.status) for row in EXIT_STATUS.values())


def test_a_signal_is_in_the_status():
    stopped = type("RunInterrupted", (KeyboardInterrupt,), {})("stopped")
    stopped.signal = 2
    assert exit_status(stopped) == 130 and exit_status("RunInterrupted") == 143


def test_tasks_read_what_their_config_says():
    for f in dataclasses.fields(DownstreamConfig):
        assert set(f.metadata["readers"] or ()) == set(tasks_that_read(f.name)), f.name


def test_measures_are_in_the_records():
    """Every measure of a task ends keys of its records."""
    keys = {}
    for path in sorted((ROOT / "data/downstream").glob("*.json")):
        record = json.loads(path.read_text())
        keys.setdefault(record["config"]["task"], []).append([metric_end(k) for k in record["metrics"]])
    for name, found in keys.items():
        words = {"set": "bccd" if name == "detection" else "camvid", "pct": "1"}
        ends = [end.format(**words) for measure in TASK_TABLE[name].measures.values() for end in measure]
        assert all(any(end in record for record in found) for end in ends), name


def test_metrics_of_a_run_are_in_the_table():
    metrics = json.loads(RUNS[0].read_text())["metrics"]
    strengths = {"linear_C"}
    assert {metric_end(k) for k in metrics} - strengths == set(METRICS)


@pytest.mark.parametrize("path", RUNS[::40], ids=lambda p: p.stem)
def test_arguments_of_a_record_give_its_config(path):
    config = from_dict(json.loads(path.read_text())["config"])
    assert read_args(as_arguments(told(config))) == config
