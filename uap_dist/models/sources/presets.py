"""The preprocessing that weights were trained with, and which one a weights file wants."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line
from uap_dist.models.classifier import Classifier, ClassNames
from uap_dist.models.weights_file import WeightsFile

logger = logging.getLogger(__name__)

GIVE_WEIGHTS = "give a weights file (--weights FILE, or MODEL=FILE in --models)"


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
    class_names: ClassNames = ()

    @property
    def input(self) -> str:
        """A description for messages."""
        return f"{self.geometry}, mean {self.mean[0]:.3g}, deviation {self.std[0]:.3g}"

    def wrap(self, network: nn.Module, name: str) -> Classifier:
        """The classifier with that network and this preprocessing."""
        return Classifier(
            network,
            name=name,
            geometry=self.geometry,
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
        )


def choose_preset(file: WeightsFile, presets: Mapping[str, Preset], default: str, named: str | None = None) -> Preset:
    """The preprocessing for the weights in a file, as far as it can be determined; a guess is logged as a warning.

    Args:
        file: with weights of one architecture.
        presets: of the published weights of that architecture, by name.
        default: name of the preset to use if nothing is known about the file.
        named: name of the preset that the user says the file wants; None if the user says nothing.

    Returns:
        The preset with the geometry in the file's provenance, which files of jobs/finetune.py have; otherwise that of the
        published file with the same SHA-256; otherwise the named one; otherwise the default.

    Raises:
        ClassifierError: the file says that it wants another geometry than the named one.
    """
    known = _from_provenance(file, presets, default) or _from_digest(file, presets)
    if named is not None:
        if known is not None and known.input != presets[named].input:
            raise ClassifierError(
                f"{file.path} was made for {known.input}, not for {named} ({presets[named].input}); leave out {named}, or name the "
                "weights that it was made from"
            )
        return presets[named]
    chosen = known or presets[default]
    others = {preset.input: name for name, preset in presets.items() if preset.input != chosen.input}
    if known is None and others:
        listed = "; ".join(f"{name} ({made_for})" for made_for, name in others.items())
        logger.warning(
            "%s is not one of the published files; images are prepared as for %s (%s). If these weights were trained with another "
            "preprocessing, name it with the network. The others are %s",
            file.path,
            default,
            chosen.input,
            listed,
        )
    return chosen


def _from_provenance(file: WeightsFile, presets: Mapping[str, Preset], default: str) -> Preset | None:
    geometry = Geometry.from_provenance(file.provenance)
    if geometry is None:
        return None
    alike = [preset for preset in presets.values() if preset.geometry == geometry]
    return alike[0] if alike else replace(presets[default], geometry=geometry)


def _from_digest(file: WeightsFile, presets: Mapping[str, Preset]) -> Preset | None:
    for preset in presets.values():
        found = re.search(r"-([0-9a-f]{8,})\.\w+$", preset.url)
        if found and file.sha256.startswith(found[1]):
            return preset
    return None


def download(create: Callable[[], nn.Module], name: str, advice: str = GIVE_WEIGHTS) -> nn.Module:
    """The network that a library creates with its published weights.

    Raises:
        ClassifierError: they cannot be fetched; the message ends with the advice.
    """
    try:
        return create()
    except Exception as error:  # of the library, its hub client, or what parses the files
        raise ClassifierError(
            f"the published weights of {name} cannot be fetched ({first_line(error)}); {advice}"
        ) from error
