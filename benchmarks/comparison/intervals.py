"""Means of seeds, in words."""

from statistics import mean, stdev

from scipy.stats import t as student


def spread(rates: list[float]) -> str:
    """Mean and standard deviation."""
    return f"**{mean(rates):.3f}**" + (f" ± {stdev(rates):.3f}" if len(rates) > 1 else "")


def interval(differences: list[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    if len(differences) < 2:
        return "–"
    return f"{mean(differences):+.3f} ± {half_interval(differences):.3f}"


def half_interval(differences: list[float]) -> float:
    """Of the 95 % interval of Student's t, half its width."""
    return float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
