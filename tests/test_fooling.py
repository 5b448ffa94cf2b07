import pytest
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.errors import ConfigError
from uap_dist.method.rates import Rate, running_rates, wilson_interval

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@given(total=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_bounds_solve_its_defining_equation(total, share):
    successes = round(share * total)
    observed = successes / total
    for bound in wilson_interval(successes, total):
        # (p̂ − p)² = z² p (1 − p) / n
        assert (observed - bound) ** 2 == pytest.approx(Z_95**2 * bound * (1 - bound) / total, abs=1e-9)


def test_rate_prints_with_interval_and_count():
    assert str(Rate(430, 500)) == "0.860 [0.827, 0.888] of 500"


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_an_invalid_proportion_is_rejected(successes, total):
    with pytest.raises(ConfigError, match="is not a share"):
        wilson_interval(successes, total)


@given(
    rates=st.lists(st.integers(1, 40).flatmap(lambda n: st.builds(Rate, st.integers(0, n), st.just(n))), max_size=12),
    num_examples=st.integers(1, 80),
)
def test_a_running_rate_pools_as_few_rates_as_have_enough_examples(rates, num_examples):
    found = running_rates(rates, num_examples)
    assert len(found) == len(rates)
    for end, rate in enumerate(found, start=1):
        pooled = Rate(0, 0)
        for each in reversed(rates[:end]):
            pooled = Rate(pooled.num_hits + each.num_hits, pooled.num_examples + each.num_examples)
            if pooled.num_examples >= num_examples:
                break
        assert rate == pooled
        assert Rate.from_metrics(rate.metrics("running"), "running") == rate
