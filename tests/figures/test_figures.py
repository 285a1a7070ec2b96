"""One command restores all figures, a changed record rebuilds what depends on it, and an edited digit is noticed."""
import dataclasses
import hashlib
import importlib.metadata
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT

from pid_ssl.figures import drift, gallery
from pid_ssl.figures.gallery import read_manifest, style_of
from pid_ssl.records import load_record

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")[:-1]
NEEDED = "pid_ssl/", "data/", "figures/", "nbs/", "settings.ini", "README.md"
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests/constraints.txt").read_text(), re.M))
# what the bytes of a picture depend on
DRAWS = "matplotlib", "seaborn", "numpy", "contourpy", "pillow", "scipy"
PICTURES = all(importlib.metadata.version(p) == PINNED[p] for p in DRAWS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a fresh clone has and making figures needs."""
    root = tmp_path_factory.mktemp("clone")
    for name in TRACKED:
        if name.startswith(NEEDED):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return root


def cells(root):
    """Kind and source of each cell of make_figures."""
    found = json.loads((root / "nbs/make_figures.ipynb").read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in found]


def make(root):
    """The documented command, in the clone."""
    (command,) = re.findall(r"^papermill nbs/make_figures.*$", cells(root)[0][1], re.M)
    # matplotlib finds its font list in the home folder, and IN_TEST would send the figures elsewhere
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env |= {"PYTHONPATH": str(root), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", "-c", command.replace("papermill", f"{sys.executable} -m papermill")]
    out = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]


def make_here(root, monkeypatch):
    """The notebook's cells, less the display, without another process."""
    monkeypatch.chdir(root)
    monkeypatch.delenv("IN_TEST", raising=False)
    space = {}
    for i, (kind, code) in enumerate(cells(root)):
        if kind == "code" and "IPython" not in code:
            # `Gallery.add` reads the source of functions
            linecache.cache[f"<cell {i}>"] = (len(code), None, code.splitlines(True), f"<cell {i}>")
            exec(compile(code, f"<cell {i}>", "exec"), space)
    return space["gallery"].rebuilt


def files(root):
    """Path below figures/ -> path."""
    figures = root / "figures"
    return {p.relative_to(figures).as_posix(): p for p in figures.rglob("*") if p.is_file()}


def hashes(root):
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files(root).items()}


def test_one_command_restores_every_byte(clone):
    before = hashes(clone)
    shutil.rmtree(clone / "figures")
    (clone / "data/README.md").unlink()
    make(clone)
    after = hashes(clone)
    assert set(after) == set(before)
    other = sorted(f for f in after if after[f] != before[f])
    if not PICTURES:  # the manifest holds the pictures' hashes
        other = [f for f in other if not f.endswith((".png", ".pdf", "manifest.json"))]
        warnings.warn("tables are the same; pictures were not compared: exact under tests/constraints.txt only")
    assert not other
    for page in ("README.md", "data/README.md"):
        assert (clone / page).read_bytes() == (ROOT / page).read_bytes()


def test_a_changed_record_rebuilds_what_depends_on_it(clone, monkeypatch):
    assert make_here(clone, monkeypatch) == []
    manifest, before = read_manifest(clone / "figures"), hashes(clone)
    written = {name: p.stat().st_mtime_ns for name, p in files(clone).items()}
    run = manifest["differences_cifar10"]["runs"][0]
    record = load_record(clone / f"data/runs/{run}.json")
    dataclasses.replace(record, metrics={**record.metrics, "test_linear_logreg": 99.0}).save(clone / "data/runs")
    rebuilt = make_here(clone, monkeypatch)
    after, again = hashes(clone), read_manifest(clone / "figures")
    depends = {name for name, entry in manifest.items() if run in entry["runs"]}
    assert set(rebuilt) == depends < set(manifest)
    assert {name for name in manifest if again[name] != manifest[name]} == depends
    outputs = {f for name in depends for f in manifest[name]["output_hashes"]}
    touched = {name for name, p in files(clone).items() if p.stat().st_mtime_ns != written[name]}
    assert touched == outputs | {"manifest.json"}
    assert after["files/differences_cifar10.csv"] != before["files/differences_cifar10.csv"]
    assert (clone / "README.md").read_text() != (ROOT / "README.md").read_text(), "README takes its numbers from there"
    assert drift(clone) == []


EDITED = "README.md", "nbs/2_results.ipynb", "data/README.md", "figures/README.md", "figures/files/results_cifar10.csv"


@pytest.mark.parametrize("name", [*EDITED, "figures/speed_training.md", "figures/plane_cifar10.png"])
def test_an_edited_digit_is_noticed(clone, name):
    assert drift(clone) == []
    path = clone / name
    was = path.read_bytes()
    now = was[:-20] + bytes([was[-20] ^ 1]) + was[-19:]
    if name in ("README.md", "nbs/2_results.ipynb"):  # of a row between markers
        now = re.sub(rb"(\| Barlow Twins \| linear \| (?:primary \| )?5 \| )(\d)", rb"\g<1>7", was)
    assert now != was
    path.write_bytes(now)
    try:
        assert name in " ".join(drift(clone))
    finally:
        path.write_bytes(was)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "pid_ssl/figures").glob("*.py")))
def test_every_room_is_in_the_input_hash(tmp_path, monkeypatch, name):
    """A touched file of the wing rebuilds every figure."""
    shutil.copytree(ROOT / "pid_ssl/figures", tmp_path / "figures")
    monkeypatch.setattr(gallery, "__file__", str(tmp_path / "figures/gallery.py"))
    before = style_of()
    with (tmp_path / "figures" / name).open("a") as f:
        f.write("\n")
    assert style_of() != before


def test_committed_files_are_those_of_the_manifest():
    listed = {f for entry in read_manifest(ROOT / "figures").values() for f in entry["output_hashes"]}
    committed = {name.removeprefix("figures/") for name in TRACKED if name.startswith("figures/")}
    assert committed == listed | {"manifest.json", "README.md"}
    own = {f"data/runs/{p.name}" for p in (ROOT / "data/runs").glob("*.json")} - set(TRACKED)  # a reader's runs
    allowed = ("not in the manifest", "data/README.md has other numbers")[:1 + bool(own)]
    found = [line for line in drift(ROOT) if not any(part in line for part in allowed)]
    assert found == [], "run nbs/make_figures.ipynb"


def test_manifest_names_every_source():
    """Every record and file a figure was made from, with the hash of the file, and recipes that there are."""
    for name, entry in read_manifest(ROOT / "figures").items():
        assert entry["runs"] or entry["files"], name
        assert entry["topic"] and all(f"nbs/sweeps/{recipe}.toml" in TRACKED for recipe in entry["recipes"]), name
        for run in entry["runs"]:
            places = [f"data/{folder}/{run}.json" for folder in ("runs", "controlled", "downstream")]
            assert any(place in TRACKED for place in places), (name, run)
        for file, digest in entry["files"].items():
            if file != "manifest.json":
                assert hashlib.sha256((ROOT / "data" / file).read_bytes()).hexdigest() == digest, (name, file)


def test_names_say_which_dataset():
    """A figure of records is called by topic and dataset; what is made from files of numbers keeps its topic."""
    datasets = "cifar10", "digits", "imagenette_96", "tiny_imagenet_32", "trifeature", "all", "gaussian"
    for name, entry in read_manifest(ROOT / "figures").items():
        if entry["runs"] and name != "recipes":
            assert name.endswith(tuple(f"_{dataset}" for dataset in datasets)), name
