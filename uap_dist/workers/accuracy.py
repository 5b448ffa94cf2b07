"""The classes of a network beside those of the images: their names, and clean accuracy.

A low accuracy may mean that the network expects other units or other class numbers.
"""

import logging
from collections.abc import Sequence

import numpy as np

from uap_dist.data.write import read_classes
from uap_dist.errors import ClassifierError, ConfigError
from uap_dist.method.rates import Rate
from uap_dist.models.classes import UNKNOWN_CLASS
from uap_dist.models.classifier import Classifier
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import Workers

SUSPICIOUS = 0.5  # a clean top-1 accuracy below this is investigated
NUM_TRIED = 100  # images

logger = logging.getLogger(__name__)


def top1(dataset: Dataset, labels: np.ndarray) -> Rate | None:
    """Top-1 accuracy of the labels (N) on the images with a known class; None if no class is known."""
    known = dataset.truths != UNKNOWN_CLASS
    return Rate(int((labels == dataset.truths)[known].sum()), int(known.sum())) if known.any() else None


def warn_of_other_classes(classifier: Classifier, dataset: Dataset, model: str) -> None:
    """Warn where labels of a data set are no classes of the network, which counts as wrong in its top-1 accuracy."""
    num_classes = classifier.count_labels(dataset.shape)
    outside = dataset.truths[dataset.truths >= num_classes]
    if len(outside):
        logger.warning(
            "%s has %d classes, but %d of %d labelled images have labels outside them, such as %d: its top-1 counts them as wrong; "
            "fooling rates need no labels",
            model,
            num_classes,
            len(outside),
            int((dataset.truths != UNKNOWN_CLASS).sum()),
            outside[0],
        )


def name_labels(classifier: Classifier, dataset: Dataset) -> tuple[Sequence[str], int]:
    """Names of a network's labels and their number: its own names, else those of the images' classes if as many, else none."""
    num_labels = classifier.count_labels(dataset.shape)
    url = dataset.shards[0].url
    try:
        names = classifier.class_names or read_classes(url)
    except (OSError, ConfigError) as error:  # names are not worth a failed run
        logger.warning("labels are shown as numbers: %s", error)
        return (), num_labels
    if names and len(names) != num_labels:
        logger.warning(
            "labels are shown as numbers: the network has %d, classes.txt beside %s has %d", num_labels, url, len(names)
        )
        return (), num_labels
    return names, num_labels


def check_accuracy(workers: Workers, dataset: Dataset, model: str) -> dict[str, Rate | None]:
    """Clean top-1 accuracy of a data set by network, "" where there is one; None if no class is known. A low one is warned of.

    Args:
        workers: with the classifier.
        dataset: with its clean labels.
        model: name of the classifier, for messages.

    Raises:
        ClassifierError: the classifier is more accurate on pixels of 0..1 than on 0..255, which it has to accept.
    """
    found = {name: top1(dataset, clean.labels) for name, clean in dataset.clean.each()}
    if all(rate is None or rate.rate >= SUSPICIOUS for rate in found.values()):
        return found
    some = dataset.thin(min(NUM_TRIED, dataset.num_examples))
    divided = classify(workers, some, np.zeros(some.shape, np.float32), divisor=255.0)
    for (name, clean), (_, other) in zip(some.clean.each(), divided.each(), strict=True):
        rate = found[name]
        if rate is not None and rate.rate < SUSPICIOUS:
            _explain(name or model, rate, some, clean.labels, other.labels)
    return found


def _explain(model: str, rate: Rate, some: Dataset, labels: np.ndarray, labels_divided: np.ndarray) -> None:
    """Refuse a network that expects 0..1, or warn; by its labels for some images, as shown and divided by 255."""
    as_shown, scaled = top1(some, labels), top1(some, labels_divided)
    if as_shown is not None and scaled is not None:
        counts = np.unique(some.truths[some.truths != UNKNOWN_CLASS], return_counts=True)[1]
        guess = counts.max() / counts.sum()  # accuracy of a network that gives every image the same label
        if scaled.interval[0] > max(as_shown.interval[1], guess):
            raise ClassifierError(
                f"{model} classifies {as_shown.rate:.3f} of the labelled images correctly, but {scaled.rate:.3f} if their pixels are "
                "divided by 255: it expects 0..1 but is given 0..255. Let its forward begin with pixels / 255 (then subtract the mean "
                "and divide by the standard deviation that it was trained with)"
            )
    logger.warning(
        "%s classifies only %s labelled images correctly; are its classes numbered in the same way as the labels (.cls)?",
        model,
        rate,
    )
