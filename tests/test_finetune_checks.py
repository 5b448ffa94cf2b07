"""Pools that fine-tuning refuses before any work, because their fresh pools could not be computed or reported."""

from dataclasses import asdict

import pytest
import torch
from conftest import TINY

from uap_dist.errors import ConfigError
from uap_dist.finetuning.checks import check_pool
from uap_dist.finetuning.options import FinetuneConfig, FinetuneOptions
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.files import Perturbation
from uap_dist.perturbations.pool import PerturbationPool


def check(configs, **options):
    """What `check_pool` says of a pool whose members, named a, b and so on, were computed with these configs."""
    classifier = load_classifier(TINY)
    own = {"model": TINY, "weights_digest": classifier.weights_digest, "radius": 10.0}
    members = [
        Perturbation(name, torch.ones(3, 16, 16), asdict(config) | own)
        for name, config in zip("abc", configs, strict=False)
    ]
    data = DataOptions(train_shards=("t",), val_shards=("v",))
    given = FinetuneOptions(model=TINY, pool="p", data=data, **options)
    return check_pool(given, PerturbationPool.of(members), classifier)


def test_a_pool_whose_fresh_pool_would_have_fewer_members_is_refused():
    """As one of separate runs: a fresh pool's members are known by their seeds, and its report compares them."""
    configs = [ComputeConfig(seed=seed) for seed in (4, 0, 4)]
    assert check(configs[:2]) == ComputeConfig(seed=4, radius=10.0)
    with pytest.raises(
        ConfigError, match="^members a and c of the pool both have seed 4, and a fresh pool .* another --seed"
    ):
        check(configs)
    with pytest.raises(ConfigError, match="^the pool has one member, .*; give a pool of two or more"):
        check(configs[:1], finetune=FinetuneConfig(online=True))
    check(configs[:2], finetune=FinetuneConfig(online=True))


def test_verifying_where_one_worker_computes_members_in_one_batch_is_refused():
    fleet = FleetConfig(num_workers=2, verify_determinism=True)
    configs = [ComputeConfig(seed=seed, members_at_once=2) for seed in range(2)]
    check(configs)
    check([ComputeConfig(seed=seed) for seed in range(2)], fleet=fleet)
    with pytest.raises(ConfigError, match="--verify-determinism .* computed with --members-at-once 2.*; leave it out"):
        check(configs, fleet=fleet)
