"""The perturbed images of a fine-tuning: which perturbation each gets, at what strength, and how those of --online move.

Sources: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2; Shafahi et al., "Universal
adversarial training", AAAI 2020; Mummadi, Brox and Metzen, "Defending against universal perturbations with shared adversarial
training", ICCV 2019.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uap_dist.finetuning.batches import WorkerGroup
from uap_dist.finetuning.network import set_training_mode
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.method.norms import add_perturbation, random_perturbation, spread
from uap_dist.method.update import Iterate, Steps, finish, log_odds_update
from uap_dist.models.classifier import Classifier


@dataclass(frozen=True)
class PerturbedImages:
    """A batch as the network is trained on it.

    Attributes:
        pixels: N×C×H×W float32, 0..255: clip(x + α v), with α = 0 for images that are left clean.
        added: N×C×H×W float32, pixels: the v of each image; with --online its `grad` after the backward pass is that of the loss.
        members: N numbers of these v.
        num_evaluations: network evaluations that choosing α took.
    """

    pixels: Tensor
    added: Tensor
    members: Tensor
    num_evaluations: int


def perturb(classifier: Classifier, pixels: Tensor, members: Tensor, config: FinetuneConfig) -> PerturbedImages:
    """Add a random one of the perturbations to each image with some probability, at full or at the smallest fooling strength.

    It draws from torch's global generator.

    Args:
        classifier: the network in training; adaptive strengths depend on its current weights.
        pixels: N×C×H×W float32, 0..255.
        members: M×C×H×W float32, pixels, on the same device.
        config: probability, whether strengths are adaptive, and their ladder.
    """
    chosen = torch.randint(len(members), (len(pixels),)).to(pixels.device)
    is_perturbed = (torch.rand(len(pixels)) < config.share_perturbed).to(pixels.device)
    added, factors, num_evaluations = members[chosen], is_perturbed.float(), 0
    rows = is_perturbed.nonzero().squeeze(1)
    if config.adaptive and len(rows):
        set_training_mode(classifier, False, config.batch_norm)
        factors[rows], num_evaluations = smallest_factors(classifier, pixels[rows], added[rows], config.ladder)
        set_training_mode(classifier, True, config.batch_norm)
    added.requires_grad_(config.online)
    shown = add_perturbation(pixels, factors.view(-1, 1, 1, 1) * added)
    return PerturbedImages(shown, added, chosen, num_evaluations)


def smallest_factors(
    classifier: Classifier, pixels: Tensor, added: Tensor, ladder: Sequence[float]
) -> tuple[Tensor, int]:
    """For each image the smallest α of the ladder for which clip(x + α v) and x get different labels, else the largest α.

    Args:
        classifier: the network with its current weights, in inference mode.
        pixels: N×C×H×W, 0..255.
        added: N×C×H×W, pixels: the v of each image.
        ladder: values of α in ascending order.

    Returns:
        α of each image (N), and the number of network evaluations.

    Source: the footnote to section 3.2 of the paper, which does not give its ladder.
    """
    factors = torch.full((len(pixels),), float(ladder[-1]), device=pixels.device)
    is_open = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    with torch.no_grad():
        labels, num_evaluations = classifier(pixels).argmax(1), len(pixels)
        for factor in ladder[:-1]:
            rows = is_open.nonzero().squeeze(1)
            if not len(rows):
                break
            perturbed = add_perturbation(pixels[rows], factor * added[rows])
            fooled = rows[classifier(perturbed).argmax(1) != labels[rows]]
            factors[fooled], is_open[fooled] = factor, False
            num_evaluations += len(rows)
    return factors, num_evaluations


class OnlinePerturbations:
    """Perturbations that follow the network in training: the backward pass that trains it moves them too, so that its loss rises.

    All workers hold the same ones. They start as random ones on the surface of the ball. Training shows what an attack would deliver
    of them, which is farther in the corner of an ℓ∞ ball (`finish`): a network that is trained on less than that is fooled by it.

    Attributes:
        v: M×C×H×W float32, pixels, on the worker's device: as they are shown; each step changes it in place.
    """

    def __init__(self, shape: tuple[int, ...], steps: Steps, config: FinetuneConfig, group: WorkerGroup) -> None:
        """Draw the first ones.

        Args:
            shape: C×H×W of the images.
            steps: give the ball, and the period of each step.
            config: number of perturbations, their step, seed.
            group: the workers.
        """
        self._steps, self._group = steps, group
        self._step_size = config.online_step * spread(steps.norm, steps.radius, int(np.prod(shape)))
        seeds = np.random.SeedSequence(config.seed).generate_state(config.online_perturbations).tolist()
        first = [random_perturbation(shape, norm=steps.norm, radius=steps.radius, seed=seed) for seed in seeds]
        v = torch.stack(first).double().to(group.device)
        self.v = v.float()
        self._hold(Iterate(v, torch.zeros_like(v)))

    def step(self, batch: PerturbedImages) -> None:
        """Move each v by one step of the log-odds rule along the gradient of the loss, summed over its images of all workers.

        Args:
            batch: as shown to the network, after the backward pass.
        """
        assert batch.added.grad is not None
        gradients = [batch.added.grad[batch.members == m].sum(0, dtype=torch.float64) for m in range(len(self.v))]
        totals = self._group.add_up(torch.stack(gradients))
        self._hold(log_odds_update(self._iterate, totals, self._step_size, self._steps))

    @property
    def state(self) -> dict[str, Tensor]:
        """What `load` continues from, v before `finish` and its momentum (M×C×H×W float64 each), and v as it is shown."""
        return {"v": self._iterate.v, "momentum": self._iterate.momentum, "shown": self.v}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`."""
        self._hold(Iterate(*(state[name].to(self._group.device) for name in ("v", "momentum"))))

    def _hold(self, iterate: Iterate) -> None:
        self._iterate = iterate
        self.v.copy_(finish(iterate.v, norm=self._steps.norm, radius=self._steps.radius))
