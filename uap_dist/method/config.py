"""The configuration of a computation: with data, network and device it determines the perturbation."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf, prod
from typing import Any, get_args

import numpy as np

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.job_options import option
from uap_dist.method.augment import Augmentation, check_augmentation
from uap_dist.method.deepfool import SLOPE_RATIO
from uap_dist.method.norms import Norm, check_ball, paper_norm_l2
from uap_dist.method.rates import Goal
from uap_dist.method.schedule import check_sizes
from uap_dist.method.solver import Rule, Solver
from uap_dist.method.update import AVERAGED, Steps, default_period, default_step_size

POOL_RANDOM_START = 0.5  # fraction of the radius; benchmarks/pools.md says why


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Options that, with data, network and device, determine the perturbation; those that most runs set come first."""

    norm: Norm = "linf"
    """Norm of the ball that the perturbation is kept in."""
    radius: float | None = None
    """Radius of the ball in pixels; if not given, the paper's for 224×224 images: 10 for linf, 2000 for l2."""
    max_evaluations: int | None = None
    """Stop after so many network evaluations (one image once forward or once backward)."""
    max_passes: int | None = None
    """Stop after so many passes over the training images; if not given, 10, or no limit with --max-evaluations."""
    target_fooling_rate: float = 1.0
    """Stop after a pass at whose end v fools this fraction (0..1) of the training images; no relation to --target."""
    target: int | str | None = None
    """Label that all images shall get, by number or name (of the network); if not given, any but their own will do."""
    only_classes: tuple[int | str, ...] = ()
    """Classes (labels or names) whose images shall be fooled, the others keeping their labels; if not given, all."""
    spare_classes: tuple[int | str, ...] = ()
    """Classes whose images shall keep their labels, the others being fooled; with --only-classes the rest has no part."""
    spare_weight: float | None = None
    """Weight of an image that shall keep its label; if not given, one with which such images count as much as the others."""
    rule: Rule = "log-odds"
    """How increments are computed and summed: one log-odds step per image, or the paper's DeepFool and plain sum."""
    seed: int = 0
    """Seed of the order of images, of their random views and of a random start."""
    evaluate_every: int | None = None
    """Passes between two measurements on all images; if not given, the curve is of some held-out images."""
    round_size: int = 6
    """Training images per round, which are solved against the same v. It changes the result."""
    block_size: int = 3
    """Training images that one worker solves together; it must divide the round size. It changes the result."""
    members_at_once: int = 1
    """Perturbations of a pool that go through the network in one batch, on one worker. It changes the result."""
    local_steps: int | None = None
    """Log-odds rule: steps that each block takes on its own copy of v; if not given, a round is one step of all."""
    random_start: float | None = None
    """Norm of a random v to start from, as a fraction (0..1) of the radius; if not given, 0, and 0.5 in a pool."""
    step_size: float | None = None
    """Log-odds rule: root mean square of the first step, in pixels; if not given, it follows from the radius."""
    period: int | None = None
    """Log-odds rule: pixels after which v repeats itself, down and across; if not given, 32, in long l2 runs more."""
    augment: Augmentation | None = None
    """Log-odds rule: random views of the training images, drawn for each image; if not given, flip-shift."""
    achromatic: bool = False
    """Log-odds rule: v has the same value in all three channels; for transfer to other networks, see docs/transfer.md."""
    zoom: float | None = None
    """Log-odds rule: solve perturbed images at random sizes, up to this fraction smaller or larger; for transfer, too."""
    candidates: int | None = None
    """Paper's rule: classes that DeepFool considers, the clean label included; if not given, 10."""
    slope_ratio: float | None = None
    """Paper's rule: largest ratio of gradient norms that DeepFool expects between classes; if not given, 1.5."""
    gain: float | None = None
    """Paper's rule: factor on the sum of a round's increments; if not given, 1, as in the paper."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.rule not in get_args(Rule):
            raise ConfigError(f"--rule is {self.rule!r}; it must be one of {', '.join(get_args(Rule))}")
        check_ball(self.norm, self.ball_radius)
        if self.augment is not None:
            check_augmentation(self.augment)
        if not 0 < self.target_fooling_rate <= 1:
            raise ConfigError(f"--target-fooling-rate is {self.target_fooling_rate}; it must lie in (0, 1]")
        for name in ("max_passes", "max_evaluations", "evaluate_every", "gain", "step_size", "period"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{option(name)} is {value}; it must be positive and finite")
        if self.candidates is not None and self.candidates < 2:
            raise ConfigError(f"--candidates is {self.candidates}; it must be at least 2, the clean label included")
        if self.slope_ratio is not None and not self.slope_ratio >= 1:
            raise ConfigError(f"--slope-ratio is {self.slope_ratio}; it must be at least 1")
        if self.random_start is not None and not 0 <= self.random_start <= 1:
            raise ConfigError(f"--random-start is {self.random_start}; it must lie in [0, 1], a fraction of the radius")
        if self.zoom is not None and not 0 < self.zoom < 1:
            raise ConfigError(f"--zoom is {self.zoom}; it must lie in (0, 1), a fraction of the images' side")
        check_sizes(self.round_size, self.block_size)
        if self.local_steps is not None and (self.local_steps < 1 or self.block_size % self.local_steps):
            raise ConfigError(
                f"--local-steps is {self.local_steps}; it must be positive and divide the block size, {self.block_size}"
            )
        _check_rule(self)
        _check_goal(self)
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must not be negative")

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
        said: dict[str, Any] = {field.name: provenance[field.name] for field in fields(cls) if field.name in provenance}
        said |= {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
        return cls(**said)

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
            achromatic=self.achromatic,
        )

    def with_labels(self, class_names: Sequence[str], num_classes: int) -> "ComputeConfig":
        """The same config with target and classes as numbers, which `compute` needs.

        Args:
            class_names: of the network's labels; empty if unknown.
            num_classes: how many labels it has.

        Raises:
            ConfigError: one is no class of the network, or no class is left to attack or to spare.
        """
        goal = Goal.of_names(self.target, self.only_classes, self.spare_classes, class_names, num_classes)
        return replace(self, target=goal.target, only_classes=goal.only, spare_classes=goal.spare)

    def without_goal(self) -> "ComputeConfig":
        """The same config to fool all images."""
        return replace(self, target=None, only_classes=(), spare_classes=(), spare_weight=None)

    def balanced(self, labels: np.ndarray) -> "ComputeConfig":
        """The same config with the weight of spared images that training images with these clean labels (N) call for."""
        has_weight = self.spare_weight is not None or not (self.only_classes or self.spare_classes)
        return self if has_weight else replace(self, spare_weight=self.goal.balanced(labels))

    @cached_property
    def goal(self) -> Goal:
        """What images shall be taken for.

        Raises:
            ConfigError: a target or class is still a name.
        """
        for given in (self.target, *self.only_classes, *self.spare_classes):
            if isinstance(given, str):
                raise ConfigError(
                    f"{given!r} is the name of a class; call ComputeConfig.with_labels, or give its number"
                )
        weight = 1.0 if self.spare_weight is None else self.spare_weight
        return replace(Goal.from_provenance(vars(self)), spare_weight=weight)

    @cached_property
    def solver(self) -> Solver:
        """The options that workers need, with defaults filled in."""
        return Solver(
            rule=self.rule,
            augmentation="none" if self.rule == "paper" else self.augment or "flip-shift",
            candidates=self.candidates or 10,
            slope_ratio=self.slope_ratio or SLOPE_RATIO,
            goal=self.goal,
            max_zoom=self.zoom or 0.0,
        )


def _check_rule(config: ComputeConfig) -> None:
    """Raise ConfigError where an option does not belong to the rule."""
    if config.members_at_once < 1:
        raise ConfigError(f"--members-at-once is {config.members_at_once}; it must be positive")
    if config.members_at_once > 1 and (config.rule == "paper" or config.local_steps):
        raise ConfigError("--members-at-once belongs to the log-odds rule without local steps; leave it out")
    foreign = (
        ("candidates", "slope_ratio", "gain")
        if config.rule == "log-odds"
        else ("step_size", "period", "augment", "local_steps", "zoom")
    )
    if config.achromatic and config.rule == "paper":
        raise ConfigError("achromatic does not belong to rule paper; leave it out")
    for name in foreign:
        if getattr(config, name) is not None:
            raise ConfigError(f"{option(name)} does not belong to rule {config.rule}; leave it out")


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


def _check_goal(config: ComputeConfig) -> None:
    has_classes = bool(config.only_classes or config.spare_classes)
    for name, is_given in (("target", config.target is not None), ("classes to attack or spare", has_classes)):
        if is_given and config.rule == "paper":
            raise ConfigError(f"the paper's rule knows no {name}; give them with --rule log-odds")
    if config.spare_weight is not None and not has_classes:
        raise ConfigError("--spare-weight belongs to --only-classes and --spare-classes; leave it out")
    if config.spare_weight is not None and not 0 <= config.spare_weight < inf:
        raise ConfigError(f"--spare-weight is {config.spare_weight}; it must be finite and not negative")
