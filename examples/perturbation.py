"""A universal adversarial perturbation in a dozen lines, without Ray and MLflow: EfficientNet-Lite0, crops of a few photographs.

python examples/perturbation.py --help
"""

from pathlib import Path

import numpy as np
import tyro

from uap_dist import ComputeConfig, LocalWorkers, Worker, compute, load_classifier, load_dataset
from uap_dist.data.demo import write_demo_shards


def main(folder: Path = Path("outputs/example"), num_images: int | None = None, max_evaluations: int = 1000) -> None:
    """Compute a perturbation and save it as an array.

    Args:
        folder: for shards and perturbation.npy (3×224×224, pixels).
        num_images: to compute from, and to hold out; all of the demonstration's crops where it is None.
        max_evaluations: images once forward or backward.
    """
    train_shards, held_out_shards, *_ = write_demo_shards(folder / "shards")
    workers = LocalWorkers(Worker(load_classifier("efficientnet_lite0"), cache_bytes=4 << 30, num_threads=2))
    train = load_dataset(workers, train_shards, num_images=num_images)
    held_out = load_dataset(workers, held_out_shards, num_images=num_images)
    for report in compute(workers, train, held_out, ComputeConfig(max_evaluations=max_evaluations)):
        if report.evaluation is not None:
            print(f"round {report.round_number}: held-out images fooled {report.evaluation.val}")
    np.save(folder / "perturbation.npy", report.perturbation.numpy())  # show the network clip(x + v, 0, 255)


if __name__ == "__main__":
    tyro.cli(main)
