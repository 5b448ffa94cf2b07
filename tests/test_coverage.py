"""What a pool covers, and the benchmark of it (benchmarks/pool_coverage.py) at toy size."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.evaluation.coverage import (
    Coverage,
    by_symbol,
    class_rows,
    common_goal,
    coverage_rows,
    measure_random_coverage,
)
from uap_dist.method.norms import random_of_same_norms
from uap_dist.method.rates import ATTACKED, FOOLING, TARGETED, UNTARGETED, Goal, Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.dataset import classify

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import pool_coverage
from networks import NETWORKS, Network

FOOLED = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
LABELS = np.array([7, 7, 7, 2, 2, 2])


def coverage_of(names, is_hit):
    return Coverage(names, is_hit, LABELS)


def test_members_are_taken_greedily_and_the_share_that_any_of_them_fools_is_counted():
    coverage = coverage_of("abcd", FOOLED)
    assert coverage.order == [0, 1, 2, 3]  # the first among equals; the twin of a member adds nothing
    assert coverage.rates == [Rate(3, 6), Rate(4, 6), Rate(5, 6), Rate(5, 6)]
    assert coverage_of("abcd", FOOLED[::-1]).order == [0, 1, 2, 3]
    assert coverage_of("bca", FOOLED[[1, 2, 0]]).order == [0, 1, 2]
    rows = coverage_rows(coverage, {"linf": coverage_of("xyzw", ~FOOLED)})
    assert [row["member"] for row in rows] == list("abcd") and rows[1]["covered"] == pytest.approx(4 / 6)
    assert rows[0]["covered_random_linf"] == pytest.approx(5 / 6) and rows[3]["covered_random_linf"] == 1


def test_classes_are_listed_with_the_least_covered_first():
    rows = class_rows(coverage_of("abcd", FOOLED), {2: "two", 7: "seven"})
    assert [(row["clean_name"], row["covered_num_images"]) for row in rows] == [("two", 3), ("seven", 3)]
    assert [row["covered"] for row in rows] == [pytest.approx(2 / 3), 1] and rows[0]["covered_by_first"] == 0


@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1), st.none() | st.integers(0, 3), st.sets(st.integers(0, 3))
)
def test_what_counts_is_what_the_members_are_for(labels, target, only):
    clean, *perturbed = np.array(labels).T
    goal = Goal(target, tuple(only))
    coverage = Coverage.of("abc", goal, clean, np.stack(perturbed))
    counts, kind = goal.pushes(clean), ATTACKED if only else FOOLING
    if target is not None and counts.any():
        kind, hits = TARGETED, np.any([each == target for each in perturbed], 0)
    else:
        counts = goal.attacks(clean) if goal.attacks(clean).any() else clean == clean
        kind, hits = kind if goal.attacks(clean).any() else FOOLING, np.any(perturbed != clean, 0)
    assert coverage.kind == kind and coverage.rates[-1] == Rate((hits & counts).sum(), counts.sum())
    assert coverage.labels.tolist() == clean[counts].tolist()


def test_members_of_several_goals_are_counted_by_the_images_that_they_fool():
    members = [Perturbation(str(target), torch.zeros(3, 2, 2), {"target": target}) for target in (1, 1, 2)]
    assert common_goal(members[:2]) == Goal(1) and common_goal(members) == UNTARGETED


def test_random_perturbations_are_as_many_and_as_large_as_the_members(local_workers, tiny_data):
    _, val = tiny_data
    members = 30 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = measure_random_coverage(local_workers, val, members)
    for norm, coverage in found.items():
        noise = [random_of_same_norms(v, seed=seed)[norm].numpy() for seed, v in enumerate(members)]
        expected = [classify(local_workers, val, v).labels != val.clean.labels for v in noise]
        assert np.array_equal(coverage.is_hit, expected) and not np.array_equal(noise[0], noise[1])
    tiny = 0.4 * members.sign()  # which rounding removes
    assert not any(c.is_hit.any() for c in measure_random_coverage(local_workers, val, tiny, quantize=True).values())
    later = measure_random_coverage(local_workers, val, members, seed=1)["linf"]
    own = random_of_same_norms(members[0], seed=1)["linf"].numpy()
    assert np.array_equal(later.is_hit[0], classify(local_workers, val, own).labels != val.clean.labels)
    corners = measure_random_coverage(local_workers, val, 20 * members.sign())
    assert corners["l2"] is corners["linf"]  # measured once
    assert list(by_symbol(corners)) == ["ℓ∞ and ℓ2"] and list(by_symbol(found)) == ["ℓ∞", "ℓ2"]


def test_pools_are_computed_once_and_stand_beside_as_many_random_perturbations(shards, tmp_path, monkeypatch, capsys):
    tiny = {"train": "train-*.tar", "val": "val-*.tar", "num_train_images": 47, "num_val_images": 20, "tune_shards": 2}
    monkeypatch.setitem(NETWORKS, "tiny", Network(model=TINY, weights=None, **tiny))
    pool = pool_coverage.Pool("tiny", 3, {"max_evaluations": 200})
    monkeypatch.setattr(pool_coverage, "POOLS", {"three of them": pool})
    options = pool_coverage.Options(data=shards, output=tmp_path / "coverage.jsonl")
    pool_coverage.run(options)
    pool_coverage.run(options)
    (line,) = pool_coverage.read(options.output)
    assert sorted(line["members"]) == ["seed 0", "seed 1", "seed 2"]
    assert line["covered"][0] == max(line["alone"]) and line["covered"] == sorted(line["covered"])
    assert line["covered"][-1] <= min(20, sum(line["alone"]))
    assert {norm: len(hits) for norm, hits in line["random"].items()} == {"ℓ∞": 3, "ℓ2": 3}
    _, (row,) = (text.splitlines() for text in pool_coverage.table([line]))
    assert f"| {20 - line['covered'][-1]} |" in row and f"{sum(line['alone']) / 60:.3f}" in row
    pool_coverage.draw([line], tmp_path / "coverage.png")
    assert (tmp_path / "coverage.png").stat().st_size > 1000
