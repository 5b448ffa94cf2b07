"""Reading a file of perturbations, wherever it lies."""

from pathlib import PurePosixPath

from uap_dist.data.locations import join, read_file, split_query
from uap_dist.errors import PerturbationError, TrackingError
from uap_dist.models.weights_file import header_of, metadata_of

MLFLOW_SCHEMES = ("runs:/", "models:/")
PERTURBATION_FILE, POOL_FILE = "perturbation.safetensors", "pool.safetensors"
# what they are, and how jobs/evaluate.py is given them
KINDS = {PERTURBATION_FILE: ("a single perturbation", "--perturbations"), POOL_FILE: ("a pool", "--pools")}
# and what is to be given instead where the other one is expected
INSTEAD = {
    PERTURBATION_FILE: "a perturbation of it lies in its run's members/NAME",
    POOL_FILE: "--num-perturbations makes a pool",
}


def read(location: str) -> bytes:
    """A whole file, local, s3://, gs:// or in MLflow (runs:/, models:/).

    Raises:
        PerturbationError: it cannot be read.
        TrackingError: MLflow cannot provide it.
    """
    if location.startswith(MLFLOW_SCHEMES):
        from uap_dist.tracking.mlflow_server import fetch  # imported here because only these locations need MLflow

        location = fetch(location)
    try:
        return read_file(location)
    except OSError as error:
        raise PerturbationError(f"cannot read {error}") from error


def read_own(location: str, file: str) -> tuple[str, bytes]:
    """Location and content of a file that jobs/compute.py has written, which is given as itself or by its folder.

    Args:
        location: of the file or folder.
        file: PERTURBATION_FILE or POOL_FILE.

    Raises:
        PerturbationError: it cannot be read, or the other one was given.
        TrackingError: MLflow cannot provide it.
    """
    (other,) = KINDS.keys() - {file}
    refusal = PerturbationError(
        "{} is {}; jobs/evaluate.py takes it as {}; {}".format(location, *KINDS[other], INSTEAD[file])
    )
    is_folder = PurePosixPath(split_query(location)[0]).suffix != ".safetensors"
    place = join(location, file) if is_folder else location
    try:
        data = read(place)
    except (PerturbationError, TrackingError) as error:
        if is_folder and _is_readable(join(location, other)):
            raise refusal from error
        if isinstance(error, TrackingError):
            raise
        raise PerturbationError(f"{error}; files of others need the unit of their values, :255 or :1") from error
    if written_as(data) == other:
        raise refusal
    return place, data


def written_as(data: bytes) -> str | None:
    """PERTURBATION_FILE or POOL_FILE for the contents of one that jobs/compute.py has written; None for any other."""
    metadata = metadata_of(data)
    if "manifest" in metadata:
        return POOL_FILE
    # files of weights have a provenance, too
    return PERTURBATION_FILE if "provenance" in metadata and "perturbation" in header_of(data) else None


def _is_readable(location: str) -> bool:
    try:
        return bool(read(location))
    except (PerturbationError, TrackingError):
        return False
