"""Reading a file of perturbations, wherever it lies."""

import json

from uap_dist.data.locations import read_file
from uap_dist.errors import PerturbationError

MLFLOW_SCHEMES = ("runs:/", "models:/")


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


def metadata_of(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file in memory (the library reads metadata only from files)."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata
