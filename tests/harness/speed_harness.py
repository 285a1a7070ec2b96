"""Times views, training steps and evaluation against what people use today, on the machine it runs on.

    python tests/harness/speed_harness.py [view] [train] [growth] [eval]

Needs `pip install "pid_ssl[bench]"` and CIFAR-10, see README.
Writes `data/benchmarks/{view,train,growth,eval}_speed.json`. With ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell a newer processor is held to what an older one has.
Sides take turns, each turn in a process of its own, so that whatever else the machine does meets all of them and memory
is counted apart. Nothing else should run.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
BATCH, WORKERS = 256, 2


def median(values):
    return sorted(values)[len(values) // 2]


def images(size=None, count=0):
    from pid_ssl.data import load_dataset

    return load_dataset("cifar10", size, count)


class Pictures:
    """CIFAR-10 as torchvision's dataset hands it out: a PIL image made from an array, then the transform."""

    def __init__(self, images, transform, pil=True):
        self.images, self.transform, self.pil = images.permute(0, 2, 3, 1).numpy() if pil else images, transform, pil

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i]) if self.pil else self.images[i]), 0


# views: images a second


def torchvision_recipe(policy, size, pil):
    import torch
    from torchvision.transforms import v2

    reach = max(1, size // 20)
    jitter = v2.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
    steps = [v2.RandomResizedCrop(size, scale=policy.crop, antialias=True), v2.RandomHorizontalFlip(policy.flip),
             v2.RandomApply([jitter], p=policy.jitter), v2.RandomGrayscale(policy.gray)]
    if policy.blur:
        blur = v2.GaussianBlur(2 * reach + 1, policy.blur_sigma)
        steps += [v2.RandomApply([blur], p=policy.blur), v2.RandomSolarize(128, p=policy.solarize)]
    if pil:
        steps.append(v2.ToImage())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def views(side, name):
    """Images a second over 10,240 CIFAR-10 images at 32 px, after a warm-up."""
    import torch

    from pid_ssl.data.views import POLICIES, ViewMaker

    x = images(count=10_240).images["train"]
    torch.set_num_threads(THREADS)
    if side == "pid_ssl":
        make = ViewMaker(name, [0.5] * 3, [0.25] * 3)
        batches = lambda: (make(b) for b in x.split(BATCH))
    else:
        from torch.utils.data import DataLoader

        pil = side == "torchvision, PIL"
        pictures = Pictures(x, torchvision_recipe(POLICIES[name], 32, pil), pil)
        loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        batches = lambda: loader
    for _ in batches():
        pass
    start = time.perf_counter()
    for _ in batches():
        pass
    return dict(images_per_s=len(x) / (time.perf_counter() - start))


# training steps

RESNET = dict(encoder="resnet18", image_size=32, projector_hidden=2048, projector_dim=512, lambda_param=0.02)
NETS = {"ResNet-18": RESNET,
        "CPU net": dict(preset="cpu", image_size=16),
        "lab net": dict(preset="lab", early_size=0)}


def config(net, **other):
    from pid_ssl.config import Config, resolve

    fixed = dict(loss="barlow", dataset="cifar10", preset="gpu", batch_size=BATCH, train_size=10_240, policy="byol",
                 optimizer="sgd", lr=0.01)
    return resolve(Config(**fixed | NETS[net] | other))


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, stage):
        now = time.perf_counter()
        self.seconds.setdefault(stage, []).append(now - self.last)
        self.last = now


