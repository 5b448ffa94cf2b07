import re
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest
import torch

from uap_dist.analysis.boundaries import SUBSPACE, BoundaryCorrelation
from uap_dist.analysis.phase_transition import MEAN, SIGNS, SINGLE, SPHERE, SUM, UNIVERSAL, Point
from uap_dist.analysis.report import FinishedAnalysis, save_analysis, to_html
from uap_dist.analysis.sample_size import SampleSizePoint
from uap_dist.analysis.spectrum import Spectrum
from uap_dist.analysis.text import boundaries_finding, norm_at, phase_finding, sample_size_finding
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.rates import Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.tracking.outputs import markdown_table

SLOPES = {UNIVERSAL: 40, SPHERE: 5, SIGNS: 6, SINGLE: 10, SUM: 20, MEAN: 0}  # of 100 images, at the norm 10 and scale 1


def phase(slopes=SLOPES, scales=(0.5, 1.0, 2.0)):
    return [
        Point(kind, draw, norm, scale, 10 * scale, 10 * scale, Rate(int(slope * scale) + draw, 100))
        for norm in ("l2", "linf")
        for kind, slope in slopes.items()
        for draw in range(2 if kind == SPHERE else 1)
        for scale in scales
    ]


def finished(provenance, points=()):
    said = {"model": "net", "weights_digest": "ab" * 32}
    return FinishedAnalysis(
        Perturbation("v", torch.full((3, 4, 4), 2.0), provenance), points or phase(), None, [], 9, 9, said, "run"
    )


def test_only_what_was_measured_is_saved(tmp_path):
    save_analysis(tmp_path, finished({}))
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {"phase-transition.csv", "phase-transition.parquet"}
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["1-phase-transition.png"]
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 1 and "<h2>2." not in html and "<h2>3." not in html


@pytest.mark.parametrize(
    ("provenance", "sentence"),
    [
        ({}, "The perturbation does not say which network it was computed for"),
        (
            {"weights_digest": "cd" * 32, "model": "other"},
            "computed for another network**, other (weights cdcdcdcdcdcd…)",
        ),
        ({"weights_digest": "ab" * 32, "model": "net"}, ""),
    ],
)
def test_whose_perturbation_it_is_is_said(provenance, sentence):
    summary = finished(provenance).summary()
    assert sentence in summary and ("computed for" in summary) == bool(sentence)


def test_the_norm_of_a_share_lies_on_the_line_between_its_neighbours():
    points = [p for p in phase() if p.kind == UNIVERSAL and p.norm == "l2"]  # 0.2 at 5, 0.4 at 10, 0.8 at 20
    assert norm_at(points, 0.5) == pytest.approx(12.5)
    assert norm_at(points, 0.1) == pytest.approx(2.5)
    assert norm_at(points, 0.4) == pytest.approx(10)
    assert norm_at(points, 0.9) is None


def test_the_findings_are_the_numbers():
    text = phase_finding(phase())
    assert "**0.400 [0.309, 0.498] of 100**" in text
    assert "The perturbation fools half of them from an ℓ2 norm of 12.5 on, 1.25 times the perturbation's own" in text
    assert (
        "A random vector fools 0.105 of them at the largest ℓ2 norm that was tested, 20, so it never reaches half"
        in text
    )
    assert (
        "own ℓ2 norm, 10, *sum of DeepFool perturbations* fools most images, 0.200; a random vector fools 0.055" in text
    )
    metrics = finished({}).metrics()
    assert metrics["phase/l2/norm_at_half/universal_perturbation"] == 12.5
    assert metrics["phase/linf/at_own_norm/random_vector"] == pytest.approx(0.055)
    assert "phase/l2/norm_at_half/mean_image" not in metrics and all(np.isfinite(list(metrics.values())))


def test_enough_images_are_the_fewest_within_half_an_interval():
    rates = {10: (30, 34), 20: (72, 78), 40: (80, 80)}
    points = [
        SampleSizePoint(n, s, Rate(hits, 100), Rate(9, 10), 5, 6.0)
        for n, each in rates.items()
        for s, hits in enumerate(each)
    ]
    text = sample_size_finding(points)
    assert (
        "from 10 training images, a perturbation fools **0.320**" in text
        and "from 40, 0.800 (means over 2 seeds)" in text
    )
    assert "20 images already give a rate that is at most 0.078 lower" in text
    assert sample_size_finding(points[:1]).endswith("fools **0.300** of the held-out images (one seed).")


def test_names_stay_inside_their_cell_and_are_no_html(tmp_path):
    html = to_html(
        "# A & B\n\n"
        + markdown_table(["a", "b"], [[escape_markdown(name) for name in ("x|y", "<script>alert(1)</script>")]]),
        tmp_path,
    )
    assert "<title>A &amp; B</title>" in html and "<script>" not in html and html.count("<td") == 2


HOSTILE = (
    "x** ![](pictures/../../secret.png) ![](/etc/hostname) ![](http://127.0.0.1:9/x) [a](javascript:alert(1)) | b `c`\n\n"
    "# heading\n\n<script>alert(1)</script>\n| d | e |\n\x1b]0;title\x07"
)


def test_what_a_file_says_of_itself_is_shown_and_not_obeyed(tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    said = {"weights_digest": HOSTILE, "model": HOSTILE}
    perturbation = Perturbation(HOSTILE, torch.full((3, 4, 4), 2.0), said)
    analysis = replace(
        finished({}), perturbation=perturbation, provenance={"model": HOSTILE, "weights_digest": "ab", HOSTILE: HOSTILE}
    )
    save_analysis(tmp_path / "report", analysis)
    html = (tmp_path / "report/report.html").read_text()
    assert html.count("<img") == html.count("data:image/png;base64,") == 1 and b64encode(b"secret").decode() not in html
    assert not re.search("<script|<a |<h1>heading|\x1b", html)
    assert "![](/etc/hostname)" in html and "&lt;script&gt;alert(1)&lt;/script&gt; | d | e |" in html


@pytest.mark.parametrize(
    "source", ["pictures/../secret.png", "/etc/hostname", "secret.png", "http://127.0.0.1:9/x.png", "file:///etc/x"]
)
def test_only_the_reports_own_pictures_are_read(tmp_path, source):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "secret.png").write_text("secret")
    html = to_html(f"# A\n\n![]({source})", tmp_path)
    assert f'="{source}' not in html and 'src=""' not in html and b64encode(b"secret").decode() not in html


def test_dimensions_of_a_reduced_matrix_are_bounds():
    def finding(values, error):
        spectrum = Spectrum(np.array(values), np.eye(1, 3, dtype=np.float32), 4, 4.0, error)
        points = [Point(kind, 0, "l2", 1.0, 7.0, 1.0, Rate(1, 10)) for kind in (UNIVERSAL, SUBSPACE, SPHERE)]
        return boundaries_finding(BoundaryCorrelation(spectrum, spectrum, 0, points))

    assert "4 unit normals lies in 2 dimensions," in finding([1.8, 0.8, 0.35], 0.0)
    assert "lies in at most 2 dimensions," in finding([1.8, 0.8], 0.1)
    assert "lies in an unknown number of dimensions (the 2 kept hold at least 50 %)," in finding([1.0, 1.0], 0.1)
