"""A benchmark is worth as much as its construction: the atoms are as prescribed, no view alone knows the synergy."""
import math
import re
import subprocess

import pytest
import torch
from conftest import ROOT
from scipy import stats

from pid_ssl.config import ConfigError
from pid_ssl.data.trifeature import PARTS, ControlledAtoms, Trifeature, draw, synergy_table
from pid_ssl.experiments.controlled import (
    ARMS, ControlledConfig, build_arm, controlled_config, controlled_id, load_controlled, run_controlled)
from pid_ssl.evaluate import linear_probe, mlp_probe
from pid_ssl.pid import discrete_information, pid_discrete
from pid_ssl.records import RecordError, load_record, load_records


def codes(world, n, seed):
    """Symbols of view 1, of view 2 and readings of each part, as the tables index them."""
    s1, s2, label = world.sample(n, torch.Generator().manual_seed(seed))
    nothing = torch.zeros(n, dtype=torch.long)
    sources = {"redundancy": (s1[:, 0], s2[:, 0]), "unique1": (s1[:, 1], nothing), "unique2": (nothing, s2[:, 1]),
               "synergy": (s1[:, 2], s2[:, 2])}
    return {part: (*sources[part], label[:, k]) for k, part in enumerate(PARTS)}


def deviations(sampled, assumed, n=20_000, replicates=60):
    """How far the sample's plug-in atoms are from those of samples of the assumed world, in standard deviations."""
    out = {}
    for part, table in assumed.tables().items():
        a, b, t = codes(sampled, n, 0)[part]
        count = torch.zeros(table.shape, dtype=torch.float64)
        count.index_put_((a, b, t), torch.ones(n, dtype=torch.float64), accumulate=True)
        draws = torch.distributions.Multinomial(n, table.flatten()).sample((replicates,)).view(replicates, *table.shape)
        atoms = pid_discrete(torch.cat([count[None], draws])/n, base=2).atoms
        spread = atoms[1:].std(0)
        # an atom that is zero in every sample has no spread
        out[part] = ((atoms[0] - atoms[1:].mean(0)).abs()/spread.clamp(min=1e-6)).max().item()
    return out


def test_atoms_of_a_sample_are_the_prescribed_ones():
    torch.manual_seed(0)
    world = ControlledAtoms(1.2, 0.6, 0.3, 0.9)
    assert max(deviations(world, world).values()) < 4.5
    # the test has the power to see a difference of 0.05 bits in any part
    other = deviations(ControlledAtoms(1.25, 0.65, 0.35, 0.95), world)
    assert min(other.values()) > 4.5, other


def test_parts_are_independent():
    """What was prescribed part by part holds for the whole only if the parts do not know each other."""
    s1, s2, label = ControlledAtoms().sample(40_000, torch.Generator().manual_seed(1))
    columns = [s1[:, 0], s1[:, 1], s2[:, 1], s1[:, 2], s2[:, 2]]
    for i, x in enumerate(columns):
        for y in columns[:i]:
            count = torch.bincount(x*4 + y, minlength=16).view(4, 4).double()
            assert stats.chi2_contingency(count.numpy()).pvalue > 1e-4
    assert torch.equal(s1[:, 0], s2[:, 0])
    for k in range(2):  # neither view alone tells the sum
        count = torch.bincount((s1, s2)[k][:, 2]*4 + label[:, 3], minlength=16).view(4, 4).double()
        assert stats.chi2_contingency(count.numpy()).pvalue > 1e-4


BAD = ("synergy", 2.1), ("redundancy", -0.1), ("symbols", 11), ("unique1", math.nan)


@pytest.mark.parametrize("name, value", BAD)
def test_atoms_that_cannot_be_had_are_refused(name, value):
    with pytest.raises(ConfigError) as e:
        ControlledAtoms(**{name: value})
    assert e.value.name == name


@pytest.fixture(scope="module")
def data():
    return Trifeature(drawings=1, size=16)


@pytest.mark.parametrize("split", ["fit", "val", "test"])
def test_synergy_does_not_leak_into_a_single_view(data, split):
    """The content of either image, its combination of three attributes, is independent of S; so is what both share."""
    i, j = data.pairs(split, 60_000, "balanced", torch.Generator().manual_seed(0))
    s = data.answers(i, j)["S"]
    for row in (i, j):
        count = torch.bincount(row*2 + s, minlength=2000).view(1000, 2).double()
        assert stats.chi2_contingency(count[count.sum(1) > 0].numpy()).pvalue > 1e-3
    i1, i2, i12 = discrete_information(synergy_table(data.bijection))
    assert abs(i1) < 1e-12 and abs(i2) < 1e-12 and abs(i12 - math.log(2)) < 1e-12


def test_single_view_probe_stays_at_chance(data):
    """A probe that is handed all attributes of one image cannot do better than chance; with both it can."""
    g = torch.Generator().manual_seed(0)
    x, y = {1: {}, 2: {}, 12: {}}, {}
    for name, split, n in (("train", "fit", 4000), ("val", "val", 1000), ("test", "test", 4000)):
        i, j = data.pairs(split, n, "balanced", g)
        y[name] = data.answers(i, j)["S"]
        x[1][name], x[2][name] = (torch.nn.functional.one_hot(data.labels[k], 10).flatten(1).float() for k in (i, j))
        x[12][name] = torch.cat([x[1][name], x[2][name]], 1)
    chance = 4*50/math.sqrt(4000)  # four standard deviations
    assert abs(mlp_probe(x[1], y) - 50) < chance and abs(mlp_probe(x[2], y) - 50) < chance
    assert abs(linear_probe(x[12], y)["accuracy"] - 50) < chance + 2, "no sum over the two images tells the match"
    assert mlp_probe(x[12], y) > 90


