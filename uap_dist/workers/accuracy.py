"""Whether a network names images rightly where their labels are known: one that is shown the wrong unit does not."""

import logging

import numpy as np

from uap_dist.data.decode import UNKNOWN_CLASS
from uap_dist.errors import ClassifierError
from uap_dist.method.rates import Rate
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import Workers

SUSPICIOUS = 0.5  # top-1 below this is looked into
NUM_TRIED = 100  # images

logger = logging.getLogger(__name__)


def top1(dataset: Dataset, labels: np.ndarray) -> Rate | None:
    """How many of the images with a known class get it as their label (N); None where no class is known."""
    known = dataset.truths != UNKNOWN_CLASS
    return Rate(int((labels == dataset.truths)[known].sum()), int(known.sum())) if known.any() else None


def check_accuracy(workers: Workers, dataset: Dataset, model: str) -> Rate | None:
    """Clean top-1 of a dataset that carries its clean labels; None where no class is known. A low one is warned of.

    Args:
        workers: with the classifier.
        dataset: with its clean labels.
        model: name of the classifier.

    Raises:
        ClassifierError: it names images rightly when it is shown pixels of 0..1 instead of 0..255.
    """
    clean = top1(dataset, dataset.clean.labels)
    if clean is None or clean.rate >= SUSPICIOUS:
        return clean
    some = dataset.thin(min(NUM_TRIED, dataset.num_examples))
    divided = classify(workers, some, np.zeros(some.shape, np.float32), divisor=255.0)
    as_shown, scaled = top1(some, some.clean.labels), top1(some, divided.labels)
    if as_shown is not None and scaled is not None:
        counts = np.unique(some.truths[some.truths != UNKNOWN_CLASS], return_counts=True)[1]
        guess = counts.max() / counts.sum()  # by a network that says the same of every image
        if scaled.interval[0] > max(as_shown.interval[1], guess):
            raise ClassifierError(
                f"{model} names {as_shown.rate:.3f} of the labelled images rightly, but {scaled.rate:.3f} when their pixels are divided "
                "by 255: it wants 0..1 and is shown 0..255. Have its forward begin with pixels / 255 (and with the mean and "
                "deviation that it was trained with)"
            )
    logger.warning(
        "%s names only %s labelled images rightly; are its classes numbered as the labels (.cls) are?", model, clean
    )
    return clean
