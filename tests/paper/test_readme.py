"""What README promises: its commands are CI's, its loop learns, its numbers are the tables', and it is short."""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from pid_ssl.__main__ import VERBS
from pid_ssl.config import LOSS_TABLE, TASK_TABLE
from pid_ssl.figures import fill_markers, fill_notebook

README = (ROOT / "README.md").read_text()
READING = sorted((ROOT / "nbs").glob("[0-9]_*.ipynb"))
MARKER = r"<!-- (?:table|value|caption) .*?<!-- end -->"


def cells(path, kind="markdown"):
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def prose(text):
    """Without code, tables and comments."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def run(code, folder):
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_it_is_short():
    assert len(prose(README).split()) <= 1500


def test_the_answer_comes_second():
    first, second = re.split(r"(?<=[.!?]) (?=[A-Z])", re.sub(r"<!--.*?-->", "", README.split("\n")[2]))[:2]
    assert "pid_ssl" in first and re.search(r"[-+]\d+\.\d\d points", second)


def test_ci_runs_the_documented_test_command():
    (command,) = re.findall(r"^pip install .*nbdev_test.*$", README, re.M)
    ci = (ROOT / ".ci/run").read_text().replace("-q --disable-pip-version-check ", "")
    assert command in ci
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_loop_learns(tmp_path):
    loop, *_ = re.findall(r"```python\n(.*?)```", README, re.S)
    said = run(loop, tmp_path)
    assert "'relation_synergy'" in said
    before, after = (float(x) for x in re.findall(r"5-NN .* (\d\.\d+)", said))
    assert after > before + 0.2
    promised = [float(x) for x in re.findall(r"# about (\d\.\d+)$", loop, re.M)]
    assert [before, after] == pytest.approx(promised, abs=0.06)
    assert not list(tmp_path.iterdir()), "a training loop of one's own writes nothing"


def test_the_decomposition_is_right(tmp_path):
    _, pid, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    found = [float(x) for x in re.findall(r"tensor\(([\d.]+)", run(pid, tmp_path))]
    assert found == pytest.approx([1, 0.5], abs=1e-6)


def test_the_audit_reads_any_encoder(tmp_path):
    *_, audit = re.findall(r"```python\n(.*?)```", README, re.S)
    given = "import torch\nencoder, images = torch.nn.Flatten(), torch.rand(60, 3, 8, 8)\n"
    said = run(given + audit.replace("images)", "images, pairs=100)"), tmp_path)
    assert re.search(r"possible +R +U1 +U2 +S", said) and "flip" in said


def test_tables_are_the_figures():
    assert README == fill_markers(README), "run nbs/make_figures.ipynb"
    assert all(f"| `{name}` | {row.title} |" in README for name, row in LOSS_TABLE.items())


def test_every_verb_is_named():
    table = README.split("## One command")[1].split("|---|---|")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.M)) == set(VERBS)


@pytest.mark.parametrize("path", [ROOT / "README.md", *READING], ids=lambda p: p.stem)
def test_files_named_exist(path):
    text = README if path.suffix == ".md" else "\n".join(cells(path))
    named = re.findall(r"\]\(((?!http)[^)]+)\)", text)
    for target in named:
        assert (path.parent / target).exists(), target
    assert any(target.endswith(".png") for target in named), "a picture"


@pytest.mark.parametrize("path", READING, ids=lambda p: p.stem)
def test_notebooks_for_reading_are_complete(path):
    """Their numbers are those of the figures, every picture is a committed one, and nothing is stored from a run."""
    assert fill_notebook(path) == path.read_text(), "run nbs/make_figures.ipynb"
    text = "\n".join(cells(path))
    known = json.loads((ROOT / "figures/manifest.json").read_text())
    pictures = re.findall(r"!\[[^\]]+\]\(\.\./figures/(\w+)\.png\)", text)
    assert pictures and set(pictures) <= set(known)
    assert "savefig" not in "\n".join(cells(path, "code"))
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
    # a number of a result in prose is filled in, not typed
    said = re.sub(MARKER, "", text, flags=re.S)
    assert not re.findall(r"[-+]\d+\.\d+ points|\d+\.\d+ ± \d", said)


def test_results_open_with_the_answer():
    first = cells(ROOT / "nbs/2_results.ipynb")[0]
    answer, picture = first.split("![", 1)
    assert len(re.findall(r"^\d\. ", answer, re.M)) == 5 and "?" in answer.split("\n1. ")[0]
    assert picture.count("![") == 0


def test_results_keep_what_readme_leaves_to_them():
    text = "\n".join(cells(ROOT / "nbs/2_results.ipynb"))
    assert all(f"--task {task}" in text for task in TASK_TABLE)