def ours(net, steps, amp="off", **other):
    """The package's own loop, timed as a whole; then the same step taken apart, and what it computes counted."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pid_ssl.config import step_images
    from pid_ssl.experiments.training import Pretraining

    torch.set_num_threads(THREADS)
    c = config(net, amp=amp, **other)
    state = Pretraining(c, images(c.image_size, c.train_size), "cpu")
    state.steps = steps
    state.epoch()  # warm-up
    state.history.append({})
    start = time.perf_counter()
    state.epoch()
    whole = (time.perf_counter() - start) / steps
    layout, rows = dict(memory_format=torch.channels_last), torch.arange(step_images(c))
    clock = Clock()
    for _ in range(max(2, steps // 2)):
        clock.last = time.perf_counter()
        batch = state.images[rows]
        v = torch.cat([state.views(batch) for _ in range(state.peers)])
        clock("views")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state.amp), state.quick:
            z = state.embed(v.contiguous(**layout)).chunk(state.peers)
        clock("forward")
        loss = state.loss(*z) if state.peers == 2 else state.loss(z)
        clock("loss")
        state.optimizer.zero_grad()
        loss.backward()
        clock("backward")
        state.optimizer.step()
        clock("optimiser")
    with FlopCounterMode(display=False) as counted:
        state.batch_loss(batch).backward()
    return dict(s_per_step=whole, stages={k: median(v) for k, v in clock.seconds.items()},
                flops=counted.get_total_flops())


def as_lab(steps):
    """The lab preset's steps of both sizes by their shares: 256 images in two steps of 128, as it is trained."""
    from pid_ssl.config import Config, resolve

    c = resolve(Config(loss="barlow", dataset="cifar10", preset="lab"))
    own = dict(batch_size=c.batch_size, optimizer=c.optimizer, lr=c.lr, policy=c.policy)
    parts = [ours("lab net", steps, c.amp, early_size=side, **own) for side in (c.early_size, 0)]
    mean = lambda early, late: BATCH / c.batch_size * (c.early_share * early + (1 - c.early_share) * late)
    early, late = (part["stages"] for part in parts)
    return dict(s_per_step=mean(*(part["s_per_step"] for part in parts)),
                stages={k: mean(early[k], late[k]) for k in early})


def peak():
    """Float32 operations a second of this processor in its best case, a product of large matrices."""
    import torch

    torch.set_num_threads(THREADS)
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return dict(flops_per_s=2 * 2048**3 / min(times))


