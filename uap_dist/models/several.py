"""Several networks as one classifier, for perturbations that are to fool all of them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uap_dist.errors import ClassifierError
from uap_dist.models.classifier import Classifier

WORST = "worst"  # stands in the names of rates where that of a network does: the lowest rate of all, of spared classes the highest


class Several(Classifier):
    """Maps pixels (N×3×H×W) to the logits of S networks (N×S×K). It sees images as the first of them does.

    Attributes:
        networks: S names, in the order of the logits.
    """

    def __init__(self, members: Sequence[Classifier], networks: Sequence[str], given: tuple[str, ...]) -> None:
        """Take classifiers with their names, and what they were loaded from.

        Raises:
            ClassifierError: they differ in input size or in the names of their classes.
        """
        nn.Module.__init__(self)
        first = members[0]
        self.each = nn.ModuleList(members)
        self.networks = tuple(networks)
        self.name = " + ".join(networks)
        self._given = given
        self.geometry = first.geometry
        self.trainable = frozenset()
        self.weights_digest = hashlib.sha256("".join(each.weights_digest for each in members).encode()).hexdigest()
        self.class_names = next((each.class_names for each in members if each.class_names), ())
        for name, member in zip(networks, members, strict=True):
            self._check(name, member)
        self.register_buffer("mean", first.mean)
        self.eval()

    @property
    def members(self) -> Sequence[Classifier]:
        """The classifiers."""
        return tuple(each for each in self.each if isinstance(each, Classifier))

    @property
    def given(self) -> tuple[str, ...]:
        """What `load_classifier` was given."""
        return self._given

    def with_members(self, members: Sequence[Classifier]) -> "Several":
        """The same with other classifiers of these networks, such as accelerated ones."""
        return Several(members, self.networks, self._given)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of all networks (N×S×K) of pixels (N×3×H×W)."""
        return torch.stack([each(pixels) for each in self.each], 1)

    def _check(self, name: str, member: Classifier) -> None:
        size, first = member.geometry.crop, self.geometry.crop
        if size is not None and size != first:
            seen = "images as they lie in the shards" if first is None else f"{first}×{first} pixels"
            raise ClassifierError(
                f"{name} takes {size}×{size} pixels, {self.networks[0]} {seen}; one perturbation needs networks of one input size"
            )
        for label, (own, other) in enumerate(zip(member.class_names, self.class_names, strict=False)):
            if own != other:
                raise ClassifierError(
                    f"label {label} is {own!r} to {name}, and {other!r} to another network; one perturbation needs networks of the "
                    "same classes in one order. If only the names differ, give the networks the same class_names, or none"
                )


def of_network(kind: str, network: str) -> str:
    """The kind of rate, or the quantity, of one of several networks."""
    return f"{network}.{kind}"


def split_kind(kind: str) -> tuple[str, str]:
    """The network, or "" for all, and the kind of rate without it."""
    network, _, own = kind.rpartition(".")
    return network, own
