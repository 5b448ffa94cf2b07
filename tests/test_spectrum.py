import numpy as np
import pytest
import torch

from uap_dist.analysis.spectrum import Sketch, count_rows
from uap_dist.errors import ConfigError

ROOMY = 1 << 26


def decaying_rows(num_rows, num_columns, seed=0):
    """Unit rows that a few directions hold most of."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, num_columns)) * 0.8 ** np.arange(num_columns)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def sketched(rows, memory_bytes, piece=7):
    sketch = Sketch(rows.shape[1], memory_bytes)
    for start in range(0, len(rows), piece):
        sketch.add(rows[start : start + piece])
    return sketch


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40), (1, 5)])
def test_what_fits_has_the_singular_values_and_vectors_of_the_matrix(shape):
    rows = decaying_rows(*shape)
    count = min(8, *shape)
    spectrum = sketched(rows, ROOMY).spectrum(count)
    _, values, vectors = torch.linalg.svd(torch.from_numpy(rows).double(), full_matrices=False)
    assert spectrum.error == 0 and spectrum.num_rows == shape[0] and len(spectrum.values) == min(shape)
    np.testing.assert_allclose(spectrum.values, torch.linalg.svdvals(torch.from_numpy(rows).double()), atol=2e-7)
    assert spectrum.energy == pytest.approx(shape[0], rel=1e-6)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(count), atol=1e-5)
    alignment = np.abs((spectrum.vectors * vectors[:count].numpy()).sum(1))
    np.testing.assert_allclose(alignment, 1, atol=1e-5)
    assert values[0] == pytest.approx(spectrum.values[0])


@pytest.mark.parametrize(("num_columns", "memory_bytes"), [(300, 40_000), (60, 260_000)])
def test_what_does_not_fit_keeps_the_leading_values_within_the_error_it_says(num_columns, memory_bytes):
    rows = decaying_rows(2000, num_columns)
    sketch = sketched(rows, memory_bytes)
    assert sketch.capacity < 2000 and (sketch.capacity <= num_columns) == (num_columns == 300)
    spectrum = sketch.spectrum(5)
    true = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    kept = len(spectrum.values)
    assert kept == min(sketch.capacity // 2, num_columns) and spectrum.num_rows == 2000
    assert (np.square(spectrum.values) <= np.square(true[:kept]) + 1e-3).all()
    assert (np.square(true[:kept]) <= np.square(spectrum.values) + spectrum.error + 1e-3).all()
    np.testing.assert_allclose(spectrum.values[:5], true[:5], rtol=1e-3)
    np.testing.assert_allclose(spectrum.vectors @ spectrum.vectors.T, np.eye(5), atol=1e-5)
    assert spectrum.dimension(0.9) >= int((np.cumsum(true**2) < 0.9 * 2000).sum()) + 1


def test_rows_of_low_rank_lose_nothing_when_they_do_not_fit():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(500, 4)) @ rng.normal(size=(4, 200))).astype(np.float32)
    sketch = sketched(rows, 30_000)
    assert sketch.capacity < 100
    true = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    spectrum = sketch.spectrum(4)
    np.testing.assert_allclose(spectrum.values[:4], true[:4], rtol=1e-5)
    assert spectrum.error < 1e-6 * spectrum.energy


def test_the_dimension_that_holds_a_share_is_what_one_counts():
    orthonormal, equal = np.eye(20, 50, dtype=np.float32), np.zeros((20, 50), np.float32)
    equal[:, 3] = 1
    assert sketched(orthonormal, ROOMY).spectrum(20).dimension(0.9) == 18
    assert sketched(orthonormal, ROOMY).spectrum(0).dimension(1.0) == 20
    assert sketched(equal, ROOMY).spectrum(1).dimension(0.9) == 1
    with pytest.raises(ConfigError, match="2 singular vectors asked for, but the 20 rows span only 1 dimensions"):
        sketched(equal, ROOMY).spectrum(2)


def test_a_share_that_the_kept_values_do_not_reach_has_no_dimension():
    rows = np.random.default_rng(0).normal(size=(1000, 300)).astype(np.float32)
    assert sketched(rows, 100_000).spectrum(0).dimension(0.9) is None


@pytest.mark.parametrize(("num_columns", "memory_bytes"), [(10, 10_000), (300, 40_000), (150_528, 1 << 31)])
def test_capacity_fills_the_memory(num_columns, memory_bytes):
    def needed(k):
        return 4 * k * num_columns + 40 * min(k, num_columns) ** 2

    k = count_rows(num_columns, memory_bytes)
    assert needed(k) <= memory_bytes < needed(k + 2)
    with pytest.raises(ConfigError, match="do not hold two rows"):
        Sketch(num_columns, 8 * num_columns)
