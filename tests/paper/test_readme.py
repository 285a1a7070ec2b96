"""What README promises: its commands are CI's, its loop runs, its numbers are the tables'."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from pid_ssl.figures import fill_markers

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_documented_test_command():
    (command,) = re.findall(r"^pip install .*nbdev_test.*$", README, re.M)
    ci = (ROOT / ".ci/run").read_text().replace("-q --disable-pip-version-check ", "")
    assert command in ci
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_python_example_runs(tmp_path):
    code, pid = re.findall(r"```python\n(.*?)```", README, re.S)
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert "'tau'" in out.stdout
    assert not list(tmp_path.iterdir()), "a training loop of one's own writes nothing"
    out = subprocess.run([sys.executable, "-c", pid], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=120)
    assert [float(x) for x in re.findall(r"tensor\(([\d.]+)", out.stdout)] == pytest.approx([1, 0.5], abs=1e-6), out.stderr


def test_tables_are_the_figures():
    assert README == fill_markers(README), "run nbs/make_figures.ipynb"


def test_files_named_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
