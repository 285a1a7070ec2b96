"""Times the gradient of convolutions' weights over narrow maps, by torch and by `models/42_narrow`, and a step of the
lab preset with the one and the other, on a processor with AMX.

    python tests/harness/narrow_harness.py

Writes `data/benchmarks/narrow_speed.json`. One thread, as runs at this preset have; the two sides take turns. Needs
CIFAR-10, see README.
"""

import contextlib
import datetime
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch

from pid_ssl.config import Config, resolve, source_hash
from pid_ssl.data import load_dataset
from pid_ssl.experiments.training import Pretraining
from pid_ssl.models.narrow import QuickConvolutions, quick_convolutions, weight_gradient
from pid_ssl.records import device_name, git_state

ROOT = Path(__file__).resolve().parents[2]
IMAGES, TURNS, STEPS = 256, 15, 15
# channels in and out, columns in, stride, kernel: the lab net at 32 and 24 px, ResNet-18's last stages, and wider maps
LAYERS = ((64, 128, 16, 2, 3), (128, 128, 8, 1, 3), (128, 256, 8, 2, 3), (256, 256, 4, 1, 3), (128, 256, 8, 2, 1),
          (64, 128, 12, 2, 3), (128, 128, 6, 1, 3), (256, 256, 3, 1, 3), (256, 512, 8, 2, 3), (512, 512, 4, 1, 3),
          (96, 96, 2, 1, 3), (64, 64, 12, 1, 3), (64, 64, 16, 1, 3))


def seconds(sides, turns):
    """Seconds of each turn of each of two calls, after one that does not count."""
    out = [[] for _ in sides]
    for turn in range(turns + 1):
        for call, times in zip(sides, out):
            start = time.perf_counter()
            call()
            if turn:
                times.append(time.perf_counter() - start)
    return out


def layer(c_in, c_out, columns, stride, kernel):
    torch.manual_seed(0)
    x, weight = torch.randn(IMAGES, c_in, columns, columns), torch.randn(c_out, c_in, kernel, kernel)
    x, weight = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, weight))
    pad = kernel // 2
    g = torch.randn_like(torch.conv2d(x, weight, None, stride, pad))
    how = [stride] * 2, [pad] * 2, (1, 1), False, (0, 0), 1, (False, True, False)
    plain = lambda: torch.ops.aten.convolution_backward(g, x, weight, None, *how)[1]
    ours = lambda: weight_gradient(x, g, weight, (stride, stride))
    apart = ((plain().float() - ours().float()).norm() / plain().float().norm()).item()
    known = dict(channels=[c_in, c_out], columns=columns, out=g.shape[3], stride=stride, kernel=kernel)
    times = dict(zip(("torch_s", "side_by_side_s"), seconds((plain, ours), TURNS)))
    return known | times | dict(relative_difference=apart)


def step(side):
    config = resolve(Config(loss="barlow", dataset="cifar10", preset="lab", threads=1))
    state = Pretraining(config, load_dataset("cifar10", config.image_size, 2048), "cpu")
    state.views.side, images = side, state.images[: config.batch_size]

    def taken(mode):
        def take():
            state.quick = mode
            loss = state.batch_loss(images)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()

        return take

    sides = taken(contextlib.nullcontext()), taken(QuickConvolutions())
    return dict(side=side or config.image_size) | dict(zip(("torch_s", "side_by_side_s"), seconds(sides, STEPS)))


if __name__ == "__main__":
    if isinstance(quick_convolutions(), contextlib.nullcontext):
        raise SystemExit("error: no AMX here, where training does not use this")
    torch.set_num_threads(1)
    about = dict(device=device_name("cpu"), cores=len(os.sched_getaffinity(0)), threads=1, images=IMAGES,
                 load_before=os.getloadavg()[0], versions=dict(torch=version("torch")), source_hash=source_hash(),
                 date=datetime.date.today().isoformat(), **git_state(ROOT))
    rows = dict(layers=[layer(*sizes) for sizes in LAYERS], steps=[step(side) for side in (24, None)])
    path = ROOT / "data/benchmarks/narrow_speed.json"
    path.write_text(json.dumps({"provenance": about, **rows}, indent=1) + "\n")
