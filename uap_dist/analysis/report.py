"""The files of an analysis: a report as Markdown and as one HTML file, pictures, tables and result.json."""

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from uap_dist.analysis import plots
from uap_dist.analysis import text as text
from uap_dist.analysis.boundaries import BoundaryCorrelation
from uap_dist.analysis.phase_transition import Point
from uap_dist.analysis.sample_size import SampleSizePoint
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.norms import measure
from uap_dist.method.rates import flatten_rates
from uap_dist.perturbations.files import Perturbation
from uap_dist.tracking.outputs import RESULT_FILE, markdown_table, save_table, writes_files

REPORT_FILE = "report"  # .md and .html
PICTURES = (text.PHASE_PICTURE, text.BOUNDARIES_PICTURE, text.NUMBERS_PICTURE)
PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% }
table { border-collapse: collapse; font-size: 85%; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left }
code { overflow-wrap: anywhere }
</style>
</head>
<body>
{{ body }}</body>
</html>
""")


@dataclass(frozen=True)
class FinishedAnalysis:
    """Results of an analysis.

    Attributes:
        perturbation: the analysed perturbation.
        phase: points of the phase transition, including scale 1; empty if it was not measured.
        boundaries: None if they were not measured.
        numbers: a point for each number of training images and seed; empty if not measured.
        num_train_images, num_solved: training images from which directions were computed; training images given to DeepFool.
        provenance: network, data, options, versions.
        mlflow_run_id: MLflow run of the analysis.
    """

    perturbation: Perturbation
    phase: Sequence[Point]
    boundaries: BoundaryCorrelation | None
    numbers: Sequence[SampleSizePoint]
    num_train_images: int
    num_solved: int
    provenance: Mapping[str, Any]
    mlflow_run_id: str

    def result(self) -> dict[str, Any]:
        """The contents of result.json, apart from the provenance."""
        return {
            "norm_l2": measure(self.perturbation.v, "l2"),
            "norm_linf": measure(self.perturbation.v, "linf"),
            "phase_transition": text.phase_numbers(self.phase) if self.phase else None,
            "boundaries": text.boundaries_numbers(self.boundaries) if self.boundaries else None,
            "number_of_images": text.sample_size_numbers(self.numbers) if self.numbers else None,
            "mlflow_run_id": self.mlflow_run_id,
        }

    def metrics(self) -> dict[str, float]:
        """Key numbers by their names in MLflow, without those that were not measured or not reached."""
        found: dict[str, float | None] = {}
        for norm, values in text.phase_numbers(self.phase).items() if self.phase else ():
            for name, by_kind in (("at_own_norm", "fooling_rates_at_own_norm"), ("norm_at_half", "norms_at_half")):
                found |= {f"phase/{norm}/{name}/{_key(kind)}": value for kind, value in values[by_kind].items()}
        if self.boundaries:
            numbers = text.boundaries_numbers(self.boundaries)
            rates = numbers.pop("fooling_rates")
            found |= {f"boundaries/{name}": value for name, value in numbers.items()}
            found |= {f"boundaries/fooling_rate/{_key(kind)}": rate for kind, rate in rates.items()}
        for each in text.sample_size_numbers(self.numbers):
            found[f"images/{each['num_images']}"] = each["val_fooling_rate"]
        return {name: float(value) for name, value in found.items() if value is not None}

    def summary(self) -> str:
        """A summary of the findings in Markdown."""
        findings = []
        if self.phase:
            findings.append(text.phase_finding(self.phase))
        if self.boundaries:
            findings.append(text.boundaries_finding(self.boundaries))
        if self.numbers:
            findings.append(text.sample_size_finding(self.numbers))
        name, model = escape_markdown(self.perturbation.name), escape_markdown(self.provenance["model"])
        about = f"Analysis of the universal perturbation *{name}* on **{model}**."
        return "\n\n".join([about, *self._origin(), "\n".join(f"* {finding}" for finding in findings)])

    def markdown(self) -> str:
        """The complete report in Markdown."""
        v = self.perturbation.v
        parts = [
            "# Analysis of a universal adversarial perturbation",
            self.summary(),
            f"A universal perturbation is one array v ({'×'.join(map(str, v.shape))}) that, added to almost any image, "
            "changes the label that a classifier gives it. Pixels have values from 0 to 255. The values of this v lie between "
            f"±{measure(v, 'linf'):.4g} (its ℓ∞ norm), and its length is {measure(v, 'l2'):.4g} (its ℓ2 norm, the root of the "
            "sum of squares). An image x is *fooled* if the classifier gives x + v, clipped to 0..255, another label than x. "
            "The *fooling rate* is the share of images that are fooled; unless stated otherwise, of held-out images, from "
            "which nothing was computed. [low, high] after a rate is its 95 % Wilson interval: the rate of very many such "
            "images would probably lie there.",
            "The three questions of this report are those of section 4 of Moosavi-Dezfooli, Fawzi, Fawzi and Frossard, *Universal "
            "adversarial perturbations*, CVPR 2017 (arXiv 1610.08401), which is called the paper below.",
        ]
        if self.phase:
            parts += text.phase_section(self.phase, self.num_train_images, self.num_solved)
        if self.boundaries:
            parts += text.boundaries_section(self.boundaries)
        if self.numbers:
            parts += text.sample_size_section(self.numbers)
        rows = [
            [escape_markdown(name), "default" if value in (None, ()) else escape_markdown(_in_words(value))]
            for name, value in self.provenance.items()
        ]
        parts += [
            "## Where this comes from",
            markdown_table(["what", "value"], [*rows, ["MLflow run", self.mlflow_run_id]]),
        ]
        return "\n\n".join(parts) + "\n"

    def _origin(self) -> list[str]:
        """A note if the perturbation was computed for another network or does not say for which; otherwise nothing."""
        origin = self.perturbation.provenance
        digest = origin.get("weights_digest")
        if digest is None:
            return ["The perturbation does not say which network it was computed for; it may be another one than this."]
        if not self.perturbation.is_for(self.provenance["weights_digest"]):
            model, said = escape_markdown(origin.get("model", "unnamed")), escape_markdown(str(digest)[:12])
            return [
                f"**The perturbation was computed for another network**, {model} (weights {said}…): "
                "the fooling rates here show how it transfers."
            ]
        return []


@writes_files
def save_analysis(folder: Path, finished: FinishedAnalysis) -> None:
    """Write all files of an analysis: pictures/, tables/, report.md and report.html, result.json last."""
    for name in ("pictures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if finished.phase:
        plots.save_phase_transition(folder / text.PHASE_PICTURE, finished.phase)
        save_table(folder / "tables/phase-transition", [flatten_rates(vars(point)) for point in finished.phase])
    if finished.boundaries:
        plots.save_boundaries(folder / text.BOUNDARIES_PICTURE, finished.boundaries)
        save_table(folder / "tables/subspace", [flatten_rates(vars(point)) for point in finished.boundaries.points])
        pairs = zip(finished.boundaries.spectrum.values, finished.boundaries.random.values, strict=True)
        rows = [{"index": i, "normals": own, "random": other} for i, (own, other) in enumerate(pairs, start=1)]
        save_table(folder / "tables/singular-values", rows)
    if finished.numbers:
        plots.save_number_of_images(folder / text.NUMBERS_PICTURE, finished.numbers)
        save_table(folder / "tables/number-of-images", [flatten_rates(vars(point)) for point in finished.numbers])
    markdown = finished.markdown()
    (folder / f"{REPORT_FILE}.md").write_text(markdown, encoding="utf-8")
    (folder / f"{REPORT_FILE}.html").write_text(to_html(markdown, folder), encoding="utf-8")
    result = finished.result() | {"provenance": finished.provenance}
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def to_html(markdown: str, folder: Path) -> str:
    """A self-contained HTML page of a report.

    Args:
        markdown: the report, whose first line is its title. HTML in it is escaped.
        folder: folder with the report's own pictures, which are embedded. Any other image is replaced by an empty one and not read.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        source = image.attrs["src"]
        data = (folder / source).read_bytes() if source in PICTURES else b""
        image.attrs["src"] = f"data:image/png;base64,{b64encode(data).decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    title = markdown.partition("\n")[0].lstrip("# ")
    return PAGE.render(title=title, body=Markup(body))  # the parser has escaped the body


def _in_words(value: object) -> object:
    """Several values as the command line has them."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _key(name: str) -> str:
    """A kind of direction as part of a metric's name."""
    return re.sub(r"\W+", "_", name)
