"""Shards, weights, pools and checkpoints in an object store that fails as such stores do."""

import re
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_worker
from faulty_store import ONCE
from test_checkpoint import checkpoint

from uap_dist.data import fetch as fetch_module
from uap_dist.data.decode import Geometry, load_shard
from uap_dist.errors import ClassifierError, ConfigError, ShardError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import write_weights
from uap_dist.models.weights_file import read_weights
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.workers.messages import Examples

AS_IS = Geometry()
V = np.random.default_rng(0).normal(0, 5, size=(1, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("fault", [("status", 500), ("status", 503), ("cut", 1000)])
def test_a_failing_store_is_retried_with_a_warning(store, put, shards, caplog, fault):
    url = put("t.tar", "train-0000.tar")
    store.fail_first(2, fault)
    remote, local = load_shard(url, AS_IS), load_shard(str(shards / "train-0000.tar"), AS_IS)
    assert remote.digest == local.digest and np.array_equal(remote.images, local.images)
    assert [f"attempt {n} of 5 follows" in r.message for n, r in zip((2, 3), caplog.records, strict=True)] == [
        True,
        True,
    ]
    assert url in caplog.text


def test_a_timeout_of_the_store_is_retried(store, put, caplog):
    url = put("t.tar", "train-0000.tar") + "&request_timeout=1"
    store.fail_first(1, ("wait", 1.8))
    assert len(load_shard(url, AS_IS).keys) == 20
    assert "Timeout was reached" in caplog.text and "attempt 2 of 5 follows" in caplog.text


def test_five_failed_attempts_are_an_error(store, put):
    url = put("t.tar", "train-0000.tar")
    store.fault = lambda method, path: ("status", 500)
    with pytest.raises(ShardError, match="cannot read shard s3://bucket/t.tar.*HTTP status 500.*; 5 attempts failed"):
        load_shard(url, AS_IS)
    assert len(store.requests) == 5


def test_a_tar_that_is_truncated_in_the_store_is_not_retried(store, put, shards):
    whole = (shards / "train-0000.tar").read_bytes()
    url = put("cut.tar", whole[: len(whole) // 2 + 100])
    with pytest.raises(ShardError, match="is cut short"):
        load_shard(url, AS_IS)
    assert store.count("GET") == 1


def test_a_shard_that_is_replaced_between_two_blocks_ends_the_run(put):
    url = put("t.tar", "train-0000.tar")
    worker = tiny_worker(cache_bytes=1)
    listing = worker.load(Examples(url))
    task = Examples(url, listing.digest, listing.keys[:4], (0,) * 4, seed=(1,))
    worker.solve(task, V, ComputeConfig().solver)
    put("t.tar", "train-0001.tar")
    with pytest.raises(ShardError, match=r"shard s3://bucket/t.tar\S* changed during the run"):
        worker.solve(task, V, ComputeConfig().solver)


def test_a_shard_that_is_replaced_while_it_is_read_is_retried(store, put, shards, caplog, monkeypatch):
    url = put("t.tar", "train-0000.tar")
    other = (shards / "train-0001.tar").read_bytes()
    monkeypatch.setattr(
        fetch_module, "COPY_SIZE", len(other) // 3
    )  # a request each; replaced before the first is answered
    endpoint = re.search(r"127.0.0.1:\d+", url)[0]

    def replace():
        kind = {"Content-Type": "application/x-tar"}
        urlopen(Request(f"http://{endpoint}/bucket/t.tar", other, kind, method="PUT")).close()

    store.fail_first(1, None, action=replace)
    shard = load_shard(url, AS_IS)
    assert shard.digest == load_shard(str(shards / "train-0001.tar"), AS_IS).digest
    assert "it was replaced while it was read; attempt 2 of 5" in caplog.text


def test_weights_are_read_from_a_store(store, put, tmp_path):
    network = load_classifier(TINY).network
    write_weights(tmp_path / "w.safetensors", network, {})
    torch.save(network.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        read = read_weights(put(name, (tmp_path / name).read_bytes()))
        assert all(torch.equal(read[key], value) for key, value in network.state_dict().items())
    with pytest.raises(
        ClassifierError, match=r"cannot read weights file s3://bucket/no.pth\?.*: there is no such file"
    ):
        read_weights(f"s3://bucket/no.pth?{store.query}")


def test_reading_weights_pools_and_checkpoints_is_retried(store, put, tmp_path, caplog):
    write_weights(tmp_path / "w.safetensors", load_classifier(TINY).network, {})
    pool = PerturbationPool(
        torch.ones(1, 3, 4, 4),
        {"model": "m", "weights_digest": "d", "norm": "linf", "radius": 10.0},
        [{"name": "a"}],
    )
    pool.save(tmp_path / "pool")
    weights = put("w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    there = put("pool/pool.safetensors", (tmp_path / "pool/pool.safetensors").read_bytes())
    checkpoint = Checkpoint(JobRecord("run", {}, {}, {}), State(Iterate.zero((3, 4, 4))), ())
    place = CheckpointStore(f"s3://bucket/again?{store.query}&{ONCE}")
    place.start(checkpoint)
    for name, read in (
        ("w.safetensors", lambda: load_classifier(TINY, weights)),
        ("pool.safetensors", lambda: PerturbationPool.load(there)),
        ("again", place.newest),
    ):
        caplog.clear()
        store.fail_first(2, ("status", 503))
        read()
        assert [f"attempt {n} of 5 follows" in r.message for n, r in zip((2, 3), caplog.records, strict=True)] == [
            True
        ] * 2
        assert name in caplog.text
    store.fault = lambda method, path: ("status", 503)
    store.requests.clear()
    with pytest.raises(ClassifierError, match=r"cannot read weights file s3://bucket/w.*503.*; 5 attempts failed"):
        read_weights(weights)
    assert len(store.requests) == 5
    store.fault = lambda method, path: ("status", 403)
    store.requests.clear()
    with pytest.raises(ClassifierError, match="access is denied"):
        read_weights(weights)
    assert len(store.requests) == 1


def test_a_missing_local_shard_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ShardError, match="no shard /absent/t.tar on .*; every node must see it: give a path that all of them share"
    ):
        load_shard("/absent/t.tar", AS_IS)


@pytest.mark.parametrize(
    ("bucket", "denied", "message"),
    [
        ("bucket", "PUT", "access is denied"),
        ("bucket", "POST", "access is denied"),
        ("bucket", "DELETE", "access is denied"),
        ("absent", "none", "there is no such bucket"),
    ],
)
def test_missing_write_permission_is_detected_before_any_work(store, bucket, denied, message):
    store.fault = lambda method, path: ("status", 403) if method == denied else None
    with pytest.raises(ConfigError, match=f"cannot write checkpoints to s3://{bucket}/run.*: {message}"):
        CheckpointStore(f"s3://{bucket}/run?{store.query}").prepare()


def test_an_interrupted_commit_does_not_count(store):
    """Bytes of an object that is not completed are no object."""
    location = f"s3://bucket/cut-off?{store.query}&{ONCE}"
    with CheckpointStore(location) as checkpoints:
        checkpoints.start(checkpoint(0))
        store.fault = lambda method, path: ("status", 500) if method == "PUT" else None
        checkpoints.commit(checkpoint(1))
        checkpoints.wait()
        store.reset()
        assert checkpoints.newest().state.num_rounds == 0
        checkpoints.commit(checkpoint(2))
    assert checkpoints.newest().state.num_rounds == 2
