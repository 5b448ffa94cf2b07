"""Shards, checkpoints and results in an object store that fails as such stores do."""

import re
import resource
import tempfile
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Barrier, Thread
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_worker
from faulty_store import FaultyStore
from processes import run_job
from pyarrow import fs
from test_checkpoint import checkpoint
from test_job import JOB, finish, runs, start

from uap_dist.computing.rounds import compute
from uap_dist.data import fetch as fetch_module
from uap_dist.data import locations
from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.locations import join, locate
from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import ClassifierError, ConfigError, ShardError, UapDistError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import read_weights, write_weights
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, JobRecord
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

AS_IS = Geometry()
V = np.random.default_rng(0).normal(0, 5, size=(3, 16, 16)).astype(np.float32)
ONCE = "retries=1"  # of a request by pyarrow, so that ours are seen


@pytest.fixture(scope="module")
def server(s3):
    server = FaultyStore()
    yield server
    server.stop()


@pytest.fixture
def store(server, monkeypatch):
    monkeypatch.setattr(locations, "SECONDS_BEFORE_RETRY", 0.01)
    server.reset()
    yield server
    server.reset()


@pytest.fixture
def put(store, shards):
    """Put a file, or bytes, into the bucket; the URL of what is there then."""

    def put(name, data):
        filesystem, path = locate(f"s3://bucket/{name}?{store.query}")
        with filesystem.open_output_stream(path) as file:
            file.write(data if isinstance(data, bytes) else (shards / data).read_bytes())
        store.requests.clear()
        return f"s3://bucket/{name}?{store.query}&{ONCE}"

    return put


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


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        (
            "bucket/t.tar?{}",
            403,
            r"bucket/t.tar\?.*: access is denied; give credentials that may do this as AWS_ACCESS_KEY_ID",
        ),
        ("bucket/t.tar?{}", 301, "the bucket is in another region .*; give its region as .region="),
        ("absent/t.tar?{}", None, r"no shard s3://absent/t.tar\?.*: there is no bucket absent$"),
        ("absent/*.tar?{}", None, "absent/.*: there is no such bucket; look at its name"),
        ("bucket/absent.tar?{}", None, r"no shard s3://bucket/absent.tar\?"),
        (
            "bucket/t.tar?endpoint_override=127.0.0.1:9&scheme=http&retries=1",
            None,
            "127.0.0.1:9 does not answer; look at",
        ),
        ("bucket/t.tar?{}&retrys=3", None, "unknown option 'retrys'; the options are region, endpoint_override, "),
        ("bucket/t.tar?{}&retries=many", None, "option retries is 'many'; it must be a number"),
        ("bucket/t.tar?{}&anonymous=1", None, "option anonymous is '1'; it must be true or false"),
        (
            "key:secret@bucket/t.tar",
            None,
            "s3://…@bucket/t.tar holds credentials, which runs and checkpoints would keep",
        ),
    ],
)
def test_invalid_urls_and_refusals_are_one_line_without_retries(store, address, status, message):
    store.fault = lambda method, path: status and ("status", status)
    with pytest.raises(UapDistError, match=message) as caught:
        expand_patterns([f"s3://{address.format(store.query)}"])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert len(store.requests) <= 3


