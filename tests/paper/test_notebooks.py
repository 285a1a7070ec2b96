"""The notebooks are the source: small, clean, documented, and their parameters are the config's."""
import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from pid_ssl.config import Config
from pid_ssl.experiments.controlled import ControlledConfig
from pid_ssl.experiments.downstream import DownstreamConfig

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT / "pid_ssl").glob("[a-z]*.py"))


def cells(path, kind="code"):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_small_and_readable(path):
    assert path.stat().st_size < 200_000
    code = "\n".join(cells(path))
    assert len(code.splitlines()) < 420, "split the room"
    assert cells(path, "markdown")[0].startswith("# "), "opens with a title"
    for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", code))):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != "*" for a in node.names), "no wildcard imports"


ENTRIES = {"run_experiment": Config, "run_controlled": ControlledConfig, "run_downstream": DownstreamConfig}


@pytest.mark.parametrize("name", ENTRIES)
def test_parameters_cell_is_the_config(name):
    config = ENTRIES[name]
    nb = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    got = {}
    for line in cell["source"]:
        name, kind, value, comment = re.fullmatch(r"(\w+): (\w+) = (.+?)  # (.+)\n?", line).groups()
        got[name] = kind, ast.literal_eval(value)
        assert comment.startswith(config.__dataclass_fields__[name].metadata["help"])
    want = {f.name: (f.type if isinstance(f.type, str) else f.type.__name__, f.default) for f in dataclasses.fields(config)}
    assert got == want and list(got) == list(want)


def exported():
    for name in MODULES:
        module = importlib.import_module(f"pid_ssl.{name}")
        for public in getattr(module, "__all__", []):
            thing = getattr(module, public)
            if getattr(thing, "__module__", None) == module.__name__ and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield pytest.param(thing, id=f"{name}.{public}")


def functions_of(thing):
    if inspect.isfunction(thing):
        return [thing]
    own = [m for k, m in vars(thing).items() if inspect.isfunction(m) and (k == "__init__" or not k.startswith("_"))]
    # forward of the base class documents the contract of every loss; compute is its private half
    return [m for m in own if m.__name__ != "compute" and "<string>" not in inspect.getfile(m)]


EXAMPLES = "\n".join(c for p in NOTEBOOKS for c in cells(p) if not re.search(r"^#\|\s*export", c, re.M))


@pytest.mark.parametrize("thing", list(exported()))
def test_public_names_are_documented(thing):
    assert inspect.getdoc(thing), "a docstring"
    assert re.search(rf"\b{thing.__name__}\b", EXAMPLES), "an example"
    for f in functions_of(thing):
        signature, source = inspect.signature(f), inspect.getsource(f)
        for p in signature.parameters.values():
            if p.name in ("self", "cls") or p.kind is p.VAR_KEYWORD:
                continue
            # a function handed in has no simple type
            assert p.annotation is not p.empty or p.name == "make", f"{f.__qualname__}: type of {p.name}"
            assert re.search(rf"\b{p.name}\b[^#\n]*#\s*\S", source), f"{f.__qualname__}: comment beside {p.name}"


@pytest.mark.parametrize("name", ENTRIES)
def test_help_notebook_lists_every_parameter(name):
    out = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    text = out.stdout + out.stderr
    missing = [f.name for f in dataclasses.fields(ENTRIES[name]) if not re.search(rf"^\s*{f.name}: ", text, re.M)]
    assert not missing and "Unknown" not in text
