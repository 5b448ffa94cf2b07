import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.perturbations.files import Perturbation, load_perturbations, save_perturbation
from uap_dist.perturbations.pool import PerturbationPool, load_members
from uap_dist.perturbations.reading import PERTURBATION_FILE, POOL_FILE
from uap_dist.perturbations.transform import AddUniversalPerturbation

SHARED = {"model": "tiny", "weights_digest": "a" * 64, "norm": "linf", "radius": 10.0}


def member(seed, shape=(3, 8, 6), **changes):
    v = 20 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 10
    return Perturbation(f"seed-{seed}", v, SHARED | {"seed": seed, "val_fooling_rate": 0.5} | changes)


@pytest.fixture
def pool():
    return PerturbationPool.of([member(seed) for seed in range(3)])


def test_a_saved_pool_is_loaded_with_its_provenance(pool, tmp_path):
    pool.save(tmp_path / "p")
    for location in (tmp_path / "p", tmp_path / "p" / POOL_FILE):
        again = PerturbationPool.load(location)
        assert torch.equal(again.perturbations, pool.perturbations) and again.shared == SHARED
        assert [m["seed"] for m in again.members] == [0, 1, 2]
    manifest = json.loads((tmp_path / "p/pool.json").read_text())
    assert manifest["shape"] == [3, 3, 8, 6] and manifest["members"][1]["val_fooling_rate"] == 0.5
    for before, after in zip([member(seed) for seed in range(3)], again.to_perturbations(), strict=True):
        assert torch.equal(before.v, after.v) and before.provenance.items() <= after.provenance.items()


NAMES_THAT_LEAD_ELSEWHERE = (
    "../../x",
    "/tmp/x",
    "a/b",
    "..",
    ".bashrc",
    "",
    "a\\b",
    "a\0b",
    "a\nb",
    "a" * 250,
    7,
    None,
)


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_ELSEWHERE)
def test_member_names_in_a_manifest_cannot_lead_out_of_the_folder(pool, tmp_path, monkeypatch, name):
    members = [{**pool.members[0], "name": name}, *pool.members[1:]]
    with pytest.raises(PerturbationError, match="is not a plain name for a file"):
        PerturbationPool(pool.perturbations, SHARED, members)
    with monkeypatch.context() as unchecked:  # as somebody else's program may write it
        unchecked.setattr(PerturbationPool, "__post_init__", lambda self: None)
        PerturbationPool(pool.perturbations, SHARED, members).save(tmp_path / "theirs")
    with pytest.raises(PerturbationError) as caught:
        PerturbationPool.load(tmp_path / "theirs")
    said = f"{tmp_path}/theirs/pool.safetensors is not a pool: the member name {name!r} is not a plain name"
    assert str(caught.value).startswith(said) and str(caught.value).isprintable()


def test_member_names_must_be_unique(pool):
    with pytest.raises(PerturbationError, match="two members are named seed-1"):
        PerturbationPool.of([member(0), member(1), member(1)])


