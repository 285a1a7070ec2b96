"""The audit tells apart encoders that are known by construction, whatever module and images it is given."""
import importlib
import json
import time

import pytest
import torch
from torch import nn

import pid_ssl
from pid_ssl.__main__ import main
from pid_ssl.config import ConfigError
from pid_ssl.data import Policy, ViewMaker
from pid_ssl.evaluate.heads import ATOMS
from pid_ssl.losses.baselines import BarlowTwins
from pid_ssl.models import SmallResNet
from pid_ssl.records import save_checkpoint

FEW = dict(pairs=3000, replicates=100)


class Pixels(nn.Module):
    """Every pixel, of the image alone or of the image and its mirror image together."""

    def __init__(self, mirrored=False):
        super().__init__()
        self.mirrored = mirrored

    def forward(self, x):
        return ((x + x.flip(-1)) / 2 if self.mirrored else x).flatten(1)


class Colour(nn.Module):
    """Mean of each channel, or of the luma alone, and how much they vary."""

    def __init__(self, gray=False):
        super().__init__()
        self.gray = gray

    def forward(self, x):
        x = (x * torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True) if self.gray else x
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture(scope="module")
def handed():
    """A ramp with noise that rises to the right or to the left by chance: no image tells whether it was mirrored."""
    g = torch.Generator().manual_seed(0)
    rise = torch.randint(2, (1200, 1, 1, 1), generator=g) * 2 - 1
    ramp = 0.5 + 0.3 * rise * torch.linspace(-1, 1, 8) + 0.05 * torch.randn(1200, 1, 8, 8, generator=g)
    return ramp.clamp(0, 1)


@pytest.fixture(scope="module")
def coloured():
    """Noise in a colour of its own for each image."""
    g = torch.Generator().manual_seed(1)
    tint = 0.3 + 0.4 * torch.rand(900, 3, 1, 1, generator=g)
    return (tint + 0.05 * torch.randn(900, 3, 8, 8, generator=g)).clamp(0, 1)


def test_relative_flip_is_synergy_for_an_encoder_that_can_tell(handed):
    flips = dict(policy=Policy(flip=0.5), **FEW)
    tells, cannot = (pid_ssl.audit(Pixels(m), handed, **flips) for m in (False, True))
    can, not_at_all = (found.bits()["flip"] for found in (tells, cannot))
    assert can["S"][1] > 0.5 and can["R"][0] < 0.05, can
    assert not_at_all["I12"][0] < 0.02 and not_at_all["S"][1] <= 0.01, not_at_all
    difference = pid_ssl.compare(tells, cannot)
    assert difference.bits()["flip"]["S"][2] < -0.5 and difference.name == "Pixels less Pixels"
    assert cannot.invariance["flip"][0] > 0.999 > tells.invariance["flip"][0]


def test_colour_is_told_by_an_encoder_that_keeps_it(coloured):
    policy = Policy(jitter=1.0, saturation=0.4)
    keeps, loses = (pid_ssl.audit(Colour(gray), coloured, policy=policy, **FEW) for gray in (False, True))
    assert keeps.bits()["saturation"]["I12"][1] > 0.5
    assert loses.bits()["saturation"]["I12"][0] < 0.1
    assert loses.invariance["saturation"][0] > keeps.invariance["saturation"][0]


def test_both_views_tell_the_image_and_less_of_it_without_colour(coloured):
    keeps, loses = (pid_ssl.audit(Colour(gray), coloured, policy=Policy(flip=0.5), **FEW) for gray in (False, True))
    more, less = (found.bits()["image"] for found in (keeps, loses))
    assert more["R"][1] > less["R"][2] + 1 and less["R"][1] > 0.5, (more, less)
    assert max(more[k][0] for k in ("S", "U1", "U2")) < more["R"][0] / 4, "mirror images have the same colours"
    assert keeps.possible["image"] is None and pid_ssl.compare(keeps, loses).bits()["image"]["R"][2] < -1


def trained(policy, images, steps):
    """A small net after some steps of Barlow Twins; 0 for the untrained one."""
    torch.manual_seed(0)
    net, head = SmallResNet(8, 3), nn.Linear(32, 32)
    views, loss = ViewMaker("none", [0.4] * 3, [0.2] * 3, seed=0), BarlowTwins(0.02)
    views.policy = policy
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3)
    for step in range(steps):
        batch = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:256]]
        optimizer.zero_grad()
        loss(*(head(net(views(batch))) for _ in range(2))).backward()
        optimizer.step()
    return net.eval()


