"""JupyterLab in a real browser: each notebook for reading and the experiment, opened and run as a reader does.

Not part of the plain suite: `pip install -e ".[browser]" && python -m pytest -m browser`, with Chromium or Chrome
installed, or after `playwright install chromium`. PID_SSL_SCREENSHOTS names a folder that gets a picture of each page.
"""
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

from pid_ssl.paper.report import find_browser

pytestmark = pytest.mark.browser
READING = sorted((ROOT / "nbs").glob("[0-9]_*.ipynb"))
NOTEBOOKS = [*READING, ROOT / "nbs/run_experiment.ipynb"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # outputs out of sight are on the page too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
IDLE = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
ERROR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[browser]"')
    found = find_browser()
    if not found:
        pytest.skip("no browser: install Chromium, or playwright install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        print(f"{found} {browser.version}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a copy of the project, since it saves what is open; its kernels have this clone's package."""
    folder = tmp_path_factory.mktemp("lab")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for f in filter(None, files.split("\n")):
        if (ROOT / f).is_file() and not f.startswith(("pid_ssl/", "tests/")):
            (folder / "project" / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f, folder / "project" / f)
    for name, value in SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT)}
    env |= {f"JUPYTER_{k}_DIR": str(folder / k.lower()) for k in ("CONFIG", "RUNTIME")}
    env |= {f"JUPYTERLAB_{k}_DIR": str(folder / k.lower()) for k in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder / 'project'}"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder / "project", env=env, stdout=log, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.time() + 120
    while True:
        assert server.poll() is None and time.time() < deadline, (folder / "log").read_text()
        try:
            urllib.request.urlopen(f"{url}/api", timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    yield url
    server.terminate()
    server.wait(60)


def cells(path, kind):
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def draws(path):
    """Whether a notebook's code makes pictures."""
    return bool(re.search(r"\bplt\.|plot_|Image\(", "\n".join(cells(path, "code"))))


def opened(browser, lab, path):
    """A page of JupyterLab with a notebook whose kernel is idle."""
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    page.set_default_timeout(60_000)
    page.goto(f"{lab}/lab/tree/nbs/{path.name}?reset", wait_until="domcontentloaded")
    page.wait_for_selector(IDLE, state="attached")
    page.wait_for_timeout(5000)  # after the kernel's first idle JupyterLab is still busy with itself
    return page


def screenshot(page, name):
    if not (folder := os.environ.get("PID_SSL_SCREENSHOTS")):
        return
    outer = "[...document.querySelectorAll('.jp-WindowedPanel-outer, .jp-Notebook, body')]"
    height = page.evaluate(f"Math.max(...{outer}.map(e => e.scrollHeight))")
    page.set_viewport_size(dict(width=1400, height=min(16_000, height + 150)))
    page.evaluate(f"{outer}.forEach(e => e.scrollTop = 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=Path(folder) / f"{name}.png")


def widths(page, selector):
    """Natural widths of the pictures that are shown; 0 for one that is not there."""
    return page.eval_on_selector_all(selector, "found => found.map(e => e.complete ? e.naturalWidth : 0)")


@pytest.mark.parametrize("path", READING, ids=lambda p: p.stem)
def test_complete_without_being_run(path, browser, lab):
    """Opened in JupyterLab, and as plain Markdown: every picture is there, and no marker can be seen."""
    text = "\n\n".join(cells(path, "markdown"))
    pictures = len(re.findall(r"!\[[^\]]*\]\(", text))
    page = opened(browser, lab, path)
    page.wait_for_timeout(2000)
    found = widths(page, ".jp-NotebookPanel .jp-MarkdownOutput img")
    assert len(found) == pictures and all(found), found
    assert "<!--" not in page.locator(".jp-NotebookPanel").inner_text()
    assert not page.locator(".jp-NotebookPanel .jp-OutputArea-output").count(), "nothing was run"
    screenshot(page, f"{path.stem}-unrun")
    page.close()
    body = importlib.import_module("nbconvert.filters").markdown2html(text)
    page = browser.new_page(viewport=dict(width=1000, height=1000))
    plain = ROOT / "nbs" / f".{path.stem}-{os.getpid()}.html"  # beside the notebook, where its links lead
    try:
        plain.write_text(f'<meta charset="utf-8"><base href="{path.as_uri()}"><body>{body}</body>')
        page.goto(plain.as_uri())
        found = widths(page, "img")
        assert len(found) == pictures and all(found), found
        screenshot(page, f"{path.stem}-plain")
    finally:
        plain.unlink(missing_ok=True)
    page.close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_in_jupyterlab(path, browser, lab):
    page = opened(browser, lab, path)
    code, deadline = ".jp-NotebookPanel .jp-CodeCell .jp-InputArea-prompt", time.time() + 500
    count = lambda selector: page.locator(f".jp-NotebookPanel {selector}").count()
    prompts = lambda: [x.strip() for x in page.locator(code).all_inner_texts()]
    while not all(re.fullmatch(r"\[\d+\]:", x) for x in prompts()) and not count(ERROR):
        # once, unless JupyterLab dropped some of it, as it does while it starts
        if count(IDLE) and "[*]:" not in prompts():
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)
        assert time.time() < deadline, f"not done: {prompts()}"
    page.wait_for_selector(IDLE, state="attached")
    assert len(prompts()) == len(cells(path, "code"))
    page.wait_for_timeout(1000)  # the last output is drawn
    screenshot(page, path.stem)
    assert count(ERROR) == 0, page.locator(ERROR).all_inner_texts()[0][-2000:]
    said = page.locator('.jp-NotebookPanel [data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert not [x for x in said if "Traceback" in x or "Warning" in x], said
    assert "Error displaying widget" not in page.locator(".jp-NotebookPanel").inner_text()
    drawn = widths(page, ".jp-NotebookPanel .jp-OutputArea-output img")
    assert all(drawn) and (bool(drawn) or not draws(path)), drawn
    page.close()
