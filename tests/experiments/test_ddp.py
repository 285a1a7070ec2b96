"""Several processes are one: the same values, gradients and weights as a single process, one writer, one end."""
import copy
import os
import signal
import socket
import subprocess
import sys
import time

import fault_harness
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from fault_harness import ARGS, Run, context, wait_until_stopped
from torch import nn

from pid_ssl.config import Config, as_arguments, resolve
from pid_ssl.data import load_dataset
from pid_ssl.experiments import processes as trainers_ddp
from pid_ssl.experiments import training as trainers_base
from pid_ssl.experiments.processes import GlobalBatchNorm, Processes, share_batchnorm
from pid_ssl.experiments.training import Pretraining
from pid_ssl.losses import LOSSES
from pid_ssl.records import load_checkpoint, load_record, lock_run, run_id

N, D = 32, 4
# name of the loss, its arguments, targets it gets
VARIANTS = {
    "barlow": ("barlow", {}, 0),
    "vicreg": ("vicreg", {}, 0),
    "simclr": ("simclr", {}, 0),
    "wmse": ("wmse", dict(whitening_size=16, whitening_iters=2), 0),
    "byol": ("byol", dict(dim=D, hidden=8), 2),
    "pid coordinate": ("pid", dict(estimator="coordinate", covariance_momentum=0.9), 1),
    "pid coordinate, crossed targets": ("pid", dict(estimator="coordinate", pairing="cross"), 2),
    "pid gaussian": ("pid", dict(estimator="gaussian", covariance_momentum=0.9), 1),
    "pid gaussian, two targets": ("pid", dict(estimator="gaussian", pairing="mean"), 2),
    "pid infonce": ("pid", dict(estimator="infonce", dim=D, width=8), 1),
    "pid_barlow": ("pid_barlow", {}, 1),
    "pid_barlow, two targets": ("pid_barlow", {}, 2),
    "pid_wmse": ("pid_wmse", dict(whitening_size=16, w_r=1.0), 1),
    "pid_wmse, two targets": ("pid_wmse", dict(whitening_size=16, w_r=1.0, pairing="mean"), 2),
}


def loss_step(variant, dtype, group=Processes()):
    """Value, gradients and buffers after two calls, of an encoder and of the loss's own networks, from these rows."""
    name, arguments, targets = VARIANTS[variant]
    g = torch.Generator().manual_seed(2)
    x1, x2, *t = (group.rows(torch.randn(N, k, generator=g).to(dtype)) for k in (6, 6, *[D] * targets))
    torch.manual_seed(1)
    # bounded, so that float32 can be held to 1e-5
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, D)).to(dtype)
    loss = LOSSES[name](**arguments).to(dtype)
    encoder = group.prepare(encoder, "cpu")
    params = [*encoder.parameters(), *group.prepare(loss).parameters()]
    for _ in range(2):
        for p in params:
            p.grad = None
        value = loss(*encoder(torch.cat([x1, x2])).chunk(2), *t)
        value.backward()
        group.average(params)
    return [value.detach(), *loss.terms.values(), *(p.grad for p in params), *encoder.buffers(), *loss.buffers()]


def plain_embed(config, dataset):
    """No batch norm, and no last bias, whose gradient would be rounding noise that AdamW enlarges."""
    torch.manual_seed(config.seed)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.Tanh(), nn.Flatten())
    encoder.num_features = 72
    return nn.Sequential(encoder, nn.Linear(72, 8, bias=False))


# how whole steps are compared: the encoder, settings
TRAINED = {
    "no batch norm": (plain_embed, dict(form="target", estimator="gaussian", target="ema_third")),
    "batch norm": (trainers_base.build_embed, dict(form="target", estimator="gaussian", target="ema_third")),
    "relation": (trainers_base.build_embed, dict(form="relation")),
}


