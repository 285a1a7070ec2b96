"Estimators from samples: what each sees, what it costs, and what it refuses"
import json
import math
import warnings

import numpy as np
import pytest
import torch

from pid_ssl.config import project_root
from pid_ssl.pid import fit_infonce, gaussian_mi_bias, pid_samples, scalar_information
from pid_ssl.pid.quantised import count_table, pid_codes, quantise
from pid_ssl.pid.samples import NAMES, RECOMMENDED, confidence_interval, recommended


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_signs(n=20_000, noise=0.3):
    "Two random signs and the sources that show them through noise"
    g = generator()
    signs = [torch.randint(0, 2, (n, 1), generator=g) * 2.0 - 1 for _ in range(2)]
    return signs, [s + noise * torch.randn(n, 1, generator=g) for s in signs]


def known_views(n, d, a, seed=0):
    "Views with corr(z_i, t) = a in every coordinate, independent given t"
    g = generator(seed)
    t = torch.randn(n, d, generator=g, dtype=torch.float64)
    return *(a * t + math.sqrt(1 - a * a) * torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2)), t


def known_informations(d, a):
    return [d * x.item() for x in scalar_information(*(torch.tensor(v, dtype=torch.float64) for v in (a, a, a * a)))]


def test_xor_needs_critics():
    (s1, s2), (z1, z2) = noisy_signs()
    xor = pid_samples(z1, z2, s1 * s2, "infonce", base=2, steps=300)
    assert xor.synergy > 0.5 and xor.redundancy.abs() < 0.1
    assert not xor.info["saturated"] and xor.info["held_out"] == 10_000
    assert pid_samples(z1, z2, s1 * s2, "gaussian", base=2).synergy < 0.01


def test_critics_find_no_synergy_where_there_is_none():
    (s1, _), (z1, z2) = noisy_signs()
    unique = pid_samples(z1, z2, s1, "infonce", base=2, steps=200)  # the second source is noise
    assert unique.synergy.abs() < 0.1 and unique.unique1 > 0.8 and unique.redundancy.abs() < 0.1
    both = s1 + 0.3 * torch.randn(s1.shape, generator=generator(1))
    shared = pid_samples(z1, both, s1, "infonce", base=2, steps=200)  # two looks at one bit, each nearly perfect
    assert shared.synergy.abs() < 0.1 and shared.redundancy > 0.8


@pytest.mark.parametrize("estimator,options,tolerance", [
    ("coordinate", {}, 0.03), ("gaussian", {}, 0.03), ("gaussian", {"measure": "broja"}, 0.06),
    ("gaussian", {"bias_correct": True}, 0.03), ("gaussian", {"shrinkage": "ledoit_wolf"}, 0.03)])
def test_known_gaussian(estimator, options, tolerance):
    i1, _, i12 = known_informations(3, 0.6)
    pid = pid_samples(*known_views(20_000, 3, 0.6), estimator, **options)
    assert abs(pid.i1 - i1) < tolerance and abs(pid.joint - i12) < tolerance
    assert abs(pid.redundancy - i1) < tolerance and abs(pid.synergy - (i12 - i1)) < tolerance


def test_infonce_on_known_gaussian():
    i1, _, i12 = known_informations(1, 0.8)
    pid = pid_samples(*known_views(10_000, 1, 0.8), "infonce", steps=300)
    assert abs(pid.i1 - i1) < 0.06 and abs(pid.joint - i12) < 0.08


def test_quantised_keeps_part_of_a_known_gaussian():
    i1, _, i12 = known_informations(1, 0.8)
    pids = [pid_samples(*known_views(20_000, 1, 0.8), "quantised", codes=k, permutations=5) for k in (2, 6, 12)]
    read = [p.joint.item() for p in pids]
    assert read == sorted(read) and 0.3 * i12 < read[0] and 0.85 * i12 < read[2] < i12
    assert pids[2].redundancy > 0.8 * i1


def test_bias_correction_is_unbiased():
    i1, _, i12 = known_informations(4, 0.5)
    pids = [pid_samples(*known_views(60, 4, 0.5, s), "gaussian", bias_correct=True) for s in range(200)]
    for read, truth, d in (("i1", i1, 4), ("joint", i12, 8)):
        values = torch.stack([getattr(p, read) for p in pids])
        assert abs(values.mean() - truth) < 5 * values.std() / 200**0.5
        assert gaussian_mi_bias(d, 4, 60) > 5 * values.std() / 200**0.5  # and the uncorrected mean would be far off
    raw = pid_samples(*known_views(60, 4, 0.5, 0), "gaussian")
    assert abs(raw.joint - pids[0].info["raw_joint"]) < 1e-12


