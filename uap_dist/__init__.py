"""Universal adversarial perturbations of image classifiers, as a distributed batch job.

The names here need neither Ray nor MLflow.
"""

from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import UapDistError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.deepfool import Increments, deepfool
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.method.norms import measure, project
from uap_dist.method.rates import Rate
from uap_dist.method.state import RoundReport
from uap_dist.models.accelerate import accelerate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.files import load_perturbations
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.perturbations.transform import AddUniversalPerturbation
from uap_dist.rounds.loop import compute
from uap_dist.versions import __version__ as __version__
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

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
