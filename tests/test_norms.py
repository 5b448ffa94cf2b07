import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.errors import ConfigError
from uap_dist.method.norms import measure, project, random_of_same_norms, random_perturbation, root_mean_square

NORMS = st.sampled_from(["linf", "l2"])


@given(seed=st.integers(0, 2**32 - 1), norm=NORMS, radius=st.floats(0.1, 100), scale=st.floats(0.01, 1000))
def test_projection_is_the_nearest_point_of_the_ball(seed, norm, radius, scale):
    rng = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(3, 4, 4, generator=rng, dtype=torch.float64)
    nearest = project(v, norm=norm, radius=radius)
    assert measure(nearest, norm) <= radius * (1 + 1e-12)
    assert torch.allclose(project(nearest, norm=norm, radius=radius), nearest, rtol=1e-12)
    if measure(v, norm) <= radius:
        assert torch.equal(nearest, v)
    # the obtuse-angle condition pins the point itself
    other = project(10 * radius * torch.randn(3, 4, 4, generator=rng, dtype=torch.float64), norm=norm, radius=radius)
    assert ((v - nearest) * (other - nearest)).sum() <= 1e-9 * scale * radius * v.numel()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_perturbation_fills_the_ball_and_repeats(norm):
    v = random_perturbation((3, 8, 8), norm=norm, radius=7.0, seed=3)
    assert measure(v, norm) == pytest.approx(7, rel=1e-6)
    assert torch.equal(v, random_perturbation((3, 8, 8), norm=norm, radius=7.0, seed=3))
    assert not torch.equal(v, random_perturbation((3, 8, 8), norm=norm, radius=7.0, seed=4))


def test_random_baselines_have_the_norms_of_the_perturbation():
    v = torch.zeros(3, 8, 8).index_fill(1, torch.arange(2), 5.0)
    noise = random_of_same_norms(v, seed=3)
    assert measure(noise["linf"], "linf") == 5 and measure(noise["l2"], "l2") == pytest.approx(measure(v, "l2"))
    assert measure(noise["linf"], "l2") > 1.9 * measure(v, "l2")
    corner = random_perturbation((3, 8, 8), norm="linf", radius=7.0, seed=4)
    noise = random_of_same_norms(corner, seed=3)
    assert noise["linf"] is noise["l2"] and not torch.equal(noise["l2"], corner)
    assert [measure(noise["l2"], norm) for norm in ("linf", "l2")] == [measure(corner, norm) for norm in ("linf", "l2")]
    assert not random_of_same_norms(torch.zeros(3, 8, 8), seed=3)["l2"].any()


@pytest.mark.parametrize(("norm", "radius"), [("l1", 1.0), ("linf", 0.0), ("l2", -1.0), ("l2", float("nan"))])
def test_an_invalid_ball_is_rejected(norm, radius):
    with pytest.raises(ConfigError, match="norm is 'l1'" if norm == "l1" else "radius is"):
        project(torch.zeros(1), norm=norm, radius=radius)


def test_the_drivers_sums_do_not_depend_on_the_number_of_threads():
    values = torch.randn(20, 3, 224, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append([(measure(v, "l2"), float(root_mean_square(v))) for v in values])
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    for v, (norm, rms) in zip(values, found[0], strict=True):
        expected = [v.norm().item(), v.square().mean().sqrt().item()]
        assert [norm, rms] == pytest.approx(expected, rel=1e-12)
