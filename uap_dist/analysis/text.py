"""The results of an analysis in words: key numbers, a one-sentence finding and a section of the Markdown report for each part."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from uap_dist.analysis.boundaries import SUBSPACE, Boundaries
from uap_dist.analysis.phase_transition import MEAN, SIGNS, SINGLE, SPHERE, SUM, UNIVERSAL, Point
from uap_dist.analysis.sample_size import SampleSizePoint
from uap_dist.analysis.spectrum import Spectrum
from uap_dist.method.norms import Norm
from uap_dist.tracking.outputs import markdown_table

PHASE_PICTURE = "pictures/1-phase-transition.png"
BOUNDARIES_PICTURE = "pictures/2-singular-values.png"
NUMBERS_PICTURE = "pictures/3-number-of-images.png"
ENERGY_SHARE = 0.9
NORM_NAMES: dict[Norm, str] = {"l2": "ℓ2", "linf": "ℓ∞"}
KINDS = {
    UNIVERSAL: "the perturbation that this report is about, multiplied with a number",
    SPHERE: "uniform on the sphere: the baseline for ℓ2",
    SIGNS: "plus or minus one number at each value: the baseline for ℓ∞",
    SINGLE: "DeepFool's step for one training image, drawn at random, shown to all others",
    SUM: "DeepFool's steps for {num_summed:,} training images, added",
    MEAN: "the mean of the training images",
}


def select(points: Sequence[Point], **wanted: object) -> list[Point]:
    """The points whose attributes have the given values."""
    return [point for point in points if all(getattr(point, name) == value for name, value in wanted.items())]


def mean_rate(points: Sequence[Point]) -> float:
    """Mean fooling rate of several points, such as all draws of one kind."""
    return fmean(point.fooling.rate for point in points)


def norm_at(points: Sequence[Point], share: float) -> float | None:
    """Smallest norm (pixels) at which the mean fooling rate of the points reaches a share.

    Between two norms of the grid the rate is taken as linear, from nothing at zero; None where it is not reached.
    """
    norm_before, rate_before = 0.0, 0.0
    for scale in sorted({point.scale for point in points}):
        own = select(points, scale=scale)
        norm, rate = fmean(getattr(point, f"norm_{point.norm}") for point in own), mean_rate(own)
        if rate >= share:
            return norm_before + (norm - norm_before) * (share - rate_before) / (rate - rate_before)
        norm_before, rate_before = norm, rate
    return None


def by_sample_size(points: Sequence[SampleSizePoint]) -> dict[int, list[SampleSizePoint]]:
    """Points grouped by number of training images, in ascending order."""
    numbers = sorted({point.num_images for point in points})
    return {number: [point for point in points if point.num_images == number] for number in numbers}


def phase_numbers(points: Sequence[Point]) -> dict[str, Any]:
    """For each norm and kind of direction: mean fooling rate at the perturbation's own norm, and the norm at which half are fooled."""
    kinds = list(dict.fromkeys(point.kind for point in points))
    return {
        norm: {
            "fooling_rates_at_own_norm": {k: mean_rate(select(points, kind=k, norm=norm, scale=1.0)) for k in kinds},
            "norms_at_half": {k: norm_at(select(points, kind=k, norm=norm), 0.5) for k in kinds},
        }
        for norm in NORM_NAMES
    }


def phase_finding(points: Sequence[Point]) -> str:
    """The finding on the phase transition, as one line of Markdown."""
    (own,) = select(points, kind=UNIVERSAL, norm="l2", scale=1.0)
    rates = phase_numbers(points)["l2"]["fooling_rates_at_own_norm"]
    best = max((kind for kind in rates if kind != UNIVERSAL), key=rates.__getitem__)
    return (
        f"*Phase transition:* the perturbation fools **{own.fooling}** held-out images. "
        f"{_halves(points)} At the perturbation's own ℓ2 norm, {own.norm_l2:.4g}, "
        f"the best of the other directions is *{best}* with {rates[best]:.3f}; a random vector fools {rates[SPHERE]:.3f}."
    )


