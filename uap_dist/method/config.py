"""What decides a perturbation beside data and network."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.method import update
from uap_dist.method.augment import Augmentation
from uap_dist.method.deepfool import SLOPE_RATIO
from uap_dist.method.norms import Norm, check_ball
from uap_dist.method.schedule import check_sizes
from uap_dist.method.solver import Rule, Solver
from uap_dist.method.update import StepRule

POOL_RANDOM_START = 0.5  # share of the radius; benchmarks/pools.md says why


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Everything beside data and network that decides the result."""

    norm: Norm = "linf"
    """Norm of the ball that the perturbation stays in."""
    radius: float | None = None
    """Radius of the ball, in pixels (0..255). Default: 10 for linf, 2000 for l2, as in the paper (for 224×224 images)."""
    rule: Rule = "log-odds"
    """How increments are computed and summed: one log-odds step an image, or the paper's DeepFool and plain sum.
    The paper's algorithm 1, which projects after each image, is its rule in rounds of one: --round-size 1 --block-size 1."""
    target_fooling_rate: float = 1.0
    """Stop after a pass that fools this share of the training images (0..1)."""
    max_passes: int | None = None
    """Passes over the training images at most. Default: 10, or no limit where --max-evaluations is given."""
    max_evaluations: int | None = None
    """Network evaluations at most (one image once forward or backward; clean labels of the training images count,
    reports do not). The paper's rule, whose costs are not known beforehand, starts no round once they are spent."""
    evaluate_every: int | None = None
    """Passes between two measurements of the fooling rates on all training and held-out images; the end is always measured.
    Default: 1 where --target-fooling-rate needs it; else some of the held-out images (50 or more, if there are as many) at
    eleven places over the run, which costs a fiftieth of a long run's evaluations and more of a short one's."""
    candidates: int | None = None
    """Paper's rule: classes that DeepFool looks at, the clean label included. Default 10."""
    slope_ratio: float | None = None
    """Paper's rule: by which the slopes of an image's candidates are taken to differ at most; candidates that cannot be the
    nearest then are left out. Default 1.5; inf leaves none out."""
    gain: float | None = None
    """Paper's rule: factor on the summed increments of a round. Default 1, the paper."""
    step_size: float | None = None
    """Log-odds rule: size of the first step, in pixels (root mean square for l2). Default: 0.8 of the
    radius for linf, 1.2 of what fills the ball for l2; beyond 125 steps less, as √(125/steps); twice that where local steps of
    several blocks are averaged."""
    period: int | None = None
    """Log-odds rule: pixels after which the perturbation repeats itself, down and across; an image's side or more: it does
    not. Default: 32, the total stride of most networks for photographs; for l2 64 where rounds times round size make 1,500
    images or more (with 500 training images some 3,500 evaluations), 128 from 6,000 on (12,500)."""
    augment: Augmentation | None = None
    """Log-odds rule: random views of the training images, drawn per image. Default flip-shift."""
    round_size: int = 6
    """Training images in a round: solved against one v, reduced once. Part of the result; never derived from the fleet."""
    block_size: int = 3
    """Training images solved together by one worker; divides the round size. Part of the result."""
    local_steps: int | None = None
    """Log-odds rule: steps that each block takes on its own copy of the perturbation, with its block size divided by so many
    images each, before the round averages the copies: for large fleets. Part of the result. Default: blocks take none, the
    round sums their increments and takes one step."""
    random_start: float | None = None
    """Share of the radius (0..1) that v starts with: random signs (linf) or a random direction (l2) of the seed.
    Default: 0 for one perturbation, 0.5 for the members of a pool, which are more diverse then."""
    seed: int = 0
    """Of the order of images, of their random views and of a random start."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, and say what to give instead."""
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule is {self.rule!r}; it must be one of {', '.join(get_args(Rule))}")
        check_ball(self.norm, self.ball_radius)
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
            raise ConfigError(f"random start is {self.random_start}; it must lie in [0, 1], a share of the radius")
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
        """That of a perturbation which jobs/compute.py has written: to compute another one likewise.

        Args:
            provenance: what its file says of it.
            name: of the perturbation, for the complaint.

        Raises:
            PerturbationError: it does not say how it was computed.
        """
        if "rule" not in provenance:
            raise PerturbationError(
                f"{name} does not say how it was computed; give one that jobs/compute.py has written"
            )
        return cls(**{field.name: provenance[field.name] for field in fields(cls) if field.name in provenance})

    @property
    def ball_radius(self) -> float:
        """Radius in pixels, with the norm's default."""
        return self.radius if self.radius is not None else {"linf": 10.0, "l2": 2000.0}.get(self.norm, 0.0)

    @property
    def paper_gain(self) -> float:
        """Factor on a round's summed increments under the paper's rule, with its default."""
        return self.gain or 1.0

    def step_rule(self, num_rounds: int) -> StepRule:
        """What all steps of the log-odds rule have in common, in a run of so many rounds."""
        period = self.period or update.default_period(norm=self.norm, num_images=num_rounds * self.round_size)
        return StepRule(self.norm, self.ball_radius, period)

    @property
    def solver(self) -> Solver:
        """What the workers need to know, defaults filled in."""
        return Solver(
            rule=self.rule,
            augmentation="none" if self.rule == "paper" else self.augment or "flip-shift",
            candidates=self.candidates or 10,
            slope_ratio=self.slope_ratio or SLOPE_RATIO,
        )
