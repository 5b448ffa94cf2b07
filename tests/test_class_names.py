"""Names of labels: the network's own, or those of the classes that the shards were made from."""

from conftest import TINY, random_samples, tiny_worker
from rich.console import Console

from uap_dist.computing.provenance import Setting
from uap_dist.data.locations import write_file
from uap_dist.data.write import CLASSES_FILE, read_classes, write_classes, write_shards
from uap_dist.models.loading import load_classifier
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers


def names(folder, own=()):
    """What a run calls the labels of a network with four of them on images of that folder."""
    if not (folder / "train-0000.tar").exists():
        write_shards(random_samples(8, seed=1), folder, prefix="train", shard_size=8)
    classifier = load_classifier(TINY)
    classifier.class_names = own
    data = load_dataset(LocalWorkers(tiny_worker()), [str(folder / "train-0000.tar")])
    return list(Setting(classifier, None, data, data, {}, Console(), commit_every_s=10.0).class_names)


def test_the_names_beside_the_shards_are_those_of_a_network_without_its_own(tmp_path, caplog):
    assert names(tmp_path) == []
    write_classes(tmp_path, ["ant\u2028 hill", "bee", "cat", "dog"])
    assert names(tmp_path) == ["ant  hill", "bee", "cat", "dog"]
    assert names(tmp_path, ("red", "green", "blue", "grey")) == ["red", "green", "blue", "grey"]
    assert not caplog.records


def test_names_of_another_number_of_classes_are_not_used(tmp_path, caplog):
    write_classes(tmp_path, ["ant", "bee", "cat"])
    assert names(tmp_path) == []
    assert "the network has 4" in caplog.text and "has 3" in caplog.text


def test_a_file_that_cannot_be_read_costs_the_names_alone(tmp_path, caplog):
    write_classes(tmp_path, ["ant", "bee", "cat", "dog"])
    (tmp_path / CLASSES_FILE).chmod(0)
    found = names(tmp_path)
    assert found in ([], ["ant", "bee", "cat", "dog"])  # root reads everything
    assert found or "labels are shown as numbers" in caplog.text


def test_numbers_as_names_leave_no_file(tmp_path):
    write_classes(tmp_path, ["0", "1", "2"])
    assert not list(tmp_path.iterdir())


def test_names_in_a_store(s3):
    write_file(f"s3://bucket/named/{CLASSES_FILE}?{s3}", b"ant\nbee\n")
    assert read_classes(f"s3://bucket/named/train-0000.tar?{s3}") == ["ant", "bee"]
    assert read_classes(f"s3://bucket/elsewhere/train-0000.tar?{s3}") == []


def test_names_as_editors_save_them(tmp_path, caplog):
    path = tmp_path / CLASSES_FILE
    for data in ("\ufeffcat\r\ndog \r\n\r\n".encode(), "cat\ndog\n".encode("utf-16")):
        path.write_bytes(data)
        assert read_classes(str(tmp_path / "train-0000.tar")) == ["cat", "dog"]
    path.write_bytes("café\n".encode("latin-1"))
    assert names(tmp_path) == []
    assert "labels are shown as numbers: " in caplog.text and "classes.txt is not in UTF-8" in caplog.text


def test_names_that_differ_in_how_accents_are_composed_are_the_same_classes(tmp_path):
    write_classes(tmp_path, ["cafe\u0301", "dog "])
    write_classes(tmp_path, ["caf\u00e9", "dog"])
    assert read_classes(str(tmp_path / "train-0000.tar")) == ["caf\u00e9", "dog"]
