"""Options of jobs/analyze.py."""

from dataclasses import dataclass, field
from typing import Literal

from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import GIB, DataOptions, RecordOptions, option

Analysis = Literal["phase", "boundaries", "images"]


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Analyse a universal perturbation.

    Pixels are RGB values 0..255 at the classifier's input size; every norm is in these units.
    """

    model: str
    """Classifier, as `--model` of jobs/compute.py has it."""
    weights: str | None = None
    """File with its weights, or FILE#KEY; if not given, the published ones."""
    perturbation: str
    """Folder or file of jobs/compute.py; FILE.mat:255, FILE.pth:1 and so on of others. NAME=FILE names it."""
    analyses: tuple[Analysis, ...] = ("phase", "boundaries", "images")
    """phase: fooling rate against norm; boundaries: singular values of normals; images: fooling rate against number of images."""
    num_normals: int | None = None
    """phase, boundaries: training images, evenly spread, that DeepFool solves; if not given, all."""
    num_draws: int = 3
    """Random vectors of each kind, and images whose DeepFool perturbation is shown to others."""
    scales: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """phase: norms, in multiples of the perturbation's own; 1 is always among them."""
    num_singular: int = 100
    """boundaries: singular vectors that span the subspace."""
    norm_l2: float | None = None
    """boundaries: length of vectors of the subspace; if not given, as strong as the paper's 2000 for 3×224×224."""
    memory_gib: float = 2.0
    """boundaries: memory of the driver for the matrix of normals, in GiB; a larger one is reduced on the way."""
    numbers: tuple[int, ...] = ()
    """images: how many training images; if not given, all, a quarter, a sixteenth, … of them."""
    num_seeds: int = 3
    """images: perturbations computed from each number of images; their seeds count up from that of the given perturbation."""
    seed: int = 0
    """Seed of random vectors and of images drawn at random."""
    data: DataOptions = field(default_factory=DataOptions)
    record: RecordOptions = field(default_factory=RecordOptions)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Validate the options."""
        self.data.require()
        if not self.analyses:
            raise ConfigError("no analyses given (--analyses); name some of phase, boundaries, images")
        if self.fleet.verify_determinism and "images" not in self.analyses:
            raise ConfigError(
                "--verify-determinism compares increments, which only the analysis `images` computes; leave it out"
            )
        for name in ("num_draws", "num_singular", "norm_l2", "memory_gib", "num_seeds", "num_normals"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option(name)} is {value}; it must be positive")
        for number in self.numbers or ():
            most = self.data.num_train_images
            if number < 1 or (most is not None and number > most):
                raise ConfigError(
                    f"--numbers has {number}; it must be positive"
                    + f", and at most {most} (--num-train-images)" * bool(most)
                )
        for scale in self.scales:
            if not 0 < scale < float("inf"):
                raise ConfigError(f"a scale is {scale}; scales must be positive")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must not be negative")

    job, name = "analyze", "analysis"

    @property
    def memory_bytes(self) -> int:
        """Memory of the driver for normals."""
        return int(self.memory_gib * GIB)
