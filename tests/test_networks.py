"""Networks as people have them: members of weights enums, timm's sources, outputs that are no tensor, factories with arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights, resnet18, resnet50

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import redact
from uap_dist.models.check import check_classifier
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import write_weights
from uap_dist.models.weights_file import open_weights

TINY_FILE = TINY.rpartition(":")[0]


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    save_file(resnet50(weights=None).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(("member", "resize"), [("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232), ("DEFAULT", 232)])
def test_a_member_of_the_weights_enum_says_which_geometry_a_file_wants(resnet_file, member, resize, caplog):
    classifier = load_classifier(f"torchvision/resnet50@{member}", resnet_file)
    made_for = ResNet50_Weights[member].transforms()
    assert classifier.geometry == Geometry(resize, 224, "bilinear") and made_for.resize_size == [resize]
    torch.testing.assert_close(classifier.mean.flatten(), 255 * torch.tensor(made_for.mean))
    assert not caplog.text  # nothing is guessed


def test_published_weights_are_those_of_the_member(tmp_path, monkeypatch):
    """torchvision's own loading, from the folder in which it keeps what it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    for member, bias in ((ResNet50_Weights.IMAGENET1K_V1, 1.0), (ResNet50_Weights.IMAGENET1K_V2, 2.0)):
        network = resnet50(weights=None)
        network.fc.bias.data.fill_(bias)
        torch.save(network.state_dict(), folder / Path(member.url).name)
    found = {name: load_classifier(f"torchvision/resnet50{name}") for name in ("@IMAGENET1K_V1", "@DEFAULT", "")}
    assert [float(c.network.fc.bias[0]) for c in found.values()] == [1.0, 2.0, 2.0]
    assert [c.geometry.resize for c in found.values()] == [256, 232, 232]
    assert found["@IMAGENET1K_V1"].name == "torchvision/resnet50@IMAGENET1K_V1"


def test_a_file_that_says_otherwise_than_the_member_is_refused(tmp_path):
    tuned = {"geometry.resize": 232, "geometry.crop": 224, "geometry.interpolation": "bilinear"}
    write_weights(tmp_path / "w.safetensors", resnet18(weights=None), tuned)
    with pytest.raises(
        ClassifierError, match=r"w.safetensors was made for resize 232, .* not for IMAGENET1K_V1 \(resize 256"
    ):
        load_classifier("torchvision/resnet18@IMAGENET1K_V1", str(tmp_path / "w.safetensors"))


def test_weights_of_another_size_say_what_to_do(tmp_path, resnet_file):
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "ten.pth")
    with pytest.raises(
        ClassifierError,
        match=r"keys 2 of another shape \(fc.bias, fc.weight\): fc.bias is 10, the network's 1000. For another",
    ):
        load_classifier("torchvision/resnet18", str(tmp_path / "ten.pth"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision/resnet50@IMAGENET1K_V3",
            "no weights 'IMAGENET1K_V3' of resnet50; nearest names: resnet50@IMAGENET1K_V",
        ),
        ("torchvision/resnet50@v1", "no weights 'v1' of resnet50; nearest names: .*resnet50@IMAGENET1K_V1"),
        ("torchvision/resnet5@IMAGENET1K_V1", "no classifier 'resnet5'; nearest names: resnet50"),
        ("timm/resnet50.a1_in1", "no weights 'a1_in1' of resnet50; nearest names: .*resnet50.a1_in1k"),
        ("timm/local-dir:absent", "weights of timm/local-dir:absent cannot be fetched .*absent/config.json"),
    ],
)
def test_unknown_members_and_tags_are_refused_with_the_nearest_names(name, message):
    pytest.importorskip("timm")
    with pytest.raises(ClassifierError, match=message):
        load_classifier(name)


OUTPUTS = """
from collections import namedtuple
import torch
from torch import nn
from tiny import Tiny

Named = namedtuple("Named", "logits aux")

class Output(Tiny):
    def __init__(self, kind="logits"):
        super().__init__()
        self.kind = kind

    def forward(self, pixels):
        logits = super().forward(pixels)
        features = torch.zeros(len(pixels), 7, 2, 2)
        return {
            "named": Named(logits, logits),
            "dict": {"logits": logits, "aux": logits},
            "only": {"out": logits, "features": features},
            "tuple": (logits, features),
            "list": [logits],
            "two": (logits, logits),
            "nothing": {"features": features},
        }[self.kind]
"""


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "outputs.py").write_text(OUTPUTS)
    (tmp_path / "tiny.py").write_text(Path(TINY_FILE).read_text())
    return f"{tmp_path / 'outputs.py'}:Output"


@pytest.mark.parametrize("kind", ["named", "dict", "only", "tuple", "list"])
def test_logits_are_taken_from_an_output_where_that_is_unambiguous(outputs, kind):
    classifier = load_classifier(f"{outputs}?kind={kind}")
    pixels = 255 * torch.rand(2, 3, 16, 16)
    assert torch.equal(classifier(pixels), load_classifier(TINY)(pixels))
    check_classifier(classifier, (3, 16, 16))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two", "returns tuple with tensors of 2×4, 2×4; its logits are not recognisable in it: return them alone"),
        ("nothing", "returns dict with tensors of 2×7×2×2 under 'features'; its logits"),
    ],
)
def test_ambiguous_outputs_are_refused(outputs, kind, message):
    with pytest.raises(ClassifierError, match=message):
        check_classifier(load_classifier(f"{outputs}?kind={kind}"), (3, 16, 16))


