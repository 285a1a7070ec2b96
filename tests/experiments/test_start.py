"""Going on from weights: what a run starts from is what it was given, is in its id, and nothing else is changed."""
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from pid_ssl.config import Config, ConfigError, identity, resolve
from pid_ssl.data import load_dataset
from pid_ssl.experiments.start import start_from
from pid_ssl.experiments.pretrain import pretrain
from pid_ssl.experiments.training import Pretraining, build_embed
from pid_ssl.models import load_encoder
from pid_ssl.records import checkpoint_folder, find_record, load_checkpoint, load_records, run_id

GIVEN = Config(loss="barlow", epochs=2, width=4, train_size=256, threads=1, projector_dim=8, device="cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return dataclasses.replace(GIVEN, home=str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def first(config):
    return pretrain(config)


@pytest.fixture(scope="module")
def exported(config, first):
    return checkpoint_folder(config, first.run_id) / "final"


def test_the_encoder_is_the_given_one_and_the_rest_that_of_the_seed(config, first, exported):
    later = resolve(dataclasses.replace(config, init=first.run_id, loss="pid", seed=3))
    data, weights = load_dataset("digits", train_size=256), start_from(later).weights
    state = Pretraining(later, data, "cpu", weights=weights)
    plain = Pretraining(dataclasses.replace(later, init=None), data, "cpu")
    stored = load_file(exported / "encoder.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in state.embed[0].state_dict().items())
    assert all(map(torch.equal, state.embed[1].parameters(), plain.embed[1].parameters()))
    assert all(map(torch.equal, state.loss.parameters(), plain.loss.parameters()))
    assert all(map(torch.equal, build_embed(later, data).parameters(), plain.embed.parameters())), "its control"
    teacher = Pretraining(dataclasses.replace(later, loss="byol"), data, "cpu", weights=weights).teacher.module[0]
    assert all(torch.equal(v, stored[k]) for k, v in teacher.state_dict().items())


def test_a_run_a_folder_and_a_file_give_the_same_run_but_for_its_name(config, first, exported, tmp_path, capsys):
    copied, bare = shutil.copytree(exported, tmp_path / "copy"), tmp_path / "net.safetensors"
    shutil.copy(exported / "encoder.safetensors", bare)
    sha256 = load_checkpoint(exported)[1]["sha256"]["encoder.safetensors"]
    made = {}
    for given in (first.run_id, str(copied), str(bare)):
        record = pretrain(dataclasses.replace(config, init=given, lr=1e-3))
        made[given] = record
        assert record.provenance["init"]["sha256"] == sha256
        assert record.config["init"] == (given if given == first.run_id else f"sha256-{sha256[:16]}")
        assert find_record(config, record.run_id).provenance["init"] == record.provenance["init"]
    assert f"from the encoder {first.run_id}" in capsys.readouterr().out
    run, folder, file = made.values()
    assert folder.run_id == file.run_id != run.run_id, "weights are known by their hash, wherever they lie"
    assert run.history == folder.history and run.metrics == folder.metrics
    again = resolve(dataclasses.replace(config, init=first.run_id, lr=1e-3))
    assert run_id(again, run.provenance["dataset_hash"], "cpu") == run.run_id
    assert not any(str(tmp_path) in str(value) for value in folder.config.values())
    begin = pretrain(dataclasses.replace(config, lr=1e-3))
    assert begin.run_id != run.run_id and "init" not in begin.provenance
    keys = [k for k in begin.metrics if k.startswith(("control_", "raw_"))]
    assert keys and all(begin.metrics[k] == run.metrics[k] for k in keys), "the controls are those of the seed"
    assert run.history[0]["loss"] < begin.history[0]["loss"]


def test_stopped_and_taken_up_it_is_the_same_run(config, first):
    config = dataclasses.replace(config, init=first.run_id, epochs=3)
    whole = pretrain(config)
    with pytest.raises(RuntimeError, match="enough"):
        pretrain(dataclasses.replace(config, force=True), lambda history, state: stop(history))
    again = pretrain(dataclasses.replace(config, force=True))
    assert again.history == whole.history and again.metrics == whole.metrics
    assert again.provenance["resumed_after_epoch"] == 2


def stop(history):
    if len(history) == 2:
        raise RuntimeError("enough")


def test_what_is_left_open_is_taken_from_the_run(config, first):
    later = dataclasses.replace(config, init=first.run_id, width=None, epochs=1)
    record = pretrain(later)
    assert (record.config["width"], record.config["encoder"], record.config["image_size"]) == (4, "small", 8)


def test_images_of_ones_own_from_committed_weights(tmp_path):
    """The way it is meant: photographs in colour, the encoder that comes with the package."""
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, 20, 24, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / f"mine/{i}.png")
    given = dict(dataset="mine", data_dir=str(tmp_path), home=str(tmp_path), loss="barlow", epochs=1, preset="cpu")
    record = pretrain(Config(**given, init="pid_cifar10", train_size=0, batch_size=16, threads=1, device="cpu"))
    header = load_checkpoint(ROOT / "data/weights/pid_cifar10")[1]
    about, start = record.provenance["init"], dict(name="pid_cifar10", loss="pid", dataset="cifar10")
    assert about == dict(start, sha256=header["sha256"]["encoder.safetensors"])
    ours, theirs = (load_encoder(at)[0] for at in (tmp_path / f"data/checkpoints/{record.run_id}/final", "pid_cifar10"))
    distance = sum((a - b).square().sum() for a, b in zip(ours.parameters(), theirs.parameters()))
    assert 0 < distance < 0.1 * sum(b.square().sum() for b in theirs.parameters()), "near where it began"


BAD = {
    "no such run": ("0" * 16, "init: got '0000000000000000'; accepted: the id of a finished run whose checkpoint is"),
    "no such file": ("nothere.safetensors", "init: got 'nothere.safetensors'; accepted: .*barlow_cifar10, pid_cifar10"),
    "another width": ("pid_cifar10", "init: got 'pid_cifar10'; accepted: weights of encoder small, width 4, .*stem"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said_before_any_work(case, config, capsys):
    given, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        pretrain(dataclasses.replace(config, init=given))
    assert "epoch" not in capsys.readouterr().out


def test_ids_of_runs_without_it_stay(config):
    assert "init" not in identity(resolve(config))


def test_weights_of_another_library(config, tmp_path):
    from torchvision.models import resnet18
    net = resnet18()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    save_file(net.state_dict(), tmp_path / "theirs.safetensors")
    later = resolve(dataclasses.replace(config, init=f"{tmp_path}/theirs.safetensors", encoder="resnet18"))
    start = start_from(later)
    assert start.check(later, 3) is None and "fc.weight" not in start.weights


def test_a_longer_schedule_of_a_finished_run_says_what_it_does(config, first, capsys):
    record = pretrain(dataclasses.replace(config, epochs=4))
    said = capsys.readouterr().out
    assert f"note: run {first.run_id} is finished with these settings and 2 epochs; 4 epochs are another run" in said
    assert f"(init={first.run_id} goes on from its encoder)" in said and len(record.history) == 4
    assert record.provenance["resumed_after_epoch"] == 0
    assert len(load_records(checkpoint_folder(config, first.run_id).parents[1] / "runs", epochs=4)) == 1
    pretrain(dataclasses.replace(config, epochs=4))
    assert "is finished with these settings" not in capsys.readouterr().out, "a finished run is found, nothing is begun"
