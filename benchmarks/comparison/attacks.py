"""DeepFool by us and by other libraries, each as a function of network, images and labels."""

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from uap_dist.method.deepfool import deepfool
from uap_dist.models.classifier import Classifier

BLOCK = 6  # images together, as jobs/compute.py has them by default
Attack = Callable[[Classifier, Tensor, Tensor], Tensor]  # network, images, labels → images of other labels, pixels


def attacks() -> Iterator[tuple[str, Attack]]:
    """Those that are installed; ours first."""
    yield "ours", ours
    yield "ours, all candidates", partial(ours, slope_ratio=torch.inf)
    for name, attack in (
        ("foolbox", by_foolbox),
        ("torchattacks", one_by_one(by_torchattacks)),
        ("adv-lib", one_by_one(by_adv_lib)),
        ("ART", one_by_one(by_art)),
    ):
        try:
            attack(TOY, torch.rand(1, 3, 4, 4), torch.tensor([0]))
        except ImportError as error:
            print(f"| {name} | not installed ({error}) |")
        else:
            yield name, attack


class Counting(nn.Module):
    """A network that counts the images that go through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.num_forward, self.num_backward = network, 0, 0

    def forward(self, pixels: Tensor) -> Tensor:
        """As the network."""
        self.num_forward += len(pixels)
        if pixels.requires_grad:
            pixels = pixels.view_as(pixels)
            pixels.register_hook(self._count)
        return self.network(pixels)

    def _count(self, slope: Tensor) -> None:
        self.num_backward += len(slope)


class Narrow(nn.Module):
    """Ten of a network's classes, for images in 0..1."""

    def __init__(self, network: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits of these classes."""
        return self.network(255 * images)[:, self.classes]


TOY = nn.Sequential(nn.Flatten(), nn.Linear(48, 12))


def ours(network: nn.Module, pixels: Tensor, labels: Tensor, **options: float) -> Tensor:
    """In blocks, as a worker has them."""
    zero = torch.zeros_like(pixels[0])
    blocks = zip(pixels.split(BLOCK), labels.split(BLOCK), strict=True)
    return torch.cat([(x + deepfool(network, x, zero, y, **options).steps).clamp(0, 255) for x, y in blocks])


def by_foolbox(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """L2DeepFoolAttack."""
    import foolbox

    attack = foolbox.attacks.L2DeepFoolAttack(steps=10, candidates=10, overshoot=0.02)
    _, (found,), _ = attack(foolbox.PyTorchModel(network.eval(), (0, 255)), pixels, labels, epsilons=[None])
    return found


def by_art(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """DeepFool of the Adversarial Robustness Toolbox; with all classes as candidates, or it takes a wrong logit for the label's."""
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    count = network(image).shape[1]
    estimator = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), tuple(image.shape[1:]), count, clip_values=(0, 1), device_type="cpu"
    )
    attack = DeepFool(estimator, max_iter=10, epsilon=0.02, nb_grads=count, verbose=False)
    return torch.tensor(attack.generate(image.numpy()))


def by_torchattacks(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """DeepFool of torchattacks."""
    import torchattacks

    return torchattacks.DeepFool(network, steps=10, overshoot=0.02)(image, label)


def by_adv_lib(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Df of adv-lib, whose package imports a plotting server that nothing here needs."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))
    from adv_lib.attacks.deepfool import df

    return df(network, image, label, steps=10, overshoot=0.02, return_unsuccessful=True)


def one_by_one(attack: Attack) -> Attack:
    """Each image by itself, with its ten candidates as the only classes."""

    def run(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        found = []
        for x in pixels.split(1):
            with torch.no_grad():
                classes = network(x)[0].topk(10).indices
            found.append(255 * attack(Narrow(network, classes).eval(), x / 255, torch.tensor([0])).detach())
        return torch.cat(found)

    return run
