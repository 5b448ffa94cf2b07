"""The state that one round hands to the next, and what a round reports."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import Norm, measure, random_perturbation
from uap_dist.method.rates import FOOLING, Rate, Rates
from uap_dist.method.update import Iterate
from uap_dist.models.classifier import Predictions

NOTHING = torch.empty(0)  # one object, which is sent once with many reports


@dataclass(frozen=True)
class Evaluation:
    """Rates of a perturbation as it would be delivered.

    Attributes:
        train_rates: on all training images; None for an intermediate measurement on some of the held-out images.
        val_rates: on held-out images.
        val_predictions: of the classifier for these held-out images under the perturbation.
    """

    train_rates: Rates | None
    val_rates: Rates
    val_predictions: Predictions

    @property
    def train(self) -> Rate | None:
        """Fooling rate on all training images, if they were measured."""
        return None if self.train_rates is None else self.train_rates[FOOLING]

    @property
    def val(self) -> Rate:
        """Fooling rate on held-out images."""
        return self.val_rates[FOOLING]


@dataclass(frozen=True)
class RoundReport:
    """One committed round.

    Attributes:
        round_number: number of this round, from 0.
        pass_number: number of the pass that the round belongs to, from 0.
        num_rounds: rounds planned for the whole run; None if the paper's rule is limited by evaluations alone.
        rates: on the round's images, of the v that they were solved against, so before the round's update; of no images where
            none counts.
        perturbation: C×H×W float32, pixels: what the run would deliver if it ended with this round. Empty, and so are the arrays of
            `state`, in reports `without_arrays`.
        state: what the next round starts from.
        step: size of the round's first step in pixels (root mean square); under the paper's rule the gain.
        means: means over the round's images. Under the log-odds rule: the log-odds of the clean labels, or of the target, and their
            absolute values.
            Under the paper's rule: the ℓ2 norms of the increments in pixels (of the images that have one; 0 if none has), and the
            share of images that their own increment fools.
        norms: ℓ2 and ℓ∞ norms of the iterate v, pixels.
        seconds: wall-clock time of the round without its evaluation.
        solve_seconds: time that its solves took, those of all workers added up.
        finished: when the round was done, in seconds since 1970.
        evaluation: fooling rates that were measured after this round: on all images after the last one, on some or all of them
            now and then before it, None after all other rounds.
        is_last: whether the run ends with this round.
    """

    round_number: int
    pass_number: int
    num_rounds: int | None
    rates: Rates
    perturbation: Tensor
    state: "State"
    step: float
    means: dict[str, float]
    norms: dict[Norm, float]
    seconds: float
    solve_seconds: float
    finished: float
    evaluation: Evaluation | None = None
    is_last: bool = False

    @property
    def fooling(self) -> Rate:
        """The fooling rate among `rates`."""
        return self.rates[FOOLING]

    @property
    def num_solves(self) -> int:
        """Increments computed since the start of the run."""
        return self.state.num_solves

    @property
    def num_evaluations(self) -> int:
        """Network evaluations since the start of the run, those for the training images' clean labels included."""
        return self.state.num_evaluations

    @property
    def has_arrays(self) -> bool:
        """Whether perturbation and state are there, so that the run can go on from them."""
        return self.perturbation.numel() > 0

    def without_arrays(self) -> "RoundReport":
        """The report with empty arrays for perturbation, iterate and predictions, which take 3 MB at 224×224."""
        state = replace(self.state, iterate=Iterate(NOTHING, NOTHING))
        evaluation = self.evaluation
        if evaluation is not None:
            evaluation = replace(
                evaluation, val_predictions=Predictions(np.empty(0, np.int64), np.empty(0, np.float32))
            )
        return replace(self, perturbation=NOTHING, state=state, evaluation=evaluation)

    def to_send(self) -> "RoundReport":
        """The report with arrays of its own in the memory of the CPU."""
        iterate = self.state.iterate
        *own, perturbation = (each.to("cpu", copy=True) for each in (*iterate, self.perturbation))
        return replace(self, perturbation=perturbation, state=replace(self.state, iterate=Iterate(*own)))

    def metrics(self) -> dict[str, float]:
        """The round in numbers, by the names that MLflow and the plots use."""
        metrics = {
            **{name: value for kind, rate in self.rates.items() for name, value in rate.point("round", kind).items()},
            "round/step": self.step,
            **{f"round/{name}": value for name, value in self.means.items()},
            "round/seconds": self.seconds,
            "round/images_per_second": self.fooling.num_examples / self.seconds,
            **{f"iterate/norm_{norm}": value for norm, value in self.norms.items()},
            "total/solves": float(self.num_solves),
            "total/evaluations": float(self.num_evaluations),
        }
        if self.evaluation is not None:
            for kind, rate in self.evaluation.val_rates.items():
                metrics |= rate.metrics("val", kind)
            for kind, rate in (self.evaluation.train_rates or {}).items():
                metrics |= rate.metrics("train", kind)
        return metrics


@dataclass(frozen=True)
class State:
    """Everything that one round hands to the next.

    Attributes:
        iterate: v, momentum and scale.
        num_rounds: done so far.
        num_solves: increments computed so far.
        num_evaluations: network evaluations so far, those for the training images' clean labels included.
    """

    iterate: Iterate
    num_rounds: int = 0
    num_solves: int = 0
    num_evaluations: int = 0

    @classmethod
    def start(cls, shape: tuple[int, ...], labels: np.ndarray, config: ComputeConfig) -> "State":
        """The state before the first round.

        Args:
            shape: C×H×W of an image.
            labels: clean labels of the training images, N or of several networks N×S, which cost one network evaluation each.
            config: gives norm, radius, random start and seed.
        """
        iterate = Iterate.zero(shape, labels.shape[1:])
        if config.random_start:
            radius = config.random_start * config.ball_radius
            noise = random_perturbation(shape, norm=config.norm, radius=radius, seed=config.seed)
            if config.achromatic:
                noise = noise[:1].expand(shape)
                noise = noise * (radius / measure(noise, config.norm))
            iterate = replace(iterate, v=noise.double())
        return cls(iterate, num_evaluations=labels.size)
