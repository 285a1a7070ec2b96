"""Seconds a training step takes on a CUDA GPU, eager and compiled: the first thing to know before long runs there.

    python tests/harness/gpu_harness.py [--dataset cifar10] [--steps 60] [--out data/benchmarks/gpu_speed.json]

Each loss with the defaults of the `gpu` preset, or of the device's own where there is no CUDA, as a rehearsal.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pid_ssl.config import Config, resolve, step_images
from pid_ssl.data import load_dataset
from pid_ssl.experiments.training import Pretraining, device_class
from pid_ssl.records import device_name, git_state

ROOT = Path(__file__).resolve().parents[2]
LOSSES, WARM_UP = ("barlow", "pid_barlow", "pid"), 10


def seconds_a_step(config, data, device, steps):
    """Median over ten parts of the steps, after a warm-up that compiles; and how long that took."""
    state = Pretraining(config, data, device)
    images = state.images[: step_images(config)].to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step():
        loss = state.batch_loss(images)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()

    begin, parts = time.perf_counter(), []
    for _ in range(WARM_UP):
        step()
    wait()
    warm = time.perf_counter() - begin
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(max(1, steps // 10)):
            step()
        wait()
        parts.append((time.perf_counter() - start) / max(1, steps // 10))
    return sorted(parts)[len(parts) // 2], warm, state.steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "data/benchmarks/gpu_speed.json")
    given = parser.parse_args()
    rows, device = [], device_class(Config())
    for compiled in (False, True):
        for loss in LOSSES:
            config = resolve(Config(loss=loss, dataset=given.dataset, compiled=compiled), device)
            data = load_dataset(config.dataset, config.image_size, config.train_size)
            step, warm, steps = seconds_a_step(config, data, device, given.steps)
            rows.append(
                dict(loss=loss, compiled=compiled, s_per_step=step, warm_up_s=warm, steps_an_epoch=steps)
                | dict(epochs=config.epochs, encoder=config.encoder, batch_size=config.batch_size, views=config.views)
            )
            print(rows[-1], flush=True)
    about = dict(device=device, processor=device_name(device), versions=dict(torch=torch.__version__), **git_state())
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    about |= dict(date=time.strftime("%Y-%m-%d"), peak_memory_bytes=memory)
    given.out.write_text(json.dumps(dict(rows=rows, provenance=about), indent=1) + "\n")


if __name__ == "__main__":
    main()