def epoch(processes):
    """Seconds of an epoch of the CPU net by processes of one thread each, started by torchrun, and memory of one."""
    c = ["--loss", "barlow", "--dataset", "cifar10", "--preset", "cpu", "--epochs", "2", "--threads", "1"]
    with tempfile.TemporaryDirectory() as home:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([sys.executable, *launch, "-m", "pid_ssl.trainers", *c, "--home", home], check=True,
                       capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        record = json.loads(next(Path(home).glob("data/runs/*.json")).read_text())
    about = record["provenance"]
    return dict(s_per_epoch=about["train_seconds"] / 2, process_mb=round(about["peak_memory_bytes"] / 2**20))


def lightly_recipe(net, steps, workers=WORKERS, threads=THREADS):
    """lightly's documented Barlow Twins: its transform for CIFAR-10, a DataLoader, each view through the model, SGD."""
    import torch
    from lightly.loss import BarlowTwinsLoss
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    from pid_ssl.experiments.training import build_embed

    torch.set_num_threads(threads)
    c = config(net)
    data = images(c.image_size, c.train_size)
    one, two = (kind(input_size=c.image_size, gaussian_blur=0.0) for kind in (BYOLView1Transform, BYOLView2Transform))
    pictures = Pictures(data.images["train"], BYOLTransform(view_1_transform=one, view_2_transform=two))
    loader = torch.utils.data.DataLoader(pictures, BATCH, shuffle=True, drop_last=True, num_workers=workers,
                                         persistent_workers=workers > 0)
    model, criterion = build_embed(c, data), BarlowTwinsLoss(lambda_param=c.lambda_param)
    optimizer = torch.optim.SGD(model.parameters(), lr=c.lr, momentum=0.9, weight_decay=c.weight_decay)

    def batches():
        while True:
            yield from loader

    source, clock = batches(), Clock()
    for step in range(2 * steps):
        if step == steps:  # the first half is warm-up
            start, clock = time.perf_counter(), Clock()
        (x0, x1), _ = next(source)
        clock("views")
        z0, z1 = model(x0), model(x1)
        clock("forward")
        loss = criterion(z0, z1)
        clock("loss")
        loss.backward()
        clock("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock("optimiser")
    whole = (time.perf_counter() - start) / steps
    return dict(s_per_step=whole, stages={k: median(v) for k, v in clock.seconds.items()})


# evaluation


def faiss_accuracy(train, labels, query, wanted, k, metric):
    """As `knn_accuracy`, but of classes with as many votes any may win."""
    import faiss
    import torch
    from torch.nn.functional import normalize

    faiss.omp_set_num_threads(THREADS)
    cosine = metric == "cosine"
    if cosine:
        train, query = normalize(train), normalize(query)
    index = (faiss.IndexFlatIP if cosine else faiss.IndexFlatL2)(train.shape[1])
    index.add(train.numpy())
    near, which = map(torch.from_numpy, index.search(query.numpy(), k))
    weight = (near / 0.07).exp() if cosine else torch.ones_like(near)
    votes = weight.new_zeros(len(query), int(labels.max()) + 1).scatter_add_(1, labels[which], weight)
    return 100 * (votes.argmax(1) == wanted).float().mean().item()


def knn(side, file, *how):
    """Seconds and accuracy by neighbours, nothing kept from another search."""
    import torch

    from pid_ssl.evaluate import knn_accuracy

    torch.set_num_threads(THREADS)
    search, known = knn_accuracy if side == "pid_ssl" else faiss_accuracy, torch.load(file)
    search(*(x[:1000] for x in known), *how)  # libraries load, threads start
    start = time.perf_counter()
    accuracy = search(*known, *how)
    return dict(seconds=time.perf_counter() - start, accuracy=accuracy)


def kernels():
    """How faiss may multiply: as the OpenBLAS of its wheel chooses, which is slow on some processors with AVX-512
    (faiss-cpu 1.15.1), and by kernels for any of those."""
    import torch

    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return {"": {}, **({", SkylakeX kernels": dict(OPENBLAS_CORETYPE="SkylakeX")} if wide else {})}


def evaluation():
    """Linear probe and both kNNs on 512 features of all 60,000 images, by an encoder trained for two epochs;
    and on the same scikit-learn's logistic regression alone, and kNN by faiss, taking turns."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression

    from pid_ssl.data import ViewMaker
    from pid_ssl.evaluate import extract_features, linear_probe
    from pid_ssl.experiments.training import Pretraining

    torch.set_num_threads(THREADS)
    c = config("CPU net", width=128, epochs=2, optimizer="adamw", lr=2e-3, policy="cifar")
    state, data = Pretraining(c, images(16, c.train_size), "cpu"), images(16)
    for _ in range(c.epochs):
        state.history.append(state.epoch())
    views_ = ViewMaker("none", data.mean, data.std)
    features = {s: extract_features(state.embed[0], x, views_) for s, x in data.images.items()}
    out = dict(features={s: list(f.shape) for s, f in features.items()}, seconds={}, accuracy={})
    start = time.perf_counter()
    found = linear_probe(features, data.labels)
    out["seconds"]["linear probe"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        torch.save([d[s] for s in ("train", "test") for d in (features, data.labels)], f"{folder}/features")
        for k, metric in ((5, "euclidean"), (200, "cosine")):
            call = lambda side: f"knn({side!r}, {folder + '/features'!r}, {k}, {metric!r})"
            sides = {f"{k}-NN {metric}": call("pid_ssl")}
            sides |= {f"faiss{how}, {k}-NN {metric}": (call("faiss"), more) for how, more in kernels().items()}
            for what, rounds in turns(sides, 5).items():
                out["seconds"][what] = median([r["seconds"] for r in rounds])
                out["accuracy"][what] = rounds[0]["accuracy"]
    out["linear"] = found
    # the same strength, each fit on its own in float64 until it converges
    mean, std = (getattr(features["train"].double(), f)(0).numpy() for f in ("mean", "std"))
    x = {s: (f.double().numpy() - mean) / std for s, f in features.items()}
    start = time.perf_counter()
    model = LogisticRegression(C=found["C"] * 1e4 / len(x["train"]), max_iter=5000, tol=1e-6)
    model.fit(x["train"], data.labels["train"].numpy())
    accuracy = 100 * model.score(x["test"], data.labels["test"].numpy())
    seconds = time.perf_counter() - start
    out["scikit_learn"] = dict(accuracy=accuracy, iterations=int(np.max(model.n_iter_)), seconds=seconds)
    return out


# turns


def told(out):
    """Print a result with the peak memory of this process, as JSON."""
    kb = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps({**out, "peak_mb": round(kb / 1024)}))


def child(call, more=()):
    """Run `call` in a process of its own, with `more` in its environment; its result with its peak memory, workers not
    counted."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/harness")])
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": paths, **dict(more)}
    # ru_maxrss would begin with the size of this process, which the child was forked from
    code = f"import speed_harness as h\nh.told(h.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def turns(calls, rounds):
    """{side: call, or call and environment} -> {side: results by round}; every round runs all sides."""
    out = {side: [] for side in calls}
    for i in range(rounds):
        for side in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            call = calls[side]
            out[side].append(child(call) if isinstance(call, str) else child(*call))
            print(side, json.dumps(out[side][-1]), flush=True)
    return out


