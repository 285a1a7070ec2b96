"""Seconds a training step takes, loss by loss: eager and compiled on a CUDA GPU, the first thing to know before long
runs there; processor seconds, one loss after another in turns, on a CPU. And the largest memory: what a loss takes
of the GPU (the first with what CUDA's libraries keep for all), or that of a process with nothing else.

    python tests/harness/step_harness.py [--dataset cifar10] [--steps 60] [--out data/benchmarks/gpu_speed.json]
    python tests/harness/step_harness.py --turns 5 --out data/benchmarks/relation_speed.json

Each loss with the defaults of the `gpu` preset, or of the device's own where there is no CUDA.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import torch

from pid_ssl.config import Config, resolve, step_images
from pid_ssl.data import load_dataset
from pid_ssl.experiments.process import stop_with_parent
from pid_ssl.experiments.training import Pretraining, device_class
from pid_ssl.records import device_name, git_state

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = {"barlow": {}, "pid_barlow": {}, "pid": {}, "wmse": {}, "pid_wmse": {}}
ON_CPU = {"barlow": {}, "pid_barlow": {}, "barlow, 4 views": {"views": 4}, "pid": {}, "wmse": {}, "pid_wmse": {}}
WARM_UP = 10


class Steps:
    """Training steps of a config on one batch."""

    def __init__(self, config, data, device):
        before = self._memory(device)
        self.state, self.device = Pretraining(config, data, device), device
        self.images = self.state.images[: step_images(config)].to(device)
        begin = time.perf_counter()
        self.take(WARM_UP)
        self.warm_up = time.perf_counter() - begin
        self.memory = self._memory(device, begins=False) - before

    @staticmethod
    def _memory(device, begins=True):
        # bytes in use on a GPU, where counting begins, and at most since then; of a CPU `alone` tells
        if device != "cuda":
            return 0
        if begins:
            gc.collect()  # what an earlier one has left
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()

    def take(self, number):
        """Seconds a step: of the wall on a GPU, of the processor on a CPU, where other programs may run beside."""
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        start = clock()
        for _ in range(number):
            loss = self.state.batch_loss(self.images)
            self.state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.state.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / number


def peak_memory(config, device):
    """Largest memory of a process that takes steps of this config and nothing else."""
    steps = Steps(config, load_dataset(config.dataset, config.image_size, config.train_size), device)
    steps.take(WARM_UP)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(config, device):
    """`peak_memory` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (config, device))


def described(name, config, seconds, steps):
    """A row of the record."""
    seconds = sorted(seconds)
    row = dict(loss=name, compiled=config.compiled, s_per_step=seconds[len(seconds) // 2], s_each=seconds)
    row |= dict(warm_up_s=steps.warm_up, steps_an_epoch=steps.state.steps, epochs=config.epochs)
    row |= dict(encoder=config.encoder, optimizer=config.optimizer, batch_size=config.batch_size, views=config.views)
    return row | dict(peak_memory_bytes=steps.memory or alone(config, steps.device))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "data/benchmarks/gpu_speed.json")
    parser.add_argument("--losses", help="only these, separated by commas")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given = parser.parse_args()
    if given.with_parent:
        stop_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    rows, device = [], device_class(Config())
    if device == "cpu":
        torch.set_num_threads(1)
    settings = ON_GPU if device == "cuda" else ON_CPU
    wanted = given.losses.split(",") if given.losses else settings
    settings = {name: fields for name, fields in settings.items() if name in wanted}
    for compiled in (False, True) if device == "cuda" else (False,):
        configs, steps = {}, {}
        for name, fields in settings.items():
            plain = Config(loss=name.split(",")[0], dataset=given.dataset, compiled=compiled, **fields)
            config = configs[name] = resolve(plain, device)
            steps[name] = Steps(config, load_dataset(config.dataset, config.image_size, config.train_size), device)
        seconds = {name: [] for name in settings}
        for _ in range(given.turns):
            for name in settings:
                seconds[name].append(steps[name].take(max(1, given.steps // given.turns)))
        rows += [described(name, configs[name], seconds[name], steps[name]) for name in settings]
        print(*rows[-len(settings) :], sep="\n", flush=True)
    about = dict(device=device, processor=device_name(device), versions=dict(torch=torch.__version__), **git_state())
    about |= dict(date=time.strftime("%Y-%m-%d"))
    given.out.write_text(json.dumps(dict(rows=rows, provenance=about), indent=1) + "\n")


if __name__ == "__main__":
    main()
