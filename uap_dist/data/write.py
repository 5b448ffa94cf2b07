"""Writing shards."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import webdataset as wds


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, *, prefix: str, shard_size: int) -> dict[str, int]:
    """Write samples to `<prefix>-0000.tar`, … in a folder, and the number of examples in each to `<prefix>-index.json`.

    The same samples give the same bytes. No shard is begun before its first sample is there, so none is left empty if `samples`
    raises at once (wds.ShardWriter would leave one).

    Args:
        samples: each has `__key__`, an image as bytes under its extension (`jpg`, …) and, if known, its class as int under `cls`.
        folder: created if it does not exist.
        prefix: of the file names.
        shard_size: samples per shard.

    Returns:
        The number of examples in each shard by file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for number, group in groupby(enumerate(samples), key=lambda numbered: numbered[0] // shard_size):
        name = f"{prefix}-{number:04d}.tar"
        with wds.TarWriter(str(folder / name), mtime=0, user="root", group="root") as writer:
            counts[name] = 0
            for _, sample in group:
                writer.write({key: str(value).encode() if key == "cls" else value for key, value in sample.items()})
                counts[name] += 1
    index = {"num_examples": sum(counts.values()), "shards": counts}
    (folder / f"{prefix}-index.json").write_text(json.dumps(index, indent=2) + "\n")
    return counts
