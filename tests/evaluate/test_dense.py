"""Dense prediction: metrics agree with independent libraries, and what does not fit is named, never dropped."""
import contextlib
import copy
import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, jaccard_score

from pid_ssl.config import ConfigError
from pid_ssl.data import DataError
from pid_ssl.data.dense import digit_scenes, load_detection, load_segmentation, png, write_dense
from pid_ssl.evaluate import (average_precision, coco_evaluation, confusion_matrix, detection, detection_interval,
                              detection_metrics, feature_maps, iou, paired_bootstrap, segmentation,
                              segmentation_interval, segmentation_metrics, untrained_control)
from pid_ssl.evaluate.dense import fit
from pid_ssl.evaluate.segmentation import _cross_entropy
from pid_ssl.models import build_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digit_scenes(tmp_path_factory.mktemp("dense"), (60, 10, 40), seed=3)


@pytest.fixture(scope="module")
def scenes(folder):
    return load_segmentation("digit-scenes", folder), load_detection("digit-scenes", folder, (48, 64))


@pytest.fixture(scope="module")
def control(scenes):
    torch.manual_seed(0)
    return untrained_control(build_encoder("small", 8, width=16), scenes[0])


def noisy_masks(data, seed):
    """Half right: other classes on random pixels, unlabelled ones included."""
    g = torch.Generator().manual_seed(seed)
    m = data.labels["test"].clamp(max=2)
    return torch.where(torch.rand(m.shape, generator=g) < 0.5, torch.randint(3, m.shape, generator=g).byte(), m)


def noisy_boxes(data, seed):
    """True boxes moved by a few pixels, some twice, some of the wrong class, and one from nowhere in every image."""
    g, out = torch.Generator().manual_seed(seed), {"boxes": [], "scores": [], "labels": [], "image": []}
    for i, (b, y) in enumerate(zip(data.boxes["test"], data.labels["test"])):
        b = torch.cat([b, b[:1], torch.tensor([[10.0, 10, 24, 28]])])
        b = b + 2 * torch.randn(len(b), 4, generator=g)
        y = torch.cat([y, y[:1], torch.tensor([i % 2])])
        out["boxes"].append(b)
        out["labels"].append(torch.where(torch.rand(len(y), generator=g) < 0.15, 1 - y, y))
        out["scores"].append(torch.rand(len(y), generator=g))
        out["image"].append(torch.full((len(y),), i))
    return {k: torch.cat(v) for k, v in out.items()}


def saved(predictions, tmp_path):
    save_file(predictions, tmp_path / "predictions.safetensors")
    return load_file(tmp_path / "predictions.safetensors")


def by_short_name(metrics, mode=""):
    """miou for test_digit-scenes_frozen_miou; every key begins like this."""
    start = f"test_digit-scenes_{mode}"
    assert all(k.startswith(start) for k in metrics)
    return {k.removeprefix(start): v for k, v in metrics.items()}


def test_segmentation_metrics_agree_with_scikit_learn(scenes, tmp_path):
    data = scenes[0]
    found = saved({"masks": noisy_masks(data, 0)}, tmp_path)["masks"]
    ours, keep = by_short_name(segmentation_metrics(found, data), "frozen_"), data.labels["test"] < 3
    true, predicted = data.labels["test"][keep].numpy(), found[keep].numpy()
    each = 100 * jaccard_score(true, predicted, labels=[0, 1, 2], average=None)
    assert 20 < each.mean() < 90, "neither all right nor all wrong"
    assert ours["miou"] == pytest.approx(each.mean(), abs=1e-4)
    assert [ours[f"iou_{n}"] for n in data.class_names] == pytest.approx(each.tolist(), abs=1e-4)
    assert ours["pixel_accuracy"] == pytest.approx(100 * accuracy_score(true, predicted), abs=1e-4)


def test_unlabelled_pixels_count_nowhere(scenes):
    data = scenes[0]
    found, unlabelled = noisy_masks(data, 1), data.labels["test"] == 3
    assert unlabelled.sum() > 1000
    other = torch.where(unlabelled, (found + 1) % 3, found)
    assert segmentation_metrics(found, data) == segmentation_metrics(other, data)
    logits = torch.randn(40, 3, 48, 64, requires_grad=True)
    _cross_entropy(logits, data.labels["test"], 3).backward()
    assert not logits.grad.movedim(1, -1)[unlabelled].any() and logits.grad.movedim(1, -1)[~unlabelled].any(1).all()
    assert _cross_entropy(logits, torch.full_like(data.labels["test"], 3), 3) == 0, "a batch without a labelled pixel"


