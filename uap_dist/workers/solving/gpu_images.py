"""Decoded images in GPU memory, so that a step takes its views of them there."""

from math import prod

import torch

from uap_dist.data.decode import DecodedShard
from uap_dist.workers.messages import Examples

FIRST_ROOM = 256  # images; the room is doubled whenever it is full
SHARE_OF_FREE = 0.25  # of the GPU memory that is free when the first image arrives: two workers may share a GPU


class GpuImages:
    """Images of shards, one after another in one tensor. None is ever dropped.

    Attributes:
        pixels: room×C×H×W uint8; empty before the first image.
    """

    def __init__(self, device: torch.device, max_bytes: int | None = None) -> None:
        """Begin without images.

        Args:
            device: that they are kept on.
            max_bytes: room for them; None for a quarter of what is free on the GPU when the first image arrives.
        """
        self.pixels = torch.empty(0, dtype=torch.uint8, device=device)
        self._max_bytes, self._count = max_bytes, 0
        self._rows: dict[str, dict[str, int]] = {}  # by the shard's digest, then by key

    def rows(self, examples: Examples) -> list[int] | None:
        """Indices of the examples' images in `pixels`; None if not all are there."""
        rows = self._rows.get(examples.digest, {})
        found = [rows[key] for key in examples.keys if key in rows]
        return found if len(found) == examples.num_examples else None

    def add(self, shard: DecodedShard) -> bool:
        """Take in the images of a shard that are not here yet; False if there is no room."""
        rows = self._rows.setdefault(shard.digest, {})
        new = [key for key in shard.keys if key not in rows]
        end = self._count + len(new)
        if not self._make_room(end, shard.images.shape[1:]):
            return False
        chosen = shard.images if len(new) == len(shard.keys) else shard.take(new)
        self.pixels[self._count : end] = torch.tensor(chosen, device=self.pixels.device)
        rows.update(zip(new, range(self._count, end), strict=True))
        self._count = end
        return True

    def _make_room(self, count: int, shape: tuple[int, ...]) -> bool:
        """Whether so many images fit."""
        if self._max_bytes is None:
            free, _ = torch.cuda.mem_get_info(self.pixels.device)
            self._max_bytes = int(SHARE_OF_FREE * free)
        most = self._max_bytes // prod(shape)
        if count > most:
            return False
        if count > len(self.pixels):
            grown = torch.empty(
                min(most, max(FIRST_ROOM, 2 * count)), *shape, dtype=torch.uint8, device=self.pixels.device
            )
            if self._count:
                grown[: self._count] = self.pixels[: self._count]
            self.pixels = grown
        return True
