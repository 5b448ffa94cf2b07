"""What --resume names: the newest checkpoint of a run, found before the other options are parsed."""

import re
import sys
from dataclasses import dataclass

from uap_dist.checkpoint import Checkpoint, CheckpointStore
from uap_dist.locations import absolute
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
            storage = checkpoints_of(target) if re.fullmatch("[0-9a-f]{32}", target) else absolute(target)
            return Resumed(CheckpointStore(storage).newest(), storage)
    return None
