"""Fleets of real Ray actors on this machine, for the tests."""

import psutil
from conftest import TINY

from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.workers.dataset import load_dataset


def make_fleet(num_workers, **options):
    fleet = Fleet(TINY, None, FleetConfig(num_workers=num_workers, **options))
    fleet.wait()
    return fleet


def load(workers, shards):
    urls = [str(shards / f"train-{i:04d}.tar") for i in range(3)]
    return load_dataset(workers, urls), load_dataset(workers, [str(shards / "val-0000.tar")])


def worker_processes():
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::UapWorker")]
