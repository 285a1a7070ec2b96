"""The wheel: imports with runtime dependencies only, and carries nothing of the workshop."""
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

NOT_RUNTIME = ("nbdev", "fastcore", "execnb", "papermill", "jupyterlab", "ipykernel", "IPython", "matplotlib",
               "seaborn", "pandas", "dit")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for f in listed.stdout.split("\n")[:-1]:  # a copy, so that no build folder is left in the project
        if f.startswith(("pid_ssl/", "data/weights/", "pyproject", "README", "LICENSE", "settings")):
            (source / f).parent.mkdir(parents=True, exist_ok=True)
            (source / f).write_bytes((ROOT / f).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if ".dist-info" not in n]
        (entry,) = [z.read(n).decode() for n in z.namelist() if n.endswith("entry_points.txt")]
    weights = {n.split(".data/data/share/")[1] for n in names if ".data/data/share/" in n}
    assert weights == {f"pid_ssl/weights/{p.relative_to(p.parents[1])}" for p in (ROOT / "data/weights").glob("*/*")}
    names = [n for n in names if ".data/" not in n]
    assert {n.split("/")[0] for n in names} == {"pid_ssl"}
    assert set(names) == {p.relative_to(ROOT).as_posix() for p in (ROOT / "pid_ssl").rglob("*.py")}
    assert {n.split("/")[1] for n in names if n.count("/") > 1} >= {"config", "pid", "losses", "figures", "paper"}
    assert "pid_ssl = pid_ssl.__main__:main" in entry


IMPORT_ALL = """
import sys
wheel, site = sys.argv[1:]
sys.path = [p for p in sys.path if 'site-packages' not in p] + [wheel, site]
import importlib, zipfile, pid_ssl
assert wheel in pid_ssl.__file__
for name in zipfile.ZipFile(wheel).namelist():
    if name.startswith('pid_ssl/') and name.endswith('.py') and not name.endswith('_modidx.py'):
        importlib.import_module(name[:-3].removesuffix('/__init__').replace('/', '.'))
from pid_ssl.figures import plotting
try:
    plotting()
except ImportError as e:
    assert 'pid_ssl[figures]' in str(e)
else:
    raise AssertionError('matplotlib should not be there')
"""


def test_weights_are_found_beside_an_installed_package(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{tmp_path}/site", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    code = "from pid_ssl.models import weights_folder as f; print(f('pid_cifar10'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == str(tmp_path / "site/share/pid_ssl/weights/pid_cifar10"), out.stderr


def test_imports_without_the_notebook_tools(wheel, tmp_path):
    """In a copy of this environment that lacks everything but the runtime dependencies and theirs."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.split(".")[0] not in NOT_RUNTIME and not entry.name.startswith("__editable__"):
            (site / entry.name).symlink_to(entry)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-S", "-c", IMPORT_ALL, str(wheel), str(site)], cwd=tmp_path, env=environment,
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
