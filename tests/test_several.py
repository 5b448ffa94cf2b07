"""One perturbation for several networks: what it is for copies of one, sums and rates of each network, and what cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_worker
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import Other, Tiny

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError, ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import FOOLING, SPARED, Goal, rate_titles
from uap_dist.method.solver import Batch, solve_block
from uap_dist.method.update import balance
from uap_dist.models.classifier import Classifier, Predictions
from uap_dist.models.loading import load_classifier
from uap_dist.models.several import WORST, Several, of_network
from uap_dist.planning.range import Range
from uap_dist.planning.shard_sizes import ShardSizes
from uap_dist.planning.work import OF_LOG_ODDS, count_work
from uap_dist.rounds.concurrent import compute_concurrently
from uap_dist.rounds.group import run_together
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import plan_run
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

OTHER = TINY.replace("Tiny", "Other")
CONFIG = ComputeConfig(round_size=10, block_size=5, max_passes=3, radius=20.0)


def of(network, **options):
    return Classifier(network, name="own", geometry=Geometry(), **options)


def workers_of(*networks):
    several = Several([of(each) for each in networks], [f"n{i}" for i in range(len(networks))], ())
    return LocalWorkers(Worker(several, cache_bytes=1 << 30, num_threads=1))


def load(workers, shards):
    train = [str(shards / f"train-{i:04d}.tar") for i in range(3)]
    return load_dataset(workers, train), load_dataset(workers, [str(shards / "val-0000.tar")])


@pytest.fixture
def both(shards):
    workers = LocalWorkers(Worker(load_classifier((TINY, OTHER)), cache_bytes=1 << 30, num_threads=1))
    return workers, *load(workers, shards)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "l2", "radius": 300.0},
        {"target": 1},
        {"only_classes": (0,)},
        {"local_steps": 5},
        {"random_start": 0.5, "members_at_once": 2},
    ],
)
def test_copies_of_a_network_have_its_perturbation_at_twice_the_cost(shards, tiny_data, local_workers, options):
    """To the bit: the sums of two copies are twice those of one, and directions do not know how long a sum is."""
    config = replace(CONFIG, **options)
    *_, alone = compute(local_workers, *tiny_data, config)
    workers = workers_of(Tiny(), Tiny())
    data = load(workers, shards)
    assert data[0].clean.labels.shape == (47, 2) and data[0].clean.networks == ("n0", "n1")
    *_, found = compute(workers, *data, config)
    assert torch.equal(found.perturbation, alone.perturbation) and found.perturbation.any()
    assert found.num_evaluations == 2 * alone.num_evaluations and found.num_solves == alone.num_solves
    rates = found.evaluation.val_rates
    for kind, rate in alone.evaluation.val_rates.items():
        assert {rates[kind]} == {rates[of_network(kind, name)] for name in ("n0", "n1", WORST)} == {rate}


def test_increments_are_those_of_each_network_in_units_of_its_log_odds(shards):
    networks = [tiny_worker().classifier, of(Other())]
    several = Several(networks, ["a", "b"], ())
    rng = torch.Generator().manual_seed(0)
    pixels, v = 255 * torch.rand(6, 3, 16, 16, generator=rng), 10 * torch.randn(1, 3, 16, 16, generator=rng)
    labels, scales = several(pixels).argmax(-1), torch.tensor([[2.0, 6.0]], dtype=torch.float64)
    solver = plan_run([6], CONFIG, several.networks).solver
    total, sums = solve_block(several, Batch(pixels, labels), v, scales, solver)
    parts = [
        solve_block(network, Batch(pixels, labels[:, i]), v, scales[:, i], CONFIG.solver)
        for i, network in enumerate(networks)
    ]
    assert torch.allclose(total, 2 * parts[0][0] + 2 / 3 * parts[1][0], atol=1e-6)
    found = dict(zip(solver.names, sums[0].tolist(), strict=True))
    for name, (_, own) in zip(several.networks, parts, strict=True):
        for kind, values in zip(CONFIG.solver.names, own[0].tolist(), strict=True):
            assert found[of_network(kind, name)] == pytest.approx(values)
    at_once = (several((pixels + v).clamp(0, 255)).argmax(-1) != labels).all(1).sum()
    assert found[FOOLING] == [at_once, 6]


def test_networks_count_alike_before_any_statistics_and_with_equal_ones():
    scales = torch.tensor([[torch.inf, torch.inf], [3.0, 3.0], [0.0, 2.0], [1.0, 3.0]])
    assert balance(scales).tolist() == [[1, 1], [1, 1], [1, 0.5], [2, pytest.approx(2 / 3)]]


LABELS = arrays(np.int64, (12, 3), elements=st.integers(0, 3))


@given(LABELS, LABELS, st.sampled_from([Goal(), Goal(target=1), Goal(only=(0, 2)), Goal(only=(0,), spare=(1,))]))
def test_the_worst_network_and_all_at_once(clean, perturbed, goal):
    names = ("a", "b", "c")
    rates, masks = (getattr(goal.of_networks(names), what)(clean, perturbed) for what in ("rates", "hits"))
    for number, name in enumerate(names):
        for kind, rate in goal.rates(clean[:, number], perturbed[:, number]).items():
            assert rates[of_network(kind, name)] == rate
    for kind in goal.kinds:
        each = [rates[of_network(kind, name)].rate for name in names if of_network(kind, name) in rates]
        assert (of_network(kind, WORST) in rates) == bool(each)
        if each:
            assert rates[of_network(kind, WORST)].rate == (max if kind == SPARED else min)(each)
        hits, counts = masks[kind]
        for name in names:
            own_hits, own_counts = masks[of_network(kind, name)]
            assert not (counts & ~own_counts).any()
            assert not (own_hits & counts & ~hits).any() if kind == SPARED else not (hits & ~own_hits).any()
    fooled = Predictions(perturbed, clean, names).differ_from(Predictions(clean, clean, names))
    assert rates[FOOLING].num_hits == fooled.sum() and rates[FOOLING].num_examples == 12
    assert all("network" in title or " of " in title for title in rate_titles(rates).values())


@pytest.mark.parametrize("options", [{}, {"rule": "paper"}, {"local_steps": 5}, {"target": 1}])
def test_a_resumed_computation_has_the_same_bits_and_a_budget_counts_every_network(both, options):
    workers, train, val = both
    config = replace(CONFIG, max_passes=None, max_evaluations=700, **options)
    reports = list(compute(workers, train, val, config))
    state = reports[len(reports) // 2].state
    assert state.iterate.scale.shape == (2,)
    *_, last = compute(workers, train, val, config, state)
    assert torch.equal(last.perturbation, reports[-1].perturbation)
    assert last.evaluation.val_rates == reports[-1].evaluation.val_rates
    if "rule" not in options:
        assert last.num_evaluations == 2 * 47 + 4 * last.num_solves <= 700 < last.num_evaluations + 40
    assert reports[0].rates.keys() == {"Tiny.fooling", "Other.fooling", "fooling"} or "target" in options
    rates = last.evaluation.val_rates
    assert rates["fooling"].rate <= rates["worst.fooling"].rate and rates["worst.fooling"].rate > 0.5


@pytest.mark.parametrize("options", [{}, {"max_passes": None, "max_evaluations": 700}, {"local_steps": 5}])
def test_the_work_that_a_plan_counts_is_that_of_all_networks(both, options):
    workers, train, val = both
    config = replace(CONFIG, **options)
    *_, final = compute(workers, train, val, config)
    sizes = [ShardSizes(tuple(data.sizes), tuple(data.sizes), (1,) * len(data.sizes)) for data in (train, val)]
    work = count_work(*sizes, config, evaluations_per_solve=OF_LOG_ODDS * 2, num_networks=2)
    assert work.num_evaluations == Range.exactly(final.num_evaluations)
    assert (work.num_rounds, work.num_solves) == (final.round_number + 1, final.num_solves)


def test_a_member_has_the_same_bits_alone_in_its_batch_and_beside_others(both):
    workers, *data = both
    configs = {str(seed): replace(CONFIG, members_at_once=2, random_start=0.5, seed=seed) for seed in (0, 1)}
    rest = run_together(workers, configs, lambda name, own: compute(own, *data, configs[name]))
    together = {name: r for name, r in compute_concurrently(rest, limit=lambda left: left) if r.is_last}
    for name, config in configs.items():
        *_, alone = compute(workers, *data, config)
        assert torch.equal(alone.perturbation, together[name].perturbation)


def test_what_is_no_class_or_leaves_nothing_is_said_of_several_too(both):
    with pytest.raises(
        ConfigError, match=r"^90 evaluations \(--max-evaluations\) do not pay for .* 47 .*images by 2 net"
    ):
        list(compute(*both, replace(CONFIG, max_evaluations=90)))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (("Tiny", "Tiny"), r"^--models has .*tiny.py:Tiny twice with the same weights \(published\)$"),
        (("a=Tiny", "a=Other"), "^two models are named 'a'; give them other names, as NAME=…$"),
        (
            ("worst=Tiny", "Other"),
            "^a network is named 'worst', which is kept for the rates of the worst one; name it ",
        ),
        (("Tiny", "Renamed"), "^label 1 is 'blue' to Renamed, and 'green' to another network; one perturbation needs "),
        (("Tiny", "FiveClasses"), "^Tiny has 4 classes, FiveClasses 5; one perturbation needs networks of the same cl"),
        (("Resized", "WronglyResized"), "^WronglyResized takes 20×20 pixels, Resized 16×16 pixels; one perturbation n"),
        (
            ("Tiny", "Resized"),
            "^Resized takes 16×16 pixels, Tiny images as they lie in the shards; one perturbation ne",
        ),
        (("Tiny", "Half"), "tiny.py:Half returns float16; return logits of float32"),
        (("Tiny", "Missing"), "has no factory 'Missing'"),
    ],
)
def test_networks_that_do_not_go_together(shards, networks, message):
    given = tuple(name.replace(name.rpartition("=")[2], TINY[:-4] + name.rpartition("=")[2]) for name in networks)
    with pytest.raises((ClassifierError, ConfigError), match=message):
        load(LocalWorkers(Worker(load_classifier(given), cache_bytes=1 << 30, num_threads=1)), shards)


def test_a_copy_of_a_network_is_found_by_its_weights(tmp_path):
    for name in ("a", "b"):
        torch.save(Tiny().state_dict(), tmp_path / f"{name}.pth")
    with pytest.raises(
        ClassifierError, match="^Tiny_ a and Tiny_ b are one network: their weights are the same; leave one out$"
    ):
        load_classifier(tuple(f"{TINY}={tmp_path / name}.pth" for name in ("a", "b")))
