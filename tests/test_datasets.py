"""Which images of the shards make a data set, and that held-out images are none of the training images."""

import io
from itertools import islice

import numpy as np
import pytest
from conftest import random_samples, tiny_worker
from PIL import Image

from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError, ShardError
from uap_dist.workers.dataset import CLASSIFY_TIMES, classify, classify_each, list_dataset, load_dataset
from uap_dist.workers.disjoint import check_disjoint
from uap_dist.workers.local import LocalWorkers


def test_a_thinned_dataset_is_evenly_spread_and_keeps_its_labels(local_workers, tiny_data):
    train, _ = tiny_data
    assert train.thin(train.num_examples).digest == train.digest
    some = train.thin(7)
    assert some.num_examples == 7 and some.keys == [train.keys[i * train.num_examples // 7] for i in range(7)]
    labels = dict(zip(train.keys, train.clean.labels, strict=True))
    assert [labels[key] for key in some.keys] == some.clean.labels.tolist()
    again = classify(local_workers, some, np.zeros(train.shape, np.float32))
    assert again.labels.tolist() == some.clean.labels.tolist()


def test_several_perturbations_of_the_same_images_share_calls_and_have_the_bits_of_each_alone(tiny_data):
    calls, worker = [], tiny_worker()

    class Counting(LocalWorkers):
        def map(self, method, tasks, *shared):
            calls.append(len(shared[0]))
            return super().map(method, tasks, *shared)

    train, _ = tiny_data
    many = [n * np.random.default_rng(n).normal(size=train.shape).astype(np.float32) for n in range(CLASSIFY_TIMES + 2)]
    together = list(classify_each(Counting(worker), train, iter(many), quantize=True))
    assert calls == [CLASSIFY_TIMES, 2]
    for v, found in zip(many, together, strict=True):
        alone = classify(LocalWorkers(worker), train, v, quantize=True)
        assert np.array_equal(found.labels, alone.labels) and np.array_equal(found.confidences, alone.confidences)
    assert len({found.confidences.tobytes() for found in together}) == len(many)
    assert list(classify_each(Counting(worker), train, [])) == []


def test_more_images_than_there_are_and_shards_on_both_sides_are_refused(local_workers, tiny_data, shards):
    url = str(shards / "val-0000.tar")
    for options in ({"num_images": 0}, {"max_bad_fraction": 1.5}):
        with pytest.raises(ConfigError, match="it must"):
            load_dataset(local_workers, [url], **options)
    with pytest.raises(ConfigError, match="asked for 21 images, but the 1 shards from .* hold 20"):
        load_dataset(local_workers, [url], num_images=21)
    with pytest.raises(ShardError, match="training shard .* is also a held-out shard"):
        check_disjoint(tiny_data[1], load_dataset(local_workers, [url], num_images=5))


def png_to_webp(sample):
    data = io.BytesIO()
    Image.open(io.BytesIO(sample["png"])).save(data, "WEBP", lossless=True)
    return {"__key__": f"copy-of-{sample['__key__']}", "webp": data.getvalue()}


def test_held_out_images_that_are_training_images_are_left_out_or_end_it(local_workers, tiny_data, tmp_path, caplog):
    train, val = tiny_data
    assert check_disjoint(train, val) is val and not val.shared
    copies = [png_to_webp(sample) for sample in list(random_samples(47, seed=1))[30:32]]
    own = list(random_samples(18, seed=5))
    write_shards([*own[:9], copies[0], *own[9:], copies[1]], tmp_path, prefix="v", shard_size=10)
    mixed = load_dataset(local_workers, [str(tmp_path / f"v-{i:04d}.tar") for i in range(2)])
    with pytest.raises(
        ShardError,
        match=r"^2 of 20 held-out images are training images too, more than the allowed share 0.01 \(--max-bad-fraction\); "
        "the first: .*v-0000.tar: copy-of-s1-030 = .*train-0001.tar: s1-030; hold out",
    ):
        check_disjoint(train, mixed)
    left = check_disjoint(train, mixed, max_shared_fraction=0.1)
    assert left.keys == [sample["__key__"] for sample in own] and left.sizes == [9, 9] and len(left.shared) == 2
    rows = [mixed.keys.index(key) for key in left.keys]
    assert np.array_equal(left.clean.labels, mixed.clean.labels[rows]) and left.hashes == [
        mixed.hashes[i] for i in rows
    ]
    assert "left out 2 of 20 held-out images that are training images too: " + left.shared[0] in caplog.text
    write_shards(copies, tmp_path, prefix="c", shard_size=10)
    copied = load_dataset(local_workers, [str(tmp_path / "c-0000.tar")])
    with pytest.raises(ShardError, match="2 of 2 held-out images are training images too"):
        check_disjoint(train, copied, max_shared_fraction=1.0)


def test_the_same_images_in_another_order_are_no_held_out_images(local_workers, tiny_data, tmp_path):
    write_shards(list(random_samples(47, seed=1))[::-1], tmp_path, prefix="v", shard_size=20)
    val = load_dataset(local_workers, [str(tmp_path / "v-0001.tar")])
    with pytest.raises(ShardError, match="20 of 20 held-out images are training images too"):
        check_disjoint(tiny_data[0], val)


def test_equal_keys_and_images_that_are_there_twice_are_said(local_workers, tiny_data, tmp_path, caplog):
    others = [{**sample, "__key__": f"s1-{i:03d}"} for i, sample in enumerate(random_samples(4, seed=6))]
    write_shards([*others, {**others[2], "__key__": "again"}], tmp_path, prefix="v", shard_size=4)
    val = load_dataset(local_workers, [str(tmp_path / f"v-{i:04d}.tar") for i in range(2)])
    assert val.num_examples == 5
    assert "1 of 5 images duplicate an earlier one pixel for pixel and are counted again; the first: " in caplog.text
    assert f"{tmp_path}/v-0001.tar: again = {tmp_path}/v-0000.tar: s1-002" in caplog.text
    assert check_disjoint(tiny_data[0], val) is val
    assert "4 of 5 held-out images have the key of a training image but other pixels, the first s1-000" in caplog.text


def test_the_first_images_are_taken(local_workers, tiny_data, shards):
    urls = [str(shards / f"train-{i:04d}.tar") for i in range(3)]
    part = load_dataset(local_workers, urls, num_images=23)
    assert part.keys == tiny_data[0].keys[:23] and part.sizes == [20, 3]
    assert np.array_equal(part.clean.labels, tiny_data[0].clean.labels[:23])
    assert part.digest != tiny_data[0].digest


@pytest.mark.parametrize("num_workers", [1, 2, 9])
def test_how_many_shards_are_read_depends_on_the_images_alone(num_workers, tmp_path):
    """So does whether a damaged one ends the job."""
    write_shards(random_samples(80, seed=3), tmp_path, prefix="t", shard_size=20)
    urls = [str(tmp_path / f"t-{i:04d}.tar") for i in range(4)]
    (tmp_path / "t-0003.tar").write_bytes((tmp_path / "t-0003.tar").read_bytes()[:3000])
    read = []

    class Many(LocalWorkers):
        def map(self, method, tasks, *shared):
            read.extend(task.shard for task in tasks)
            return super().map(method, tasks, *shared)

    workers = Many(tiny_worker())
    workers.num_workers = num_workers
    assert list_dataset(workers, urls, num_images=30).num_examples == 30 and read == urls[:2]
    assert list_dataset(workers, urls, num_images=60).num_examples == 60
    with pytest.raises(ShardError, match="t-0003.tar"):
        list_dataset(workers, urls, num_images=61)


def test_shards_are_read_until_there_are_enough_images(local_workers, tmp_path):
    """However few are in the first ones."""
    samples, urls = random_samples(67, seed=3), []
    for number, size in enumerate((1, 1, 3, 20, 2, 40)):
        some = [sample if number else sample | {"png": b"broken"} for sample in islice(samples, size)]
        write_shards(some, tmp_path, prefix=f"t{number}", shard_size=40)
        urls.append(str(tmp_path / f"t{number}-0000.tar"))
    options = {"max_bad_fraction": 0.1}
    assert list_dataset(local_workers, urls, num_images=30, **options).sizes == [1, 3, 20, 2, 4]
    assert list_dataset(local_workers, urls, num_images=66, **options).num_examples == 66


def test_bad_images_are_counted_and_too_many_end_it(local_workers, tmp_path, caplog):
    samples = list(random_samples(20, seed=3))
    samples[4]["png"] = b"broken"
    write_shards(samples, tmp_path, prefix="t", shard_size=20)
    url = str(tmp_path / "t-0000.tar")
    dataset = load_dataset(local_workers, [url], max_bad_fraction=0.05)
    assert dataset.num_examples == 19 and len(dataset.bad) == 1 and "s3-004" in caplog.text
    with pytest.raises(ShardError, match="1 of 20 images cannot be decoded, more than the allowed share 0.01"):
        load_dataset(local_workers, [url])


def test_pictures_that_make_no_example_are_said(local_workers, tmp_path, caplog):
    samples = [{**sample, "mask.png": sample["png"]} for sample in random_samples(7, seed=3)]
    write_shards(samples, tmp_path, prefix="t", shard_size=9)
    assert load_dataset(local_workers, [str(tmp_path / "t-0000.tar")]).num_examples == 7
    assert "left out 7 files that may be pictures" in caplog.text and "t-0000.tar: s3-000.mask.png; " in caplog.text