def test_training_for_invariance_to_colour_is_seen():
    """Shapes in a tint: an untrained net, Barlow Twins with crops and flips, and with strong changes of colour, too."""
    g = torch.Generator().manual_seed(2)
    shape = nn.functional.interpolate(torch.rand(1200, 1, 3, 3, generator=g), size=8, mode="bilinear")
    images = (255 * shape * (0.4 + 0.6 * torch.rand(1200, 3, 1, 1, generator=g))).to(torch.uint8)
    frame = dict(crop=(0.5, 1.0), flip=0.5)
    strong = Policy(**frame, jitter=1.0, brightness=0.6, saturation=0.9, hue=0.5, gray=0.3)
    asked = dict(policy=Policy(**frame, jitter=1.0, saturation=0.9, hue=0.2), **FEW)
    nets = trained(strong, images, 0), trained(Policy(**frame), images, 200), trained(strong, images, 200)
    untrained, barlow, colour = (pid_ssl.audit(net, images, **asked) for net in nets)
    hue = [found.bits()["hue"]["I12"] for found in (untrained, barlow, colour)]
    assert hue[2][2] < min(hue[0][1], hue[1][1]), "what it was trained to ignore it does not tell"
    for part in ("hue", "saturation"):
        one, two, three = (found.invariance[part][0] for found in (untrained, barlow, colour))
        assert three > max(one, two)
    assert barlow.invariance["crop"][0] > untrained.invariance["crop"][0], "both crops and flips are trained for"
    assert pid_ssl.compare(barlow, colour).bits()["hue"]["S"][2] < 0


def test_any_module_goes_through_and_stays_as_it_was(coloured):
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    few = dict(pairs=100, replicates=20, normalise=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mobile = timm.create_model("mobilenetv3_small_050", num_classes=0)
    for net in (torchvision.models.resnet18().train(), mobile.eval()):
        before, mode = {k: v.clone() for k, v in net.state_dict().items()}, net.training
        found = pid_ssl.audit(net, coloured[:90], size=32, labels=torch.arange(90) % 3, **few)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training is mode
        assert "label" in found.bits() and found.about["normalise"][0] == pytest.approx([0.485, 0.456, 0.406])
    assert pid_ssl.audit(mobile, coloured[:90], size=32, pairs=100, replicates=20).about["normalise"][0][0] == \
        pytest.approx(0.485), "kept with the model"


@pytest.mark.parametrize("tells, names", [("own", {"flip"}), ("all", {"view1_flip", "view2_flip", "flip"})])
def test_own_parameters_are_asked_for(handed, tells, names):
    found = pid_ssl.audit(Pixels(), handed[:90], policy=Policy(flip=0.5), tells=tells, pairs=100, replicates=20)
    assert set(found.possible) == names | {"image"}


def test_one_channel_goes_through_a_net_of_three(handed):
    found = pid_ssl.audit(SmallResNet(8, 3), handed[:90].squeeze(1).numpy(), pairs=100, replicates=20)
    assert found.about["images"] == {"fit": 60, "held": 30}


def test_record_is_json_and_again_the_same(handed, tmp_path):
    one, again = (pid_ssl.audit(Pixels(), handed[:120], pairs=200, replicates=20) for _ in range(2))
    one.save(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text()) == json.loads(json.dumps(again.record()))
    assert set(one.bits()["x"]) == {"R", "U1", "U2", "S", "I1", "I2", "I12"} and len(ATOMS) == 7


def test_digits_take_less_than_a_minute_of_one_core():
    torch.manual_seed(0)
    before = time.process_time()
    found = pid_ssl.audit(SmallResNet(16, 1), "digits")
    assert time.process_time() - before < 60
    bits = found.bits()
    assert bits["label"]["R"][1] > 0.5 and bits["x"]["S"][1] > 0.2
    table = found.table()
    assert list(table.index) == list(bits) and table.loc["x", "S"] == bits["x"]["S"][0]


WRONG = [
    (dict(images=torch.zeros(50, 3, 8, 9)), r"images: got \(50, 3, 8, 9\); accepted: at least 40 square images"),
    (dict(images=torch.zeros(50, 3, 8, 8) + 7), "images: got .*7 to 7.*; accepted: .* uint8 or 0..1"),
    (dict(labels=[0, 1]), r"labels: got .*\(2,\).*; accepted: class numbers \(50,\)"),
    (dict(labels=torch.zeros(50)), "labels: got .*float32.*; accepted: class numbers"),
    (dict(policy="none"), "policy: got .*; accepted: a policy that changes images"),
    (dict(policy=3), "policy: got 3; accepted: a `Policy`, or one of none"),
    (dict(normalise=(0.5, 0.0)), "normalise: got .*; accepted: .*std above 0"),
    (dict(normalise=((0.5,) * 2, (0.5,) * 2)), "normalise: got .*; accepted: .*1 or 3 channels"),
    (dict(tells="nothing"), "tells: got 'nothing'; accepted: relation, own, all"),
    (dict(bins=1), "bins: got 1; accepted: "),
    (dict(pairs=0), "pairs: got 0; accepted: "),
    (dict(encoder=len), "encoder: got .*; accepted: a torch.nn.Module"),
    (dict(encoder=nn.Linear(3, 3)), r"encoder: got 'Linear'; accepted: a module that takes \(.*, 3, 8, 8\)"),
    (dict(encoder=nn.Flatten(2)), r"encoder: got \(.*, 3, 64\); accepted: a module that gives \(.*, f\) features"),
    (dict(images="nowhere"), "nowhere"),
]


@pytest.mark.parametrize("given, words", WRONG)
def test_what_cannot_be_audited_is_said(given, words):
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises((ConfigError, ValueError), match=words):
        pid_ssl.audit(**(dict(encoder=Pixels(), images=images, pairs=100, replicates=20) | given))


def test_audits_of_other_images_are_not_compared(handed):
    one, other = (pid_ssl.audit(Pixels(), x, pairs=100, replicates=20) for x in (handed[:60], handed[60:120]))
    with pytest.raises(ConfigError, match="images_hash: .*accepted: audits of the same images"):
        pid_ssl.compare(one, other)
    for given, size, said in ((handed[:60], 16, "side: got 16; .* made alike: 8"),
                              (handed[:90], None, "images: got .* made alike: .*'fit': 40")):
        with pytest.raises(ConfigError, match=said):
            pid_ssl.compare(one, pid_ssl.audit(Pixels(), given, size=size, pairs=100, replicates=20))


def test_the_command_compares_two_checkpoints(tmp_path, capsys):
    config = dict(encoder="small", image_size=8, width=8, loss="barlow", dataset="digits")
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = SmallResNet(8, 1)
        save_checkpoint(tmp_path / str(seed), {"encoder": net.state_dict()}, {"config": config})
    options = ["--folder", str(tmp_path), "--pairs", "500"]
    assert main(["audit", str(tmp_path / "0"), str(tmp_path / "1"), *options]) == 0
    assert "barlow less barlow, in bits" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text())["about"]["one"]["images"] == {"fit": 1293, "held": 360}
    assert (tmp_path / "audit.png").stat().st_size > 10_000


