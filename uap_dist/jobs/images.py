"""The images of a job, decoded by its workers."""

from uap_dist.fleet.fleet import Fleet
from uap_dist.job_options import DataOptions
from uap_dist.jobs.common import console
from uap_dist.method.rates import Goal
from uap_dist.models.classifier import Classifier
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import Dataset, list_dataset, predict
from uap_dist.workers.disjoint import check_disjoint
from uap_dist.workers.listing import Reader
from uap_dist.workers.worker import Worker


def list_images(
    fleet: Fleet, options: DataOptions, train_urls: list[str], val_urls: list[str]
) -> tuple[Dataset, Dataset]:
    """The training and held-out images, without those that are in both; not yet classified."""
    console.print(f"decoding {len(train_urls)} training and {len(val_urls)} held-out shards")
    train = list_training(fleet, options, train_urls)
    return train, list_held_out(fleet, options, val_urls, train)


def list_training(fleet: Fleet, options: DataOptions, urls: list[str]) -> Dataset:
    """The training images, not yet classified."""
    bad, key = options.max_bad_fraction, options.label_key
    return list_dataset(fleet, urls, num_images=options.num_train_images, max_bad_fraction=bad, label_key=key)


def list_held_out(
    fleet: Fleet, options: DataOptions, urls: list[str], train: Dataset, read: Reader = Worker.load
) -> Dataset:
    """The held-out images that are no training images, not yet classified; `read` as for `list_dataset`."""
    bad, key = options.max_bad_fraction, options.label_key
    num_images = options.num_val_images
    val = list_dataset(fleet, urls, num_images=num_images, max_bad_fraction=bad, label_key=key, like=train, read=read)
    return check_disjoint(train, val, max_shared_fraction=bad)


def classify_images(fleet: Fleet, model: str, dataset: Dataset, what: str) -> Dataset:
    """The images with their clean labels; the console hears what the network knows of them where the shards say what they show."""
    dataset = predict(fleet, dataset)
    for name, top1 in check_accuracy(fleet, dataset, model).items():
        by = f" by {name}" if name else ""
        console.print(f"clean top-1 of {what} images{by}: {top1 or f'not known, {dataset.lack_of_labels}'}")
    return dataset


def say_what_is_seen(classifier: Classifier) -> str:
    """How images are brought to the input size of several networks."""
    first, shape = classifier.networks[0], classifier.geometry.shape
    size = f"brought to {shape[1]}×{shape[2]} pixels as {first} does" if shape else "taken as they lie in the shards"
    return f"one perturbation for {', '.join(classifier.networks)}; images are {size}, for all of them"


def say_who_takes_part(goal: Goal, train: Dataset) -> None:
    """Tell the console how many training images a computation attacks and spares, and how many have the target's label already."""
    total = train.num_examples
    for name, clean in train.clean.each():
        masks = (part(clean.labels) for part in (goal.attacks, goal.pushes, goal.spares))
        num_attacked, num_pushed, num_spared = (int(mask.sum()) for mask in masks)
        prefix = f"{name}: " if name else ""
        if goal.has_classes:
            console.print(
                f"{prefix}of {total} training images {num_attacked} are of attacked classes, {num_spared} of spared ones"
            )
        if num_pushed < num_attacked:
            console.print(
                f"{prefix}{num_attacked - num_pushed} of {total} training images take no part: the network gives them the target's "
                "label already"
            )


def read_held_out(fleet: Fleet, options: DataOptions, urls: list[str], train: Dataset, model: str) -> Dataset:
    """The held-out images with their clean labels, decoded while the workers compute rounds."""
    val = list_held_out(fleet, options, urls, train, Worker.read)
    return classify_images(fleet, model, val, "held-out")