FACTORY = """
from torch import nn

def build(depth, width=1.5, *, pretrained=True, name="a"):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    network.got = depth, width, pretrained, name
    return network
"""


def test_arguments_of_a_factory_are_constants_of_python_or_strings(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    name = f"{tmp_path / 'net.py'}:build?depth=18&width=1e-3&pretrained=false&name=a%26b/c:d"
    classifier = load_classifier(name)
    assert classifier.network.got == (18, 1e-3, False, "a&b/c:d") and classifier.name == name
    assert redact(name) == name and "hunter2" not in redact(f"{name}&token=hunter2")
    assert redact("https://host/a?b=c") == "https://host/a?b=…"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", r"net.py:build: missing a required argument: 'depth'; it takes depth, width, pretrained, name, given as "),
        (
            "?dept=1&depth=1",
            r"unexpected keyword argument 'dept' \(nearest: depth\); it takes depth, .* as .*:build\?depth=…",
        ),
        ("?depth", "'depth' is no argument, or given twice; give them as"),
        ("?depth=1&depth=2", "'depth=2' is no argument, or given twice"),
    ],
)
def test_wrong_arguments_of_a_factory_are_refused(tmp_path, query, message):
    (tmp_path / "net.py").write_text(FACTORY)
    with pytest.raises(ClassifierError, match=message):
        load_classifier(f"{tmp_path / 'net.py'}:build{query}")


def test_one_entry_of_a_checkpoint_is_taken_by_its_key(tmp_path):
    state = load_classifier(TINY).network.state_dict()
    ema = {f"module.{key}": value + 1 for key, value in state.items()}
    attack = {f"attacker.model.{key}": value for key, value in state.items()}
    robust = {
        f"module.model.{key}": value + 2 for key, value in state.items()
    } | attack  # as the robustness library has them
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "state_dict_ema": ema, "model": robust, "epoch": 3}, path)
    biases = {
        key: float(load_classifier(TINY, f"{path}#{key}").network.head.bias[0] - state["head.bias"][0])
        for key in ("state_dict", "state_dict_ema", "model.module.model")
    }
    assert [round(bias) for bias in biases.values()] == [0, 1, 2]
    with pytest.raises(ClassifierError, match=r"no tensors under 'ema'; nearest keys: .*state_dict"):
        load_classifier(TINY, f"{path}#ema")
    path.rename(tmp_path / "a#b.pth")
    assert len(open_weights(str(tmp_path / "a#b.pth")).states) == 3


def recipe(heading):
    """The first block of Python under a heading of docs/networks.md."""
    text = (Path(__file__).parents[1] / "docs/networks.md").read_text()
    found = re.search(rf"## {heading}.*?```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, heading
    return found[1]


def load_elsewhere(folder, name):
    """Geometry and class names of a classifier that is loaded and checked in a process where the folder comes first."""
    script = (
        "from uap_dist.models.loading import load_classifier\n"
        "from uap_dist.models.check import check_classifier\n"
        f"c = load_classifier({f'{folder}/{name}'!r})\n"
        "check_classifier(c, (3, 4, 4))\n"
        "print(c.geometry, c.class_names)"
    )
    path = f"{folder}{os.pathsep}{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    return done.stdout or done.stderr


def test_the_recipe_for_robustbench_works_on_a_stand_in(tmp_path):
    """RobustBench fetches its weights; the stand-in has its signature, takes 0..1 and has two classes."""
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench/__init__.py").touch()
    (tmp_path / "robustbench/utils.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def load_model(model_name, model_dir='./models', dataset='cifar10', threat_model='Linf'):\n"
        "    torch.manual_seed(len(model_name))\n"
        "    class Net(nn.Module):\n"
        "        def __init__(self):\n"
        "            super().__init__()\n"
        "            self.head = nn.Linear(48, 2)\n"
        "        def forward(self, x):\n"
        "            assert 0 <= x.min() and x.max() <= 1\n"
        "            return self.head(x.flatten(1))\n"
        "    return Net()\n"
    )
    (tmp_path / "robust.py").write_text(recipe("RobustBench"))
    arguments = "model_name=Rice2020Overfitting&threat_model=L2"
    assert load_elsewhere(tmp_path, f"robust.py:network?{arguments}") == "resize None, crop None, bilinear ()\n"


def test_the_recipe_for_transformers_works_on_a_stand_in(tmp_path):
    """from_pretrained reads the hub; the stand-in returns an object with .logits, as transformers does."""
    (tmp_path / "transformers.py").write_text(
        "from types import SimpleNamespace\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(48, 3)\n"
        "        self.config = SimpleNamespace(id2label={0: 'a', 1: 'b', 2: 'c'}, num_labels=3)\n"
        "    def forward(self, pixel_values):\n"
        "        return SimpleNamespace(loss=None, logits=self.head(pixel_values.flatten(1)))\n"
        "class AutoModelForImageClassification:\n"
        "    from_pretrained = staticmethod(lambda name: Net())\n"
        "class AutoImageProcessor:\n"
        "    from_pretrained = staticmethod(lambda name: SimpleNamespace(image_mean=[.5]*3, image_std=[.5]*3, "
        "size={'height': 4, 'width': 4}))\n"
    )
    (tmp_path / "hugging.py").write_text(recipe("Transformers"))
    found = load_elsewhere(tmp_path, "hugging.py:network?name=org/net")
    assert found == "resize 4, crop 4, bilinear ('a', 'b', 'c')\n"
