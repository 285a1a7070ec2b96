import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def random_images(rng, n):
    """Random images of 8 by 8 pixels as the rows of a Parquet file hold them."""
    rows = []
    for image in rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    return rows


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of its own for records and checkpoints."""
    monkeypatch.delenv("IN_TEST", raising=False)
    return tmp_path / "home"
