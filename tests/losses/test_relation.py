"""The relation of views: known relations are read, baselines stay what they were, and several views are the mean over
their pairs."""

import itertools
import math

import pytest
import torch

from pid_ssl.config import Config, resolve
from pid_ssl.data import load_dataset
from pid_ssl.data.parameters import relation, relation_table, told
from pid_ssl.data.views import POLICIES, Policy, ViewMaker, draw_view, jitter_colour, resample
from pid_ssl.experiments.resume import load_state, save_state
from pid_ssl.experiments.training import Pretraining
from pid_ssl.losses import LOSSES, Relation, RelationLoss, Unique, cross_correlation, standardise
from pid_ssl.losses.relation import Teller

VIEWED = {"barlow": {}, "vicreg": {}, "simclr": {}, "wmse": dict(whitening_size=16)}
SMALL = dict(
    dataset="digits",
    epochs=2,
    width=4,
    batch_size=64,
    train_size=256,
    projector_dim=8,
    projector_hidden=8,
    whitening_size=32,
    lr=5e-4,
)


def value_and_gradient(name, views, together):
    z = torch.stack(views).requires_grad_()
    torch.manual_seed(0)
    loss = LOSSES[name](**VIEWED[name])
    value = loss(z) if together == "stack" else loss(list(z)) if together == "list" else loss(*z)
    value.backward()
    return value.detach(), z.grad, loss.terms


def views_of(number, n=32, d=4):
    g = torch.Generator().manual_seed(0)
    image = torch.randn(n, d, generator=g, dtype=torch.float64)
    return [image + torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(number)]


@pytest.mark.parametrize("name", VIEWED)
def test_two_views_are_what_they_were(name):
    one = value_and_gradient(name, views_of(2), "two arguments")
    for together in ("stack", "list"):
        value, gradient, terms = value_and_gradient(name, views_of(2), together)
        assert torch.equal(value, one[0]) and torch.equal(gradient, one[1]) and terms == one[2]


def test_barlow_twins_of_peers_is_the_mean_over_ordered_pairs():
    x = [standardise(v) for v in views_of(4)]
    c = torch.stack([cross_correlation(a, b) for a, b in itertools.permutations(x, 2)]).mean(0)
    want = (1 - c.diagonal()).square().sum() + 5e-3 * (c - torch.diag(c.diagonal())).square().sum()
    assert torch.allclose(value_and_gradient("barlow", views_of(4), "stack")[0], want)


@pytest.mark.parametrize("name", ("vicreg", "simclr"))
def test_other_losses_of_peers_are_the_mean_over_pairs(name):
    pairs = [value_and_gradient(name, pair, "stack")[0] for pair in itertools.combinations(views_of(3), 2)]
    assert torch.allclose(value_and_gradient(name, views_of(3), "list")[0], torch.stack(pairs).mean())


def test_wmse_of_peers_whitens_each_view_once():
    from pid_ssl.losses.baselines import distance, whiten

    views = views_of(4)
    torch.manual_seed(0)
    order = torch.randperm(32)
    parts = [[whiten(v[rows]) for v in views] for rows in order.split(16)]
    want = torch.stack([distance(a, b) for part in parts for a, b in itertools.combinations(part, 2)]).mean()
    assert torch.allclose(value_and_gradient("wmse", views, "stack")[0], want)


