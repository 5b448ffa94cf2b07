"""The comparison of targeted perturbations (benchmarks/targeted.py) at toy size: on a tiny network in this process."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import targeted
from comparison.bench import Bench
from comparison.opponents import EntropyWorkers
from networks import NETWORKS, Network
from targeted import Options, Run, runs, tables

from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import TARGETED
from uap_dist.workers.worker import Worker

BUDGET = 400


@pytest.fixture
def options(shards, tmp_path, monkeypatch):
    parts = {"train": "train-*.tar", "val": "val-*.tar", "num_train_images": 47, "num_val_images": 20}
    monkeypatch.setitem(NETWORKS, "tiny", Network(model=TINY, weights=None, tune_shards=2, **parts))
    output = tmp_path / "targeted.jsonl"
    return Options(networks=("tiny",), targets=(0, 1), seeds=(0, 1), budget=BUDGET, data=shards, output=output)


@pytest.mark.filterwarnings("ignore")  # of ART
def test_every_method_is_measured_within_its_budget_and_stands_in_the_table(options, monkeypatch):
    pytest.importorskip("art")
    bench = Bench("tiny", options.data)
    with options.output.open("w") as file:
        for run in runs("tiny", options):
            line = vars(run) | targeted.measure(run, bench)
            file.write(json.dumps(line) + "\n")
            cost = 20 if run.method == "art" else 0  # of the batch in which the evaluations are spent
            assert BUDGET / 2 < line["evaluations"] <= BUDGET + cost, run
            counted = int((bench.held_out.clean.labels != run.target).sum())
            assert line["held_out_success"][1] == line["random_success"][1] == counted
    head, _, ours, entropy, art, _, _, _, zero, one, *_ = tables(options.output)
    assert head.startswith("| network, evaluations | method |") and ours.startswith("| tiny, 400 | ours | **")
    assert entropy.startswith("| tiny, 400 | entropy | **") and art.startswith("| tiny, 400 | ART | **")
    assert (
        ours.endswith("| 2 | 2 | 4 |") and zero.startswith("| tiny, 400 | 0 |") and one.startswith("| tiny, 400 | 1 |")
    )
    found = targeted.read(options.output)
    assert set(runs("tiny", options)) == set(found)  # nothing is measured again
    success = [found[Run("tiny", 0, "ours", BUDGET, "{}", seed)]["held_out_success"] for seed in (0, 1)]
    assert f"**{np.mean([hits / images for hits, images in success]):.3f}**"[2:7] in zero


def test_constants_are_tried_on_held_in_images_by_other_targets_and_seeds(options):
    tried = list(runs("squeezenet", replace(options, targets=(), tune=True)))
    assert {run.target for run in tried} == {150, 650} and {run.seed for run in tried} == {0, 1}
    assert len({run.constants for run in tried if run.method == "entropy"}) == 8
    assert {run.constants for run in tried if run.method == "ours"} == {"{}"}


def test_the_gradient_attack_descends_the_cross_entropy_of_the_target(options):
    bench = Bench("tiny", options.data)
    (task, *_) = bench.shards[0].blocks(6)
    solver, v = ComputeConfig(augment="none", target=0).solver, np.zeros((1, *bench.shards[0].shape), np.float32)
    (found,) = EntropyWorkers(bench.worker, clamp=np.inf).map(Worker.solve, [task], v, solver)
    others = torch.tensor(task.labels) != 0
    x = torch.tensor(bench.worker.pixels(task)).float().requires_grad_()
    losses = torch.nn.functional.cross_entropy(bench.worker.classifier(x), torch.zeros(6, dtype=int), reduction="none")
    (slopes,) = torch.autograd.grad(losses[others].sum(), x)
    expected = -slopes.sum(0) / slopes.sum(0).abs().mean()
    torch.testing.assert_close(torch.tensor(found.total)[0], expected, rtol=1e-3, atol=1e-4)
    assert others.any() and not others.all() and TARGETED in solver.names
