"""Shards that a worker reads ahead, and the images that it keeps in memory or on its disk."""

import gzip
import resource
import shutil
import tarfile
import tempfile
import time

import numpy as np
import pytest
from conftest import TINY, tiny_worker

from uap_dist.data import fetch as fetch_module
from uap_dist.data.decode import Geometry, load_shard
from uap_dist.errors import ShardError
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

AS_IS = Geometry()
V = np.random.default_rng(0).normal(0, 5, size=(1, 3, 16, 16)).astype(np.float32)


def test_a_prefetched_shard_is_not_waited_for_and_read_once(store, put):
    store.fault = lambda method, path: ("wait", 0.3) if method == "GET" else None
    urls = [put(f"{i}.tar", f"train-000{i}.tar") for i in range(2)]
    worker = tiny_worker()
    worker.load(Examples(urls[0]))
    first = worker.traffic
    assert first.seconds_reading > 0.3 and (first.shards_read, first.cache_hits) == (1, 0)
    worker.prefetch(urls[1])
    worker.prefetch(urls[0])  # which it has
    time.sleep(0.6)
    successor = tiny_worker()
    successor.adopt(worker)
    successor.load(Examples(urls[1]))
    second = successor.traffic - first
    assert second.seconds_reading < 0.2 and second.shards_read == 1
    assert (
        second.bytes_read == first.bytes_read > 10_000
        and store.count("GET") == 2
        and first + second == successor.traffic
    )


def test_a_prefetch_that_fails_is_tried_again_when_the_shard_is_wanted(store, put):
    url = f"s3://bucket/late.tar?{store.query}"
    worker = tiny_worker()
    for _ in range(2):  # nothing comes of it
        worker.prefetch(url)
        with pytest.raises(ShardError, match="there is no such file"):
            worker.load(Examples(url))
    worker.prefetch(url)
    time.sleep(0.3)
    put("late.tar", "train-0000.tar")
    assert len(worker.load(Examples(url)).keys) == 20


def solve_all(url, **budgets):
    """Two blocks of a shard by a worker of its own, and what it read."""
    worker = Worker(load_classifier(TINY), num_threads=1, **budgets)
    listing = worker.load(Examples(url))
    tasks = [Examples(url, listing.digest, listing.keys[i : i + 4], (0,) * 4, seed=(i,)) for i in (0, 4)]
    return [worker.solve(task, V, ComputeConfig().solver).digest() for task in tasks], worker.traffic


def test_where_decoded_images_are_cached_changes_what_is_read_but_no_result(put, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = put("t.tar", "train-0000.tar")
    size = 20 * 3 * 16 * 16
    in_memory, on_disk, nowhere, too_small = (
        solve_all(url, cache_bytes=memory, disk_cache_bytes=disk)
        for memory, disk in ((size, 0), (size - 1, size), (1, 0), (1, size - 1))
    )
    assert in_memory[0] == on_disk[0] == nowhere[0] == too_small[0]
    found = [(t.shards_read, t.cache_hits, t.cache_misses) for _, t in (in_memory, on_disk, nowhere, too_small)]
    assert found == [(1, 2, 0), (1, 2, 0), (3, 0, 2), (3, 0, 2)]
    assert not list(tmp_path.iterdir())  # nothing has a name that could be left behind


@pytest.mark.parametrize("place", ["local", "store"])
def test_of_a_shard_beyond_the_caches_only_the_pictures_of_a_block_are_read(
    store, put, shards, tmp_path, monkeypatch, place
):
    monkeypatch.setattr(fetch_module, "MAX_GAP", 2048)
    path = shards / "train-0000.tar"
    local, packed = shutil.copy(path, tmp_path / "t.tar"), gzip.compress(path.read_bytes())
    (tmp_path / "t.tar.gz").write_bytes(packed)
    url = put("t.tar", path.name) if place == "store" else str(local)
    with tarfile.open(path) as tar:
        names = [member.name for member in tar if member.name.endswith(".png")]
        sizes = {name.removesuffix(".png"): tar.getmember(name).size for name in names}

    def read(url, *chosen):
        """The pixels of these examples, and what was read for each block of them, after the listing."""
        worker = tiny_worker(cache_bytes=1)
        listing = worker.load(Examples(url))
        pixels, amounts = [], []
        for rows in chosen:
            before = worker.traffic
            pixels.append(worker.pixels(Examples(url, listing.digest, tuple(listing.keys[row] for row in rows))))
            amounts.append(worker.traffic - before)
        return pixels, amounts, listing.keys

    blocks = ((17, 2, 9), (4, 5, 6))
    pixels, amounts, keys = read(url, *blocks)
    apart, adjacent = amounts
    assert apart.bytes_read == sum(sizes[keys[row]] for row in blocks[0])
    assert sum(sizes[keys[row]] for row in blocks[1]) < adjacent.bytes_read < path.stat().st_size / 4
    assert (apart.shards_read, apart.cache_misses, adjacent.retries) == (1, 1, 0)
    if place == "store":
        store.requests.clear()
        assert read(url, blocks[1])[1][0].bytes_read == adjacent.bytes_read
        assert store.count("GET") == 2  # the listing's, and one for the three neighbours
    whole = load_shard(str(path), AS_IS).images
    compressed, amounts, _ = read(str(tmp_path / "t.tar.gz"), *blocks)
    assert [amount.bytes_read for amount in amounts] == [len(packed)] * 2
    for rows, found, other in zip(blocks, pixels, compressed, strict=True):
        assert np.array_equal(found, whole[list(rows)]) and np.array_equal(other, found)


def test_a_picture_that_changes_in_its_place_ends_the_run(shards, tmp_path):
    path = tmp_path / "t.tar"
    shutil.copy(shards / "train-0000.tar", path)
    worker = tiny_worker(cache_bytes=1)
    listing = worker.load(Examples(str(path)))
    task = Examples(str(path), listing.digest, listing.keys[3:6])
    before = worker.pixels(task)
    with tarfile.open(path) as tar:
        here, there = (tar.getmember(f"{listing.keys[row]}.png") for row in (4, 9))
    data = bytearray(path.read_bytes())
    for member, is_noticed in ((there, False), (here, True)):
        middle = member.offset_data + member.size // 2
        data[middle] ^= 1
        path.write_bytes(data)
        if is_noticed:
            with pytest.raises(ShardError, match="changed during the run"):
                worker.pixels(task)
        else:  # another block's
            assert np.array_equal(worker.pixels(task), before)


def test_a_full_disk_disables_the_disk_cache_and_makes_fetching_an_error(put, shards, caplog):
    url, local = put("t.tar", "train-0000.tar"), str(shards / "train-0000.tar")
    expected, _ = solve_all(local, cache_bytes=1 << 30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may be larger, as if the disk were full
    try:
        results, traffic = solve_all(local, cache_bytes=1, disk_cache_bytes=1 << 30)
        with pytest.raises(
            ShardError, match=r"cannot keep shard s3://bucket/t.tar\S* in \S+ \(TMPDIR\): File too large"
        ):
            load_shard(url, AS_IS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert results == expected and traffic.cache_misses == 2
    assert "decoded images are no longer kept in" in caplog.text
