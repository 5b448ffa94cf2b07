"""Shards written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset as wds


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, *, prefix: str, shard_size: int) -> dict[str, int]:
    """Write samples (`__key__`, `jpg` or another image extension as bytes, `cls` as int) to `folder`, and an index of counts.

    The same samples give the same bytes. Returns the examples in each shard by file name, as in `<prefix>-index.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    writer = None
    for number, sample in enumerate(samples):
        if number % shard_size == 0:
            if writer is not None:
                writer.close()
            name = f"{prefix}-{number // shard_size:04d}.tar"
            writer, counts[name] = wds.TarWriter(str(folder / name), mtime=0, user="root", group="root"), 0
        assert writer is not None
        writer.write({key: str(value).encode() if key == "cls" else value for key, value in sample.items()})
        counts[name] += 1
    if writer is not None:
        writer.close()
    index = {"num_examples": sum(counts.values()), "shards": counts}
    (folder / f"{prefix}-index.json").write_text(json.dumps(index, indent=2) + "\n")
    return counts
