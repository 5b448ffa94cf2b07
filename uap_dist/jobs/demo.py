"""The images of a computation: shards that are given, or those of the demonstration."""

from pathlib import Path

from uap_dist.computing.options import ComputeOptions
from uap_dist.data.demo import write_demo_shards
from uap_dist.data.patterns import expand_apart
from uap_dist.fleet.ray_cluster import Need, check_shared
from uap_dist.jobs.common import console


def list_shards(options: ComputeOptions, output: Path) -> tuple[list[str], list[str]]:
    """URLs of the training and held-out shards; without any given, the demonstration's are written beside the output folder."""
    if not options.is_demo:
        return expand_apart(options.data.train_shards, options.data.val_shards)
    train, val, num_train, num_val = write_demo_shards(output.parent / "demo-shards")
    console.print(
        f"no shards given: crops of {num_train} training and {num_val} held-out photographs, a demonstration only"
    )
    return train, val


def check_demo(options: ComputeOptions, urls: list[str], need: Need) -> None:
    """Raise ConfigError where nodes do not see the demonstration's shards, which the driver has written."""
    if options.is_demo:
        check_shared(
            Path(urls[0]).parent,
            need,
            "the demonstration's shards are written beside --output: give one in a folder that every node sees, or shards of your own "
            "(--train-shards, --val-shards)",
        )