def test_the_command_says_first_what_cannot_be(tmp_path, capsys, monkeypatch):
    work = importlib.import_module("pid_ssl.evaluate.audit")
    monkeypatch.setattr(work, "_target_bits", lambda *given: pytest.fail("work was begun"))
    for size in (8, 16):
        config = dict(encoder="small", image_size=size, width=8, loss="barlow", dataset="digits")
        save_checkpoint(tmp_path / str(size), {"encoder": SmallResNet(8, 1).state_dict()}, {"config": config})
    (tmp_path / "taken").write_text("a file")
    two = ["audit", str(tmp_path / "8"), str(tmp_path / "16")]
    for given, status, said in ((["--folder", str(tmp_path / "taken")], 4, "taken: cannot be written"),
                                (["--folder", str(tmp_path)], 2, "size: got None; accepted: one for both: theirs are"),
                                (["--folder", str(tmp_path), "--size", "8", "--split", "train"], 2,
                                 "split: got 'train'; accepted: val, test")):
        assert main([*two, *given]) == status and said in capsys.readouterr().err


def test_a_record_is_json(handed, tmp_path):
    """Two features have no decay of eigenvalues that could be measured."""
    found = pid_ssl.audit(Colour(gray=True), handed[:90], pairs=100, replicates=20)
    found.save(tmp_path / "audit.json")
    read = json.loads((tmp_path / "audit.json").read_text(), parse_constant=pytest.fail)
    assert read["features"]["alpha_req"] == [None, None, None]
    with pytest.raises(ConfigError, match="audits: got .*; accepted: two of one encoder each"):
        pid_ssl.compare(pid_ssl.compare(found, found), found)