def test_counts_beyond_32_bits():
    c = torch.full((2, 2), 2**40)
    assert confusion_matrix(torch.zeros(1, 2, 2).byte(), torch.zeros(1, 2, 2).byte(), 2).dtype == torch.int64
    assert iou(c).tolist() == pytest.approx([100 / 3] * 2)


def independent_ap(predictions, boxes, labels, classes):
    """faster-coco-eval's own C++ matching and accumulation."""
    from faster_coco_eval import COCO, COCOeval_faster

    sides = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
    truth = [(i, sides(b), int(y)) for i, (bs, ys) in enumerate(zip(boxes, labels)) for b, y in zip(bs.tolist(), ys)]
    whole = {"annotations": [], "images": [{"id": i} for i in range(len(boxes))],
             "categories": [{"id": c, "name": str(c)} for c in range(classes)]}
    for n, (i, b, y) in enumerate(truth, 1):
        row = {"id": n, "image_id": i, "category_id": y, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        whole["annotations"].append(row)
    rows = zip(*(predictions[k].tolist() for k in ("boxes", "scores", "labels", "image")))
    found = [{"image_id": i, "category_id": y, "bbox": sides(b), "score": s} for b, s, y, i in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(whole)
        ev = COCOeval_faster(gt, gt.loadRes(found), "bbox")
        ev.run()
    return 100 * np.array(ev.stats[:3])


def test_average_precision_agrees_with_faster_coco_eval(scenes, tmp_path):
    data = scenes[1]
    found = saved(noisy_boxes(data, 0), tmp_path)
    ours = by_short_name(detection_metrics(found, data))
    theirs = independent_ap(found, data.boxes["test"], data.labels["test"], 2)
    assert 5 < theirs[0] < 80 and data.empty["test"] == 8 and ours["empty_images"] == 8
    assert [ours[k] for k in ("ap", "ap50", "ap75")] == pytest.approx(theirs.tolist(), abs=1e-4)
    # a third class of which there is nothing: left out of the mean by both
    each = average_precision(coco_evaluation(found, data.boxes["test"], data.labels["test"], 3))
    assert np.nanmean(each) == pytest.approx(theirs[0], abs=1e-4)


def test_average_precision_is_blind_to_the_order_of_images_and_detections(scenes):
    data = scenes[1]
    found = noisy_boxes(data, 1)
    one = average_precision(coco_evaluation(found, data.boxes["test"], data.labels["test"], 2))
    g = torch.Generator().manual_seed(0)
    images, rows = torch.randperm(40, generator=g), torch.randperm(len(found["scores"]), generator=g)
    moved = {k: v[rows] for k, v in found.items()}
    moved["image"] = images.argsort()[moved["image"]]
    boxes, labels = ([truth[i] for i in images] for truth in (data.boxes["test"], data.labels["test"]))
    two = average_precision(coco_evaluation(moved, boxes, labels, 2))
    assert np.abs(one - two).max() < 1e-9


def test_a_find_in_an_empty_image_costs(scenes):
    data = scenes[1]
    perfect = {"boxes": torch.cat(data.boxes["test"]), "labels": torch.cat(data.labels["test"])}
    perfect["scores"] = torch.full((len(perfect["boxes"]),), 0.5)
    perfect["image"] = torch.tensor([i for i, b in enumerate(data.boxes["test"]) for _ in b])
    assert by_short_name(detection_metrics(perfect, data))["ap"] == pytest.approx(100)
    at = next(i for i, b in enumerate(data.boxes["test"]) if not len(b))
    extra = {"boxes": [[1.0, 1, 9, 9]], "labels": [0], "scores": [0.9], "image": [at]}
    found = {k: torch.cat([v, torch.tensor(extra[k])]) for k, v in perfect.items()}
    worse = by_short_name(detection_metrics(found, data))
    assert worse["ap_zero"] < 99 and worse["ap_one"] == pytest.approx(100)


def test_a_class_the_split_lacks_is_left_out_and_the_rest_counted(scenes):
    seg, det = copy.deepcopy(scenes)
    seg.labels["test"][seg.labels["test"] == 2] = 3
    m = by_short_name(segmentation_metrics(seg.labels["test"].clamp(max=2) % 2, seg), "frozen_")
    assert m["classes"] == 2 and "iou_one" not in m and m["miou"] == 100
    for i, y in enumerate(det.labels["test"]):
        det.boxes["test"][i], det.labels["test"][i] = det.boxes["test"][i][y == 0], y[y == 0]
    d = by_short_name(detection_metrics(noisy_boxes(det, 0), det))
    assert d["classes"] == 1 and "ap_one" not in d and d["ap"] == d["ap_zero"]


def image(values):
    """A change of a row: another image in it."""
    return lambda r: r.update(img={"bytes": png(values), "path": None})


def mask(values):
    return lambda r: r.update(mask={"bytes": png(values), "path": None})


def corner(at, value):
    """A change of a row: another number in its first box."""
    return lambda r: r["boxes"][0].__setitem__(at, value)


def shortened(r):
    r["img"] = {"bytes": r["img"]["bytes"][:200], "path": None}


UNREADABLE = "val.parquet: img of row 3 is not a readable image"
BROKEN_SEGMENTATION = {
    "corrupt image": (shortened, UNREADABLE),
    "16 bits a channel": (image(np.full((48, 64), 40_000, np.uint16)),
                          rf"{UNREADABLE} \(pixel format I;16, more than 8 bits a channel\)"),
    "image of another size": (image(np.zeros((8, 9, 3), np.uint8)), "img of row 3 is 9x8; accepted: 64x48"),
    "mask of another size": (mask(np.zeros((48, 32), np.uint8)), "mask of row 3 is 32x48; accepted: 64x48"),
    "mask in colour": (mask(np.zeros((48, 64, 3), np.uint8)), "mask of row 3 has the pixel format RGB"),
    "mask value": (mask(np.full((48, 64), 4, np.uint8)),
                   "mask of row 3 has the value 4; accepted: 0 to 2, and 3 or 255"),
}
BROKEN_DETECTION = {
    "no bytes": (lambda r: r.update(img={"bytes": None, "path": None}), UNREADABLE),
    "label": (lambda r: r.update(labels=[-1] * len(r["labels"])), "row 3: label -1; accepted: 0 to 1"),
    "missing label": (lambda r: r.update(labels=[None] * len(r["labels"])), "row 3: label nan; accepted: 0 to 1"),
    "fewer labels": (lambda r: r.update(labels=[]), "row 3: [1-3] boxes and 0 labels"),
    "box outside": (corner(2, 65.0), "row 3: box .*65.0.*; accepted: xmin < xmax and ymin < ymax inside 64x48"),
    "box of no area": (lambda r: corner(2, r["boxes"][0][0])(r), "row 3: box"),
    "box not a number": (corner(1, float("nan")), "row 3: box"),
    "three numbers": (lambda r: r["boxes"][0].pop(), "row 3: boxes or labels cannot be read"),
    "boxes in shares of a side": (lambda r: r.update(boxes=[[0.1, 0.2, 0.5, 1.0]] * len(r["labels"])),
                                  "row 3: boxes within one pixel, .*; accepted: pixels, not shares of a side"),
    "size": (lambda r: r.update(height=47), "row 3: width and height are 64x47, the image is 64x48"),
}
BROKEN = {what: (load_segmentation, *row) for what, row in BROKEN_SEGMENTATION.items()}
BROKEN |= {what: (load_detection, *row) for what, row in BROKEN_DETECTION.items()}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_row_is_named(what, folder, tmp_path):
    read, change, message = BROKEN[what]
    for split in ("train", "val", "test"):
        rows = pq.read_table(folder / "digit-scenes" / f"{split}.parquet").to_pylist()[:20]
        if split == "val":
            assert rows[3]["boxes"]
            change(rows[3])
        write_dense(tmp_path / "digit-scenes" / f"{split}.parquet", rows)
    with pytest.raises(DataError, match=message):
        read("digit-scenes", tmp_path)


@pytest.mark.parametrize("read", [load_segmentation, load_detection])
def test_a_broken_folder_is_named(read, folder, tmp_path):
    rows = {s: pq.read_table(folder / "digit-scenes" / f"{s}.parquet").to_pylist() for s in ("train", "val", "test")}
    only = lambda rows, c: [r for r in rows if set(r["labels"]) <= {c}]  # noqa: E731
    at = tmp_path / "digit-scenes"
    for split in ("train", "val"):
        write_dense(at / f"{split}.parquet", rows[split])
    with pytest.raises(DataError, match="test.parquet: no such file"):
        read("digit-scenes", tmp_path)
    write_dense(at / "test.parquet", rows["test"])
    write_dense(at / "train.parquet", only(rows["train"], 0))
    with pytest.raises(DataError, match=r"val.parquet: class [12] \(one\) does not occur in train.parquet"):
        read("digit-scenes", tmp_path)
    (at / "train.parquet").write_bytes((at / "test.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match="train.parquet: not a readable Parquet file"):
        read("digit-scenes", tmp_path)
    write_dense(at / "train.parquet", [{"img": r["img"], "width": 64} for r in rows["train"]])
    with pytest.raises(DataError, match="train.parquet: .*(mask|boxes)"):
        read("digit-scenes", tmp_path)


def lying(cell, turn):
    """An image or a mask as a camera stores it that was held on its side: turned, and marked to be turned back."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 8 if turn > 0 else 6
    Image.open(io.BytesIO(cell["bytes"])).rotate(-90 * turn, expand=True).save(out, "PNG", exif=exif)
    return {"bytes": out.getvalue(), "path": cell["path"]}


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("read", [load_segmentation, load_detection])
def test_boxes_and_masks_lie_on_images_that_were_stored_on_their_side(read, turn, folder, tmp_path):
    for split in ("train", "val", "test"):
        rows = pq.read_table(folder / "digit-scenes" / f"{split}.parquet").to_pylist()
        turned = [{**r, "img": lying(r["img"], turn), "mask": lying(r["mask"], turn)} for r in rows]
        write_dense(tmp_path / "digit-scenes" / f"{split}.parquet", turned)
    ours, theirs = read("digit-scenes", tmp_path), read("digit-scenes", folder)
    for split in ("train", "val", "test"):
        assert torch.equal(ours.images[split], theirs.images[split])
        assert all(torch.equal(a, b) for a, b in zip(ours.labels[split], theirs.labels[split]))


def test_a_split_without_boxes_is_an_error(folder, tmp_path):
    for split in ("train", "val", "test"):
        rows = pq.read_table(folder / "digit-scenes" / f"{split}.parquet").to_pylist()
        kept = [r for r in rows if split != "test" or not r["boxes"]]
        write_dense(tmp_path / "digit-scenes" / f"{split}.parquet", kept)
    with pytest.raises(DataError, match="test.parquet: no boxes in 8 images"):
        load_detection("digit-scenes", tmp_path)


def untouched(control, before):
    """The encoder that was handed in has the weights it had, and all of them may be trained."""
    same = all(torch.equal(v, before[k]) for k, v in control.state_dict().items())
    return same and all(p.requires_grad for p in control.parameters())


def test_a_segmenter_learns_and_leaves_the_encoder_alone(scenes, control):
    data, before = scenes[0], copy.deepcopy(control.state_dict())

    def miou(data, epochs):
        return by_short_name(segmentation(control, data, epochs=epochs, lr=1e-2)[0], "frozen_")["miou"]

    trained = miou(data, 8)
    assert trained > miou(data, 0) + 20
    shuffled = copy.deepcopy(data)
    shuffled.labels["train"] = shuffled.labels["train"].roll(7, 0)
    assert miou(shuffled, 8) < trained - 20, "masks of other images teach nothing"
    one, same, other = (segmentation(control, data, "finetuned", epochs=1, lr=1e-2, seed=s) for s in (1, 1, 2))
    assert one[0] == same[0] and torch.equal(one[1]["masks"], same[1]["masks"]), "a run is a function of its settings"
    assert not torch.equal(one[1]["masks"], other[1]["masks"])
    assert untouched(control, before)


def cut(data, train, test):
    """The first images of two splits."""
    few = lambda d: {**d, "train": d["train"][:train], "test": d["test"][:test]}
    return dataclasses.replace(data, images=few(data.images), boxes=few(data.boxes), labels=few(data.labels))


def test_a_detector_learns_and_leaves_the_encoder_alone(scenes, control):
    data, before = cut(scenes[1], 40, 20), copy.deepcopy(control.state_dict())
    untrained, trained = (detection(control, data, "frozen", epochs=e, lr=1e-2, upside_down=False)[0] for e in (0, 5))
    assert by_short_name(trained, "frozen_")["ap50"] > by_short_name(untrained, "frozen_")["ap50"] + 15
    again, same = (detection(control, cut(data, 16, 8), epochs=1, lr=1e-2, seed=1) for _ in range(2))
    assert again[0] == same[0] and torch.equal(again[1]["boxes"], same[1]["boxes"])
    assert untouched(control, before)


def test_intervals_are_of_pairs(scenes):
    seg, det = scenes
    a, b = ({"masks": noisy_masks(seg, s)} for s in (0, 1))
    wrong = torch.rand(b["masks"].shape, generator=torch.Generator().manual_seed(5)) < 0.2
    b["masks"] = torch.where(wrong, 0, b["masks"]).byte()
    one, two = segmentation_interval(a, b, seg, draws=200), segmentation_interval(b, a, seg, draws=200)
    assert one["difference"] == pytest.approx(-two["difference"]) and one["low"] == pytest.approx(-two["high"])
    whole = [segmentation_metrics(p["masks"], seg)["test_digit-scenes_frozen_miou"] for p in (a, b)]
    assert one["difference"] == pytest.approx(whole[0] - whole[1], abs=1e-9)
    assert one["units"] == 6, "three sequences of 13 or 14 frames: stretches of 10 and of the rest"
    a, b = (noisy_boxes(det, s) for s in (0, 1))
    gap = detection_interval(a, b, det, draws=100)
    whole = [detection_metrics(p, det)["test_digit-scenes_ap"] for p in (a, b)]
    assert gap["difference"] == pytest.approx(whole[0] - whole[1], abs=1e-9)
    assert gap["low"] < 0 < gap["high"], "two draws of one noise"


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        x = rng.normal(0.5, 1, 60)
        gap = paired_bootstrap(lambda rows: (x[rows].mean(), 0), 60, 200, i)  # noqa: B023
        hits += gap["low"] <= 0.5 <= gap["high"]
    assert 180 <= hits <= 199  # 95 % of 200 is 190, give or take 3


def test_any_number_of_steps(monkeypatch):
    """torch's one-cycle schedule as it is, but for the number of steps that it divides by zero for."""
    plain = torch.optim.lr_scheduler.OneCycleLR
    for steps in range(1, 26):
        made = []
        remember = lambda *a, **k: made.append(plain(*a, **k)) or made[-1]  # noqa: B023
        monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", remember)
        model, rates = torch.nn.Linear(1, 1), []

        def loss(rows):
            rates.append(made[0].get_last_lr()[0])  # noqa: B023
            return model(torch.ones(1, 1)).sum()  # noqa: B023

        fit(model, loss, 1, steps, 0.1, 1, torch.Generator())
        if steps == 10:
            assert rates[0] == pytest.approx(0.1 / 25) and 0.09 < rates[1] < 0.1
            assert rates[1:] == sorted(rates[1:], reverse=True) and len(rates) == 10
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 0.1)
            schedule, expected = plain(optimizer, 0.1, total_steps=max(steps, 2), pct_start=0.1), []
            for _ in range(steps):
                expected.append(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
            assert rates == expected


def test_maps_of_a_timm_network():
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "resnet50d"):  # the second has a stem of three layers
        net, x = timm.create_model(name, num_classes=0).eval(), torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(feature_maps(net, x)[-1], net.forward_features(x))


def test_settings_are_checked_before_work(scenes, control):
    for task, data in ((segmentation, scenes[0]), (detection, scenes[1])):
        for field, bad in dict(mode="linear", eval_on="train", epochs=-1, lr=0.0).items():
            with pytest.raises(ConfigError, match=f"^{field}: got"):
                task(control, data, **{field: bad})
    with pytest.raises(ValueError, match="predicted: got shape"):
        segmentation_metrics(torch.zeros(40, 48, 63).byte(), scenes[0])