@pytest.mark.parametrize(
    "text",
    [
        "localhost:9000",
        "minio.local",
        "//localhost:9000",
        "http://",
        "http://localhost:9000/minio",
        "ftp://localhost:9000",
    ]
    + ["http://user:secret@localhost:9000", "http://localhost:port", "http://localhost:9000?region=eu"],
)
@pytest.mark.parametrize(
    ("url", "variable"),
    [("s3://b/t.tar?region=eu-west-1", "AWS_ENDPOINT_URL"), ("S3://b/t.tar", "AWS_ENDPOINT_URL_S3")]
    + [("gs://b/t.tar", "STORAGE_EMULATOR_HOST")],
)
def test_an_invalid_endpoint_is_an_error_and_no_other_store_is_contacted(monkeypatch, text, url, variable):
    monkeypatch.setenv(variable, text)
    with pytest.raises(
        ConfigError, match=f"^{variable} is '.*'; it must be HOST:PORT .*, with http:// or https://"
    ) as caught:
        locate(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["HTTP://{}", "http://{}/", " http://{} "])
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_in_a_variable_is_used(store, put, monkeypatch, variable, text):
    put("t.tar", "train-0000.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, text.format(re.search(r"127.0.0.1:\d+", store.query)[0]))
    assert len(load_shard("s3://bucket/t.tar?region=us-east-1", AS_IS).keys) == 20


@pytest.mark.parametrize(
    "query",
    ["endpoint_override=http://{}", "endpoint_override=HTTP://{}/&scheme=http", "endpoint_override={}&scheme=HTTP"],
)
def test_an_endpoint_in_the_url_may_have_its_scheme(store, put, query):
    put("t.tar", "train-0000.tar")
    endpoint = re.search(r"127.0.0.1:\d+", store.query)[0]
    assert len(load_shard(f"s3://bucket/t.tar?region=us-east-1&{query.format(endpoint)}", AS_IS).keys) == 20


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("endpoint_override=", "option endpoint_override is ''; it must be HOST:PORT"),
        ("endpoint_override=host:9000/path", "it must be HOST:PORT of the store, without a path"),
        ("endpoint_override=http://host&scheme=https", "endpoint_override begins with http, but scheme is https"),
        ("scheme=ftp", "option scheme is 'ftp'; it must be https or http"),
    ],
)
def test_an_invalid_endpoint_in_the_url_is_an_error(query, message):
    with pytest.raises(ConfigError, match=message):
        locate(f"s3://bucket/t.tar?{query}")