def test_an_export_does_not_follow_existing_links(pool, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    for extension in ("npy", "png"):
        (tmp_path / f"out/seed-0.{extension}").symlink_to(tmp_path / "mine")
    pool.export(tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine" and np.load(tmp_path / "out/seed-0.npy").shape == (3, 8, 6)


@pytest.mark.parametrize("shared", [{}, SHARED | {"norm": "l7"}, SHARED | {"radius": "wide"}])
def test_an_incomplete_manifest_is_an_error_without_a_type_name(pool, tmp_path, shared):
    PerturbationPool(pool.perturbations, shared, pool.members).save(tmp_path)
    with pytest.raises(PerturbationError, match="pool.safetensors is not a pool") as caught:
        PerturbationPool.load(tmp_path)
    assert "Error" not in str(caught.value)


def test_file_permissions_follow_the_umask(pool, tmp_path):
    pool.save(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_from_s3(pool, tmp_path, s3):
    from uap_dist.data.locations import locate

    pool.save(tmp_path)
    filesystem, path = locate(f"s3://bucket/pool/pool.safetensors?{s3}")
    with filesystem.open_output_stream(path) as file:
        file.write((tmp_path / POOL_FILE).read_bytes())
    assert torch.equal(PerturbationPool.load(f"s3://bucket/pool?{s3}").perturbations, pool.perturbations)


@pytest.mark.parametrize("given", ["own", "own/FILE", "own:255", "own/FILE:1"])
def test_a_pool_is_no_perturbation_nor_the_other_way_round(pool, tmp_path, given):
    v = pool.perturbations[0]
    provenance = SHARED | {"perturbation_sha256": sha256(v.numpy().tobytes()).hexdigest()}
    for folder, file, load, message in (
        (
            "pool",
            POOL_FILE,
            load_perturbations,
            "is a pool.*--pools(; a perturbation of it lies in its run's members/NAME)?$",
        ),
        (
            "v",
            PERTURBATION_FILE,
            PerturbationPool.load,
            "is a single perturbation.*--perturbations(; --num-perturbations makes a pool)?$",
        ),
    ):
        (tmp_path / "own").mkdir()
        if file == POOL_FILE:
            pool.save(tmp_path / "own")
        else:
            save_perturbation(tmp_path / "own" / file, v, provenance)
        with pytest.raises(PerturbationError, match=message):
            load(f"{tmp_path}/{given}".replace("FILE", file))
        (tmp_path / "own").rename(tmp_path / folder)


def test_a_pool_that_is_damaged_or_outside_its_ball_is_rejected(pool, tmp_path):
    pool.save(tmp_path)
    data = bytearray((tmp_path / POOL_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / POOL_FILE).write_bytes(data)
    with pytest.raises(PerturbationError, match="is damaged"):
        PerturbationPool.load(tmp_path)
    pool.save(tmp_path)
    data = (tmp_path / POOL_FILE).read_bytes()
    assert data.count(b'val_fooling_rate\\": 0.5') == 3
    (tmp_path / POOL_FILE).write_bytes(data.replace(b'val_fooling_rate\\": 0.5', b'val_fooling_rate\\": 0.9', 1))
    with pytest.raises(PerturbationError, match="is damaged: its manifest"):
        PerturbationPool.load(tmp_path)
    (tmp_path / POOL_FILE).write_bytes(b"nothing")
    with pytest.raises(PerturbationError, match="is not a pool"):
        PerturbationPool.load(tmp_path)
    PerturbationPool(pool.perturbations, SHARED | {"radius": 5.0}, pool.members).save(tmp_path)
    with pytest.raises(PerturbationError, match=r"member seed-0, has linf norm 9\.\d+, more than its radius 5"):
        PerturbationPool.load(tmp_path)
    with pytest.raises(PerturbationError, match="cannot read .*absent/pool.safetensors"):
        PerturbationPool.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (member(1, weights_digest="b"), "its weights_digest is b, not aaaa"),
        (member(1, norm="l2"), "its norm is l2, not linf"),
        (member(1, radius=8.0), "its radius is 8.0, not 10.0"),
        (member(1, shape=(3, 4, 4)), r"seed-1 is \(3, 4, 4\), seed-0 \(3, 8, 6\): members of a pool have one size"),
        (Perturbation("CaffeNet", torch.ones(3, 8, 6)), "CaffeNet does not say its model"),
    ],
)
def test_perturbations_that_differ_in_what_a_pool_shares_are_rejected(other, message):
    with pytest.raises(PerturbationError, match=message):
        PerturbationPool.of([member(0), other])


def test_a_pool_is_rejected_for_another_network(pool):
    pool.check_classifier("a" * 64)
    with pytest.raises(PerturbationError, match="computed for tiny with weights aaaaaaaaaaaa…, this network has cccc"):
        pool.check_classifier("c" * 64)


def test_inner_products_against_numpy_and_the_nearest_pair_by_name():
    v = member(0).v
    near = Perturbation("near", v + 0.1 * v.roll(1, 2), SHARED)
    pool = PerturbationPool.of([member(3), Perturbation("v", v, SHARED), member(4), near])
    flat = pool.perturbations.flatten(1).double().numpy()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.allclose(pool.inner_products(), flat @ flat.T)
    (largest, names), *others = pool.nearest_pairs()
    assert len(others) == 5 and others == sorted(others, reverse=True)
    assert names == ("v", "near") and largest == pytest.approx(flat[1] @ flat[3]) and largest > 0.9
    assert PerturbationPool.of([member(0)]).nearest_pairs() == []


def test_export_is_pixels(pool, tmp_path):
    pool.export(tmp_path)
    assert np.array_equal(np.load(tmp_path / "seed-2.npy"), pool.perturbations[2].numpy())
    picture = np.asarray(Image.open(tmp_path / "seed-1.png")).astype(int) - 128
    assert np.abs(picture.transpose(2, 0, 1) - pool.perturbations[1].numpy()).max() <= 0.5


@given(count=st.integers(1, 5), floats=st.sampled_from([None, 1.0, 255.0]), seed=st.integers(0, 1000))
def test_each_image_gets_one_member_and_stays_an_image(count, floats, seed):
    pool = PerturbationPool.of([member(s) for s in range(3)])
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 6), dtype=torch.uint8)
    given = images if floats is None else images * (floats / 255)
    shown = AddUniversalPerturbation(pool, 1.0, float_range=floats or 255.0)(given)
    assert shown.dtype == given.dtype and shown.shape == given.shape
    pixels = shown.float() * (1 if floats is None else 255 / floats)
    for image, result in zip(images.float(), pixels, strict=True):
        ways = [(image + v).clamp(0, 255) for v in pool.perturbations]
        tolerance = 0.5 if floats is None else 1e-3
        assert min(float((way - result).abs().max()) for way in ways) <= tolerance


