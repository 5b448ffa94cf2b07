import pytest
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.errors import ConfigError
from uap_dist.method.rates import Z_95, Rate, wilson_interval


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
def test_what_is_no_share_is_refused(successes, total):
    with pytest.raises(ConfigError, match="is not a share"):
        wilson_interval(successes, total)
