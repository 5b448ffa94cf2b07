"""The classifier of a fleet: changed, refused, different on some worker, nondeterministic. Real Ray, real actors."""

import os
import signal
from threading import Lock

import numpy as np
import pytest
from conftest import TINY
from fleets import load, make_fleet, worker_processes

from uap_dist.errors import ClassifierError, WorkerLostError
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import write_weights
from uap_dist.workers.worker import Worker


def test_a_fleet_changes_its_classifier(local_ray, shards):
    fleet = make_fleet(2)
    _, val = load(fleet, shards)
    fleet.use(TINY.replace(":Tiny", ":Sharper"), None)
    fleet.wait()
    zero = np.zeros((1, 3, 16, 16), np.float32)
    ((answer,),) = fleet.map(Worker.classify, [val.examples(0, range(20))], zero)
    fleet.use(TINY.replace(":Tiny", ":not_a_network"), None)
    with pytest.raises(ClassifierError, match="not a torch.nn.Module"):
        fleet.wait()
    fleet.close()
    assert np.array_equal(answer.labels, val.clean.labels)
    assert not np.array_equal(answer.confidences, val.clean.confidences)


def pids():
    return {process.pid for process in worker_processes()}


def test_workers_that_could_not_load_a_classifier_load_the_next_one(local_ray, shards):
    fleet = make_fleet(2)
    _, val = load(fleet, shards)
    before = pids()
    for bad, message in ((":not_a_network", "not a torch.nn.Module"), (":Absent", "has no factory 'Absent'")):
        fleet.use(TINY.replace(":Tiny", bad), None)
        with pytest.raises(ClassifierError, match=message):
            fleet.wait()
        with pytest.raises(ClassifierError, match=message):
            list(fleet.map(Worker.pixels, [val.examples(0, [1])]))
    fleet.use(TINY.replace(":Tiny", ":Sharper"), None)
    fleet.wait()
    answers = list(
        fleet.map(Worker.classify, [val.examples(0, [i]) for i in range(20)], np.zeros((1, 3, 16, 16), np.float32))
    )
    after, lost = pids(), fleet.stats.workers_lost
    fleet.close()
    assert [int(answer.labels[0]) for (answer,) in answers] == val.clean.labels.tolist()
    assert after == before and len(before) == 2 and lost == 0


def test_an_error_in_a_callers_request_reaches_that_caller_and_the_fleet_goes_on(local_ray, shards):
    fleet = make_fleet(1)
    train, _ = load(fleet, shards)
    with pytest.raises(TypeError, match="serialize"):
        fleet.use(Lock(), None)  # neither a model's name nor anything that can be sent to a worker
    with pytest.raises(TypeError, match="serialize"):
        fleet.wait()
    fleet.use(TINY, None)
    fleet.wait()
    assert len(list(fleet.map(Worker.pixels, [train.examples(0, [1])]))) == 1
    fleet.close()
    with pytest.raises(WorkerLostError, match="the fleet was closed"):
        fleet.use(TINY, None)


@pytest.mark.parametrize("factory", ["FreshHead", "FreshBuffers"])
def test_a_factory_that_creates_other_weights_in_every_process_is_refused(local_ray, factory):
    model = TINY.replace(":Tiny", f":{factory}")
    fleet = Fleet(model, None, FleetConfig(num_workers=1), weights_digest=load_classifier(model).weights_digest)
    with pytest.raises(
        ClassifierError, match=rf"worker-\d+ loaded other weights of .*:{factory} than the driver .* seed"
    ):
        fleet.wait()
    fleet.close()


def test_a_replacement_that_loads_a_changed_weights_file_ends_the_job(local_ray, shards, tmp_path):
    network, path = load_classifier(TINY).network, tmp_path / "w.safetensors"
    write_weights(path, network, {})
    fleet = Fleet(TINY, str(path), FleetConfig(num_workers=1))  # the weights digest is that of the first worker
    fleet.wait()
    train, _ = load(fleet, shards)
    next(network.parameters()).data[0] += 1
    write_weights(path, network, {})
    os.kill(worker_processes()[0].pid, signal.SIGKILL)
    with pytest.raises(ClassifierError, match=r"loaded other weights .*; keep \S*w.safetensors as it is while"):
        list(fleet.map(Worker.pixels, [train.examples(0, [0])]))
    fleet.close()


def test_nondeterministic_kernels_are_warned_of_once_and_recorded(local_ray, shards, caplog):
    fleet = Fleet(TINY.replace(":Tiny", ":Unrepeatable"), None, FleetConfig(num_workers=2))
    fleet.wait()
    assert fleet.describe()["nondeterministic_kernels"] == "none"
    load(fleet, shards)
    fleet.close()
    assert fleet.describe()["nondeterministic_kernels"] == "put_"
    assert caplog.text.count("torch has no deterministic kernel for put_") == 1


def test_errors_of_a_worker_reach_the_caller_unchanged(local_ray, shards):
    fleet = Fleet(TINY.replace(":Tiny", ":not_a_network"), None, FleetConfig(num_workers=1))
    with pytest.raises(ClassifierError, match="not a torch.nn.Module"):
        fleet.wait()
    fleet.close()
