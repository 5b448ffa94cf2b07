"""What a run is told: options that cannot be, defaults, and the record of them."""

from dataclasses import asdict, replace

import pytest

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.method.config import ComputeConfig, warn_of_default_radius
from uap_dist.rounds.plan import count_rounds, describe_steps


def test_the_first_step_doubles_where_blocks_are_averaged():
    def first(**options):
        return ComputeConfig(radius=10.0, **options).steps(100, (3, 16, 16)).sizes(0)

    assert first(round_size=20, block_size=10) == (8.0,)
    alone, averaged = (first(round_size=size, block_size=10, local_steps=2) for size in (10, 20))
    assert len(alone) == 2 and alone[0] == pytest.approx(8.0 * (125 / 200) ** 0.5)
    assert averaged == tuple(2 * size for size in alone)
    assert first(round_size=20, block_size=10, local_steps=2, step_size=3.0)[0] == 3.0


def test_passes_default_to_ten_unless_evaluations_bound_them():
    assert count_rounds([50], ComputeConfig(round_size=25, block_size=25)) == 20
    assert count_rounds([50], ComputeConfig(round_size=25, block_size=25, max_evaluations=10_050)) == 200
    assert count_rounds([50], ComputeConfig(rule="paper", max_evaluations=10_050)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0; it must be a positive"),
        ({"norm": "l1"}, "norm is 'l1'; it must be one of linf, l2"),
        ({"rule": "best"}, "rule is 'best'"),
        ({"target_fooling_rate": 0.0}, r"--target-fooling-rate is 0.0; it must lie in \(0, 1\]"),
        ({"target_fooling_rate": 1.5}, "it must lie in"),
        ({"max_passes": 0}, "--max-passes is 0; it must be positive"),
        ({"candidates": 5}, "candidates does not belong to rule log-odds"),
        ({"rule": "paper", "step_size": 5.0}, "--step-size does not belong to rule paper"),
        ({"random_start": 1.5}, "--random-start is 1.5; it must lie in"),
        ({"seed": -1}, "seed is -1"),
        ({"rule": "paper", "candidates": 1}, "candidates is 1; it must be at least 2"),
        ({"augment": "rotate"}, "augment is 'rotate'; it must be one of none, flip, flip-shift"),
        ({"period": 0}, "period is 0; it must be positive"),
        ({"step_size": float("inf")}, "--step-size is inf; it must be positive and finite"),
        ({"zoom": 1.0}, "zoom is 1.0; it must lie in \\(0, 1\\)"),
        ({"zoom": -0.1}, "zoom is -0.1; it must lie"),
        ({"rule": "paper", "zoom": 0.2}, "zoom does not belong to rule paper"),
        ({"rule": "paper", "achromatic": True}, "achromatic does not belong to rule paper"),
        ({"rule": "paper", "period": 8}, "period does not belong to rule paper"),
        ({"rule": "paper", "local_steps": 3}, "--local-steps does not belong to rule paper"),
        ({"local_steps": 0}, "--local-steps is 0; it must be positive and divide the block size, 3"),
        ({"local_steps": 2}, "--local-steps is 2; it must be positive and divide the block size, 3"),
        ({"round_size": 10, "block_size": 4}, "--round-size 10 is not a positive multiple of --block-size 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ComputeConfig(**options)


def test_a_config_is_read_back_from_what_a_perturbation_says_of_itself():
    config = ComputeConfig(norm="l2", max_evaluations=900, augment="flip", seed=3, random_start=0.5)
    provenance = asdict(config) | {"radius": config.ball_radius, "model": "x"}
    assert ComputeConfig.from_provenance(provenance, "v") == replace(config, radius=2000.0)
    with pytest.raises(PerturbationError, match="v does not say how it was computed"):
        ComputeConfig.from_provenance({}, "v")


def test_the_record_of_a_run_says_its_period_and_first_step():
    config = ComputeConfig(norm="l2", radius=90.0, round_size=10, block_size=5)
    assert describe_steps(600, (1, 30, 30), config) == {
        "steps.period": 128,
        "steps.first_size": 1.2 * 3 * (125 / 600) ** 0.5,
    }
    assert describe_steps(600, (1, 30, 30), replace(config, period=8, step_size=2.0)) == {
        "steps.period": 8,
        "steps.first_size": 2.0,
    }
    assert describe_steps(None, (1, 30, 30), ComputeConfig(rule="paper")) == {}


@pytest.mark.parametrize(
    ("options", "side", "is_warned"),
    [({}, 32, True), ({}, 260, False), ({"radius": 2000.0}, 32, False), ({"norm": "linf"}, 32, False)],
)
def test_the_default_l2_radius_is_questioned_on_images_of_another_size(options, side, is_warned, caplog):
    warn_of_default_radius(ComputeConfig(**{"norm": "l2"} | options), (3, side, side))
    assert ("the same root mean square is 286 (--radius 286)" in caplog.text) == is_warned
