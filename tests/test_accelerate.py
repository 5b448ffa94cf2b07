import pytest
import torch
from conftest import TINY
from torch import nn
from torch.testing import assert_close

from uap_dist.data.decode import Geometry
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.models.accelerate import accelerate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier

SHAPE = (3, 32, 32)


def wrap(network, **options):
    return Classifier(network, name="test", geometry=Geometry(), **options)


def pixels_of(shape, count=3):
    return 255 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def check_same(classifier, shape=SHAPE, rtol=1e-4):
    """Logits, and the gradient of each image by itself and of the sum."""
    fast = accelerate(classifier, shape)
    pixels = pixels_of(shape)
    labels = classifier(pixels).argmax(1)
    assert_close(fast(pixels), classifier(pixels), rtol=rtol, atol=1e-4)
    gradients = []
    for c in (fast, classifier):
        x = pixels.clone().requires_grad_()
        gradients.append(torch.autograd.grad(c(x).logsumexp(1).sum(), x)[0].flatten(1))
    assert ((gradients[0] - gradients[1]).norm(dim=1) <= 1e-2 * gradients[1].norm(dim=1)).all()
    sums = [log_odds_sum(c, pixels, torch.zeros(shape), labels, weigh=torch.sigmoid).total for c in (fast, classifier)]
    assert (sums[0] - sums[1]).norm() <= 1e-2 * sums[1].norm()
    return fast


class Normed(nn.Module):
    """What accelerate takes apart: a first convolution with stride and padding, batch norms, one of them used twice."""

    def __init__(self, *, twice=False, shortcut=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 5, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.twice, self.shortcut = twice, shortcut
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def forward(self, x):
        y = self.norm(self.first(x)).relu()
        z = self.second(y)
        y = self.norm2(z) + (z if self.twice else 0)  # z is not the batch norm's alone
        y = self.head(y.mean((2, 3)))
        return y + x.mean((2, 3)).sum(1, keepdim=True) * torch.tensor([1.0, 0, 0, 0]) if self.shortcut else y


def count(classifier, kind):
    return sum(isinstance(module, kind) for module in classifier.modules())


def test_batch_norms_disappear_and_the_first_layer_is_found():
    plain = wrap(Normed(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    fast = check_same(plain)
    assert count(fast, nn.BatchNorm2d) == 0 and count(plain, nn.BatchNorm2d) == 2
    assert fast.first_layer == "network.first" and plain.first_layer is None
    assert fast.weights_digest == plain.weights_digest


@pytest.mark.parametrize("trap", ["twice", "shortcut"])
def test_a_network_whose_outputs_would_differ_is_not_accelerated(trap):
    plain = wrap(Normed(**{trap: True}))
    assert check_same(plain) is plain


def test_a_network_that_cannot_be_copied_is_not_accelerated():
    network = Normed()
    network.stream = (i for i in range(3))
    plain = wrap(network)
    assert accelerate(plain, SHAPE) is plain


def test_a_network_with_parametrized_weights_keeps_its_outputs():
    network = Normed()
    torch.nn.utils.parametrizations.weight_norm(network.second)
    check_same(wrap(network))


@pytest.mark.parametrize("padding", [0, "same", (2, 1)])
def test_first_layers_with_different_padding(padding):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5)
    assert check_same(wrap(nn.Sequential(*layers))).first_layer == "network.0"


def test_a_network_without_convolutions():
    assert check_same(load_classifier(TINY), (3, 16, 16)).first_layer is None


@pytest.mark.filterwarnings("ignore")
def test_real_networks(shared):
    squeezenet = load_classifier("torchvision/squeezenet1_0", f"{shared}/models/squeezenet1_0.safetensors")
    assert check_same(squeezenet, (3, 224, 224)).first_layer == "network.features.0"
    lite = load_classifier("efficientnet_lite0")
    fast = check_same(lite, (3, 224, 224))
    assert count(fast, nn.BatchNorm2d) == 0 and count(lite, nn.BatchNorm2d) == 49
    assert fast.first_layer == "network.conv_stem"
