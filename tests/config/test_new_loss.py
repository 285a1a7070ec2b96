"""Adding a loss takes one class and one row of the table; everything that lists losses then has it."""
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

CLASS = '''
from .baselines import BarlowTwins

class Mine(BarlowTwins):
    "Barlow Twins with a knob of its own."
    def __init__(self, lambda_param=5e-3, delta=0.25):
        super().__init__(lambda_param)
        self.delta = delta
'''
ROW = """    Loss('mine', 'My own loss', '#123456', 'losses.mine:Mine', baseline='barlow',
         knobs=('lambda_param', knob('delta', float, 'how much of mine', 0.25, lo=0., hi=1.))),
]}"""
LOOK = """
import contextlib, dataclasses, io, json, sys
from pid_ssl.__main__ import main
from pid_ssl.config import LOSS_TABLE, Config, parameter_table, parameters_cell, resolve

out = dict(cell=parameters_cell(), table=parameter_table())
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    main(['pretrain', '--help'])
with contextlib.redirect_stderr(io.StringIO()) as wrong:
    out['status'] = main(['pretrain', '--loss', 'mine', '--delta', '2'])
out['help'], out['wrong'] = said.getvalue(), wrong.getvalue()

from matplotlib.colors import to_hex
from pid_ssl.figures.relations import plot_strength
from pid_ssl.losses import LOSSES, build_loss
from pid_ssl.records import load_record

loss = build_loss(resolve(Config(loss='mine', delta=0.75)))
out['built'] = [type(loss).__name__, loss.delta, LOSSES['mine']().delta]
record = load_record(sys.argv[1])
mine = [record.config | dict(loss='mine', policy=p) for p in ('cifar', 'cifar_strong')]
legend = plot_strength([dataclasses.replace(record, config=c) for c in mine]).legends[0]
out['legend'] = [[t.get_text(), to_hex(h.get_color())] for t, h in zip(legend.get_texts(), legend.legend_handles)]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a copy of the package, with one class and one row more, says of its losses."""
    top = tmp_path_factory.mktemp("mine")
    package = shutil.copytree(ROOT / "pid_ssl", top / "pid_ssl", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "losses/mine.py").write_text(CLASS)
    table = (package / "config/tables.py").read_text()
    start = table.index("LOSS_TABLE = ")
    end = table.index("]}", start)
    (package / "config/tables.py").write_text(table[:end] + ROW.lstrip("\n") + table[end + 2:])
    record = next(p for p in sorted((ROOT / "data/runs").glob("*.json")) if '"cifar10"' in p.read_text())
    command = [sys.executable, "-c", LOOK, str(record)]
    out = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_help(seen):
    assert re.search(r"--loss LOSS .*?mine", seen["help"], re.S) and "Read by mine:\n  --delta DELTA" in seen["help"]
    assert seen["status"] == 2 and seen["wrong"] == "error: delta: got 2; accepted: a number from 0.0 to 1.0\n"


def test_papermill_cell(seen):
    assert "# Read by mine\ndelta: float = 0.25  # how much of mine" in seen["cell"]
    assert re.search(r"^loss: str = 'pid'  # objective \[[^]]*mine\]", seen["cell"], re.M)


def test_table_of_parameters(seen):
    assert "| `delta` | 0.25 | a number from 0.0 to 1.0 | how much of mine (mine) |" in seen["table"]
    assert re.search(r"\| `lambda_param` .*\(barlow, .*mine\) \|", seen["table"])


def test_figure(seen):
    ((label, colour),) = seen["legend"]
    assert label.startswith("My own loss") and colour == "#123456"


def test_built_from_a_config(seen):
    assert seen["built"] == ["Mine", 0.75, 0.25]
