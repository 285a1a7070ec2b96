"""A recipe is the one place where it is said which records a figure is made from."""
import dataclasses
import json
import subprocess
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

from pid_ssl.config import identity, resolve
from pid_ssl.experiments.recipe import every_record, find, plan, planned_again, read_recipe, recipes_folder, select
from pid_ssl.records import run_id

RECORDS = every_record(ROOT / "data")
RUNS = {r.run_id: r for r in RECORDS}
MANIFEST = json.loads((ROOT / "figures/manifest.json").read_text())
# the figures and tables that show the whole of a recipe
WHOLE = {
    "digits": ["results_digits"], "cifar10": ["results_cifar10"], "imagenette-96": ["results_imagenette_96"],
    "tiny-imagenet-32": ["results_tiny_imagenet_32"], "beta_cifar10": ["beta_curve_cifar10"],
    "beta_digits": ["beta_curve_digits"], "ablations_cifar10": ["ablations_cifar10"],
    "augmentation_cifar10": ["augmentation_cifar10"], "trifeature": ["results_trifeature"],
    "two_views_beta_cifar10": ["two_views_beta_cifar10"],
    **{f"downstream_{d}": [f"{name}_{d.replace('-', '_')}" for name in ("downstream_results", "encoder_audit")]
       for d in ("cifar10", "imagenette-96", "tiny-imagenet-32")},
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_recipe_gives_the_records_of_its_table(name):
    """Of the committed records, exactly those that the table was made from, and none is missing."""
    shown = {i for figure in WHOLE[name] for i in MANIFEST[figure]["runs"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {r.run_id for r in select(name, RECORDS)} == shown
    planned = plan(name)
    assert len(planned) == len(shown)
    if "experiment" not in read_recipe(name):
        (data,) = {RUNS[i].provenance["dataset_hash"] for i in shown}
        assert {run_id(resolve(p.config), data, p.config.device) for p in planned} == shown


def test_every_figure_names_the_recipes_of_its_records():
    ids = {p.stem: {r.run_id for r in select(p.stem, RECORDS)} for p in recipes_folder().glob("*.toml")}
    for name, entry in MANIFEST.items():
        named = set().union(*(ids[recipe] for recipe in entry.get("recipes", ())))
        assert set(entry["runs"]) <= named or name == "recipes", name
    listed = subprocess.run(["git", "ls-files", "data/runs"], cwd=ROOT, capture_output=True, text=True, check=True)
    committed = {Path(name).stem for name in listed.stdout.split()}  # a reader may have made others
    assert committed and committed <= set().union(*ids.values()), "every committed record is in a recipe"


def test_what_gives_a_record_again():
    """Its own settings do, those of records from before a field existed too."""
    for r in RECORDS:
        planned = planned_again(r, RUNS)
        behind_it = [RUNS[r.config["run"]]] if "run" in r.config else []
        assert r in find([planned], [r, *behind_it])[0], r.run_id
        if "loss" in r.config:
            made = run_id(resolve(planned.config), r.provenance["dataset_hash"], r.provenance["device"])
            assert made == r.run_id
        if "arm" in r.config:
            assert planned.settled() == r.run_id


def test_another_setting_is_another_record():
    """Each field that a run reads is a part of its key, the machine's are not."""
    run = plan({"loss": "pid", "form": "target", "dataset": "digits", "device": "cpu"})[0]
    for name, value in {"seed": 1, "beta": 0.1, "epochs": 3, "eval_on": "val", "target": "ema_third"}.items():
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, **{name: value}))
        assert other.key() != run.key() and identity(resolve(other.config)) == other.settled(), name
    assert run.at(home="/elsewhere", threads=3).key() == run.key() != run.at(device="cuda").key()
