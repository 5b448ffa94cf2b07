"""Checkpoints and shards that fail."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.lab import Lab
from faults.runs import Line, Trial
from faults.shards import shard_options, write_shards


def storage_fails(lab: Lab) -> Iterator[Line]:
    """The folder of checkpoints cannot be written to for a while (a file stands in its place)."""
    trial, seconds = Trial(lab, "storage-fails"), lab.size.storage_away_s
    trial.start()
    trial.reach(lab.num_rounds // 12)
    folder = trial.checkpoints
    away = folder.with_suffix(".away")
    folder.rename(away)
    folder.touch()
    time.sleep(seconds)
    folder.unlink()
    away.rename(folder)
    trial.reach(lab.num_rounds // 2)
    trial.kill()
    trial.resume()
    trial.finish()
    yield trial.line(f"storage refuses writes for {seconds:g} s; then the driver is killed, resumed", 1)


def checkpoint_cut(lab: Lab) -> Iterator[Line]:
    """The newest checkpoint is cut in half: the one before is taken."""
    trial = Trial(lab, "checkpoint-cut")
    trial.start()
    trial.reach(lab.num_rounds // 6)
    trial.kill()
    newest = max(trial.checkpoints.glob("round-*"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    trial.resume()
    trial.finish()
    yield trial.line("newest checkpoint cut in half, resumed", 1)


def shard_cut(lab: Lab) -> Iterator[Line]:
    """A shard is cut short before the run."""
    trial, shard = _with_own_shards(lab, "shard-cut")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    trial.start()
    trial.finish("FAILED")
    assert shard.name in trial.errors and not trial.rounds, trial.errors
    shard.write_bytes(whole)
    trial.start()
    trial.finish()
    yield trial.line("a shard cut in half; made whole, started again", 1)


def shard_deleted(lab: Lab) -> Iterator[Line]:
    """A shard is deleted during a run that reads images again."""
    yield _harm_during_run(lab, "deleted", lambda shard: shard.unlink())


def shard_replaced(lab: Lab) -> Iterator[Line]:
    """A shard is replaced by another during a run that reads images again."""
    yield _harm_during_run(lab, "replaced", lambda shard: shutil.copy(shard.with_name("train-0000.tar"), shard))


def _harm_during_run(lab: Lab, name: str, harm: Callable[[Path], object]) -> Line:
    trial, shard = _with_own_shards(lab, f"shard-{name}", "--cache-gib", "1e-9", "--disk-cache-gib", "0")
    trial.start()
    trial.reach(lab.num_rounds // 7)
    whole = shard.read_bytes()
    harm(shard)
    trial.finish("FAILED")
    assert shard.name in trial.errors, trial.errors
    shard.write_bytes(whole)
    trial.resume()
    trial.finish()
    return trial.line(f"a shard {name} during the run; put back, resumed", 1)


def image_broken(lab: Lab) -> Iterator[Line]:
    """An image is none."""
    trial, shard = _with_own_shards(lab, "image", "--max-bad-fraction", "0.05")
    write_shards(shard.parent, broken_image=True)
    trial.start()
    trial.finish()
    yield trial.line("an image that is none, beside the others", 1)


def _with_own_shards(lab: Lab, name: str, *options: str) -> tuple[Trial, Path]:
    """A trial with shards that may be harmed, and one of them."""
    trial = Trial(lab, name, *options)
    folder = shutil.copytree(lab.folder / "shards", trial.folder / "shards")
    own = dict(zip(shard_options(lab.folder / "shards"), shard_options(folder), strict=True))
    trial.options = tuple(own.get(option, option) for option in trial.options)
    return trial, folder / "train-0001.tar"
