"""Which examples are solved in which round: a pure function of the seed and the shard sizes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from uap_dist.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """Examples of one shard that are solved together.

    Attributes:
        shard: index of the shard in the data set.
        examples: indices into the shard, in the order of computation.
    """

    shard: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """Blocks that are solved against the same v and reduced in this order.

    Attributes:
        number: from 0, over the whole run.
        pass_number: from 0.
        ends_pass: whether it is the last round of its pass.
        blocks: at least one.
    """

    number: int
    pass_number: int
    ends_pass: bool
    blocks: tuple[Block, ...]

    @property
    def num_examples(self) -> int:
        """Number of examples in all blocks."""
        return sum(len(block.examples) for block in self.blocks)


def check_sizes(round_size: int, block_size: int) -> None:
    """Raise ConfigError unless both sizes are positive and the round size is a multiple of the block size."""
    if block_size < 1 or round_size < 1 or round_size % block_size:
        raise ConfigError(f"--round-size {round_size} is not a positive multiple of --block-size {block_size}")


def plan_rounds(shard_sizes: Sequence[int], *, seed: int, round_size: int, block_size: int) -> Iterator[Round]:
    """Rounds without end; each pass visits every example once, in an order of its own.

    A pass shuffles each shard, cuts it into blocks of nearly equal size (at most `block_size`), shuffles the blocks of all
    shards, and deals them to rounds of round_size/block_size blocks each. The last round of a pass takes what is left. So no
    round has more than `round_size` examples.

    Args:
        shard_sizes: number of examples in each shard.
        seed: determines the order, together with the number of the pass.
        round_size: examples in a round at most; a multiple of `block_size`.
        block_size: examples in a block at most.

    Raises:
        ConfigError: sizes that `check_sizes` rejects, or fewer examples than one block.
    """
    check_sizes(round_size, block_size)
    if sum(shard_sizes) < block_size:
        raise ConfigError(f"{sum(shard_sizes)} training images are fewer than one block of {block_size}")
    blocks_per_round = round_size // block_size
    number = count()
    for pass_number in count():
        blocks = _cut_pass(shard_sizes, np.random.default_rng([seed, pass_number]), block_size)
        for start in range(0, len(blocks), blocks_per_round):
            end = start + blocks_per_round
            yield Round(next(number), pass_number, end >= len(blocks), blocks[start:end])


def _cut_pass(shard_sizes: Sequence[int], rng: np.random.Generator, block_size: int) -> tuple[Block, ...]:
    blocks = []
    for shard, size in enumerate(shard_sizes):
        if size:
            pieces = np.array_split(rng.permutation(size), -(-size // block_size))
            blocks += [Block(shard, tuple(int(i) for i in piece)) for piece in pieces]
    return tuple(blocks[i] for i in rng.permutation(len(blocks)))