def test_views_that_do_not_fit():
    loss = LOSSES["barlow"]()
    with pytest.raises(ValueError, match="accepted: the same"):
        loss([torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="z1: got 3 views; accepted: 2"):
        LOSSES["pid"](estimator="coordinate")(torch.randn(3, 8, 2), target=torch.randn(8, 2))
    with pytest.raises(ValueError, match="singular"):
        LOSSES["wmse"](whitening_size=16)(torch.zeros(6, 16, 4))


# --- known relations


def blob(n, g, side=24):
    """A round spot of random place and size on black ground."""
    at = torch.linspace(-1, 1, side)
    x, y = torch.rand(2, n, 1, 1, generator=g) * 0.4 - 0.2
    width = 0.12 + 0.1 * torch.rand(n, 1, 1, generator=g)
    return 0.5 * torch.exp(-((at[None, None] - x) ** 2 + (at[None, :, None] - y) ** 2) / (2 * width**2))[:, None]


def measured(image):
    """Centre, logarithm of the width and logarithm of the mass of a spot."""
    at = torch.linspace(-1, 1, image.shape[-1])
    mass = image.sum((1, 2, 3))
    x, y = (image.sum((1, 2)) * at).sum(1) / mass, (image.sum((1, 3)) * at).sum(1) / mass
    distance = (at[None, None] - x[:, None, None]) ** 2 + (at[None, :, None] - y[:, None, None]) ** 2
    spread = (image * distance[:, None]).sum((1, 2, 3)) / mass
    return torch.stack([x, y, spread.log() / 2, mass.log()], 1)


def of_two_views(image, policy, g):
    """Features of two views, and what leads from the first to the second."""
    h, omegas = [], []
    for _ in range(2):
        omega, colour = draw_view(len(image), policy, g, 1, image.shape[-1])
        h.append(measured(jitter_colour(resample(image, omega["theta"], policy), colour)))
        omegas.append(omega)
    return h, relation(*omegas, policy)


def test_heads_read_what_moments_of_a_spot_tell():
    """The oracle knows the formulas: a zoom is a ratio of widths, brightness one of masses, and so on."""
    policy = Policy(translate=0.1, zoom=0.3, jitter=1.0, brightness=0.4, padding="zeros")
    g, noise = torch.Generator().manual_seed(0), 0.02
    table = relation_table(policy, channels=1)
    assert list(table) == ["x", "y", "zoom", "brightness"]
    head = Teller(4, table, 2, hidden=64)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 600)
    batch = lambda n: of_two_views(blob(n, g), policy, g)
    sets = [batch(2048) for _ in range(4)]
    noisy = lambda h: [x + noise * torch.randn(x.shape, generator=g) for x in h]
    for step in range(600):
        h, rho = sets[step % 3]
        errors = head.errors(rho, *noisy(h))
        optimizer.zero_grad()
        (-head.nats(errors).sum()).backward()
        optimizer.step()
        schedule.step()
    h, rho = sets[3]
    one, two = h = noisy(h)
    zoom = one[:, 2] - two[:, 2]
    oracle = dict(
        zoom=zoom,
        x=one[:, 0] - zoom.exp() * two[:, 0],
        y=one[:, 1] - zoom.exp() * two[:, 1],
        brightness=two[:, 3] - one[:, 3] - 2 * (two[:, 2] - one[:, 2]),
    )
    with torch.no_grad():
        got = dict(zip(table, head.nats(head.errors(rho, *h)).tolist()))
    want = {k: math.log(table[k].std ** 2 / (oracle[k] - rho[k]).square().mean()) / 2 for k in table}
    assert min(want.values()) > 1 and sum(got.values()) > 0.9 * sum(want.values()), (got, want)
    assert all(got[k] > 0.8 * want[k] for k in table), (got, want)


@pytest.mark.parametrize("symmetric", [True, False])
def test_flip_of_symmetric_shapes_reads_nothing(symmetric):
    policy, g = Policy(flip=0.5), torch.Generator().manual_seed(0)
    table = relation_table(policy, channels=1)
    assert list(table) == ["flip"]
    head = Teller(8, table, 2, hidden=64)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)

    def batch(n):
        half = torch.rand(n, 1, 8, 4, generator=g)
        image = torch.cat([half, half.flip(3) if symmetric else torch.rand(n, 1, 8, 4, generator=g)], 3)
        omegas = [draw_view(n, policy, g, 1, 8)[0] for _ in range(2)]
        return [resample(image, o["theta"], policy).mean((1, 2)) for o in omegas], relation(*omegas, policy)

    for _ in range(400):
        h, rho = batch(512)
        errors = head.errors(rho, *h)
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
    h, rho = batch(4096)
    nats = head.nats(head.errors(rho, *h)).item()
    assert abs(nats) < 0.02 if symmetric else nats > 0.8 * math.log(2), nats


# --- the term beside a loss


