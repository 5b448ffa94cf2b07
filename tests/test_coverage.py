"""What a pool covers."""

import numpy as np
import pytest
import torch

from uap_dist.evaluation.coverage import Coverage, by_symbol, class_rows, coverage_rows, measure_random_coverage
from uap_dist.method.norms import random_of_same_norms
from uap_dist.method.rates import Rate
from uap_dist.workers.dataset import classify

FOOLED = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], bool)


def test_members_are_taken_greedily_and_the_share_that_any_of_them_fools_is_counted():
    coverage = Coverage("abcd", FOOLED)
    assert coverage.order == [0, 1, 2, 3]  # the first among equals; the twin of a member adds nothing
    assert coverage.rates == [Rate(3, 6), Rate(4, 6), Rate(5, 6), Rate(5, 6)]
    assert Coverage("abcd", FOOLED[::-1]).order == [0, 1, 2, 3]
    assert Coverage("bca", FOOLED[[1, 2, 0]]).order == [0, 1, 2]
    rows = coverage_rows(coverage, {"linf": Coverage("xyzw", ~FOOLED)})
    assert [row["member"] for row in rows] == list("abcd") and rows[1]["covered"] == pytest.approx(4 / 6)
    assert rows[0]["covered_random_linf"] == pytest.approx(5 / 6) and rows[3]["covered_random_linf"] == 1


def test_classes_are_listed_with_the_least_covered_first():
    labels = np.array([7, 7, 7, 2, 2, 2])
    rows = class_rows(Coverage("abcd", FOOLED), labels, ["seven"] * 3 + ["two"] * 3)
    assert [(row["clean_name"], row["covered_num_images"]) for row in rows] == [("two", 3), ("seven", 3)]
    assert [row["covered"] for row in rows] == [pytest.approx(2 / 3), 1] and rows[0]["fooled_by_first"] == 0


def test_random_perturbations_are_as_many_and_as_large_as_the_members(local_workers, tiny_data):
    _, val = tiny_data
    members = 30 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = measure_random_coverage(local_workers, val, members)
    for norm, coverage in found.items():
        noise = [random_of_same_norms(v, seed=seed)[norm].numpy() for seed, v in enumerate(members)]
        expected = [classify(local_workers, val, v).labels != val.clean.labels for v in noise]
        assert np.array_equal(coverage.is_fooled, expected) and not np.array_equal(noise[0], noise[1])
    corners = measure_random_coverage(local_workers, val, 20 * members.sign())
    assert corners["l2"] is corners["linf"]  # measured once
    assert list(by_symbol(corners)) == ["ℓ∞ and ℓ2"] and list(by_symbol(found)) == ["ℓ∞", "ℓ2"]
