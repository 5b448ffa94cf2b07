"""The results of an analysis in words: key numbers, a one-sentence finding and a section of the Markdown report for each part."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from uap_dist.analysis.boundaries import SUBSPACE, BoundaryCorrelation
from uap_dist.analysis.phase_transition import MEAN, SIGNS, SINGLE, SPHERE, SUM, UNIVERSAL, Point
from uap_dist.analysis.sample_size import SampleSizePoint
from uap_dist.analysis.spectrum import Spectrum
from uap_dist.method.norms import SYMBOLS, Norm
from uap_dist.tracking.outputs import markdown_table

PHASE_PICTURE = "pictures/1-phase-transition.png"
BOUNDARIES_PICTURE = "pictures/2-singular-values.png"
NUMBERS_PICTURE = "pictures/3-number-of-images.png"
ENERGY_SHARE = 0.9
NORMS: tuple[Norm, ...] = ("l2", "linf")  # in the order of the figures
KINDS = {
    UNIVERSAL: "the perturbation that this report is about",
    SPHERE: "drawn uniformly from a sphere; the baseline for the ℓ2 norm",
    SIGNS: "each value is plus or minus the same number, at random; the baseline for the ℓ∞ norm",
    SINGLE: "DeepFool's step for one training image, which is drawn at random",
    SUM: "the sum of DeepFool's steps for {num_summed:,} training images",
    MEAN: "the mean of all {num_train_images:,} training images",
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
        for norm in NORMS
    }


def phase_finding(points: Sequence[Point]) -> str:
    """The finding on the phase transition, as one line of Markdown."""
    (own,) = select(points, kind=UNIVERSAL, norm="l2", scale=1.0)
    rates = phase_numbers(points)["l2"]["fooling_rates_at_own_norm"]
    best = max((kind for kind in rates if kind != UNIVERSAL), key=rates.__getitem__)
    return (
        f"*Phase transition:* the perturbation fools **{own.fooling}** held-out images. {_halves(points)} "
        f"Of the other directions, scaled to the perturbation's own ℓ2 norm, {own.norm_l2:.4g}, *{best}* fools most images, "
        f"{rates[best]:.3f}; a random vector fools {rates[SPHERE]:.3f}."
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
        "Several directions are scaled to the same norms, and each is added to all held-out images. Some of them are steps of "
        "DeepFool, the algorithm that finds the smallest step by which one image crosses a decision boundary of the network."
    )
    counts = {"num_summed": num_summed, "num_train_images": num_train_images}
    yield "\n".join(f"* *{kind}*: {meaning.format(**counts)}" for kind, meaning in KINDS.items())
    yield f"![Fooling rate against norm]({PHASE_PICTURE})"
    yield (
        "How to read it: the further left a line rises, the smaller is the perturbation that suffices. Where there are several "
        "draws of a kind, the line is their mean, and the band around it covers all their 95 % intervals. In the left panel "
        "all directions have the same ℓ2 norm, in the right panel the same ℓ∞ norm. The panels differ, because of two "
        "directions with the same ℓ∞ norm the one whose values are all equally large, such as random signs, has a much "
        "larger ℓ2 norm than one with few large values."
    )
    yield (
        f"What it shows, on the held-out images: {_halves(points)} In the paper "
        "(figure 8, CaffeNet, ImageNet) the universal perturbation fools 85 % at ℓ2 norm 2000, and random vectors of that norm 10 %."
    )
    for norm in NORMS:
        yield f"Mean fooling rate of the draws, at multiples of the perturbation's own {SYMBOLS[norm]} norm (that norm is in brackets):"
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
    yield f"`tables/phase-transition.csv` has each draw with its 95 % interval, which is at most ±{half:.3f}."


def boundaries_numbers(boundaries: BoundaryCorrelation) -> dict[str, Any]:
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


def boundaries_finding(boundaries: BoundaryCorrelation) -> str:
    """The finding on correlated boundaries, as one line of Markdown."""
    found = boundaries_numbers(boundaries)
    rates = found["fooling_rates"]
    own, random = _dimension(boundaries.spectrum), _dimension(boundaries.random)
    return (
        f"*Correlated boundaries:* 90 % of the energy (sum of squares) of {found['num_normals']:,} unit normals lies in {own}, "
        f"90 % of that of as many random vectors in {random}. At an ℓ2 norm of {found['norm_l2']:.4g}, random vectors of the "
        f"subspace that the first {found['num_singular']} singular vectors span fool **{rates[SUBSPACE]:.3f}** of the held-out "
        f"images, random vectors of the whole space {rates[SPHERE]:.3f}, and the perturbation, scaled to that norm, "
        f"{rates[UNIVERSAL]:.3f}."
    )


def boundaries_section(boundaries: BoundaryCorrelation) -> Iterator[str]:
    """The section on correlated boundaries, built like the one on the phase transition."""
    found = boundaries_numbers(boundaries)
    num_images = found["num_normals"] + found["num_left_out"]
    num_draws = len(select(boundaries.points, kind=SUBSPACE))
    left_out = (
        f"It reached none from {found['num_left_out']:,} images, which are left out. " if found["num_left_out"] else ""
    )
    yield "## 2. Correlated boundaries: why does one perturbation fool so many images?"
    yield (
        f"For each of {num_images:,} training images, DeepFool finds the nearest decision boundary of the network and its unit "
        "normal, which is the direction of the smallest step to that boundary (unless the step is held back by pixels that are "
        f"already 0 or 255). {left_out}The {found['num_normals']:,} normals are the rows of a matrix. If the normals at "
        "different images had nothing in common, the singular values of the matrix would be those of random unit vectors. If "
        "they share a few directions, a few singular values are large and the others are small."
    )
    yield f"![Singular values of the normals, and what their subspace fools]({BOUNDARIES_PICTURE})"
    yield (
        "How to read it: the left panel has the singular values in descending order. The steeper the line falls, the more the "
        "normals have in common. The middle panel has the share of the energy (the sum of the squared singular values) that the "
        "leading dimensions hold. The right panel has fooling rates on held-out images, whose normals are not in the matrix: of "
        f"random vectors of the subspace that the first {found['num_singular']} singular vectors span, of random vectors of the "
        f"whole space ({num_draws} each), and of the perturbation, all with the same ℓ2 norm. Bars are 95 % intervals."
    )
    times = found["largest_singular_value"] / found["largest_singular_value_random"]
    yield (
        f"What it shows: the largest singular value is {times:.2g} times as large as that of random vectors. The first "
        f"{found['num_singular']} dimensions hold {100 * found['energy_in_subspace']:.1f} % of the energy of the normals, and "
        f"{100 * found['energy_in_subspace_random']:.1f} % of that of random vectors. In the paper (figure 9, CaffeNet, "
        "ImageNet, ℓ2 norm 2000) random vectors of the subspace of 100 singular vectors fool 38 %, and random vectors of the "
        "whole space 10 %."
    )
    if boundaries.spectrum.error:
        yield (
            "The normals did not all fit into the memory (`--memory-gib`), so the matrix was reduced to its leading directions "
            f"on the way. Each squared singular value is therefore too small, by at most {boundaries.spectrum.error:.3g}; their "
            f"sum is {boundaries.spectrum.energy:.0f}."
        )
    rows = []
    for kind in (SUBSPACE, SPHERE, UNIVERSAL):
        own = select(boundaries.points, kind=kind)
        rows.append([kind, f"{mean_rate(own):.3f}", "; ".join(str(point.fooling) for point in own)])
    yield markdown_table(["perturbation", "mean fooling rate", "fooling rate of each draw"], rows)


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
    already = f"{enough['num_images']:,} images already give a rate that is at most"
    fewer = already if enough is not most else "Every smaller number gives a rate that is more than"
    return (
        f"*Number of images:* computed from {fewest['num_images']:,} training images, a perturbation fools "
        f"**{fewest['val_fooling_rate']:.3f}** of the held-out images; from {most['num_images']:,}, "
        f"{most['val_fooling_rate']:.3f} ({seeds}). {fewer} {half:.3f} lower, half a 95 % interval."
    )


def sample_size_section(points: Sequence[SampleSizePoint]) -> Iterator[str]:
    """The section on the number of images, built like the one on the phase transition."""
    yield "## 3. How many images does it take to compute one?"
    yield (
        "From each number of training images, perturbations are computed anew, one for each seed, as the analysed one was: by "
        "the same rule, in the same ball, and with as many network evaluations for increments. With fewer images each is "
        "visited more often, so the work stays the same; only the clean labels of the training images, one evaluation each, "
        "come on top. The images are taken in blocks that are evenly spread over all of them. The rate also depends on the "
        "number of images per round, which is in the last column."
    )
    yield f"![Fooling rate against the number of training images]({NUMBERS_PICTURE})"
    yield (
        "How to read it: each dot is the rate of one perturbation on the held-out images, with its 95 % interval, and the blue "
        "line runs through the means. The grey line has the mean rates on the images that the perturbations were computed "
        "from. Where it lies above the blue line, they fool those images more often than others."
    )
    yield (
        f"What it shows: {sample_size_finding(points).partition(':* ')[2]} In the paper (figure 6, GoogLeNet, ImageNet) 500 "
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
        return f"{subject} fools half of them from an ℓ2 norm of {half:.3g} on, {half / unit:.2f} times the perturbation's own"
    last = max(own, key=lambda point: point.scale)
    rate = mean_rate(select(own, scale=last.scale))
    return f"{subject} fools {rate:.3f} of them at the largest ℓ2 norm that was tested, {last.norm_l2:.4g}, so it never reaches half"


def _dimension(spectrum: Spectrum) -> str:
    """The number of dimensions with 90 % of the energy, in words."""
    dimension = spectrum.dimension(ENERGY_SHARE)
    if dimension is None:
        return f"an unknown number of dimensions (the {len(spectrum.values)} kept hold at least {100 * spectrum.shares[-1]:.0f} %)"
    return f"at most {dimension:,} dimensions" if spectrum.error else f"{dimension:,} dimensions"