def test_gradients_are_those_of_the_value():
    torch.manual_seed(0)
    omegas = [draw_view(12, POLICIES["byol"], torch.Generator().manual_seed(i))[0] for i in range(2)]
    rho, own = (told(*omegas, POLICIES["byol"], tells) for tells in ("all", "own"))
    h1, h2 = torch.randn(2, 12, 4, dtype=torch.float64).unbind()
    for error in ("nats", "squared"):
        term = Relation(4, relation_table("byol", "all"), 0.7, hidden=8, error=error).double()
        assert torch.autograd.gradcheck(lambda a, b: term(a, b, rho), (h1.requires_grad_(), h2.requires_grad_()))
        alone = Unique(4, relation_table("byol", "own"), 0.7, hidden=8, error=error).double()
        assert torch.autograd.gradcheck(lambda a: alone(a, own), (h1,))
    maps = torch.randn(12, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    term = Relation((3, 2, 2), relation_table("byol"), 0.7, hidden=8).double()
    assert torch.autograd.gradcheck(lambda a: term(a, a.flip(0), told(*omegas, POLICIES["byol"])), (maps,))


def test_shuffled_pairs_have_the_relations_of_others():
    table, n = relation_table("digits", channels=1), 8
    omegas = [draw_view(n, POLICIES["digits"], torch.Generator().manual_seed(i), 1)[0] for i in range(2)]
    rho = told(*omegas, POLICIES["digits"])
    h = torch.randn(2, n, 4)
    value = lambda shuffled, rho: Relation(4, table, shuffled=shuffled)(*h, rho)
    others = {k: v.roll(n // 2) for k, v in rho.items()}
    assert torch.equal(value(True, rho), value(False, others)) and value(True, rho) != value(False, rho)


def trained(steps=None, **given):
    state = Pretraining(resolve(Config(**SMALL | given)), load_dataset("digits", train_size=256), "cpu")
    while len(state.history) < state.config.epochs:
        row = state.epoch(lambda: steps is not None and state.step == steps)
        if row is None:
            break
        state.history.append(row)
    return state


@pytest.mark.parametrize(
    "loss, baseline, views",
    [("pid_barlow", "barlow", 2), ("pid", "barlow", 4), ("pid_wmse", "wmse", 2), ("pid_wmse", "wmse", 4)],
)
def test_without_weight_a_run_is_its_baseline(loss, baseline, views):
    ours, theirs = trained(loss=loss, views=views, w_s=0.0, w_u=0.0), trained(loss=baseline, views=views)
    assert all(torch.equal(v, ours.embed.state_dict()[k]) for k, v in theirs.embed.state_dict().items())
    assert all(torch.equal(v, ours.views.state()[k]) for k, v in theirs.views.state().items())
    assert all(a.items() <= b.items() for a, b in zip(theirs.history, ours.history))
    assert ours.image_passes() == theirs.image_passes() == views // 2 * 2 * 256 * 6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(head="maps", w_u=0.5, shuffled=True),
        dict(conditioned=True, redundancy_phase=0.2, anneal=0.2, synergy_end=0.6),
    ],
)
def test_a_stopped_run_goes_on_to_the_last_digit(settings, tmp_path):
    whole, part = trained(loss="pid", **settings), trained(5, loss="pid", **settings)
    assert part.step == 5
    save_state(part, tmp_path)
    again = Pretraining(part.config, load_dataset("digits", train_size=256), "cpu")
    torch.manual_seed(99)
    assert load_state(again, tmp_path)
    while len(again.history) < again.config.epochs:
        again.history.append(again.epoch())
    assert again.history == whole.history
    for a, b in ((again.embed, whole.embed), (again.loss, whole.loss)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_telling_costs_no_random_number():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    for policy in ("cifar", "byol", "simclr"):
        plain, ours = (ViewMaker(policy, [0.5] * 3, [0.2] * 3, seed=1) for _ in range(2))
        for _ in range(2):
            assert torch.equal(plain(images), ours(images, told=True)[0])
        assert torch.equal(plain.state()["device"], ours.state()["device"])


def test_relation_of_peers_does_not_depend_on_how_rows_are_shared():
    """Rows in the order of images: what a process has of them is a slice of what all have."""
    loss = RelationLoss(LOSSES["barlow"](), Relation(4, relation_table("digits", channels=1)))
    z, h = torch.randn(2, 3, 8, 4)
    rho = {k: torch.randn(3, 8) for k in loss.relation.pair.columns}
    seen = []
    loss.relation.forward = lambda h1, h2, rho, strength: seen.append((h1, h2)) or h1.sum() * 0
    loss(z, h, rho)
    ((h1, h2),) = seen
    assert torch.equal(h1[:3], h[:, 0]) and torch.equal(h2[:3], h[[1, 2, 0], 0])
