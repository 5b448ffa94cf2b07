from collections import Counter
from itertools import islice, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.errors import ConfigError
from uap_dist.method.schedule import plan_rounds

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 8)


def first_passes(sizes, count, **options):
    return list(takewhile(lambda r: r.pass_number < count, plan_rounds(sizes, **options)))


@given(sizes=SIZES, seed=st.integers(0, 100), block_size=st.integers(1, 8), blocks=st.integers(1, 4))
def test_each_pass_visits_every_example_once_in_blocks_of_one_shard(sizes, seed, block_size, blocks):
    rounds = first_passes(sizes, 3, seed=seed, round_size=block_size * blocks, block_size=block_size)
    assert [r.number for r in rounds] == list(range(len(rounds)))
    for pass_number in range(3):
        of_pass = [r for r in rounds if r.pass_number == pass_number]
        visits = Counter((b.shard, e) for r in of_pass for b in r.blocks for e in b.examples)
        assert visits == Counter((s, e) for s, size in enumerate(sizes) for e in range(size))
        assert [r.ends_pass for r in of_pass] == [False] * (len(of_pass) - 1) + [True]
        assert all(len(r.blocks) == blocks for r in of_pass[:-1])
    lengths = [len(b.examples) for r in rounds for b in r.blocks]
    assert max(lengths) <= block_size


def test_blocks_of_a_shard_differ_by_one_example_at_most():
    rounds = first_passes([100], 1, seed=0, round_size=24, block_size=12)
    lengths = sorted(len(b.examples) for r in rounds for b in r.blocks)
    assert lengths == [11] * 8 + [12]


def test_order_is_a_function_of_the_seed():
    plans = [first_passes([30, 30], 2, seed=seed, round_size=10, block_size=5) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    first, second = (list(r.blocks) for r in islice(plan_rounds([30], seed=0, round_size=30, block_size=30), 2))
    assert first != second


@pytest.mark.parametrize(("round_size", "block_size"), [(0, 1), (10, 0), (10, 3), (5, 10)])
def test_a_round_size_that_is_not_a_multiple_of_the_block_size_is_rejected(round_size, block_size):
    with pytest.raises(ConfigError, match="not a positive multiple"):
        next(plan_rounds([100], seed=0, round_size=round_size, block_size=block_size))


def test_fewer_images_than_a_block_are_an_error():
    with pytest.raises(ConfigError, match="7 training images are fewer than one block of 8"):
        next(plan_rounds([3, 4], seed=0, round_size=8, block_size=8))
