"""What can go wrong, as one tree: each message says what was wrong, where, and what to do.

UapDistError
├── ConfigError                     an option or argument that cannot be
├── ClassifierError                 a network or weights file that cannot be used
├── ShardError                      a shard or image that cannot be read
├── PerturbationError               a perturbation's file that cannot be used
├── WorkerLostError                 the fleet cannot be placed, or a block kills its workers
├── DeterminismError                two workers gave different bits for one block
├── ResumeError                     no checkpoint, or one of another computation
├── OutputError                     results that cannot be written, as on a full disk
└── TrackingError                   MLflow's server or files cannot be used
"""


class UapDistError(Exception):
    """Base of everything that the package raises on purpose."""


class ConfigError(UapDistError):
    """An option or argument has a value that it cannot have.

    No ValueError: tyro would take that for a parsing error, and no run would be marked FAILED.
    """


class ClassifierError(UapDistError):
    """A network or its weights cannot be found, do not match, or are not a classifier."""


class ShardError(UapDistError):
    """A shard is missing, empty, cut short, or holds too many images that are none."""


class PerturbationError(UapDistError):
    """A perturbation cannot be read, is not what it says of itself, or does not fit."""


class WorkerLostError(UapDistError):
    """Workers cannot be placed, or a block was given up after killing several."""


class DeterminismError(UapDistError):
    """Two workers gave different bits for the same block."""


class ResumeError(UapDistError):
    """There is no checkpoint to go on from, or going on from it would give another result."""


class OutputError(UapDistError):
    """Results cannot be written: no space is left, or no permission."""


class TrackingError(UapDistError):
    """MLflow's server does not answer or refuses, or its files cannot be read or written."""


def is_mistake(error: Exception) -> bool:
    """Whether a program's mistake raises such an error, as KeyError, and not a service, a library or the system that it asks."""
    return type(error).__module__ == "builtins" and not isinstance(error, OSError | ImportError)