def test_permutation_null():
    g = generator()
    c1, c2, label = (torch.randint(k, (10_000,), generator=g) for k in (50, 50, 10))
    pid = pid_codes(c1, c2, label, permutations=2)
    assert 0.9 < pid.info["raw"].sum() < 1.3  # a nat out of nothing
    assert pid.joint.abs() < 0.02 and (pid.info["extrapolated"] - pid.info["null"] - pid.atoms).abs().max() < 1e-12
    plain = pid_codes(c1, c2, label, permutations=2, extrapolate=False)
    assert plain.joint.abs() < 0.02 and torch.equal(plain.info["extrapolated"], plain.info["raw"])


@pytest.mark.parametrize("options", [{}, {"permutations": 0}])
def test_clear_synergy_survives_the_corrections(options):
    "16 x 16 cells whose parity is the label, one bit; the null alone takes a fifth of it"
    g = generator()
    c1, c2 = torch.randint(16, (2, 1000), generator=g)
    label = (c1 > 7).long() ^ (c2 > 7).long()
    assert pid_codes(c1, c2, label, base=2, extrapolate=False).synergy < 0.85
    pid = pid_codes(c1, c2, label, base=2, **options)
    assert abs(pid.synergy - 1) < 0.05 and pid.atoms[:3].abs().max() < 0.02


def test_halves_are_random():
    g = generator()
    c1, c2 = torch.randint(4, (2, 2000), generator=g)
    label = (c1 > 1).long() ^ (c2 > 1).long()
    order = label.argsort()  # first half: one label, where nothing is to be known
    mixed, sorted_ = (pid_codes(c1[i], c2[i], label[i], base=2, permutations=2) for i in (torch.arange(2000), order))
    assert abs(sorted_.synergy - mixed.synergy) < 0.02 and abs(sorted_.synergy - 1) < 0.05


def test_interval_is_around_the_estimate():
    z = known_views(500, 1, 0.6)
    for options in ({}, {"extrapolate": False}):
        pid = pid_samples(*z, "quantised", codes=4, permutations=2, interval="bootstrap", replicates=5, **options)
        for name in NAMES:
            assert pid.interval[name].mean() == pytest.approx(getattr(pid, name).item(), abs=1e-9)


def test_extrapolation_needs_two_samples_a_half():
    code = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=r"n=3 samples: .*at least 4; extrapolate=False"):
        pid_codes(code, code, code)
    assert pid_codes(code, code, code, permutations=0, extrapolate=False).redundancy > 0.6


@pytest.mark.parametrize("kind", [torch.tensor, np.asarray, list])
def test_one_rule_for_labels_whatever_holds_them(kind):
    "Sixteen classes of which each source shows two bits: nothing is clustered again, nothing is capped at eight codes"
    code = np.random.default_rng(0).integers(0, 4, (2, 4000))
    label = 4 * code[0] + code[1]
    pid = pid_samples(*map(kind, (*code, label)), "quantised", base=2, permutations=2)
    assert abs(pid.unique1 - 2) < 0.01 and abs(pid.unique2 - 2) < 0.01 and abs(pid.joint - 4) < 0.01
    for estimator in ("gaussian", "coordinate"):
        with pytest.raises(ValueError, match="z1 holds labels"):
            pid_samples(*map(kind, (*code, label)), estimator)


def test_the_gap_covers_halves_and_shuffles():
    z = known_views(300, 1, 0.6)
    plain, null = (pid_samples(*z, "quantised", codes=3, permutations=p).gap for p in (0, 4))
    whole = pid_samples(*z, "quantised", codes=3, permutations=0, extrapolate=False).gap
    assert 2 * whole <= plain < null < 1e-7


def test_labels_are_taken_as_they_are():
    g = generator()
    z1, z2 = torch.randn(3000, 1, generator=g), torch.randn(3000, 1, generator=g)
    label = 7 + 5 * (z1[:, 0] > 0).long()  # neither from 0 nor dense
    pid = pid_samples(z1, z2, label, "quantised", codes=2, permutations=3, base=2)
    assert pid.unique1 > 0.9 and pid.redundancy.abs() < 0.01