def trained(name, group=Processes()):
    """Everything that eight steps leave behind."""
    embed, settings = TRAINED[name]
    config = resolve(Config(**ARGS | settings | dict(loss="pid", train_size=128, batch_size=32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers_base, "build_embed", embed)
        state = Pretraining(config, load_dataset("digits", train_size=128), "cpu", group)
    rows = []
    for _ in range(2):
        rows.append(list(state.epoch().values()))
        state.history.append({})
    weights = [v for m in (state.embed, state.loss, state.teacher) if m is not None for v in m.state_dict().values()]
    return [torch.tensor(rows), *weights], state.views.state(), torch.get_rng_state()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank, size, port):
    place = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    return {k: str(v) for k, v in place.items()} | dict(MASTER_ADDR="127.0.0.1")


def compare_worker(rank, size, port, folder):
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    with trainers_ddp.join_processes("cpu") as group:
        out = {(v, dtype): loss_step(v, dtype, group) for v in VARIANTS for dtype in (torch.float64, torch.float32)}
        out |= {name: trained(name, group) for name in TRAINED}
        # one process fails: all do, with its error
        for error in (trainers_base.ConfigError("field", 1, "2"), OSError("disk")):
            with pytest.raises(type(error), match=str(error)), group.together():
                if rank == 1:
                    raise error
        with pytest.raises(ValueError, match="step of process 1: got 1; accepted: 0"):
            group.agree(step=rank)
        assert group.largest(rank) == size - 1
    assert not dist.is_initialized()
    torch.save(out, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes computed, each."""
    folder, port = tmp_path_factory.mktemp("pair"), free_port()
    processes = [context.Process(target=compare_worker, args=(rank, 2, port, str(folder))) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(600)
    assert [p.exitcode for p in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_loss_is_compared():
    assert {name for name, _, _ in VARIANTS.values()} == set(LOSSES)


def close(got, want, tolerance):
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want)):
        difference = (x.double() - y.double()).abs().max() if x.shape == y.shape and x.numel() else 0
        assert x.shape == y.shape and torch.allclose(x.double(), y.double(), tolerance, tolerance), (i, difference)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_whole_batch(variant, dtype, tolerance, pair):
    want = loss_step(variant, dtype)
    for got in pair:
        close(got[variant, dtype], want, tolerance)


@pytest.mark.parametrize("name", TRAINED)
def test_training_gives_the_same_weights(name, pair):
    want, views, random = trained(name)
    for got in pair:
        close(got[name][0], want, 1e-5)
        assert all(torch.equal(got[name][1][k], v) for k, v in views.items()) and torch.equal(got[name][2], random)
    assert all(torch.equal(x, y) for x, y in zip(pair[0][name][0], pair[1][name][0])), "the two do not drift apart"


def test_global_batchnorm_is_batchnorm_in_one_process():
    torch.manual_seed(0)
    maps = nn.BatchNorm2d(3, momentum=None), torch.randn(8, 3, 4, 4)
    for plain, x in ((nn.BatchNorm1d(3), torch.randn(8, 3)), maps):
        with torch.no_grad():
            plain.weight.uniform_()
            plain.bias.uniform_()
        ours = share_batchnorm(nn.Sequential(copy.deepcopy(plain)), "cpu")
        assert isinstance(ours[0], GlobalBatchNorm)
        for _ in range(2):
            assert torch.allclose(ours(x), plain(x), atol=1e-6)
        assert all(torch.allclose(a, b) for a, b in zip(ours[0].state_dict().values(), plain.state_dict().values()))
        assert ours(x.bfloat16()).dtype == torch.bfloat16


# whole runs


def impatient(home):
    trainers_ddp.STUCK_SECONDS = 0.5


fault_harness.FAULTS["impatient"] = impatient


def member(rank, size, port, *rest):
    os.environ.update(environment(rank, size, port))
    fault_harness.child(*rest)


class Team(Run):
    """One run in two processes; faults are given by rank."""

    def begin(self, faults={}):
        port, processes = free_port(), []
        self.logs = [self.home.with_name(f"{self.home.name}-{rank}.log") for rank in range(2)]
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            fault, *parameters = faults.get(rank, [None])
            args = (rank, 2, port, str(self.home), self.args, str(log), fault, parameters)
            processes.append(context.Process(target=member, args=args))
            processes[-1].start()
        return processes

    def end(self, processes):
        for p in processes:
            p.join(600)
        assert all(p.exitcode is not None for p in processes), "hangs"
        return [p.exitcode for p in processes], [log.read_text() for log in self.logs]

    def start(self, faults={}):
        return self.end(self.begin(faults))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in a single process."""
    run = Run(tmp_path_factory.mktemp("whole") / "home")
    status, text = run.start()
    assert status == 0, text
    return run


@pytest.fixture
def team(tmp_path):
    return Team(tmp_path / "home")


def same_result(run, whole):
    (path,) = run.records
    got, want = load_record(path), load_record(whole.records[0])
    assert got.run_id == want.run_id, "the number of processes is not part of it"
    weights = [load_checkpoint(r.home / "data/checkpoints" / got.run_id / "final")[0] for r in (run, whole)]
    close(*([v for k in ("encoder", "projector") for _, v in sorted(w[k].items())] for w in weights), 1e-5)
    assert got.metrics == pytest.approx(want.metrics, abs=1e-4) and len(got.history) == len(want.history)
    assert all(x == pytest.approx(y, rel=1e-4, abs=1e-4) for x, y in zip(got.history, want.history))
    assert not [p.name for p in run.home.rglob("*") if ".tmp-" in p.name or p.name.startswith("epoch-")]
    return got


def test_a_run_in_two_processes(team, whole):
    status, (first, second) = team.start()
    assert status == [0, 0], first + second
    assert "cpu, 2 processes" in first and "epoch 3/3" in first and "epoch" not in second and "record" not in second
    assert same_result(team, whole).provenance["processes"] == 2
    assert load_record(whole.records[0]).provenance["processes"] == 1
    status, (first, second) = team.start()
    assert status == [0, 0] and "is finished" in first and "finished" not in second


def test_a_signal_to_one_process_stops_both_at_the_same_step(team, whole):
    status, logs = team.start({1: ["signal_at", 2, int(signal.SIGTERM)]})
    assert status == [143, 143] and not team.records
    for text in logs:
        assert "stopped by SIGTERM" in text and "saved after epoch 1 of 3, step 1 of " in text
        assert "Traceback" not in text
    (folder,) = team.checkpoints[-1:]
    assert load_checkpoint(folder)[1]["step"] == 3
    # and one process alone goes on with it
    alone = Run(team.home)
    status, text = alone.start()
    assert status == 0 and "resumed after epoch 1 of 3, step 1 of " in text
    same_result(alone, whole)


def test_a_killed_process_ends_the_run(team, whole):
    status, (first, _) = team.start({1: ["signal_at", 3, int(signal.SIGKILL)]})
    assert status == [6, -signal.SIGKILL]
    words = "another process of this run has ended", "is saved after epoch 1 of 3", "the same call goes on there"
    assert all(w in first for w in words) and "Traceback" not in first
    assert [p.name for p in team.checkpoints] == ["epoch-000001"] and not team.records
    status, (first, second) = team.start()
    assert status == [0, 0] and "resumed after epoch 1 of 3\n" in first, first + second
    same_result(team, whole)


def test_a_process_that_hangs_does_not_keep_the_other_from_ending(team):
    processes = team.begin({0: ["impatient"], 1: ["signal_at", 3, int(signal.SIGSTOP)]})
    deadline = time.time() + 60
    wait_until_stopped(processes[1].pid)
    while time.time() < deadline and "epoch 1/3" not in team.logs[0].read_text():
        time.sleep(0.02)
    assert "epoch 1/3" in team.logs[0].read_text(), "a log is written while the run goes on"
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(600)
    processes[1].kill()
    status, (first, _) = team.end(processes)
    assert status[0] == 143 and "stopped by SIGTERM while waiting for another process" in first
    assert "is saved after epoch 1 of 3" in first
    assert [p.name for p in team.checkpoints] == ["epoch-000001"]


def test_an_error_of_the_writer_ends_both(team):
    status, logs = team.start({0: ["full_disk", "header.json"]})
    assert status == [4, 4] and all("No space left on device" in text and "Traceback" not in text for text in logs)


def test_a_batch_that_cannot_be_shared(team):
    team.args = dict(batch_size=33)
    status, logs = team.start()
    message = "batch_size: got 33; accepted: a multiple of 2, the number of processes, from 4: 32 or 34 are near"
    assert status == [2, 2] and all(message in text for text in logs)


def test_a_second_start_is_told_of_the_first(team):
    config = resolve(Config(**ARGS, home=str(team.home)))
    rid = run_id(config, load_dataset("digits").content_hash, "cpu")
    with lock_run(config, rid):
        status, logs = team.start()
    message = f"run {rid} is being made by process {os.getpid()}"
    assert status == [5, 5] and all(message in text and "Traceback" not in text for text in logs)


SCRIPT = """
import os, runpy, signal
import fault_harness
if os.environ["RANK"] == "1": fault_harness.signal_at("", 3, signal.SIGKILL)
runpy.run_module("pid_ssl.trainers", run_name="__main__")
"""


def test_torchrun(team, whole):
    """What torchrun makes of a killed process; the first says where the same command goes on."""
    script = team.home.with_name("script.py")
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests/harness'}")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, str(script), *as_arguments(ARGS | dict(home=team.home))]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 1 and "is saved after epoch 1 of 3" in out.stderr and "SIGKILL" in out.stderr
    status, (first, _) = team.start()
    assert status == [0, 0] and "resumed after epoch 1 of 3\n" in first
    same_result(team, whole)
