"""Accelerating a classifier: batch norms folded into convolutions, channels-last memory, a shortcut for the first layer."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from uap_dist.models.classifier import Classifier
from uap_dist.models.several import Several

logger = logging.getLogger(__name__)

TOLERANCE = 1e-2  # relative; rounding moves logits by 1e-6, gradients at the kinks of ReLUs by 1e-3


def accelerate(classifier: Classifier, shape: Sequence[int], precision: str = "float32") -> Classifier:
    """A faster copy of a classifier with the same logits and gradients up to rounding; benchmarks/deepfool.md measures the gain.

    * Batch norms are folded into the convolutions whose only consumer they are.
    * The network uses channels-last memory, except in float32 on a GPU, whose fast kernels for TF32 and bfloat16 want it so.
    * If a convolution is the only layer that sees the pixels, it becomes `Classifier.first_layer`, which gradients of sums over
      images pass only once. On the CPU its backward pass is one matrix product, because torch's kernels are slow for three channels.

    The copy is tested on random pixels. If it fails or outputs differ, the original classifier is returned.

    Args:
        classifier: as returned by `load_classifier`, on its device.
        shape: C×H×W of its input.
        precision: that it will be used in, see `reproducible`.
    """
    if isinstance(classifier, Several):
        return classifier.with_members([accelerate(each, shape, precision) for each in classifier.members])
    device = classifier.mean.device
    pixels = 255 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        fast = _rebuild(classifier, pixels, is_channels_last=device.type == "cpu" or precision != "float32")
        responses = zip(_respond(fast, pixels), _respond(classifier, pixels), strict=True)
        if all(_is_close(ours, theirs) for ours, theirs in responses):
            return fast
        reason = "logits or gradients would differ"
    except Exception as error:  # user code may raise anything
        reason = f"{type(error).__name__}: {error}"
    logger.info("%s is not accelerated: %s", classifier.name, reason)
    return classifier


def _rebuild(classifier: Classifier, pixels: Tensor, *, is_channels_last: bool) -> Classifier:
    fast = copy.deepcopy(classifier)
    _fold_batch_norms(fast, pixels)
    fast.first_layer = _find_first_layer(fast, pixels)
    if is_channels_last:
        fast.to(memory_format=torch.channels_last)
    if pixels.device.type == "cpu":
        _take_backward_by_product(fast)
    return fast


def _fold_batch_norms(classifier: Classifier, pixels: Tensor) -> None:
    producers: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by id of their outputs, which are kept alive
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            producers[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and inputs and id(inputs[0]) in producers:
            pairs.append((producers[id(inputs[0])][0], module))

    _watch(classifier, pixels, (nn.Conv2d, nn.BatchNorm2d), after)
    names = {module: name for name, module in classifier.named_modules()}
    for conv, norm in pairs:
        if calls[conv] == calls[norm] == 1 and norm.running_mean is not None and norm.running_var is not None:
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            # timm's batch norms may include dropout and an activation
            rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
            classifier.set_submodule(names[norm], nn.Sequential(*rest))
    classifier.requires_grad_(False)


def _find_first_layer(classifier: Classifier, pixels: Tensor) -> str | None:
    normalised = classifier.normalise(pixels)
    found: list[nn.Module] = []

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if inputs and torch.equal(inputs[0], normalised):
            found.append(module)

    _watch(classifier, pixels, (nn.Conv2d,), after)
    return next((name for name, module in classifier.named_modules() if [module] == found), None)


def _watch(classifier: Classifier, pixels: Tensor, kinds: tuple[type, ...], after: Callable[..., None]) -> None:
    """Run the network once with a forward hook on each module of these types."""
    hooks = [module.register_forward_hook(after) for module in classifier.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        classifier(pixels)
    for hook in hooks:
        hook.remove()


def _respond(classifier: Classifier, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a sum of log-sum-exps over the images."""
    with torch.enable_grad():
        logits, leaf = classifier.linearise(pixels)
        (slopes,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf)
    return logits.detach(), classifier.pull_back(slopes.sum(0, keepdim=True), pixels.shape[1:])[0]


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= TOLERANCE * theirs.norm())


def _take_backward_by_product(classifier: Classifier) -> None:
    name = classifier.first_layer
    layer = classifier.get_submodule(name) if name else None
    if not name or type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return
    if layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros":
        classifier.set_submodule(name, _FirstConvolution(layer))


class _FirstConvolution(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        return _ByProduct.apply(x, self.weight, self.bias, self.stride, self.padding)


class _ByProduct(torch.autograd.Function):
    """A convolution whose input gradient is computed by one matrix product per image and a fold (the sum over windows)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.weight, ctx.stride, ctx.padding, ctx.size = weight, stride, padding, x.shape[2:]
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        matrix = ctx.weight.flatten(1).T
        kernel = ctx.weight.shape[2:]
        images = [  # one at a time, which fits in the CPU cache
            F.fold(matrix @ slope.permute(1, 2, 0).flatten(0, 1).T, ctx.size, kernel, 1, ctx.padding, ctx.stride)
            for slope in slopes[0]
        ]
        return torch.stack(images), None, None, None, None