def test_quantise_separates_and_repeats():
    g = generator()
    x = torch.cat([m + 0.1 * torch.randn(100, 2, generator=g) for m in (-5, 0, 5)])
    code = quantise(x, 3)
    assert sorted(len(set(c.tolist())) for c in code.split(100)) == [1, 1, 1] and len(code.unique()) == 3
    assert torch.equal(code, quantise(x, 3))
    assert count_table(code, code, code).sum() == pytest.approx(1)


@pytest.mark.parametrize("method", ["jackknife", "bootstrap"])
def test_interval_covers(method):
    truth = known_informations(2, 0.6)[2]
    hits = 0
    for seed in range(40):
        options = dict(interval=method, level=0.9, replicates=30, seed=seed)
        pid = pid_samples(*known_views(400, 2, 0.6, seed), "gaussian", bias_correct=True, **options)
        low, high = pid.interval["joint"]
        assert low < pid.joint < high
        hits += bool(low < truth < high)
    assert 30 <= hits <= 40  # 36 expected
    assert set(pid.interval) == set(NAMES)


@pytest.mark.parametrize("estimator, options, d", [
    ("gaussian", {"bias_correct": True}, 4), ("coordinate", {}, 1)])
def test_interval_covers_where_the_estimator_is_recommended(estimator, options, d):
    "At least 90 % of 200 draws, for a level of 95 %"
    i1, _, i12 = known_informations(d, 0.5)
    truth = {"redundancy": i1, "synergy": i12 - i1, "joint": i12}
    hits = dict.fromkeys(truth, 0)
    for seed in range(200):
        interval = pid_samples(*known_views(250, d, 0.5, seed), estimator, interval="jackknife", **options).interval
        for name, value in truth.items():
            low, high = interval[name]
            hits[name] += bool(low <= value <= high)
    assert min(hits.values()) >= 180, hits


def test_what_is_recommended_was_measured():
    "Within .05 bit at every n and d of the record where no warning is given"
    record = json.loads((project_root() / "data/benchmarks/pid_error.json").read_text())
    ways = {way.removesuffix(", 8 codes") for way in {r["estimator"] for r in record["rows"]}} & set(RECOMMENDED)
    assert ways == {way for way in RECOMMENDED if "heads" not in way and "labels" not in way}  # pid_intervals.json
    errors = {}
    for r in record["rows"]:
        way = r["estimator"].removesuffix(", 8 codes")
        for atom, truth in record["truth"][str(r["d"])].items():
            errors.setdefault((way, r["d"], r["n"], atom), []).append((r[atom] - truth) / math.log(2))
    for (way, d, n, atom), values in errors.items():
        if way in RECOMMENDED and abs(np.mean(values)) > 0.0505:
            assert recommended(way, d, n), (way, d, n, atom, np.mean(values))
    with pytest.warns(RuntimeWarning, match="may be off by more than .05 bit"):
        pid_samples(*known_views(500, 16, 0.5), "coordinate")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pid_samples(*known_views(4000, 16, 0.5), "gaussian", bias_correct=True)


def test_intervals_hold_known_atoms_where_recommended():
    "The record of `tests/harness/estimator_harness.py`: mean errors, and 90 % of intervals, by as many draws as it has"
    record = json.loads((project_root() / "data/benchmarks/pid_intervals.json").read_text())
    for r in record["rows"]:
        where = r["estimator"], r["distribution"], r["d"], r["n"]
        way = r["estimator"].removesuffix(", labels") if r["d"] == 0 else r["estimator"]
        if not recommended(way, r["d"], r["n"]):
            assert r["draws"] == 200, where
            assert max(map(abs, r["mean_error"].values())) < 0.0505, (where, r["mean_error"])
            assert min(r["covered"].values()) >= 0.9 * r["draws"], (where, r["covered"])


