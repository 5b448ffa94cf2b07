"""Networks of torchvision, as NAME or NAME@WEIGHTS with a member of the network's weights enum."""

import difflib
from typing import Any

import torchvision.models

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import nearest
from uap_dist.models.classifier import Classifier
from uap_dist.models.sources.presets import Preset, choose_preset, download
from uap_dist.models.weights import fill_from
from uap_dist.models.weights_file import open_weights


def load_torchvision(text: str, weights: str | None) -> Classifier:
    """A network of torchvision with published weights, or with those of a file.

    Args:
        text: NAME, whose default weights are taken, or NAME@WEIGHTS, as resnet50@IMAGENET1K_V1.
        weights: file; WEIGHTS then says only which preprocessing it wants.

    Raises:
        ClassifierError: there is no such network or member, or the weights cannot be fetched or do not fit.
    """
    architecture, at, member = text.partition("@")
    if architecture not in classifier_names():
        found = nearest(architecture, classifier_names())
        raise ClassifierError(f"torchvision has no classifier {architecture!r}; nearest names: {found}")
    members = torchvision.models.get_model_weights(architecture)
    if at and member not in members.__members__:  # DEFAULT is another name of one of them
        names = list(members.__members__)
        near = difflib.get_close_matches(member.upper(), names, n=3, cutoff=0.4) or names
        raise ClassifierError(
            f"torchvision has no weights {member!r} of {architecture}; nearest names: "
            + ", ".join(f"{architecture}@{name}" for name in near)
        )
    chosen = members[member] if at else members.DEFAULT
    name = f"torchvision/{text}"
    if weights is None:
        network = download(lambda: torchvision.models.get_model(architecture, weights=chosen), name)
        return _preset(chosen).wrap(network, name)
    file = open_weights(weights)
    presets = {each.name: _preset(each) for each in members}
    preset = choose_preset(file, presets, chosen.name, named=chosen.name if at else None)
    size = {"image_size": preset.geometry.crop} if architecture.startswith("vit_") else {}
    network = torchvision.models.get_model(architecture, weights=None, **size)
    if hasattr(network, "transform_input"):  # Inception and GoogLeNet: torchvision sets it only with its own weights
        network.transform_input = True
    fill_from(network, file)
    return preset.wrap(network, name)


def classifier_names() -> list[str]:
    """The classifiers that torchvision has."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _preset(member: Any) -> Preset:
    made_for = member.transforms()
    return Preset(
        Geometry(made_for.resize_size[0], made_for.crop_size[0], made_for.interpolation.value),
        tuple(made_for.mean),
        tuple(made_for.std),
        member.url,
        tuple(member.meta["categories"] or ()),
    )
