"""What one round hands to the next, and what it reports."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import measure, random_perturbation
from uap_dist.method.rates import Predictions, Rate
from uap_dist.method.update import Iterate


@dataclass(frozen=True)
class Evaluation:
    """Fooling rates of the perturbation as it would be delivered now, and what the network says of held-out images under it.

    `train` is None where only some of the held-out images were looked at.
    """

    train: Rate | None
    val: Rate
    val_predictions: Predictions


@dataclass(frozen=True)
class RoundReport:
    """One committed round.

    Attributes:
        round_number, pass_number: of this round, from 0.
        num_rounds: planned; None where the paper's rule is bounded by evaluations alone.
        fooling: on the round's images, before it, under the iterate that they were solved against.
        perturbation: C×H×W float32, pixels: what would be delivered now.
        state: what the next round starts from.
        step: step size in pixels, or the paper's gain.
        means: log-odds rule: of the log-odds of the round's clean labels, and of their absolute values. Paper's rule: of ‖Δ‖2 in
            pixels over the images that got an increment (0 where none did), and the share of the images that are fooled after theirs.
        seconds: this round took, without evaluation.
        evaluation: of all images at the end of the run, of some or all of them at places before (see `rounds.plan_measurements`);
            None after the other rounds.
        is_last: whether the run ends with it.
    """

    round_number: int
    pass_number: int
    num_rounds: int | None
    fooling: Rate
    perturbation: Tensor
    state: "State"
    step: float
    means: dict[str, float]
    seconds: float
    evaluation: Evaluation | None = None
    is_last: bool = False

    @property
    def num_solves(self) -> int:
        """Since the start."""
        return self.state.num_solves

    @property
    def num_evaluations(self) -> int:
        """Since the start, clean labels of the training images included."""
        return self.state.num_evaluations

    def without_arrays(self) -> "RoundReport":
        """What a person is shown of the round: neither perturbation nor iterate nor predictions, which take 3 MB at 224×224."""
        nothing = torch.empty(0)
        state = replace(self.state, iterate=replace(self.state.iterate, v=nothing, momentum=nothing))
        evaluation = self.evaluation
        if evaluation is not None:
            evaluation = replace(
                evaluation, val_predictions=Predictions(np.empty(0, np.int64), np.empty(0, np.float32))
            )
        return replace(self, perturbation=nothing, state=state, evaluation=evaluation)

    def metrics(self) -> dict[str, float]:
        """The round in numbers, under the names that MLflow and the curve use."""
        metrics = {
            "fooling_rate/round": self.fooling.rate,
            "num_images/round": float(self.fooling.num_examples),
            "round/step": self.step,
            **{f"round/{name}": value for name, value in self.means.items()},
            "round/seconds": self.seconds,
            "round/images_per_second": self.fooling.num_examples / self.seconds,
            "iterate/norm_l2": measure(self.state.iterate.v, "l2"),
            "iterate/norm_linf": measure(self.state.iterate.v, "linf"),
            "total/solves": float(self.num_solves),
            "total/evaluations": float(self.num_evaluations),
        }
        if self.evaluation is not None:
            metrics |= self.evaluation.val.metrics("val")
            if self.evaluation.train is not None:
                metrics |= self.evaluation.train.metrics("train")
        return metrics


@dataclass(frozen=True)
class State:
    """All that one round hands to the next."""

    iterate: Iterate
    num_rounds: int = 0
    num_solves: int = 0
    num_evaluations: int = 0

    @classmethod
    def start(cls, shape: tuple[int, ...], num_train_images: int, config: ComputeConfig) -> "State":
        """Before the first round, with the clean labels of the training images paid for.

        Args:
            shape: C×H×W of an image.
            num_train_images: in the training set; a clean label costs one network evaluation.
            config: norm, radius, random start and seed.
        """
        iterate = Iterate.zero(shape)
        if config.random_start:
            radius = config.random_start * config.ball_radius
            noise = random_perturbation(shape, norm=config.norm, radius=radius, seed=config.seed)
            iterate = replace(iterate, v=noise.double())
        return cls(iterate, num_evaluations=num_train_images)
