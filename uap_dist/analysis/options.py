"""Options of jobs/analyze.py."""

from dataclasses import dataclass, field
from typing import Literal

from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, RecordOptions

Analysis = Literal["phase", "boundaries", "images"]


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Analyse a universal perturbation.

    Pixels are RGB values 0..255 at the classifier's input size; every norm is in these units.
    """

    model: str
    """Classifier, as `--model` of jobs/compute.py has it."""
    weights: str | None = None
    """File with its weights. Default: the published ones."""
    perturbation: str
    """Folder or file of jobs/compute.py; .npy and .mat of others with their unit, as FILE.mat:255 or FILE.npy:1 (which leaves
    `images` out, for they do not say how they were computed). NAME=FILE names it."""
    analyses: tuple[Analysis, ...] = ("phase", "boundaries", "images")
    """Fooling rate against norm; singular values of the boundaries' normals, and their subspace; fooling rate against the number
    of training images."""
    num_normals: int | None = None
    """Training images, evenly spread, whose DeepFool perturbations are computed: for their sum (phase) and the matrix of
    normals (boundaries). Default: all."""
    num_draws: int = 3
    """Random vectors of each kind, and images whose DeepFool perturbation is shown to others."""
    scales: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """phase: the grid of norms, ℓ2 and ℓ∞, in multiples of the perturbation's own; 1 is always among them."""
    num_singular: int = 100
    """boundaries: singular vectors that span the subspace."""
    norm_l2: float | None = None
    """boundaries: length of the vectors of the subspace. Default: as strong a value as the paper's 2000 for 3×224×224."""
    memory_gib: float = 2.0
    """Memory of the driver for normals, GiB. Where they do not fit, their matrix is reduced to its leading directions on the way."""
    numbers: tuple[int, ...] = ()
    """images: how many training images. Default: all, a quarter of them, a sixteenth, a 64th, a 256th, where those make a round."""
    num_seeds: int = 3
    """images: perturbations from each number, with seeds from the perturbation's own on."""
    seed: int = 0
    """Of random vectors and of images at random."""
    data: DataOptions = field(default_factory=DataOptions)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    record: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        """Validate the options."""
        self.data.require()
        if not self.analyses:
            raise ConfigError("no analyses given (--analyses); name some of phase, boundaries, images")
        for name in ("num_draws", "num_singular", "norm_l2", "memory_gib", "num_seeds", "num_normals"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        for scale in self.scales:
            if not 0 < scale < float("inf"):
                raise ConfigError(f"a scale is {scale}; scales must be positive")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")

    job, name = "analyze", "analysis"

    @property
    def memory_bytes(self) -> int:
        """Memory of the driver for normals."""
        return int(self.memory_gib * 2**30)