def phase_section(points: Sequence[Point], num_train_images: int, num_summed: int) -> Iterator[str]:
    """The section on the phase transition: what was measured, how to read the picture, what it shows, and the numbers.

    Args:
        points: of the phase transition.
        num_train_images: training images from which directions were computed.
        num_summed: training images whose DeepFool perturbations are summed.
    """
    yield "## 1. Phase transition: how strong must a perturbation be?"
    yield (
        "Several directions are scaled to the same norms, and each is shown to all held-out images. DeepFool is the "
        "algorithm that finds the smallest step that takes one image across a decision boundary of the network. The "
        f"directions come from {num_train_images:,} training images:"
    )
    yield "\n".join(f"* *{kind}*: {meaning.format(num_summed=num_summed)}" for kind, meaning in KINDS.items())
    yield f"![Fooling rate against norm]({PHASE_PICTURE})"
    yield (
        "How to read it: the further to the left a line rises, the less is needed. A line runs through the mean of the "
        "draws of a kind; its shade reaches from the lowest to the highest end of their Wilson intervals. Left, all "
        "directions have the ℓ2 norm below; right, the ℓ∞ norm. Two panels, because a direction whose values are all "
        "equally large, such as random signs, is long for its ℓ∞ norm, and one with few large values is short."
    )
    yield (
        f"What it says of held-out images: {_halves(points)} In the paper "
        "(figure 8, CaffeNet, ImageNet) the universal perturbation fools 85 % at ℓ2 norm 2000, and random vectors of that norm 10 %."
    )
    for norm, name in NORM_NAMES.items():
        yield f"Fooling rate, mean of the draws, at multiples of the perturbation's own {name} norm:"
        own = select(points, norm=norm)
        scales = sorted({point.scale for point in own})
        lengths = [getattr(select(own, kind=UNIVERSAL, scale=scale)[0], f"norm_{norm}") for scale in scales]
        heads = [f"× {scale:g} ({length:.4g})" for scale, length in zip(scales, lengths, strict=True)]
        rows = [
            [kind, *(f"{mean_rate(select(own, kind=kind, scale=scale)):.3f}" for scale in scales)]
            for kind in dict.fromkeys(point.kind for point in own)
        ]
        yield markdown_table(["direction", *heads], rows)
    half = max((high - low) / 2 for low, high in (point.fooling.interval for point in points))
    yield f"Each draw by itself, with its interval (at most ±{half:.3f}): `tables/phase-transition.csv`."


def boundaries_numbers(boundaries: Boundaries) -> dict[str, Any]:
    """Key numbers on boundaries: dimensions and shares of the energy of normals and of random vectors, and mean fooling rates."""
    spectrum, random = boundaries.spectrum, boundaries.random
    num_singular = len(spectrum.vectors)
    return {
        "num_normals": spectrum.num_rows,
        "num_left_out": boundaries.num_left_out,
        "num_singular": num_singular,
        "largest_singular_value": float(spectrum.values[0]),
        "largest_singular_value_random": float(random.values[0]),
        "dimension_90": spectrum.dimension(ENERGY_SHARE),
        "dimension_90_random": random.dimension(ENERGY_SHARE),
        "energy_in_subspace": float(spectrum.shares[num_singular - 1]),
        "energy_in_subspace_random": float(random.shares[num_singular - 1]),
        "error_of_squared_values": spectrum.error,
        "norm_l2": boundaries.points[0].norm_l2,
        "fooling_rates": {
            kind: mean_rate(select(boundaries.points, kind=kind)) for kind in (SUBSPACE, SPHERE, UNIVERSAL)
        },
    }


def boundaries_finding(boundaries: Boundaries) -> str:
    """The finding on correlated boundaries, as one line of Markdown."""
    found = boundaries_numbers(boundaries)
    rates = found["fooling_rates"]
    own, random = _dimension(boundaries.spectrum), _dimension(boundaries.random)
    return (
        f"*Correlated boundaries:* 90 % of the energy of {found['num_normals']:,} unit normals lies in {own}, "
        f"that of as many random vectors lies in {random}. At ℓ2 norm {found['norm_l2']:.4g}, random vectors of the subspace "
        f"of the first {found['num_singular']} singular vectors fool **{rates[SUBSPACE]:.3f}** of the held-out images, "
        f"random vectors of the whole space {rates[SPHERE]:.3f}, the perturbation {rates[UNIVERSAL]:.3f}."
    )


