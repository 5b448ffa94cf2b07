"""The exceptions of this package. Each message says what was wrong, where, and what to do.

UapDistError
├── ConfigError                     an option or argument is invalid
├── ClassifierError                 a network or weights file cannot be used
├── ShardError                      a shard or image cannot be read
├── PerturbationError               a perturbation file cannot be used
├── WorkerLostError                 workers cannot be placed, or a block kills them
├── DeterminismError                two workers gave different bits for one block
├── ResumeError                     there is no checkpoint, or it belongs to another computation
├── OutputError                     results cannot be written, for example to a full disk
└── TrackingError                   MLflow's server or files cannot be used
"""


class UapDistError(Exception):
    """Base class of the exceptions that this package raises on purpose."""


class ConfigError(UapDistError):
    """An option or argument has an invalid value.

    It is no ValueError because tyro would report one as a parsing error, and the MLflow run would not be marked FAILED.
    """


class ClassifierError(UapDistError):
    """A network or its weights cannot be found, do not match, or do not form a classifier of images."""


class ShardError(UapDistError):
    """A shard is missing, empty or truncated, or too many of its images cannot be decoded."""


class PerturbationError(UapDistError):
    """A perturbation cannot be read, contradicts its own metadata, or does not fit the classifier."""


class WorkerLostError(UapDistError):
    """Workers cannot be placed, or a block was given up because several workers were lost over it."""


class DeterminismError(UapDistError):
    """Two workers gave different bits for the same block."""


class ResumeError(UapDistError):
    """There is no checkpoint to resume from, or resuming from it would change the result."""


class OutputError(UapDistError):
    """Results cannot be written, because the disk is full or permission is missing."""


class TrackingError(UapDistError):
    """MLflow's server does not answer or refuses a request, or its files cannot be read or written."""


def is_mistake(error: Exception) -> bool:
    """Whether an error such as KeyError comes from a bug, and not from a service, a library or the operating system."""
    return type(error).__module__ == "builtins" and not isinstance(error, OSError | ImportError)
