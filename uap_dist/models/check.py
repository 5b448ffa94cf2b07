"""Checking by a few calls whether a network can be used as a classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line
from uap_dist.models.classifier import Classifier

BATCH_TOLERANCE = (
    0.02  # relative, of logits; another batch size changes them by 1e-6, batch norm over two images by 0.3
)


def check_classifier(classifier: Classifier, shape: Sequence[int]) -> None:
    """Check on random pixels that a classifier can be used.

    Args:
        classifier: as returned by `load_classifier`.
        shape: C×H×W of its input.

    Raises:
        ClassifierError: it fails on this shape; its output is random, not N×K, not float32 or float64, not finite, or
            probabilities instead of logits; the number of class names differs from K; its output for an image depends on the rest
            of the batch; or its gradient with respect to the pixels is missing, not finite or zero. Of several networks any one, or
            they differ in K.
    """
    for member in classifier.members:
        _check_one(member, shape)
    counts = {
        member.count_labels(shape): name for name, member in zip(classifier.networks, classifier.members, strict=False)
    }
    if len(counts) > 1:
        (first, one), (second, other), *_ = counts.items()
        raise ClassifierError(
            f"{one} has {first} classes, {other} {second}; one perturbation needs networks of the same classes"
        )


def _check_one(classifier: Classifier, shape: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    bright = 255 * torch.rand(1, *shape, generator=generator)
    dark = 60 * torch.rand(1, *shape, generator=generator) * torch.linspace(0, 1, shape[-1])
    # unlike each other, so that it shows if one affects the output for the other
    pixels = torch.cat([bright, dark]).to(classifier.mean.device)
    with torch.no_grad():
        first, second = _try(classifier, pixels), _try(classifier, pixels)
        _check_logits(classifier, first)
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
            raise ClassifierError(
                f"{classifier.name} gives different outputs for the same pixels; remove dropout or other randomness from it"
            )
        _check_independence(classifier, pixels, first)
    _check_gradient(classifier, pixels)


def _try(classifier: Classifier, pixels: Tensor) -> Tensor:
    try:
        logits = classifier(pixels)
    except ClassifierError:
        raise
    except Exception as error:  # user code may raise anything
        raise ClassifierError(
            f"{classifier.name} fails on pixels of shape {'×'.join(map(str, pixels.shape))}: {first_line(error)}{_size_hint(classifier)}"
        ) from error
    count = {1: "one image", 2: "two images"}[len(pixels)]
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ClassifierError(
            f"{classifier.name} returns {found} for {count}; expected logits of shape {len(pixels)}×K with K ≥ 2"
        )
    return logits


def _size_hint(classifier: Classifier) -> str:
    if classifier.geometry.shape is not None:
        return ""
    return " (the size of the images in the shards; an attribute `input_size` of the network has them resized)"


def _check_logits(classifier: Classifier, logits: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.float64):
        kind = str(logits.dtype).removeprefix("torch.")
        raise ClassifierError(f"{classifier.name} returns {kind}; return logits of float32, as by logits.float()")
    if not logits.isfinite().all():
        raise ClassifierError(
            f"{classifier.name} returns values that are not finite; look at its weights, and for overflow where pixels are 0..255"
        )
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        raise ClassifierError(f"{classifier.name} returns probabilities; return the logits before softmax instead")
    if classifier.class_names and len(classifier.class_names) != logits.shape[1]:
        raise ClassifierError(
            f"{classifier.name} has {len(classifier.class_names)} class names for {logits.shape[1]} logits"
        )


def _check_independence(classifier: Classifier, pixels: Tensor, logits: Tensor) -> None:
    """The output for an image must not depend on the rest of its batch."""
    alone = torch.cat([_try(classifier, image[None]) for image in pixels])
    spread = (logits - logits.mean(1, keepdim=True)).norm()
    if not (alone - logits).norm() <= BATCH_TOLERANCE * spread:
        kinds = (nn.modules.batchnorm._BatchNorm,)
        without = [n for n, m in classifier.network.named_modules() if isinstance(m, kinds) and m.running_mean is None]
        cause = (
            f"its batch norms have no running statistics ({', '.join(without[:3])}{', …' * (len(without) > 3)})"
            if without
            else "look for statistics over the batch, as of batch norm in training mode"
        )
        raise ClassifierError(
            f"{classifier.name} gives another output for an image alone than in a batch: {cause}; each image has to be classified "
            "independently of the others"
        )


def _check_gradient(classifier: Classifier, pixels: Tensor) -> None:
    """The logits must have a usable gradient with respect to the pixels, which perturbations follow."""
    leaf = pixels.clone().requires_grad_()
    hint = "look for no_grad, inference_mode, detach, rounding, argmax or NumPy in its forward"
    with torch.enable_grad():
        try:
            logits = classifier(leaf)
            mix = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
            gradient = (
                torch.autograd.grad((logits * mix).sum(), leaf, allow_unused=True)[0] if logits.requires_grad else None
            )
        except Exception as error:  # user code may raise anything
            raise ClassifierError(
                f"the logits of {classifier.name} cannot be differentiated with respect to its pixels: {first_line(error)}; {hint}"
            ) from error
    if gradient is None:
        raise ClassifierError(
            f"the logits of {classifier.name} cannot be differentiated with respect to its pixels; {hint}"
        )
    if not gradient.isfinite().all():
        raise ClassifierError(
            f"the gradient of {classifier.name} with respect to its pixels is not finite; look for roots, logarithms and divisions "
            "at zero"
        )
    if not gradient.any():
        raise ClassifierError(
            f"the gradient of {classifier.name} with respect to its pixels is zero everywhere; {hint}, and for activations that "
            "saturate at pixels of 0..255"
        )
