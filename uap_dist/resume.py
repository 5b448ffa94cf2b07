"""What --resume names: the newest checkpoint of a run, found before the other options are parsed."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from uap_dist.checkpoint import Checkpoint, CheckpointStore
from uap_dist.locations import is_url
from uap_dist.tracking import checkpoints_of


@dataclass(frozen=True)
class Resumed:
    """The newest checkpoint, and where it lies."""

    checkpoint: Checkpoint
    storage: str


def find_resumed() -> Resumed | None:
    """What the command line's --resume (an MLflow run, or its folder of checkpoints) names; None without that option.

    Raises:
        ResumeError: there is no checkpoint.
        TrackingError: the server that knows where it is does not answer.
    """
    for number, word in enumerate(sys.argv[1:], start=1):
        option, _, value = word.partition("=")
        if option == "--resume":
            target = value or "".join(sys.argv[number + 1 : number + 2])
            if re.fullmatch("[0-9a-f]{32}", target):
                storage = checkpoints_of(target)
            else:
                storage = target if is_url(target) else str(Path(target).resolve())
            return Resumed(CheckpointStore(storage).newest(), storage)
    return None
