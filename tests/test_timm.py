"""Networks of timm: what a folder or the hub says of them, and images cropped as timm crops them."""

import json

import numpy as np
import pytest
import torch
from conftest import encode
from PIL import Image
from safetensors.torch import save_file

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.write import write_shards
from uap_dist.errors import ClassifierError
from uap_dist.models.loading import describe_weights, load_classifier


def timm_folder(folder, num_classes=4, channels=3, **config):
    """A network and its name, saved as timm saves it."""
    network = pytest.importorskip("timm").create_model("resnet10t", num_classes=num_classes, in_chans=channels)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"input_size": [channels, 96, 96], "num_classes": num_classes} | config
    saved = {"architecture": "resnet10t", "num_classes": num_classes, "model_args": {"in_chans": channels}}
    (folder / "config.json").write_text(json.dumps(saved | {"pretrained_cfg": config}))
    return network, f"timm/local-dir:{folder}"


def test_timm_reads_a_folder_as_it_saves_one_and_its_crop_mode(tmp_path):
    config = dict(crop_pct=0.9, crop_mode="border", interpolation="bicubic", label_names=["a", "b", "c", "d"])
    config |= dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    network, name = timm_folder(tmp_path, **config)
    classifier = load_classifier(name)
    assert classifier.geometry == Geometry(106, 96, "bicubic", "border", (128, 102, 76))
    assert classifier.class_names == ("a", "b", "c", "d") and describe_weights(name, None) == "published"
    pixels = torch.rand(1, 3, 96, 96)
    shown = (pixels - torch.tensor(config["mean"]).view(3, 1, 1)) / 0.2
    torch.testing.assert_close(classifier(255 * pixels), network.eval()(shown), rtol=1e-3, atol=1e-4)
    again = load_classifier(name, str(tmp_path / "model.safetensors"))
    assert again.weights_digest == classifier.weights_digest and again.geometry == classifier.geometry


def test_classes_of_a_folder_are_named_by_its_config_alone(tmp_path):
    assert load_classifier(timm_folder(tmp_path, 1000)[1]).class_names == ()
    by_label = {"3": "d", "0": "a", "1": "b", "2": "c"}
    assert load_classifier(timm_folder(tmp_path, label_names=by_label)[1]).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(channels=1, mean=[0.5], std=[0.5]),
            "takes images of 1 channels, with 1 means and 1 deviations; only RGB",
        ),
        (dict(input_size=[3, 96, 64]), "takes 64×96 images; only square ones"),
        (
            dict(interpolation="random"),
            "the configuration of timm/local-dir:.* cannot be used: 'random' is not a valid",
        ),
        (dict(label_names=[0, 1, 2, 3]), r"has class_names \[0, 1, 2, 3\]; they must be a list of str"),
    ],
)
def test_what_a_configuration_of_timm_asks_in_vain_is_said_in_one_line(tmp_path, config, message):
    with pytest.raises(ClassifierError, match=message):
        load_classifier(timm_folder(tmp_path, **config)[1])


@pytest.mark.parametrize("with_weights", [False, True])
def test_what_timm_has_not_saved_is_refused_in_one_line(tmp_path, with_weights):
    pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ResNetForImageClassification"]}))
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    for source, reason in (
        (f"local-dir:{tmp_path}", "there is no 'architecture'"),
        ("hf:timm/resnet18.a1_in1k", "Unknown model source 'hf'"),
        ("hf-hub:a/b/c", "Repo id must be in the form"),
    ):
        with pytest.raises(ClassifierError, match=f"{reason}.*; a network of transformers is wrapped in a factory"):
            load_classifier(f"timm/{source}", f"{tmp_path}/w.pth" if with_weights else None)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(97, 61), (40, 55), (31, 31)])
def test_crop_modes_are_those_of_timm(tmp_path, mode, crop_pct, size):
    data = pytest.importorskip("timm").data
    mean = (0.5, 0.4, 0.3)
    transform = data.create_transform(
        (3, 32, 32), crop_pct=crop_pct, crop_mode=mode, interpolation="bicubic", mean=mean, normalize=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    geometry = Geometry(int(32 / crop_pct), 32, "bicubic", mode, (128, 102, 76) if mode == "border" else (0, 0, 0))
    expected = transform(Image.fromarray(pixels)).numpy()
    write_shards([{"__key__": "a", "png": encode(pixels)}], tmp_path, prefix="s", shard_size=1)
    assert np.array_equal(load_shard(str(tmp_path / "s-0000.tar"), geometry).images[0], expected)
