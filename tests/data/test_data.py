"""Datasets beyond the embedded one: torchvision's CIFAR-10, and splits that no run can change."""
import numpy as np
import pytest
import torch

from pid_ssl.data import sources as data_sources
from pid_ssl.data import DataError, ViewMaker, load_dataset


@pytest.fixture
def torchvision_cifar(monkeypatch, tmp_path):
    """torchvision's CIFAR-10 as documented: .data (n, 32, 32, 3) uint8 and .targets; RuntimeError without files."""

    class Fake:
        def __init__(self, root, train, download):
            if not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            rng = np.random.default_rng(train)
            n = 500 if train else 100
            self.data, self.targets = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), [i % 10 for i in range(n)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr(data_sources, "data_folders", lambda data_dir=None: [tmp_path])
    return Fake


def test_cifar10_from_torchvision(torchvision_cifar):
    with pytest.raises(DataError, match="download=True"):
        load_dataset("cifar10")
    d = load_dataset("cifar10", download=True)
    assert {s: tuple(x.shape) for s, x in d.images.items()} == {
        s: (n, 3, 32, 32) for s, n in (("train", 450), ("val", 50), ("test", 100))
    }
    raw = torchvision_cifar("", False, True)
    assert torch.equal(d.images["test"][3], torch.from_numpy(raw.data[3].transpose(2, 0, 1)))
    assert d.labels["test"].tolist() == raw.targets
    assert load_dataset("cifar10", image_size=16, download=True).images["val"].shape == (50, 3, 16, 16)


def test_validation_and_test_do_not_depend_on_the_training_size():
    a, b = load_dataset("digits"), load_dataset("digits", train_size=100)
    for split in ("val", "test"):
        assert torch.equal(a.images[split], b.images[split])
    rows = {im.numpy().tobytes() for im in a.images["train"]}
    assert all(im.numpy().tobytes() in rows for im in b.images["train"]), "of train, never of validation or test"


def test_views_differ_between_images_and_calls_and_seeds():
    x = load_dataset("digits").images["train"][:1].repeat(50, 1, 1, 1)
    views = ViewMaker("digits", [0.0], [1.0], seed=3)
    v = views(x)
    assert len({row.numpy().tobytes() for row in v}) == 50, "each image has its own parameters"
    assert not torch.equal(v, views(x)) and torch.equal(v, ViewMaker("digits", [0.0], [1.0], seed=3)(x))
    assert not torch.equal(v, ViewMaker("digits", [0.0], [1.0], seed=4)(x))