def boundaries_section(boundaries: Boundaries) -> Iterator[str]:
    """The section on correlated boundaries, built like the one on the phase transition."""
    found = boundaries_numbers(boundaries)
    num_images = found["num_normals"] + found["num_left_out"]
    num_draws = len(select(boundaries.points, kind=SUBSPACE))
    yield "## 2. Correlated boundaries: why does one perturbation fool so many images?"
    yield (
        f"For each of {num_images:,} training images x, DeepFool finds the nearest decision boundary and its unit normal, "
        "which is r(x)/‖r(x)‖2 for the smallest step r(x) across it if no pixel of the step is held back by 0 or 255. Of these "
        f"images {found['num_left_out']:,} are "
        f"left out, because DeepFool did not reach a boundary. The {found['num_normals']:,} normals are the rows of a "
        "matrix. If the normals at different images had nothing to do with each other, its singular values would be "
        "those of random unit vectors; if they share few directions, few singular values are large."
    )
    yield f"![Singular values of the normals, and what their subspace fools]({BOUNDARIES_PICTURE})"
    yield (
        "How to read it: left, the singular values in descending order; the steeper, the more correlated. Middle, the "
        "share of the energy (sum of their squares) that so many leading dimensions hold. Right, fooling rates on "
        "held-out images, whose normals are not in the matrix: of random vectors of the subspace that the first "
        f"{found['num_singular']} singular vectors span, of random vectors of the whole space ({num_draws} each), and of "
        "the perturbation, all of one length. Bars are 95 % intervals."
    )
    times = found["largest_singular_value"] / found["largest_singular_value_random"]
    yield (
        f"What it says: the largest singular value is {times:.2g} times that of random vectors. The first "
        f"{found['num_singular']} dimensions hold {100 * found['energy_in_subspace']:.1f} % of the energy, of random vectors "
        f"{100 * found['energy_in_subspace_random']:.1f} %. In the paper (figure 9, CaffeNet, ImageNet, ℓ2 norm 2000) random "
        "vectors of the subspace of 100 singular vectors fool 38 %, random vectors of the whole space 10 %."
    )
    if boundaries.spectrum.error:
        yield (
            "Not all normals fitted into the memory (`--memory-gib`): the matrix was reduced to its leading directions "
            f"on the way. Each squared singular value is too small by {boundaries.spectrum.error:.3g} at most; all "
            f"together they are {boundaries.spectrum.energy:.0f}."
        )
    rows = []
    for kind in (SUBSPACE, SPHERE, UNIVERSAL):
        own = select(boundaries.points, kind=kind)
        rows.append([kind, f"{mean_rate(own):.3f}", "; ".join(str(point.fooling) for point in own)])
    yield markdown_table(["perturbation", "mean fooling rate", "each"], rows)


def sample_size_numbers(points: Sequence[SampleSizePoint]) -> list[dict[str, Any]]:
    """For each number of images: mean rates, and the standard deviation of the held-out rate over seeds (None for a single seed)."""
    found = []
    for number, own in by_sample_size(points).items():
        rates = [point.val.rate for point in own]
        found.append(
            {
                "num_images": number,
                "num_seeds": len(own),
                "val_fooling_rate": fmean(rates),
                "val_fooling_rate_sd": stdev(rates) if len(rates) > 1 else None,
                "images_per_round": fmean(point.images_per_round for point in own),
                "train_fooling_rate": fmean(point.train.rate for point in own),
            }
        )
    return found


