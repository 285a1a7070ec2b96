"""Measures what a net that is trained for nothing else tells of one view: of images it was trained on, and of others.

    python tests/harness/traces_harness.py [IMAGES EPOCHS]

How a view was cropped and coloured shows in traces of interpolation and compression, or a net knows the image by heart:
then it tells more of the images it was trained on. A small net whose stem keeps all pixels or half of them, views of
the cifar policy, CIFAR-10. Writes `data/benchmarks/traces_cifar10.json`.
"""
import datetime
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# pixels a side of the images, and those that the stem is made for
SIDES = {"32 px, all pixels": (32, 8), "32 px, half of them": (32, 32), "16 px, half of them": (16, 16)}
BATCH, HELD_OUT, PASSES = 256, 4096, 2


def batches(images, rng=None):
    import torch

    order = torch.arange(len(images)) if rng is None else torch.randperm(len(images), generator=rng)
    return (images[rows] for rows in order.split(BATCH) if len(rows) == BATCH)


class Reader:
    """A net and a head that tell the own parameters of a view."""

    def __init__(self, side, stem, steps):
        import torch

        from pid_ssl.config import Config, resolve
        from pid_ssl.data.parameters import relation_table
        from pid_ssl.experiments.optim import build_optimizer
        from pid_ssl.losses.relation import Teller
        from pid_ssl.models import build_encoder

        torch.manual_seed(0)
        self.net = build_encoder("small", stem, 3, 32).to(memory_format=torch.channels_last)
        self.head = Teller(self.net.num_features, relation_table("cifar", "own", 3, side))
        config = resolve(Config(loss="barlow", dataset="cifar10", preset="lab"))
        self.peak, self.step, self.steps = config.lr, 0, steps
        self.optimizer = build_optimizer(config, [*self.net.parameters(), *self.head.parameters()], "cpu")

    def errors(self, view, images):
        import torch

        from pid_ssl.data.parameters import own

        v, omega = view(images, told=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.net(v.contiguous(memory_format=torch.channels_last))
        return self.head.errors(own(omega, view.policy), h.float())

    def learn(self, view, images):
        from pid_ssl.experiments.training import learning_rate

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.peak, 0.1)
        self.step += 1
        self.optimizer.zero_grad()
        (-self.head.nats(self.errors(view, images)).sum()).backward()
        self.optimizer.step()

    def tells(self, view, images):
        """Nats by column, of fresh views, the net in evaluation mode."""
        import torch

        parts = self.net, self.head
        for part in parts:
            part.eval()
        with torch.no_grad():
            errors = torch.stack([self.errors(view, x) for _ in range(PASSES) for x in batches(images)]).mean(0)
        for part in parts:
            part.train()
        return dict(zip(self.head.columns, self.head.nats(errors).tolist()))


def read(side, stem, number, epochs):
    import torch

    from pid_ssl.data import ViewMaker, load_dataset

    data = load_dataset("cifar10", side, number)
    images, others = data.images["train"], data.images["test"][:HELD_OUT]
    view, rng = ViewMaker("cifar", data.mean, data.std), torch.Generator().manual_seed(0)
    reader = Reader(side, stem, epochs * (len(images) // BATCH))
    for epoch in range(epochs):
        for x in batches(images, rng):
            reader.learn(view, x)
        print(f"{side} px, stem {stem}: epoch {epoch + 1}", flush=True)
    return dict(trained_on=reader.tells(view, images[:HELD_OUT]), others=reader.tells(view, others))


def main(number=10_240, epochs=24):
    import torch

    from pid_ssl.data import load_dataset
    from pid_ssl.records import device_name, git_state

    torch.set_num_threads(1)
    about = dict(images=int(number), epochs=int(epochs), held_out=HELD_OUT, policy="cifar", width=32)
    origin = dict(device=device_name("cpu"), threads=1, data=load_dataset("cifar10").note, **git_state(ROOT),
                  date=datetime.date.today().isoformat(), versions={p: version(p) for p in ("torch", "numpy")})
    start, rows = time.process_time(), {}
    for name, (side, stem) in SIDES.items():
        rows[name] = read(side, stem, int(number), int(epochs))
        record = dict(provenance=origin | dict(cpu_seconds=time.process_time() - start), about=about, nats=rows)
        (ROOT / "data/benchmarks/traces_cifar10.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