def view():
    sides = "pid_ssl", "torchvision, PIL", "torchvision, tensor"
    return {name: turns({side: f"views({side!r}, {name!r})" for side in sides}, 3) for name in ("cifar", "byol")}


def train():
    out = {}
    for net, steps, rounds in (("CPU net", 20, 5), ("lab net", 5, 3), ("ResNet-18", 2, 3)):
        sides = {"pid_ssl, float32": f"ours({net!r}, {steps})",
                 "lightly, 2 workers": f"lightly_recipe({net!r}, {steps})",
                 "pid_ssl, bfloat16": f"ours({net!r}, {steps}, 'on')"}
        if net != "ResNet-18":  # where views take a large share
            sides["lightly, 1 worker"] = f"lightly_recipe({net!r}, {steps}, 1)"
            # threads that do not share a core with a worker
            sides["lightly, 1 worker, 1 thread"] = f"lightly_recipe({net!r}, {steps}, 1, 1)"
        if net == "lab net":  # as its first steps are, and as its preset trains it
            sides["pid_ssl, bfloat16, 24 px"] = f"ours({net!r}, {steps}, 'on', early_size=24)"
            sides["pid_ssl, the lab preset"] = f"as_lab({steps})"
        out[net] = turns(sides, rounds)
    return out


def growth():
    """Seconds a step of the CPU net by one setting at a time, and beside them the processor's best and an epoch's."""
    settings = dict(batch_size=(64, 128, 256, 512, 1024), image_size=(16, 32, 64), projector_dim=(64, 128, 512, 2048),
                    views=(2, 4, 8, 16), width=(16, 32, 64, 128), train_size=(1280, 5120, 20_480, 45_000))
    timed = lambda k, v: dict(value=v, **child(f"ours('CPU net', 5, {k}={v})"))
    return {**{k: [timed(k, v) for v in values] for k, values in settings.items()},
            "processes": [dict(value=n, **child(f"epoch({n})")) for n in range(1, THREADS + 1)],
            "peak": child("peak()")}


def provenance():
    import platform
    from importlib.metadata import version

    from pid_ssl.config import source_hash
    from pid_ssl.data import load_dataset
    from pid_ssl.records import device_name, git_state

    packages = "torch", "torchvision", "lightly", "scikit-learn", "pillow", "faiss-cpu"
    return dict(device=device_name("cpu"), cores=THREADS, threads=THREADS, workers=WORKERS, batch_size=BATCH,
                load_before=os.getloadavg()[0], data=load_dataset("cifar10").note, python=platform.python_version(),
                versions={p: version(p) for p in packages}, source_hash=source_hash(), **git_state(ROOT))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for part in sys.argv[1:] or ("view", "train", "growth", "eval"):
        about = provenance()
        result = evaluation() if part == "eval" else globals()[part]()
        text = json.dumps({"provenance": about, "rows": result}, indent=1) + "\n"
        (ROOT / f"data/benchmarks/{part}_speed.json").write_text(text)