def test_probability_is_the_share_of_perturbed_images_and_members_are_equally_likely(pool):
    torch.manual_seed(0)
    images = torch.full((3000, 3, 8, 6), 128.0)
    shown = AddUniversalPerturbation(pool, 0.5)(images) - 128
    counts = [
        int((shown - v).abs().amax((1, 2, 3)).lt(1e-3).sum()) for v in (torch.zeros(3, 8, 6), *pool.perturbations)
    ]
    assert sum(counts) == 3000 and abs(counts[0] - 1500) < 110 and all(abs(c - 500) < 90 for c in counts[1:])
    assert torch.equal(AddUniversalPerturbation(pool, 0.0)(images), images)


def test_labels_boxes_and_images_of_other_sizes(pool):
    add = AddUniversalPerturbation(pool, 1.0)
    image = tv_tensors.Image(torch.full((3, 16, 12), 100, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 4, 4]], format="XYXY", canvas_size=(16, 12))
    shown, same_boxes, label = add(image, boxes, 7)
    assert isinstance(shown, tv_tensors.Image) and shown.shape == (3, 16, 12) and not torch.equal(shown, image)
    assert torch.equal(same_boxes, boxes) and label == 7 and (shown.int() - 100).abs().max() <= 10
    assert add(torch.full((3, 8, 6), 100.0)).shape == (3, 8, 6)


class Grey(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.transform(torch.full((3, 8, 6), 128, dtype=torch.uint8)), i


def test_data_loaders_workers_draw_for_themselves_and_repeat_with_the_seed(pool):
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(Grey(AddUniversalPerturbation(pool)), batch_size=4, num_workers=2, generator=generator)
        return torch.cat([images for images, _ in loader])

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) > 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 8, 6), "not 3×H×W"),
        (torch.zeros(3, 8, 6, dtype=torch.int64), "give uint8, or floats in 0..255"),
        (Image.new("RGB", (6, 8)), "images are Image; put v2.PILToTensor"),
    ],
)
def test_invalid_images_are_rejected(pool, images, message):
    with pytest.raises(PerturbationError, match=message):
        AddUniversalPerturbation(pool)(images)


def test_invalid_options_are_rejected(pool):
    for options in ({"probability": 1.5}, {"float_range": 2.0}):
        with pytest.raises(PerturbationError, match="it must"):
            AddUniversalPerturbation(pool, **options)
    with pytest.raises(PerturbationError, match="a pool needs perturbations"):
        PerturbationPool.of([])


def test_members_of_several_pools_get_unique_names(pool, tmp_path):
    other = PerturbationPool.of([member(seed, val_fooling_rate=0.4) for seed in (2, 5)])
    other = replace(other, perturbations=other.perturbations * 0.5)
    third = PerturbationPool.of([member(7)])
    places = [str(tmp_path / name / "pool") for name in ("a", "b", "c")]
    for each, place in zip((pool, other, third), places, strict=True):
        each.save(Path(place))

    def names(*specifications, taken=()):
        return [perturbation.name for perturbation in load_members(specifications, taken)]

    assert names(places[0]) == ["seed-0", "seed-1", "seed-2"]
    a, b = [f"a/pool, seed-{seed}" for seed in range(3)], [f"b/pool, seed-{seed}" for seed in (2, 5)]
    assert names(*places) == [*a, *b, "seed-7"]
    assert names(f"new={places[0]}", *places[1:]) == [
        *(f"new, seed-{seed}" for seed in range(3)),
        "seed-2",
        "seed-5",
        "seed-7",
    ]
    assert names(places[2], taken=["seed-7"]) == ["pool, seed-7"]
    for again in (f"{places[0]}/", f"again={places[0]}/pool.safetensors"):
        with pytest.raises(ConfigError, match="hold the same perturbations; leave one of them out"):
            names(places[0], again)
    with pytest.raises(ConfigError, match="two pools are named 'x'"):
        names(f"x={places[0]}", f"x={places[1]}")