@pytest.mark.parametrize("estimator", ["gaussian", "coordinate", "heads", "infonce"])
def test_what_is_outside_is_warned_about(estimator):
    "Signs seen through noise are not Gaussian; seven coordinates are too many for so few samples"
    (s1, s2), (z1, z2) = noisy_signs(1000)
    short = {"steps": 2} if estimator in ("heads", "infonce") else {}
    z = [x.repeat(1, 7) + torch.randn(1000, 7, generator=generator(i)) for i, x in enumerate((z1, z2, s1 * s2))]
    with pytest.warns(RuntimeWarning, match="may be off by more than .05 bit"):
        pid_samples(*z, estimator, **short)
    if not short:
        with pytest.warns(RuntimeWarning, match="not Gaussian"):
            pid_samples(z1, z2, s1 * s2, estimator)


@pytest.mark.parametrize("estimator,options", [
    ("coordinate", {}), ("quantised", {"codes": 3, "permutations": 2}), ("infonce", {"steps": 20})])
def test_every_estimator_has_an_interval(estimator, options):
    pid = pid_samples(*known_views(300, 1, 0.6), estimator, interval="jackknife", replicates=5, **options)
    assert pid.interval["synergy"][0] < pid.synergy < pid.interval["synergy"][1]


def test_interval_level_widens():
    x = torch.randn(100, generator=generator())
    read = lambda i: x[i].mean().expand(7)
    intervals = [confidence_interval(read, 100, "jackknife", level)["i1"] for level in (0.5, 0.9, 0.99)]
    widths = [high - low for low, high in intervals]
    assert widths == sorted(widths)


def test_saturation_is_flagged():
    g = generator()
    t = torch.randn(2000, 4, generator=g)
    with pytest.warns(RuntimeWarning, match="ceiling of ln 8"):
        pid = pid_samples(t, torch.randn(2000, 1, generator=g), t, "infonce", eval_batch=8, steps=150)
    assert pid.info["saturated"] and pid.info["ceiling"] == pytest.approx(math.log(8))


def test_seeds_repeat_and_leave_the_global_generator_alone():
    z = known_views(200, 1, 0.5)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (fit_infonce(*z, steps=10, seed=3).contributions for _ in range(2))
    assert torch.equal(first, again) and torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, fit_infonce(*z, steps=10, seed=4).contributions)


Z = known_views(50, 2, 0.5)


@pytest.mark.parametrize("args,options,message", [
    ((Z[0][:40], Z[1], Z[2]), {}, "different numbers of samples"),
    ((Z[0] * math.nan, Z[1], Z[2]), {}, "z1 holds NaN"),
    ((Z[0][:6], Z[1][:6], Z[2][:6]), {}, r"n=6 samples of 2 \+ 2 \+ 2 dimensions.*need n > 6"),
    ((Z[0][None], Z[1], Z[2]), {}, r"z1 of shape \(1, 50, 2\): need \(n, d\)"),
    ((Z[0], Z[1], Z[2][:, :1]), {"estimator": "coordinate"}, "z1, z2, t have 2, 2, 1"),
    (Z, {"estimator": "ksg"}, "choose from coordinate, gaussian, quantised, infonce"),
    (Z, {"measure": "wb"}, "choose from mmi, broja"),
    (Z, {"estimator": "coordinate", "measure": "broja"}, "choose from mmi"),
    (Z, {"interval": "bayes"}, "choose from jackknife, bootstrap"),
    (Z, {"interval": "jackknife", "level": 95}, "level=95"),
    (Z, {"bias_correct": True, "shrinkage": 0.1}, "plain covariances only"),
    (Z, {"estimator": "quantised", "codes": 51}, "more cells than the n=50 samples"),
    (Z, {"estimator": "infonce", "batch": 1}, "batch=1"),
    (Z, {"base": 0.5}, "base=0.5"),
    ((Z[0], torch.ones(50, 1), Z[2]), {}, "Z2 has a variance of 0"),
])
def test_invalid_input(args, options, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid_samples(*args, **options)


def test_unknown_options():
    with pytest.raises(TypeError, match="steps"):
        pid_samples(*Z, "gaussian", steps=3)


def test_infonce_takes_class_labels():
    "Three classes, shown by the first source: one-hot targets, not the numbers 0, 1, 2 on a line"
    g = generator()
    label = torch.randint(0, 3, (3000,), generator=g)
    z1 = torch.nn.functional.one_hot(label).float() + 0.1 * torch.randn(3000, 3, generator=g)
    pid = pid_samples(z1, torch.randn(3000, 1, generator=g), label, "infonce", steps=100)
    assert abs(pid.i1 - math.log(3)) < 0.05 and pid.i2.abs() < 0.05
