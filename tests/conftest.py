import io
import os
import tarfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from pyarrow import fs

from uap_dist.data import locations
from uap_dist.data.write import write_shards
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.files import Perturbation
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

CPU_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
settings.register_profile("uap_dist", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("uap_dist")

TINY = f"{Path(__file__).parent / 'tiny.py'}:Tiny"
SHARED = Path(__file__).parents[2] / "shared"


def pytest_report_header():
    limits = ", ".join(f"{name} {os.environ.get(name, 'unset')}" for name in CPU_VARIABLES)
    return f"instruction set of torch: {torch.backends.cpu.get_cpu_capability()}; {limits}"


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def random_samples(count: int, seed: int, side: int = 16):
    rng = np.random.default_rng(seed)
    for i in range(count):
        colour = rng.integers(0, 256, size=3)
        pixels = np.clip(colour + rng.normal(0, 40, size=(side, side, 3)), 0, 255).astype(np.uint8)
        yield {"__key__": f"s{seed}-{i:03d}", "png": encode(pixels), "cls": int(colour.argmax())}


def pack(path, files):
    """A tar of (name, bytes), or (name, target of a link)."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with train-{0000..0002}.tar (20, 20, 7 images) and val-0000.tar (20)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(random_samples(47, seed=1), folder, prefix="train", shard_size=20)
    write_shards(random_samples(20, seed=2), folder, prefix="val", shard_size=20)
    return folder


def tiny_worker(cache_bytes: int = 1 << 30, **options) -> Worker:
    return Worker(load_classifier(TINY), cache_bytes=cache_bytes, num_threads=1, **options)


def compute_here(model, weights, train, val, config):
    """A perturbation as jobs/compute.py leaves it, computed in this process from shards, and the report of its last round."""
    classifier = load_classifier(model, weights)
    workers = LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1))
    train = load_dataset(workers, train)
    *_, final = compute(workers, train, load_dataset(workers, val), config)
    provenance = asdict(config) | {
        "radius": config.ball_radius,
        "model": model,
        "weights_digest": classifier.weights_digest,
        "perturbation_sha256": sha256(final.perturbation.numpy().tobytes()).hexdigest(),
        "num_evaluations": final.num_evaluations,
        "num_train_images": train.num_examples,
    }
    return Perturbation(f"seed-{config.seed}", final.perturbation, provenance), final


@pytest.fixture
def local_workers():
    return LocalWorkers(tiny_worker())


@pytest.fixture
def tiny_data(shards, local_workers):
    train = [str(shards / f"train-{i:04d}.tar") for i in range(3)]
    return load_dataset(local_workers, train), load_dataset(local_workers, [str(shards / "val-0000.tar")])


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("real images and networks (../shared) are not here")
    return SHARED


@pytest.fixture(scope="module")
def local_ray():
    """A Ray on this machine with 4 CPUs and 2 GPUs, none of which need to exist."""
    import ray

    ray.init(
        address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3():
    """Query of the URLs of a real S3 server on loopback, with a bucket named bucket."""
    from moto.server import ThreadedMotoServer

    settings = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    old = dict(os.environ)
    os.environ.update(settings)
    query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    fs.FileSystem.from_uri(f"s3://bucket/?{query}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield query
    server.stop()
    os.environ.clear()
    os.environ.update(old)


@pytest.fixture(scope="session")
def faulty_store(s3):
    """As s3, with faults in front."""
    from faulty_store import FaultyStore

    store = FaultyStore()
    yield store
    store.stop()


@pytest.fixture
def store(faulty_store, monkeypatch):
    """An S3 server without faults yet, and no long waits before requests are repeated."""
    monkeypatch.setattr(locations, "SECONDS_BEFORE_RETRY", 0.01)
    faulty_store.reset()
    yield faulty_store
    faulty_store.reset()


@pytest.fixture
def put(store, shards):
    """Put a file, or bytes, into the bucket; the URL of what is there then, whose requests pyarrow does not repeat."""
    from faulty_store import ONCE

    def put(name, data):
        filesystem, path = locations.locate(f"s3://bucket/{name}?{store.query}")
        with filesystem.open_output_stream(path) as file:
            file.write(data if isinstance(data, bytes) else (shards / data).read_bytes())
        store.requests.clear()
        return f"s3://bucket/{name}?{store.query}&{ONCE}"

    return put
