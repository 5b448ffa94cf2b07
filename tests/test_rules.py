"""The comparison of rules (benchmarks/rules.py) at toy size: on a tiny network in this process."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rules
from comparison import opponents, rows
from comparison.bench import Bench
from comparison.pictures import Pictures
from comparison.report import constants, draw, table
from comparison.rows import MAX_LABEL_SHARE, RADII, RULES, Row, read
from comparison.runs_at_once import Change, Together
from networks import NETWORKS, Network

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import add_perturbation
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

BUDGET = 400
TINY_NETWORK = Network(
    model=TINY,
    weights=None,
    train="train-*.tar",
    val="val-*.tar",
    num_train_images=47,
    num_val_images=20,
    tune_shards=2,
)


@pytest.fixture
def options(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY_NETWORK)
    return rules.Options(data=shards, output=tmp_path / "rules.jsonl", seeds=(0, 1))


def tiny_rows():
    return [Row("tiny", "linf", BUDGET, rule) for rule in RULES]


def lines_of(options):
    return [json.loads(line) for line in options.output.read_text().splitlines()]


def test_every_rule_is_measured_once_for_each_seed_within_its_budget(options):
    rules.measure(tiny_rows()[:1], options)
    rules.measure(tiny_rows(), options)
    lines = lines_of(options)
    assert sorted((line["rule"], line["seed"]) for line in lines) == sorted((r, s) for r in RULES for s in (0, 1))
    assert all(line["evaluations"] <= BUDGET for line in lines if line["rule"] != "paper")
    assert {line["num_held_in"] for line in lines} == {7, 20} and {line["num_held_out"] for line in lines} == {20}
    assert len({line["held_in"] for line in lines}) > 1


def test_the_table_pairs_by_seed_and_leaves_out_runs_of_another_config(options, monkeypatch):
    rates = {"ours": (0.9, 0.7, 0.8), "tuned": (0.8, 0.6, 0.7)}
    with options.output.open("w") as file:
        for row in (tiny_rows()[0], tiny_rows()[2]):
            for seed, rate in enumerate(rates[row.rule]):
                line = rules.row_line(row, seed, BUDGET, 1.0) | {"held_out": rate}
                file.write(json.dumps(line) + "\n")
    *_, leads, _, _, _, ours, tuned = table(tiny_rows(), read(options.output), "held_out")
    assert leads == "| tiny, linf | 0.800 (**+0.100 ± 0.000**) |"
    assert "**0.800** ± 0.100 | +0.100 ± 0.000" in ours and "**0.700**" in tuned
    monkeypatch.setattr(rows, "tuned_config", lambda *of: {"augment": "flip"})
    *_, leads, _, _, _, ours = table(tiny_rows(), read(options.output), "held_out")
    assert leads == "| tiny, linf | 0.800 (–) |" and "| ours |" in ours


def test_each_set_of_constants_of_sgd_uap_stands_beside_the_others(options):
    row = Row("squeezenet", "linf", 4_000, "tuned")
    line = rules.row_line(row, 0, 4_000, 1.0)
    other = line | {"config": {**row.config, "clamp": 12.0}}
    with options.output.open("w") as file:
        for run, rates in ((line, (0.5, 0.7)), (other, (0.4, 0.6))):
            file.writelines(json.dumps(run | {"held_in": rate}) + "\n" for rate in rates)
    _, _, *found = constants(options.output)
    name = "| squeezenet, linf, 4,000 | 24 |"
    assert found == [f"{name} none | ours | **0.600** | 2 |", f"{name} 12 | ours | 0.500 | 2 |"]


def test_a_pattern_that_names_no_row_is_an_error(options):
    with pytest.raises(SystemExit, match="--only resnet2-.*: no such row.* such as tiny-linf-400-ours"):
        parts = {"read": read, "measure": rules.measure, "table": table, "draw": draw}
        rules.run_or_show(replace(options, only=("resnet2-*",)), tiny_rows(), **parts)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sgd_uap_climbs_the_clamped_cross_entropy(norm):
    classifier = load_classifier(TINY)
    rng = np.random.default_rng(0)
    pixels = torch.tensor(rng.integers(0, 256, (130, 3, 16, 16))).float()
    labels = classifier(pixels).argmax(1)
    radius = {"linf": 10.0, "l2": 285.7}[norm]
    (first, cost), (_, rest) = [
        step
        for step, _ in zip(
            opponents.sgd_uap(classifier, pixels, labels, seed=0, norm=norm, radius=radius), range(2), strict=False
        )
    ]
    assert (cost, rest) == (200, 60)
    length = first.abs().max() if norm == "linf" else first.norm()
    assert length == pytest.approx(0.8 * radius)

    def loss(v):
        return torch.nn.functional.cross_entropy(classifier(add_perturbation(pixels, v)), labels)

    assert loss(first) > loss(-first)


def test_entropy_takes_the_place_of_our_increments(options):
    bench = Bench("tiny", options.data)
    (task, *_) = bench.shards[0].blocks(6)
    solver, v = ComputeConfig(augment="none").solver, np.zeros((1, *bench.shards[0].shape), np.float32)
    (found,) = opponents.EntropyWorkers(bench.worker, clamp=np.inf).map(Worker.solve, [task], v, solver)
    x = torch.tensor(bench.worker.pixels(task)).float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(bench.worker.classifier(x), torch.tensor(task.labels), reduction="sum")
    (slopes,) = torch.autograd.grad(loss, x)
    expected = slopes.sum(0) / slopes.sum(0).abs().mean()
    torch.testing.assert_close(torch.tensor(found.total)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_runs_that_go_through_the_network_together_are_the_runs_of_the_rule(options, norm):
    bench = Bench("tiny", options.data)
    radius = RADII["imagenet"][norm]
    configs = [  # of two lengths
        ComputeConfig(norm=norm, radius=radius, max_evaluations=BUDGET - 100 * seed, seed=seed) for seed in (0, 1)
    ]
    changes = [Change(period=period) for period in (8, 224)]
    train, held_in = zip(*map(bench.split, (0, 1)), strict=True)
    train = [each.thin(min(each.num_examples, BUDGET // MAX_LABEL_SHARE)) for each in train]
    pictures = Pictures(bench.worker, bench.shards)
    together = Together(bench.worker.classifier, pictures, train, configs, changes)
    found = together.compute()
    for i, config in enumerate(configs):
        for j, period in enumerate((8, 224)):
            (*_, last) = compute(LocalWorkers(bench.worker), train[i], held_in[i], replace(config, period=period))
            assert together.num_evaluations[i] == last.num_evaluations
            error = (found[i, j] - last.perturbation).norm() / last.perturbation.norm()
            assert error < (0.05 if norm == "linf" else 1e-3)  # signs of momenta near zero depend on rounding


def test_starts_have_the_first_steps_of_one_run_and_what_goes_on_the_others(options):
    bench = Bench("tiny", options.data)
    config = ComputeConfig(radius=10.0, max_evaluations=BUDGET, seed=0)
    change = Change(starts=3, start_rounds=4, judges=6)
    train, _ = bench.split(0)
    pictures = Pictures(bench.worker, bench.shards)
    together = Together(bench.worker.classifier, pictures, [train], [config], [change])
    found = [together.size(number, 40, change) for number in range(40)]
    # of 40 rounds eight are those of other starts, and 18 images once forward pay for one and a half
    steps = config.steps(31, train.shape)
    run = [steps.sizes(number)[0] for number in range(31)]
    assert found == run[:4] * 3 + run[4:] + [0.0]
