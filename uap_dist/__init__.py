"""Universal adversarial perturbations of image classifiers, as a distributed batch job.

The names here need neither Ray nor MLflow.
"""

__version__ = "0.1.0"  # the one place; above the imports, because provenance.py reads it

from uap_dist.accelerate import accelerate
from uap_dist.classifiers import Classifier, load_classifier
from uap_dist.compute import RoundReport, compute
from uap_dist.config import ComputeConfig
from uap_dist.dataset import LocalWorkers, load_dataset
from uap_dist.deepfool import Increments, deepfool, log_odds_sum
from uap_dist.errors import UapDistError
from uap_dist.fooling import Rate
from uap_dist.norms import measure, project
from uap_dist.perturbations import load_perturbations
from uap_dist.pool import AddUniversalPerturbation, PerturbationPool
from uap_dist.shards import expand_patterns
from uap_dist.worker import Worker

__all__ = [
    "AddUniversalPerturbation",
    "Classifier",
    "ComputeConfig",
    "Increments",
    "LocalWorkers",
    "PerturbationPool",
    "Rate",
    "RoundReport",
    "UapDistError",
    "Worker",
    "accelerate",
    "compute",
    "deepfool",
    "expand_patterns",
    "load_classifier",
    "load_dataset",
    "load_perturbations",
    "log_odds_sum",
    "measure",
    "project",
]
