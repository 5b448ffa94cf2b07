"""Labels as they lie around: optional where nothing needs them, mapped to classes where the network knows their names."""

import json

import pytest
from conftest import TINY, random_samples, tiny_worker
from processes import run_job
from test_job import JOB
from tiny import Tiny
from torchvision.models import ResNet18_Weights

from uap_dist.data.decode import Geometry
from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError
from uap_dist.finetuning.network import check_truths
from uap_dist.method.config import ComputeConfig
from uap_dist.models.classes import UNKNOWN_CLASS, ClassIndex, find_class, imagenet_names
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.workers.accuracy import top1
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

COLOURS = ("red", "Dark Green", "blue", "grey")


def labelled(tmp_path, make, count=20):
    """A shard of random samples whose files beside the picture `make` gives for the class index."""
    samples = [
        {"__key__": sample["__key__"], "png": sample["png"], **make(sample["cls"])}
        for sample in random_samples(count, seed=3)
    ]
    write_shards(samples, tmp_path, prefix="t", shard_size=count)
    return str(tmp_path / "t-0000.tar"), [sample["cls"] for sample in random_samples(count, seed=3)]


def workers_with_names(names=COLOURS):
    classifier = Classifier(Tiny(), name="tiny", geometry=Geometry(), class_names=names)
    return LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1))


@pytest.mark.parametrize(
    "make",
    [
        lambda index: {"cls": f" {index}\n"},
        lambda index: {"cls": COLOURS[index]},
        lambda index: {"cls": COLOURS[index].upper().replace(" ", "_")},
    ],
)
def test_indices_and_names_become_the_classes_of_the_network(tmp_path, make, caplog):
    url, classes = labelled(tmp_path, make)
    data = load_dataset(workers_with_names(), [url])
    assert data.truths.tolist() == classes and not data.odd_labels and not caplog.text


@pytest.mark.parametrize("make", [lambda index: {"label": index}, lambda index: {"label": COLOURS[index], "x": 1}])
def test_labels_are_read_from_json(tmp_path, make):
    url, classes = labelled(tmp_path, lambda index: {"json": json.dumps(make(index)).encode()})
    assert load_dataset(workers_with_names(), [url], label_key="label").truths.tolist() == classes
    assert (load_dataset(workers_with_names(), [url]).truths == UNKNOWN_CLASS).all()
    wrong = r"under 'class' \(--label-key\); the first: .*t-0000.tar: s3-000: its .json has no 'class', but label"
    with pytest.raises(ConfigError, match=wrong):
        load_dataset(workers_with_names(), [url], label_key="class")


@pytest.mark.parametrize(
    "make",
    [
        lambda index: {"cls": f"n0144076{index}"},
        lambda index: {"cls": "a name"},
        lambda index: {"cls": '{"label": 3}'},
        lambda index: {},
    ],
    ids=["WordNet id", "name", "JSON", "none"],
)
def test_a_perturbation_is_computed_whatever_the_labels_are(tmp_path, make, caplog):
    url, _ = labelled(tmp_path, make)
    workers = LocalWorkers(tiny_worker())
    data = load_dataset(workers, [url])
    assert data.num_examples == 20 and top1(data, data.clean.labels) is None
    assert ("20 labels mean no class of the network, so these images do not count" in caplog.text) == bool(make(0))
    *_, last = compute(workers, data, data, ComputeConfig(max_passes=1))
    assert last.perturbation.abs().max() > 0
    lack = "labels mean no class of the network: .*/t-0000.tar: s3-000: its label" if make(0) else "there are no labels"
    with pytest.raises(ConfigError, match=f"needs the class of each image: for 20 of 20 training images {lack}"):
        check_truths(load_classifier(TINY), data, data)


def test_some_odd_labels_leave_the_others_to_count(tmp_path, caplog):
    url, classes = labelled(tmp_path, lambda index: {"cls": str(index) if index else "no colour"})
    data = load_dataset(workers_with_names(), [url])
    known = [index for index in classes if index]
    assert top1(data, data.clean.labels).num_examples == len(known) < 20
    assert f"{20 - len(known)} labels mean no class of the network" in caplog.text
    assert "its label (cls) is 'no colour', neither a class index nor the name of a class" in caplog.text


