"""The configuration of a computation: with data, network and device it determines the perturbation."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, get_args

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.method.augment import Augmentation, check_augmentation
from uap_dist.method.deepfool import SLOPE_RATIO
from uap_dist.method.norms import Norm, check_ball, paper_norm_l2
from uap_dist.method.schedule import check_sizes
from uap_dist.method.solver import Rule, Solver
from uap_dist.method.update import AVERAGED, Steps, default_period, default_step_size

POOL_RANDOM_START = 0.5  # fraction of the radius; benchmarks/pools.md says why


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Options that, with data, network and device, determine the perturbation."""

    norm: Norm = "linf"
    """Norm of the ball that the perturbation is kept in."""
    radius: float | None = None
    """Radius of the ball, in pixels (0..255). Default: 10 for linf, 2000 for l2, as in the paper (for 224×224 images)."""
    rule: Rule = "log-odds"
    """How increments are computed and summed: one log-odds step per image, or the paper's DeepFool and plain sum.
    Algorithm 1 of the paper, which projects after each image, is the paper's rule with --round-size 1 --block-size 1."""
    target_fooling_rate: float = 1.0
    """Stop after a pass at whose end v fools this fraction of the training images (0..1)."""
    max_passes: int | None = None
    """Maximum number of passes over the training images. Default: 10, or no limit if --max-evaluations is given."""
    max_evaluations: int | None = None
    """Maximum number of network evaluations (one image passed forward or backward once). The clean labels of the training images
    count, measurements do not. The paper's rule, whose cost is not known in advance, may exceed it within its last round."""
    evaluate_every: int | None = None
    """Passes between two measurements of the fooling rates on all training and held-out images; the final rates are always measured.
    Default: 1 if --target-fooling-rate is below 1; otherwise only some of the held-out images (50 or more, if there are that many)
    are measured in between, at eleven places over the run. This costs a fiftieth of a long run's evaluations and more of a short
    one's."""
    candidates: int | None = None
    """Paper's rule: number of classes that DeepFool considers, the clean label included. Default: 10."""
    slope_ratio: float | None = None
    """Paper's rule: largest ratio expected between the gradient norms of an image's candidate classes; DeepFool skips candidates
    that cannot be the nearest under this assumption. Default: 1.5; inf skips none."""
    gain: float | None = None
    """Paper's rule: factor on the sum of a round's increments. Default: 1, as in the paper."""
    step_size: float | None = None
    """Log-odds rule: size of the first step, as its root mean square in pixels. Default: 0.8 (linf) or 1.2 (l2) times the root mean
    square of a perturbation that fills the ball; in runs of more than 125 steps √(125/steps) of that; twice as much if local
    steps of several blocks are averaged."""
    period: int | None = None
    """Log-odds rule: pixels after which the perturbation repeats itself, down and across. Set it to the image side to disable
    tiling. Default: 32, the total stride of most networks for photographs; for l2 64 if rounds times round size is at least
    1,500 images (with 500 training images some 3,500 evaluations), and 128 from 6,000 (12,500)."""
    augment: Augmentation | None = None
    """Log-odds rule: random views of the training images, drawn for each image. Default: flip-shift."""
    round_size: int = 6
    """Training images per round: solved against the same v and reduced once. It changes the result, so it never depends on the fleet."""
    block_size: int = 3
    """Training images that one worker solves together; must divide the round size. It changes the result."""
    local_steps: int | None = None
    """Log-odds rule: number of steps that each block takes on its own copy of the perturbation before the round averages the
    copies. Each step uses an equal part of the block's images, so it must divide the block size. For large fleets; it changes the
    result. Default: none; the round sums the blocks' increments and takes one step."""
    random_start: float | None = None
    """Norm of the random v that the run starts from, as a fraction of the radius (0..1): random signs (linf) or a random direction
    (l2), drawn with the seed. Default: 0 for one perturbation; 0.5 for those of a pool, which makes them more diverse."""
    seed: int = 0
    """Seed of the order of images, of their random views and of a random start."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule is {self.rule!r}; it must be one of {', '.join(get_args(Rule))}")
        check_ball(self.norm, self.ball_radius)
        if self.augment is not None:
            check_augmentation(self.augment)
        if not 0 < self.target_fooling_rate <= 1:
            raise ConfigError(f"target fooling rate is {self.target_fooling_rate}; it must lie in (0, 1]")
        for name in ("max_passes", "max_evaluations", "evaluate_every", "gain", "step_size", "period"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        if self.candidates is not None and self.candidates < 2:
            raise ConfigError(f"candidates is {self.candidates}; it must be at least 2, the clean label included")
        if self.slope_ratio is not None and not self.slope_ratio >= 1:
            raise ConfigError(f"slope ratio is {self.slope_ratio}; it must be at least 1")
        if self.random_start is not None and not 0 <= self.random_start <= 1:
            raise ConfigError(f"random start is {self.random_start}; it must lie in [0, 1], a fraction of the radius")
        check_sizes(self.round_size, self.block_size)
        if self.local_steps is not None and (self.local_steps < 1 or self.block_size % self.local_steps):
            raise ConfigError(
                f"local steps is {self.local_steps}; it must be positive and divide the block size, {self.block_size}"
            )
        foreign = (
            ("candidates", "slope_ratio", "gain")
            if self.rule == "log-odds"
            else ("step_size", "period", "augment", "local_steps")
        )
        for name in foreign:
            if getattr(self, name) is not None:
                raise ConfigError(f"{name.replace('_', ' ')} does not belong to rule {self.rule}; leave it out")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], name: str) -> "ComputeConfig":
        """The configuration that a saved perturbation was computed with.

        Args:
            provenance: as stored in the perturbation's file.
            name: of the perturbation, for the error message.

        Raises:
            PerturbationError: the provenance has no configuration.
        """
        if "rule" not in provenance:
            raise PerturbationError(
                f"{name} does not say how it was computed; give a perturbation that jobs/compute.py has written"
            )
        return cls(**{field.name: provenance[field.name] for field in fields(cls) if field.name in provenance})

    @property
    def ball_radius(self) -> float:
        """Radius in pixels; the norm's default if none is given."""
        return self.radius if self.radius is not None else {"linf": 10.0, "l2": 2000.0}.get(self.norm, 0.0)

    @property
    def paper_gain(self) -> float:
        """Factor on the sum of a round's increments under the paper's rule; 1 if none is given."""
        return self.gain or 1.0

    def steps(self, num_rounds: int | None, shape: tuple[int, ...]) -> Steps | None:
        """Period and sizes of all steps in a run; None under the paper's rule.

        Args:
            num_rounds: in the whole run; only the paper's rule may leave it open.
            shape: C×H×W of the perturbation.
        """
        if self.rule == "paper":
            return None
        assert num_rounds is not None
        per_round = self.local_steps or 1
        default_size = default_step_size(
            norm=self.norm, radius=self.ball_radius, num_values=prod(shape), num_steps=per_round * num_rounds
        )
        if self.local_steps and self.round_size > self.block_size:
            default_size *= AVERAGED
        return Steps(
            norm=self.norm,
            radius=self.ball_radius,
            period=self.period or default_period(norm=self.norm, num_images=num_rounds * self.round_size),
            first_size=self.step_size or default_size,
            num_rounds=num_rounds,
            per_round=per_round,
        )

    @property
    def solver(self) -> Solver:
        """The options that workers need, with defaults filled in."""
        return Solver(
            rule=self.rule,
            augmentation="none" if self.rule == "paper" else self.augment or "flip-shift",
            candidates=self.candidates or 10,
            slope_ratio=self.slope_ratio or SLOPE_RATIO,
        )


def warn_of_default_radius(config: ComputeConfig, shape: Sequence[int]) -> None:
    """Warn if the default ℓ2 radius, which is meant for 224×224 images, is much weaker or stronger on images of a shape (C×H×W)."""
    alike = paper_norm_l2(shape)
    if config.norm == "l2" and config.radius is None and not 0.5 < alike / config.ball_radius < 2:
        logger.warning(
            "the ℓ2 radius %g is the paper's for 3×224×224 pixels; on images of %s the same root mean square is %.0f (--radius %.0f)",
            config.ball_radius,
            "×".join(map(str, shape)),
            alike,
            alike,
        )
