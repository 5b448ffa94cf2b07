"""The network as it is trained: whether it fits the data, which parameters learn, and its training and inference modes."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from uap_dist.errors import ConfigError
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.models.classes import UNKNOWN_CLASS
from uap_dist.models.classifier import Classifier
from uap_dist.workers.dataset import Dataset


def check_trainable(classifier: Classifier) -> None:
    """Raise ConfigError if the network has no trainable parameters."""
    if not classifier.trainable:
        raise ConfigError(f"{classifier.name} has no trainable parameters; leave some with requires_grad")


def check_truths(classifier: Classifier, train: Dataset, val: Dataset) -> None:
    """Check that every image has a label, and one of the classifier's classes.

    Raises:
        ConfigError: images without a label, or with a label outside the classes.
    """
    num_classes = classifier.count_labels(train.shape)
    for what, dataset in (("training", train), ("held-out", val)):
        truths = dataset.truths
        unknown = int((truths == UNKNOWN_CLASS).sum())
        if unknown:
            raise ConfigError(
                f"fine-tuning needs the class of each image: for {unknown} of {len(truths)} {what} images {dataset.lack_of_labels}"
            )
        outside = truths[(truths < 0) | (truths >= num_classes)]
        if len(outside):
            raise ConfigError(
                f"{len(outside)} of {len(truths)} {what} images have labels outside the network's {num_classes} classes, such as "
                f"{outside[0]}; give a network with a head for these classes"
            )


def check_labels(train: Dataset) -> None:
    """Check that the classes of the network are those of the labels.

    Args:
        train: training images with their clean predictions.

    Raises:
        ConfigError: the network's top-1 accuracy is not above that of always predicting the most frequent class.
    """
    counts = np.bincount(train.truths)
    top1, guess = float((train.clean.labels == train.truths).mean()), float(counts.max() / train.num_examples)
    if top1 <= guess:
        raise ConfigError(
            f"the network predicts the label of {top1:.3f} of the training images, no more than always predicting class "
            f"{counts.argmax()} ({guess:.3f}): its classes are not the data's labels; give weights trained for these classes"
        )


def make_trainable(classifier: Classifier, shape: Sequence[int]) -> None:
    """Let those parameters learn that were trainable when the network was created and that its logits depend on.

    Args:
        classifier: the network; `requires_grad` of its parameters is set.
        shape: C×H×W of an image.

    Raises:
        ConfigError: there are no such parameters.
    """
    for name, parameter in classifier.network.named_parameters():
        parameter.requires_grad_(name in classifier.trainable)
    logits = classifier(torch.full((2, *shape), 128.0, device=classifier.mean.device))
    if not logits.requires_grad:
        raise ConfigError(f"{classifier.name} has no trainable parameters; leave some with requires_grad")
    logits.sum().backward()
    for parameter in classifier.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def make_optimiser(classifier: Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimiser of the parameters that learn; its kind and learning rate follow the network's norms unless they are given."""
    learning = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    has_batch_norms = any(batch_norms(classifier))
    has_layer_norms = any(isinstance(module, nn.LayerNorm) for module in classifier.modules())
    if (config.optimiser or ("adamw" if has_layer_norms and not has_batch_norms else "sgd")) == "adamw":
        return torch.optim.AdamW(
            learning,
            lr=config.learning_rate or 0.00001,
            betas=(config.momentum, 0.999),
            weight_decay=config.weight_decay,
        )
    return torch.optim.SGD(
        learning,
        lr=config.learning_rate or (0.01 if has_batch_norms else 0.0001),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_training_mode(classifier: Classifier, is_training: bool, batch_norm: Literal["train", "frozen"]) -> None:
    """Switch between training and inference mode; frozen batch norms always stay in inference mode."""
    classifier.train(is_training)
    if batch_norm == "frozen":
        for module in batch_norms(classifier):
            module.eval()


def batch_norms(classifier: Classifier) -> Iterator[nn.Module]:
    """All batch-norm layers."""
    return (module for module in classifier.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
