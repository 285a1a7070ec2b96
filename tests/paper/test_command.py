"""`pid_ssl VERB`: help of every verb, and what is wrong in one line with its exit status."""

import subprocess
import sys

import pytest
from conftest import ROOT

from pid_ssl.__main__ import VERBS, main

WRONG = {
    "pretrain": (["--loss", "lossx"], "loss: got 'lossx'; accepted: barlow"),
    "measure": (["--task", "classify"], "run: got ''; accepted: the id of a pretraining run"),
    "audit": (["nowhere", "--images", "digits"], "nowhere"),
    "controlled": (["--arm", "clop"], "arm: got 'clop'; accepted: clip"),
    "sweep": (["nowhere.toml"], "nowhere.toml"),
    "gpu": (["--minutes", "0"], "minutes: got 0.0; accepted: a number above 0"),
    "reproduce": (["no_figure", "--plan"], "no_figure"),
    "copies": (["nothing", "nowhere"], "nothing"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert not end.value.code
    assert f"usage: pid_ssl {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", WRONG)
def test_what_is_wrong_is_one_line(verb, capsys):
    argv, words = WRONG[verb]
    assert main([verb, *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_an_unknown_verb_is_told_the_nearest():
    out = subprocess.run(
        [sys.executable, "-m", "pid_ssl", "sweap"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 2 and not out.stdout
    assert out.stderr.startswith("error: verb: got 'sweap'; accepted: did you mean 'sweep'? the verbs are pretrain")
