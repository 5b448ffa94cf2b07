"""How long a computation is, and with how many starts it begins.

Which label most images end in is settled within the first rounds of a run and depends on their order; with some a run ends higher than
with others. So a long run begins with several short ones, each from zero, and the one that fools most of some training images goes on:
it and what follows are steps of one run. benchmarks/rules_tried.md, "Starts", has what that is worth.
"""

from dataclasses import dataclass

from uap_dist.norms import Norm

STARTS: dict[Norm, int] = {"linf": 8, "l2": 1}
START_ROUNDS = 32  # of each
JUDGES = 100  # training images that each is measured on
LEAST_ROUNDS = 775  # starts take two fifths of so many; with 750 ResNet-20 loses by them, with 791 SqueezeNet gains


@dataclass(frozen=True)
class Course:
    """The rounds of a computation.

    Attributes:
        num_rounds: of all starts and what follows; None where the paper's rule is bounded by evaluations alone.
        num_starts: short runs of START_ROUNDS that it begins with; 1: it is one run.
    """

    num_rounds: int | None
    num_starts: int = 1

    @property
    def num_places(self) -> int:
        """Rounds of the run that one start and what follows are."""
        return (self.num_rounds or 0) - (self.num_starts - 1) * START_ROUNDS

    def place(self, round_number: int) -> int:
        """That a round has in its run, from 0."""
        return round_number - self.start(round_number) * START_ROUNDS

    def start(self, round_number: int) -> int:
        """Number of the start that a round belongs to, from 0; what goes on counts as the last."""
        return min(round_number // START_ROUNDS, self.num_starts - 1)

    def ends_start(self, round_number: int) -> bool:
        """Whether a start is to be measured after the round."""
        return self.num_starts > 1 and (round_number + 1) % START_ROUNDS == 0 and round_number < self.goes_on_at

    @property
    def goes_on_at(self) -> int:
        """The round before which all starts are done."""
        return self.num_starts * START_ROUNDS

    def judge_evaluations(self, num_train: int) -> int:
        """What it costs to compare the starts, with so many training images."""
        return self.num_starts * min(JUDGES, num_train) if self.num_starts > 1 else 0


def default_num_starts(*, norm: Norm, num_rounds: int) -> int:
    """From what is known before the run."""
    return STARTS[norm] if num_rounds >= LEAST_ROUNDS else 1
