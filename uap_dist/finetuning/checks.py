"""What a fine-tuning needs of its network, pool, images and storage, checked before any work; and how they are recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uap_dist.computing.provenance import describe_config, describe_held_out, describe_setup, describe_training
from uap_dist.data.locations import is_url
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.finetuning.network import check_trainable, check_truths
from uap_dist.finetuning.options import FinetuneOptions
from uap_dist.fleet.ray_cluster import Need, check_shared
from uap_dist.job_options import to_json
from uap_dist.method.config import ComputeConfig
from uap_dist.models.check import check_classifier
from uap_dist.models.classifier import Classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.workers.dataset import Dataset


def check_pool(options: FinetuneOptions, pool: PerturbationPool, classifier: Classifier) -> ComputeConfig:
    """Check that the classifier can be trained on the pool.

    Returns:
        The config of the pool's first member.

    Raises:
        PerturbationError: the pool is of another network or input size (unless --allow-transfer), or does not say how it was computed.
        ConfigError: it has too few members, or a fresh pool would; nothing of a fresh pool would be verified that shall be; or the
            classifier has nothing to train.
    """
    if not options.allow_transfer:
        try:
            pool.check_classifier(classifier.weights_digest)
        except PerturbationError as error:
            raise PerturbationError(f"{error}; --allow-transfer trains on it all the same") from error
    options.finetune.split(pool)
    configs = {p.name: ComputeConfig.from_provenance(p.provenance, p.name) for p in pool.to_perturbations()}
    first = next(iter(configs.values()))
    _check_fresh(configs)
    at_once = max(config.members_at_once for config in configs.values())
    if options.fleet.verify_determinism and at_once > 1:
        raise ConfigError(
            f"--verify-determinism compares blocks that workers share, but the pool was computed with --members-at-once {at_once}, "
            "and so are fresh ones; leave it out"
        )
    check_trainable(classifier)
    if classifier.geometry.shape is not None:
        check_pool_size(pool, classifier.geometry.shape, options)
    return first


def _check_fresh(configs: Mapping[str, ComputeConfig]) -> None:
    """Raise ConfigError unless a fresh pool of members with these configs, by name, has as many members, and two at least."""
    if len(configs) < 2:
        raise ConfigError("the pool has one member, and reports compare members; give a pool of two or more")
    names: dict[int, str] = {}
    for name, config in configs.items():
        other = names.setdefault(config.seed, name)
        if other != name:
            raise ConfigError(
                f"members {other} and {name} of the pool both have seed {config.seed}, and a fresh pool has one member of each seed; "
                "leave one of them out, or compute one with another --seed"
            )


def check_pool_size(pool: PerturbationPool, shape: tuple[int, ...], options: FinetuneOptions) -> None:
    """Raise PerturbationError where the pool is of another size than images (C×H×W), unless --allow-transfer resizes it."""
    own = tuple(pool.perturbations.shape[1:])
    if own != shape and not options.allow_transfer:
        raise PerturbationError(f"the pool is of {_size(own)}, images are {_size(shape)}; --allow-transfer resizes it")


def check_network(classifier: Classifier, train: Dataset, val: Dataset) -> None:
    """Check the network on images of that size, and that the images' classes are classes of the network.

    Raises:
        ClassifierError: the network cannot be used.
        ConfigError: images without a class, or with one that the network does not have.
    """
    check_classifier(classifier, train.shape)
    check_truths(classifier, train, val)


def check_storage(location: str, need: Need) -> None:
    """Raise ConfigError where nodes that workers may run on do not see the folder through which they exchange weights."""
    if not is_url(location):
        check_shared(
            Path(location),
            need,
            "epochs and tuned networks go from node to node there: give --storage as a folder that every node sees, or as s3://, gs://",
        )


def describe_finetuning(
    options: FinetuneOptions,
    classifier: Classifier,
    config: ComputeConfig,
    pool: PerturbationPool,
    train: Dataset,
    val: Dataset,
) -> dict[str, Any]:
    """Provenance of the tuned networks and of everything measured on them; `config` is that of the pool's first member."""
    setup = describe_setup(classifier, options.weights, options.fleet)
    return {
        **setup,
        **describe_config(config),
        **describe_training(train),
        **describe_held_out(train, val),
        "demo": False,
        "num_perturbations": len(pool.members),
        "num_train_images": train.num_examples,
        "num_val_images": val.num_examples,
        "pool": options.pool,
        "pool_sha256": pool.digest,
        "pool_size": len(pool.members),
        "repetitions": options.repetitions,
        **{f"finetune.{key}": value for key, value in to_json(options.finetune).items()},
    }


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
