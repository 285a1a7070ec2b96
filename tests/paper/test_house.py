"""The house: imports go one way, help needs no torch, hashes cover every wing, and one dialect is spoken everywhere."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import dialect
import pytest
from conftest import ROOT

from pid_ssl.config import source_hash

PACKAGE = ROOT / "pid_ssl"
WINGS = ["config", "pid", "records", "data", "models", "losses", "evaluate", "experiments", "figures", "paper"]
# modules of the package itself, and the wing they belong to
ABOVE_ALL = {"trainers": "experiments", "__main__": "paper"}
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
           for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}


def wing(module):
    """The wing of a module, by its place in the order; the package itself stands before all."""
    parts = module.split(".")[1:]
    return WINGS.index(ABOVE_ALL.get(parts[0], parts[0])) if parts else -1


def imported(module):
    """The modules of this package that a module imports, wherever in its text."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            up = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            inside = [f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in MODULES]
            yield from inside if inside or base not in MODULES else [base]


IMPORTS = {module: sorted(set(imported(module))) for module in MODULES}


def test_the_house_has_the_wings_of_the_design():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(WINGS) == {p.name for p in (ROOT / "nbs").iterdir() if p.name in WINGS}
    loose = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "_modidx"}
    assert loose == set(ABOVE_ALL)


def test_imports_go_up_only():
    down = [f"{a} imports {b}" for a, found in IMPORTS.items() for b in found if wing(b) > wing(a)]
    assert not down


def test_no_circle():
    left = {a: set(found) - {a} for a, found in IMPORTS.items()}
    while free := [a for a, found in left.items() if not found & set(left)]:
        for a in free:
            del left[a]
    assert not left, "these import each other"


def test_pid_needs_nothing_but_the_errors():
    foreign = {b for a, found in IMPORTS.items() if wing(a) == WINGS.index("pid") for b in found if wing(b) != wing(a)}
    assert foreign <= {"pid_ssl.config", "pid_ssl.config.errors"}


@pytest.mark.parametrize("code", ["import pid_ssl.config", "from pid_ssl.__main__ import main; main(['--help'])",
                                  "from pid_ssl.__main__ import main; main(['pretrain', '--epochs', '0'])"])
def test_settings_and_help_load_no_torch(code):
    code = f"import sys\n{code}\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package somewhere else."""
    top = tmp_path_factory.mktemp("house") / "pid_ssl"
    return Path(shutil.copytree(PACKAGE, top, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize("name", WINGS)
def test_source_hash_covers_every_wing(name, copy):
    before = source_hash(copy)
    for path in sorted((copy / name).glob("*.py")):
        text = path.read_text()
        path.write_text(text + "# touched\n")
        assert source_hash(copy) != before, path
        path.write_text(text)
    assert source_hash(copy) == before == source_hash()


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


def test_one_dialect():
    found = dialect.report([ROOT / "nbs", ROOT / "tests"])
    assert not found, "\n".join(found)


def test_the_dialect_is_told():
    """Each rule finds its fault, and nothing in a piece without one."""
    told = {"x = " + "1 + " * 40 + "1": "characters wide", "if x: y = 1": "a body on the line",
            "x = 1; y = 2": "two statements", "f'{[i for i in x]}'": "a program inside",
            "[[[k for k in j] for j in i] for i in x]": "nested 3 deep"}
    for code, words in told.items():
        assert any(words in what for _, what in dialect.faults(code)), code
    assert not list(dialect.faults("def f(x):\n    return [i for i in x if i]\n"))


def test_notebooks_of_a_wing_export_into_it():
    for path in sorted((ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")):
        code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        (target,) = [c.split("default_exp ")[1].split()[0] for c in code if "default_exp" in c]
        assert target.split(".")[0] == path.parent.name or target in {*ABOVE_ALL, "__init__"}, path