def test_training_pairs(data):
    g = torch.Generator().manual_seed(0)
    for pairing in ("independent", "inside"):
        i, j = data.pairs("train", 20_000, pairing, g)
        member = data.member["train"].flatten()
        assert member[i].all() and member[j].all(), "no test combination in training"
        assert torch.equal(data.labels[i, 0], data.labels[j, 0])
        matched = data.answers(i, j)["S"].float().mean().item()
        assert matched == 1 if pairing == "inside" else abs(matched - 0.1) < 4*math.sqrt(0.09/20_000)
        # colours are independent of each other: nothing but the shape (and the bijection) is shared
        count = torch.bincount(data.labels[i, 1]*10 + data.labels[j, 1], minlength=100).view(10, 10).double()
        assert stats.chi2_contingency(count.numpy()).pvalue > 1e-3


def test_drawings_of_one_combination_differ_and_repeat():
    g = lambda: torch.Generator().manual_seed(5)
    many = torch.zeros(20, dtype=torch.long)
    images = draw(many + 4, many + 2, many + 3, 32, g())
    assert torch.equal(images, draw(many + 4, many + 2, many + 3, 32, g()))
    assert len(torch.unique(images.flatten(1), dim=0)) == 20
    first, second = (Trifeature(seed, 16, 1).bijection for seed in (0, 1))
    assert not torch.equal(first, second), "another seed, another bijection"


def test_arms_start_from_the_same_encoders():
    first = build_arm(ControlledConfig("clip", seed=2)).encoders.state_dict()
    for arm in ARMS:
        encoders = build_arm(ControlledConfig(arm, seed=2)).encoders.state_dict()
        assert all(torch.equal(v, first[k]) for k, v in encoders.items()), arm


def test_pairing_synergy_makes_the_match_linear():
    """The encoders know all attributes: only the term whose target is pure synergy marks the match when they fuse."""
    torch.manual_seed(0)
    data, g = Trifeature(drawings=1, size=16), torch.Generator().manual_seed(0)
    code = torch.randn(3, 10, 64)
    known = lambda rows: sum(code[k][data.labels[rows, k]] for k in range(3)) + 0.1*torch.randn(len(rows), 64)
    scores = {}
    for weight in (0., 1.):
        arm = build_arm(ControlledConfig("pid_pairing", "inside", pairing_weight=weight, batch_size=64, fusion=128))
        optimizer = torch.optim.AdamW(arm.parameters(), 3e-3)
        for _ in range(200):
            i, j = data.pairs("train", 64, "inside", g)
            optimizer.zero_grad()
            arm(torch.cat([known(i), known(i)]), torch.cat([known(j), known(j)]))[0].backward()
            optimizer.step()
        arm.eval()
        x, y = {}, {}
        for name, split in (("train", "fit"), ("val", "val"), ("test", "test")):
            i, j = data.pairs(split, 2000, "balanced", g)
            with torch.no_grad():
                x[name], y[name] = arm.fused(known(i), known(j)), data.answers(i, j)["S"]
        scores[weight] = linear_probe(x, y)["accuracy"]
    assert scores[1.] > 90 and scores[1.] > scores[0.] + 3, scores


def test_records_are_of_their_own_kind(home, monkeypatch):
    monkeypatch.setattr("pid_ssl.experiments.controlled.PROBE_PAIRS", {"train": 200, "val": 100, "test": 100})
    for name, value in (("AUDIT_PAIRS", 200), ("PROBE_STEPS", 20), ("AUDIT_STEPS", 20)):
        monkeypatch.setattr(f"pid_ssl.experiments.controlled.{name}", value)
    config = ControlledConfig("clip", steps=2, batch_size=16, drawings=1, width=4, dim=8, image_size=16, home=str(home))
    record = run_controlled(config)
    path = home/"data"/"controlled"/f"{controlled_id(config)}.json"
    (loaded,) = load_controlled(path.parent, arm="clip")
    assert loaded.metrics == load_record(path, controlled_config).metrics == record.metrics
    assert loaded.config == record.config
    assert load_controlled(path.parent, arm="comm") == [] and load_records(home/"data"/"runs") == []
    with pytest.raises(RecordError, match="config"):
        load_record(path)
    # the same seed again, from the beginning: the same numbers
    before = record.metrics
    again = run_controlled(controlled_config({**record.config, "home": str(home), "force": True}))
    assert again.metrics == before and again.provenance["image_passes"] == 2*16*4*3


LISTED = subprocess.run(["git", "ls-files", "data/controlled"], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", LISTED.stdout.split())
def test_committed_record(name):
    record = load_record(ROOT / name, controlled_config)
    assert controlled_id(controlled_config(record.config)) == record.run_id and record.status == "finished"
    assert record.provenance["image_passes"] and record.provenance["device_name"] and not record.provenance["git_dirty"]
    assert record.config["home"] is None and not any(re.search("seconds", k) for k in record.metrics)
    # single views say nothing about S: 4,000 balanced test pairs
    assert all(abs(record.metrics[f"test_S_mlp_view{k}"] - 50) < 5 for k in (1, 2))
