"""The report is one whole page: nothing to load, nothing left out, every link inside it leads somewhere."""
import html
import importlib
import json
import re

import pytest
from conftest import ROOT

pytest.importorskip("latex2mathml", reason="extra report")
from pid_ssl.paper.report import build_report, main  # noqa: E402

MODULES = sorted(p.stem for p in (ROOT / "pid_ssl").glob("[a-z]*.py"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """With the notebooks as they are stored: running them is what nbdev_test does."""
    return build_report(tmp_path_factory.mktemp("report"), execute=False).read_text()


def test_it_loads_nothing(page):
    assert not re.findall(r"<(?:script|link|iframe)\b", page)
    assert not [x for x in re.findall(r'src="([^"]*)', page) if not x.startswith("data:")]
    assert not re.findall(r"@import|url\((?!['\"]?data:)", page)


def test_links_lead_somewhere(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), [x for x in ids if ids.count(x) > 1][:5]
    assert not {html.unescape(x) for x in re.findall(r'href="#([^"]+)"', page)} - set(map(html.unescape, ids))
    for path in set(re.findall(r'href="[^"#:]*/nbs/([^"]+)"', page)):
        assert (ROOT / "nbs" / path).is_file(), path


def test_notebooks_figures_and_names_are_all_there(page):
    for path in (ROOT / "nbs").glob("1[0-9]_*.ipynb"):
        title = "".join(json.loads(path.read_text())["cells"][0]["source"]).split("\n")[0].removeprefix("# ").split("`")[0]
        assert f'<h1 id="{path.stem}-' in page and title in page
    for name, entry in json.loads((ROOT / "figures/manifest.json").read_text()).items():
        at = page.split(f'id="figures-{name}"')[1].split("</figure>")[0]
        assert html.escape(entry["caption"], quote=False) in at and ("<table" in at or "data:image/png" in at)
    for stem in MODULES:
        for name in getattr(importlib.import_module(f"pid_ssl.{stem}"), "__all__", []):
            assert f'id="api-{stem}.{name}"' in page, f"{stem}.{name}"


def test_comments_stand_beside_parameters(page):
    at = page.split('id="api-runs_sweep.run_sweep"')[1].split("</section>")[0]
    assert re.search(r"<code>workers</code></td><td>int</td><td>runs at a time</td>", at)
    config = page.split('id="api-config.Config"')[1].split("</section>")[0]
    assert re.search(r"<code>beta</code></td><td>float</td><td>weight of redundancy minus synergy", config)


def test_formulas_are_drawn(page):
    body = re.sub(r"<(pre|code)\b.*?</\1>", "", page.split("</nav>")[1].split('<h1 id="figures"')[0], flags=re.S)
    assert "<math" in body and "\\frac" not in body and not re.search(r"formula\d+x", page)


def test_a_failing_notebook_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = pid_ssl\n")
    cell = dict(cell_type="code", id="a", metadata={}, source="raise ValueError('no records')", outputs=[], execution_count=None)
    (tmp_path / "nbs/10_broken.ipynb").write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell])))
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path / "out")]) == 1
    assert "10_broken.ipynb: ValueError: no records" in capsys.readouterr().err
