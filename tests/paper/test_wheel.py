"""The wheel: imports with runtime dependencies only, and carries nothing of the workshop."""
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

NOT_RUNTIME = ("nbdev", "fastcore", "execnb", "papermill", "jupyterlab", "ipykernel", "IPython", "matplotlib", "seaborn", "pandas", "dit")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for f in filter(None, files):  # a copy, so that no build folder is left in the project
        if f.startswith(("pid_ssl/", "pyproject", "README", "LICENSE", "settings")):
            (source / f).parent.mkdir(parents=True, exist_ok=True)
            (source / f).write_bytes((ROOT / f).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)], check=True, capture_output=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"pid_ssl"}
    committed = {p.name for p in (ROOT / "pid_ssl").glob("*.py")}
    assert {n.split("/")[1] for n in names if n.startswith("pid_ssl/")} == committed


def test_imports_without_the_notebook_tools(wheel, tmp_path):
    """In a copy of this environment that lacks everything but the runtime dependencies and theirs."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.split(".")[0] not in NOT_RUNTIME and not entry.name.startswith("__editable__"):
            (site / entry.name).symlink_to(entry)
    code = f"""
import sys
sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(wheel)!r}, {str(site)!r}]
import importlib, zipfile, pid_ssl
assert {str(wheel)!r} in pid_ssl.__file__
for n in zipfile.ZipFile({str(wheel)!r}).namelist():
    if n.startswith('pid_ssl/') and n.endswith('.py') and not n.endswith(('__init__.py', '_modidx.py')):
        importlib.import_module(n[:-3].replace('/', '.'))
from pid_ssl.figures import plotting
try: plotting()
except ImportError as e: assert 'pid_ssl[figures]' in str(e)
else: raise AssertionError('matplotlib should not be there')
"""
    out = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