def sample_size_finding(points: Sequence[SampleSizePoint]) -> str:
    """The finding on the number of images, as one line of Markdown."""
    found = sample_size_numbers(points)
    fewest, most = found[0], found[-1]
    seeds = f"means over {most['num_seeds']} seeds" if most["num_seeds"] > 1 else "one seed"
    if len(found) == 1:
        return (
            f"*Number of images:* computed from {most['num_images']:,} training images, a perturbation fools "
            f"**{most['val_fooling_rate']:.3f}** of the held-out images ({seeds})."
        )
    intervals = [point.val.interval for point in points if point.num_images == most["num_images"]]
    half = max((high - low) / 2 for low, high in intervals)
    enough = next(each for each in found if each["val_fooling_rate"] >= most["val_fooling_rate"] - half)
    return (
        f"*Number of images:* computed from {fewest['num_images']:,} training images, a perturbation fools "
        f"**{fewest['val_fooling_rate']:.3f}** of the held-out images; from {most['num_images']:,}, "
        f"{most['val_fooling_rate']:.3f} ({seeds}). {enough['num_images']:,} images give as "
        f"much as {most['num_images']:,} to within {half:.3f}, half a 95 % interval."
    )


def sample_size_section(points: Sequence[SampleSizePoint]) -> Iterator[str]:
    """The section on the number of images, built like the one on the phase transition."""
    yield "## 3. How many images does it take to compute one?"
    yield (
        "From each number of training images (in blocks that are evenly spread over all) perturbations are computed anew, one for each "
        "seed, as the analysed one was: same rule, same ball, and as many network evaluations for increments, so that "
        "with fewer images each is visited more often and the work stays the same. (The clean labels of the training images, one "
        "evaluation each, come on top. The rate also depends on the images per round, which the last column shows.)"
    )
    yield f"![Fooling rate against the number of training images]({NUMBERS_PICTURE})"
    yield (
        "How to read it: each dot is one perturbation, with its 95 % interval on the held-out images; lines run through "
        "the means. Where the grey line, the rate on the perturbation's own training images, lies above the blue one, "
        "the perturbation fits these images better than others."
    )
    yield (
        f"What it says: {sample_size_finding(points).partition(':* ')[2]} In the paper (figure 6, GoogLeNet, ImageNet) 500 "
        "images, fewer than there are classes, already give more than 30 %."
    )
    each = ["; ".join(str(point.val) for point in own) for own in by_sample_size(points).values()]
    rows = [
        [
            f"{row['num_images']:,}",
            f"{row['val_fooling_rate']:.3f}" + (f" ± {row['val_fooling_rate_sd']:.3f}" if row["num_seeds"] > 1 else ""),
            seeds,
            f"{row['train_fooling_rate']:.3f}",
            f"{row['images_per_round']:.1f}",
        ]
        for row, seeds in zip(sample_size_numbers(points), each, strict=True)
    ]
    yield markdown_table(
        ["training images", "held-out, mean ± sd", "held-out, each seed", "training, mean", "images a round"], rows
    )


def _halves(points: Sequence[Point]) -> str:
    """The norms at which the perturbation and a random vector fool half of the images, in words."""
    return f"{_half(points, UNIVERSAL, 'The perturbation')}. {_half(points, SPHERE, 'A random vector')}."


def _half(points: Sequence[Point], kind: str, subject: str) -> str:
    """The ℓ2 norm at which one kind of direction fools half of the images, in words."""
    own = select(points, kind=kind, norm="l2")
    half, unit = norm_at(own, 0.5), select(points, kind=UNIVERSAL, norm="l2", scale=1.0)[0].norm_l2
    if half is not None:
        return f"{subject} fools half of them from ℓ2 norm {half:.3g} on, {half / unit:.2f} of the perturbation's own"
    last = max(own, key=lambda point: point.scale)
    rate = mean_rate(select(own, scale=last.scale))
    return (
        f"{subject} fools {rate:.3f} at ℓ2 norm {last.norm_l2:.4g}, and never reaches half in the range that was tested"
    )


def _dimension(spectrum: Spectrum) -> str:
    """The number of dimensions with 90 % of the energy, in words."""
    dimension = spectrum.dimension(ENERGY_SHARE)
    if dimension is None:
        return f"an unknown number of dimensions (the {len(spectrum.values)} kept hold at least {100 * spectrum.shares[-1]:.0f} %)"
    return f"at most {dimension:,} dimensions" if spectrum.error else f"{dimension:,} dimensions"