def test_the_gcs_emulator_in_a_variable_is_used(monkeypatch):
    asked = []

    class Emulator(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Emulator) as emulator:
        Thread(target=emulator.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{emulator.server_port}")
        with pytest.raises(ShardError, match="no shard gs://bucket/t.tar"):
            expand_patterns(["gs://bucket/t.tar?retry_limit_seconds=2"])
        emulator.shutdown()
    assert any("/b/bucket" in path for path in asked)


def test_a_refusal_is_not_retried(store, put):
    url = put("t.tar", "train-0000.tar")
    store.fault = lambda method, path: ("status", 403)
    with pytest.raises(ShardError, match="access is denied"):
        load_shard(url, AS_IS)
    assert len(store.requests) == 1


def test_public_buckets_need_no_credentials_and_others_report_missing_ones(store, put, monkeypatch):
    url = put("t.tar", "train-0000.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert len(load_shard(f"{url}&anonymous=true", AS_IS).keys) == 20
    assert not any(is_signed for *_, is_signed in store.requests)
    store.fault = lambda method, path: ("status", 403)
    with pytest.raises(
        ShardError, match="access is denied, and no AWS_ACCESS_KEY_ID is set; .*or .anonymous=true where"
    ):
        load_shard(url, AS_IS)


def test_the_endpoint_may_come_from_the_environment(store, put, monkeypatch):
    endpoint = re.search(r"127.0.0.1:\d+", put("t.tar", "train-0000.tar"))[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    assert len(load_shard("s3://bucket/t.tar?region=us-east-1", AS_IS).keys) == 20


def test_a_public_bucket_of_google_is_opened_without_credentials():
    filesystem, path = locate("gs://bucket/a/t.tar?anonymous=true&retry_limit_seconds=1")
    assert (filesystem.type_name, path) == ("gcs", "bucket/a/t.tar")
    with pytest.raises(ConfigError, match="unknown option 'region'"):
        locate("gs://bucket/t.tar?region=x")


def test_shards_are_looked_up_at_the_same_time_and_those_of_a_listing_not_again(store, put):
    urls = [put(f"many/{i}.tar", b"tar") for i in range(4)]
    all_four = Barrier(4)

    def wait(method, path):
        if method == "HEAD" and "many/" in path:
            all_four.wait(timeout=10)  # an error if they came one after another

    store.fault = wait
    assert expand_patterns([urls[0].replace("0.tar", "{0..3}.tar")]) == expand_patterns(urls) == urls
    store.requests.clear()
    assert expand_patterns([urls[0].replace("0.tar", "*.tar")]) == urls
    assert store.count("HEAD") == 0
    store.fault = lambda method, path: ("wait", 0.3) if path.endswith("/8.tar") else None
    with pytest.raises(
        ShardError, match="no shard s3://bucket/many/8.tar"
    ):  # the first one, though not the first answer
        expand_patterns([urls[0].replace("0.tar", "{0,8,9}.tar")])


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
        store.fault = lambda method, path: (
            ("status", 500) if method == "POST" and len(store.requests) % 2 == 0 else None
        )
        store.fault = lambda method, path: ("status", 500) if method == "PUT" else None
        checkpoints.commit(checkpoint(1))
        checkpoints.wait()
        store.reset()
        assert checkpoints.newest().state.num_rounds == 0
        checkpoints.commit(checkpoint(2))
    assert checkpoints.newest().state.num_rounds == 2


SEEDS = (4, 5)
OPTIONS = ("--num-perturbations", "2", "--seed", "4", "--max-passes", "4", "--evaluate-every", "4", "--radius", "20")
OPTIONS += (
    "--round-size",
    "10",
    "--block-size",
    "5",
    "--output",
    "out",
    "--cache-gib",
    "1e-9",
    "--disk-cache-gib",
    "0",
)


def list_names(location):
    filesystem, path = locate(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return [info.path.removeprefix(f"{path}/") for info in infos if info.is_file]


@pytest.mark.slow
def test_a_job_survives_a_failing_store_and_is_resumed_from_it(store, s3, put, shards, tmp_path):
    """Shards, network, checkpoints and results on S3; each object is cut once, and every 20th answer an error; killed once."""
    for path in shards.glob("*.tar"):
        put(f"data/{path.name}", path.name)
    write_weights(tmp_path / "w.safetensors", load_classifier(TINY).network, {})
    weights = put("w.safetensors", (tmp_path / "w.safetensors").read_bytes()).removesuffix(f"&{ONCE}")
    data, storage = (f"s3://bucket/{name}?{store.query}" for name in ("data", "uap"))

    whole = set()

    def fault(method, path):
        if method == "GET" and path not in whole:
            whole.add(path)
            return "cut", 1000
        return ("status", 503) if len(store.requests) % 20 == 0 else None

    store.fault = fault
    train, val = join(data, "train-{0000..0002}.tar"), join(data, "val-*.tar")
    words = ("--weights", weights, "--train-shards", train, "--val-shards", val, "--storage", storage)
    process = start(tmp_path, *words, *OPTIONS)
    seen = f"s3://bucket/uap?{s3}"  # the same, by a server without faults
    while not any("round-00000002" in name for name in list_names(seen)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.3)
    process.kill()
    process.communicate()
    names = list_names(seen)
    run_id = names[0].partition("/")[0]
    assert not any("/results/" in name for name in names)
    done = run_job([str(JOB), "--resume", join(storage, run_id)], tmp_path)
    assert done.returncode == 0, done.stderr
    store.reset()
    results = join(join(storage, run_id), "results")
    local = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(list_names(results)) == local >= {"result.json", "members/seed-4/perturbation.safetensors"}
    workers = LocalWorkers(tiny_worker())
    sets = [load_dataset(workers, expand_patterns([str(shards / name)])) for name in ("train-*.tar", "val-*.tar")]
    pool = PerturbationPool.load(join(results, "pool"))
    for seed, v in zip(SEEDS, pool.perturbations, strict=True):
        config = ComputeConfig(max_passes=4, round_size=10, block_size=5, radius=20.0, seed=seed, random_start=0.5)
        *_, final = compute(workers, *sets, config)
        assert torch.equal(v, final.perturbation)


@pytest.mark.slow
def test_a_job_that_may_not_write_to_its_storage_ends_before_any_work(store, shards, tmp_path):
    store.fault = lambda method, path: ("status", 403) if method in ("PUT", "POST") else None
    data = ("--train-shards", str(shards / "train-*.tar"), "--val-shards", str(shards / "val-*.tar"))
    code, out, err = finish(start(tmp_path, *data, "--storage", f"s3://bucket/uap?{store.query}"))
    assert code == 1 and err.startswith("error: cannot write checkpoints to s3://bucket/uap/") and err.count("\n") == 1
    assert "access is denied" in err and "decoding" not in out and "waiting" not in out
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FAILED" and "access is denied" in run.data.tags["reason"]
