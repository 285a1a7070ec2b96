"""The notebooks are the source: small, clean, documented, and their parameters are the config's."""
import ast
import dataclasses
import importlib
import inspect
import json
import re
from collections import Counter

import pytest
from click.testing import CliRunner
from conftest import ROOT
from papermill.cli import papermill

from pid_ssl.config import Config, parameters_cell
from pid_ssl.experiments.controlled import ControlledConfig
from pid_ssl.experiments.downstream import DownstreamConfig

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FILES = sorted(p for p in (ROOT / "pid_ssl").rglob("[a-z]*.py"))
FACES = sorted(p.parent for p in (ROOT / "pid_ssl").rglob("*/__init__.py"))
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in [*FILES, *FACES]]
LINES = 400  # of code in a notebook, examples and checks included


def cells(path, kind="code"):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_stems_are_unique():
    """nbdev names what failed by its stem."""
    assert not [stem for stem, n in Counter(p.stem for p in NOTEBOOKS).items() if n > 1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_small_and_readable(path):
    assert path.stat().st_size < 200_000
    code = "\n".join(cells(path))
    assert len(code.splitlines()) <= LINES, "split the room"
    assert cells(path, "markdown")[0].startswith("# "), "opens with a title"
    for node in ast.walk(ast.parse(re.sub(r"(?m)^[%!].*$", "", code))):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != "*" for a in node.names), "no wildcard imports"


def names(node, how):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, how)}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if '"parameters"' in p.read_text()], ids=lambda p: p.stem)
def test_a_parameter_stays_what_was_asked(path):
    """No later cell gives its name to something else; it may be made into something of itself."""
    code = [re.sub(r"(?m)^[%!].*$", "", cell) for cell in cells(path)]
    told = [c["metadata"].get("tags") == ["parameters"] for c in json.loads(path.read_text())["cells"]
            if c["cell_type"] == "code"].index(True)
    parameters, later = names(ast.parse(code[told]), ast.Store), ast.parse("\n".join(code[told + 1:]))
    made_of_it = lambda n: isinstance(n, ast.Assign) and names(n, ast.Store) <= names(n.value, ast.Load)
    later.body = [n for n in later.body if not made_of_it(n)]
    assert parameters and not parameters & names(later, ast.Store)


ENTRIES = {"run_experiment": Config, "run_controlled": ControlledConfig, "run_downstream": DownstreamConfig}


@pytest.mark.parametrize("name", ENTRIES)
def test_parameters_cell_is_the_config(name):
    config = ENTRIES[name]
    nb = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert "".join(cell["source"]) == parameters_cell(config), "the text is that of `parameters_cell`"
    space = {}
    exec("".join(cell["source"]), space)
    kinds = {k: v.__name__ for k, v in space["__annotations__"].items()}
    fields = {f.name: f for f in dataclasses.fields(config)}
    assert kinds == {k: getattr(f.type, "__name__", f.type) for k, f in fields.items()}
    assert {k: space[k] for k in kinds} == {k: f.default for k, f in fields.items()}
    text = re.sub(r"\n *# ", " ", "".join(cell["source"]))
    assert not [k for k, f in fields.items() if f"  # {f.metadata['help']}" not in text]


@pytest.mark.parametrize("name", ENTRIES)
def test_help_notebook_lists_every_parameter(name):
    out = CliRunner().invoke(papermill, ["--help-notebook", str(ROOT / f"nbs/{name}.ipynb")])
    found = dict(re.findall(r"(?m)^\s*(\w+): (.*)$", out.output))
    assert {f.name for f in dataclasses.fields(ENTRIES[name])} <= set(found) and "Unknown" not in out.output


def exported():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            thing = getattr(module, public)
            own = getattr(thing, "__module__", None) == module.__name__
            if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield pytest.param(thing, id=f"{name.removeprefix('pid_ssl.')}.{public}")


def functions_of(thing):
    if inspect.isfunction(thing):
        return [thing]
    own = [m for k, m in vars(thing).items() if inspect.isfunction(m) and (k == "__init__" or not k.startswith("_"))]
    # forward of the base class documents the contract of every loss; what computes is its private half
    return [m for m in own if not m.__name__.startswith("compute") and "<string>" not in inspect.getfile(m)]


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
