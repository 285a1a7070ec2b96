"""One command restores everything in figures/, a changed record rebuilds what depends on it, and an edited digit is noticed."""
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

from pid_ssl.figures import drift
from pid_ssl.records import load_record

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")[:-1]
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tests/constraints.txt").read_text(), re.M))
# what the bytes of a picture depend on
DRAWS = ("matplotlib", "seaborn", "numpy", "contourpy", "pillow", "scipy")
PICTURES = all(importlib.metadata.version(p) == PINNED[p] for p in DRAWS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a fresh clone has and making figures needs."""
    root = tmp_path_factory.mktemp("clone")
    for name in TRACKED:
        if name.startswith(("pid_ssl/", "data/", "figures/", "nbs/make_figures", "nbs/1_", "nbs/2_", "nbs/3_", "nbs/4_")) or name in ("settings.ini", "README.md"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return root


def make(root):
    """The documented command, in the clone."""
    (command,) = re.findall(r"^papermill nbs/make_figures.*$", "".join(json.loads((root / "nbs/make_figures.ipynb").read_text())["cells"][0]["source"]), re.M)
    # matplotlib finds its font list in the home folder, and IN_TEST would send the figures elsewhere
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(root), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-c", command.replace("papermill", f"{sys.executable} -m papermill")], cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]


def make_here(root, monkeypatch):
    """The notebook's cells, less the display, without another process."""
    monkeypatch.chdir(root)
    monkeypatch.delenv("IN_TEST", raising=False)
    space = {}
    for i, cell in enumerate(json.loads((root / "nbs/make_figures.ipynb").read_text())["cells"]):
        code = "".join(cell["source"])
        if cell["cell_type"] == "code" and "IPython" not in code:
            # `Gallery.add` reads the source of functions
            linecache.cache[f"<cell {i}>"] = (len(code), None, code.splitlines(True), f"<cell {i}>")
            exec(compile(code, f"<cell {i}>", "exec"), space)
    return space["gallery"].rebuilt


def hashes(root):
    figures = root / "figures"
    return {p.relative_to(figures).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in figures.rglob("*") if p.is_file()}


def test_one_command_restores_every_byte(clone):
    before = hashes(clone)
    shutil.rmtree(clone / "figures")
    make(clone)
    after = hashes(clone)
    assert set(after) == set(before)
    other = sorted(f for f in after if after[f] != before[f])
    if not PICTURES:  # the manifest holds the pictures' hashes
        other = [f for f in other if not f.endswith((".png", ".pdf", "manifest.json"))]
    assert not other
    assert (clone / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    if not PICTURES:
        warnings.warn("the tables are the same; pictures were not compared, they are exact under tests/constraints.txt only")


def test_a_changed_record_rebuilds_what_depends_on_it(clone, monkeypatch):
    assert make_here(clone, monkeypatch) == []
    manifest = json.loads((clone / "figures/manifest.json").read_text())
    before = hashes(clone)
    written = {name: (clone / "figures" / name).stat().st_mtime_ns for name in before}
    run = manifest["differences_cifar10"]["runs"][0]
    record = load_record(clone / f"data/runs/{run}.json")
    dataclasses.replace(record, metrics={**record.metrics, "test_linear_logreg": 99.0}).save(clone / "data/runs")
    rebuilt = make_here(clone, monkeypatch)
    after, again = hashes(clone), json.loads((clone / "figures/manifest.json").read_text())
    depends = {name for name, entry in manifest.items() if run in entry["runs"]}
    assert set(rebuilt) == depends
    assert {name for name in manifest if again[name] != manifest[name]} == depends and depends < set(manifest)
    files = {f for name in depends for f in manifest[name]["output_hashes"]}
    touched = {name for name in written if (clone / "figures" / name).stat().st_mtime_ns != written[name]}
    assert touched == files | {"manifest.json"}
    assert after["files/differences_cifar10.csv"] != before["files/differences_cifar10.csv"]
    assert (clone / "README.md").read_text() != (ROOT / "README.md").read_text(), "README takes its numbers from there"
    assert drift(clone) == []


@pytest.mark.parametrize("name", ["README.md", "figures/files/results_cifar10.csv", "figures/speed_training.md", "figures/plane_cifar10.png"])
def test_an_edited_digit_is_noticed(clone, name):
    assert drift(clone) == []
    path = clone / name
    was = path.read_bytes()
    if name == "README.md":
        now = re.sub(rb"(\| Barlow Twins \| 45 \| 5 \| )(\d)", rb"\g<1>7", was)
    else:
        now = was[:-20] + bytes([was[-20] ^ 1]) + was[-19:]
    assert now != was
    path.write_bytes(now)
    try:
        assert len(drift(clone)) >= 1 and name.removeprefix("figures/") in " ".join(drift(clone))
    finally:
        path.write_bytes(was)


def test_committed_files_are_those_of_the_manifest():
    listed = {f for entry in json.loads((ROOT / "figures/manifest.json").read_text()).values() for f in entry["output_hashes"]} | {"manifest.json"}
    assert {name.removeprefix("figures/") for name in TRACKED if name.startswith("figures/")} == listed
    assert [line for line in drift(ROOT) if "not in the manifest" not in line] == [], "run nbs/make_figures.ipynb"


def test_manifest_names_every_source():
    """Every record and file a figure was made from, with the hash of the file."""
    manifest = json.loads((ROOT / "figures/manifest.json").read_text())
    for name, entry in manifest.items():
        assert entry["runs"] or entry["files"], name
        for run in entry["runs"]:
            assert any(f"data/{folder}/{run}.json" in TRACKED for folder in ("runs", "controlled", "downstream")), (name, run)
        for file, digest in entry["files"].items():
            if file != "manifest.json":
                assert hashlib.sha256((ROOT / "data" / file).read_bytes()).hexdigest() == digest, (name, file)
