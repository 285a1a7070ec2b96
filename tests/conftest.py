import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of its own for records and checkpoints."""
    monkeypatch.delenv("IN_TEST", raising=False)
    return tmp_path / "home"
