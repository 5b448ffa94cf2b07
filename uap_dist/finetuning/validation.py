"""How good the network is after an epoch: accuracy on held-out images, clean and perturbed, and the fooling rates of the pool."""

from collections.abc import Mapping

import torch
from torch import Tensor

from uap_dist.finetuning.batches import ImageReader, WorkerGroup, WorkerImages
from uap_dist.finetuning.network import set_training_mode
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.method.norms import add_perturbation
from uap_dist.method.rates import Rate
from uap_dist.models.classifier import Classifier
from uap_dist.workers.dataset import CLASSIFY_SIZE, Dataset


class Validation:
    """Measures the network on the held-out images, each worker on a part of them."""

    def __init__(
        self,
        classifier: Classifier,
        val: Dataset,
        reader: ImageReader,
        config: FinetuneConfig,
        group: WorkerGroup,
    ) -> None:
        """Nothing is measured yet.

        Args:
            classifier: the network to measure, see `Learner.measured`.
            val: all held-out images.
            reader: reads them.
            config: of the training.
            group: the workers.
        """
        self._classifier, self._group, self._batch_norm = classifier, group, config.batch_norm
        part = val.part(group.rank, group.size)
        self._images = WorkerImages(part, reader, config.shuffle_shards)
        self._first = group.rank * val.num_examples // group.size

    def measure(self, groups: Mapping[str, Tensor]) -> dict[str, float]:
        """Top-1 and top-5 accuracy of clean images; for each group of perturbations, its fooling rate and the top-1 under it.

        Args:
            groups: perturbations (M×C×H×W, pixels, on the worker's device) by the names of their metrics; an image sees one of each
                group, in turn.
        """
        set_training_mode(self._classifier, False, self._batch_norm)
        # workers gather batch-norm statistics of their own until the next step; the first worker's are saved
        self._group.share_buffers(self._classifier)
        counts = dict.fromkeys(("images", "top1/clean", "top5/clean"), 0)
        counts |= {f"{what}/{name}": 0 for what in ("fooling_rate", "top1") for name in groups}
        first = self._first
        for batch in self._images.in_order(CLASSIFY_SIZE):
            pixels, truths = self._group.to_tensors(batch)
            for name, count in self._count(pixels, truths, first, groups).items():
                counts[name] += count
            first += len(pixels)
        total = dict(zip(counts, map(int, self._group.sum(list(counts.values()))), strict=True))
        num_images = total.pop("images")
        metrics = {name: count / num_images for name, count in total.items() if name.startswith("top")}
        for name in groups:
            metrics |= Rate(total[f"fooling_rate/{name}"], num_images).metrics(name)
        return metrics

    @torch.no_grad()
    def _count(self, pixels: Tensor, truths: Tensor, first: int, groups: Mapping[str, Tensor]) -> dict[str, int]:
        """Correct and changed predictions in a batch whose first image is number `first` of all held-out images."""
        logits = self._classifier(pixels)
        clean = logits.argmax(1)
        top5 = logits.topk(min(5, logits.shape[1]), 1).indices
        counts = {
            "images": len(pixels),
            "top1/clean": int((clean == truths).sum()),
            "top5/clean": int((top5 == truths[:, None]).sum()),
        }
        for name, members in groups.items():
            turns = torch.arange(first, first + len(pixels), device=pixels.device) % len(members)
            labels = self._classifier(add_perturbation(pixels, members[turns])).argmax(1)
            counts[f"fooling_rate/{name}"] = int((labels != clean).sum())
            counts[f"top1/{name}"] = int((labels == truths).sum())
        return counts