def test_the_classes_of_imagenet_have_wordnet_ids():
    timm = pytest.importorskip("timm")
    classes = ClassIndex(imagenet_names())
    ids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    assert [classes.find(each) for each in ids] == list(range(1000))
    names = ResNet18_Weights.DEFAULT.meta["categories"]
    assert [classes.find(name) for name in names] == list(range(1000))
    assert classes.find("Great_White_Shark") == 2
    assert classes.find("CARDIGAN") is None  # a dog and a jacket
    assert ClassIndex(list(ids)).find(ids[7]) == 7 and ClassIndex(()).find(ids[7]) is None


def test_wordnet_ids_of_real_photographs_are_their_indices(shared):
    import tarfile

    with tarfile.open(shared / "data/imagenet-sample/heldout-0000.tar") as tar:
        classes = ClassIndex(imagenet_names())
        numbers = {m.name[:9]: int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")}
    assert numbers == {key: classes.find(key) for key in numbers} and len(numbers) == 100


@pytest.mark.parametrize(
    ("files", "key", "reason"),
    [
        ({"cls": b"9" * 30}, None, "is '999999999999999999999999999999', neither a class index"),
        ({"cls": b"-2"}, None, "is '-2', neither"),
        ({"cls": b"1.0"}, None, "is '1.0', neither"),
        ({"cls": b"\xff"}, None, "is '�', neither"),
        ({"cls": b" \n"}, None, "its label (cls) is empty"),
        ({"cls": b"x" * 99}, None, "is '" + "x" * 40 + "…', neither"),
        ({"json": b"{"}, "label", "its .json is not JSON"),
        ({"json": b"[3]"}, "label", "its .json holds no keys"),
        ({"json": b'{"a": 1, "b": 2}'}, "label", "its .json has no 'label', but a, b"),
        ({"json": b'{"label": [1, 2]}'}, "label", "its label (json, label) is '[1, 2]', neither"),
        ({"json": b'{"label": true}'}, "label", "is 'true', neither"),
        ({"json": b'{"label": null}'}, "label", ""),
        ({"json": b'{"label": " "}'}, "label", "its label (json, label) is empty"),
        ({"cls": b"-1"}, None, ""),
        ({}, "label", ""),
        ({"cls": b"3"}, "label", ""),
    ],
)
def test_what_is_no_label_says_why(files, key, reason):
    index, found = find_class(files, ClassIndex(COLOURS), key)
    assert index == UNKNOWN_CLASS and reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("files", "key", "index"),
    [
        ({"cls": b"\xef\xbb\xbf7\r\n"}, None, 7),
        ({"cls": "3".encode("utf-16")}, None, 3),
        ({"json": b'\xef\xbb\xbf{"label": " 5"}'}, "label", 5),
        ({"cls": "cafe\u0301".encode()}, None, 1),
        ({"cls": "caf\u00e9".encode()}, None, 1),
        ({"json": b'{"label": "CAF\\u00c9 "}'}, "label", 1),
    ],
)
def test_labels_in_other_spellings(files, key, index):
    for name in ("cafe\u0301", "caf\u00e9"):
        assert find_class(files, ClassIndex(["tea", name]), key) == (index, "")


def test_subsets_keep_their_truths(tmp_path):
    url, classes = labelled(tmp_path, lambda index: {"cls": COLOURS[index]})
    part = load_dataset(workers_with_names(), [url]).part(1, 2)
    assert part.truths.tolist() == classes[10:]


def test_the_job_runs_without_labels_and_says_what_is_missing(tmp_path):
    for prefix, seed in (("train", 5), ("val", 6)):
        samples = [{"__key__": s["__key__"], "png": s["png"]} for s in random_samples(20, seed)]
        write_shards(samples, tmp_path, prefix=prefix, shard_size=20)
    data = ("--train-shards", "train-*.tar", "--val-shards", "val-*.tar", "--max-evaluations", "60")
    done = run_job([str(JOB), "--model", TINY, *data, "--num-workers", "1", "--output", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    for what in ("training", "held-out"):
        lack = f"clean top-1 of {what} images: not known, there are no labels; give shards with .cls"
        assert lack in " ".join(done.stdout.split())
