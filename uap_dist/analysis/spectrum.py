"""Singular values of a matrix whose rows arrive one after another, in bounded memory."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from uap_dist.errors import ConfigError

CHUNK_BYTES = 1 << 26  # of the float64 copy that sums of products are taken from
EIGH_BYTES = 40  # per entry of a symmetric matrix: itself, its eigenvectors, LAPACK's workspace
RANK_TOLERANCE = 1e-6  # of the largest singular value; float32 rows leave 1e-7 of noise


@dataclass(frozen=True)
class Spectrum:
    """Singular values and leading right singular vectors of a matrix of n rows.

    Attributes:
        values: float64, descending; all singular values, or the leading ones if not all rows were kept.
        vectors: K×D float32, orthonormal rows.
        num_rows: n.
        energy: sum of the squares of all n·D entries, which is that of all squared singular values.
        error: upper bound on how much each squared value is too small; 0 if all rows were kept.
    """

    values: np.ndarray
    vectors: np.ndarray
    num_rows: int
    energy: float
    error: float

    @property
    def shares(self) -> np.ndarray:
        """Share of the energy (0..1) that the first 1, 2, … dimensions hold."""
        return np.cumsum(np.square(self.values)) / self.energy

    def dimension(self, share: float) -> int | None:
        """Number of leading dimensions that hold a share of the energy.

        If not all rows were kept (`error` > 0), it is an upper bound, and None means that the kept values do not reach the share.
        """
        reached = np.flatnonzero(self.shares >= share - 1e-12)
        return int(reached[0]) + 1 if len(reached) else None


class Sketch:
    """A matrix of bounded size to which rows are added.

    As long as all rows fit, they are kept unchanged. When the matrix A is full, it is replaced by diag(s) Vᵀ of the larger half of its
    singular values s. This reduces each squared singular value by at most the largest square that was dropped. Nothing is lost if the
    rank of the rows is at most half the capacity.

    Source: the sequential Karhunen-Loève update of Levy and Lindenbaum (2000), halving at once as frequent directions
    (Liberty 2013) does; without its shrinking, which would make the leading values smaller.
    """

    def __init__(self, num_columns: int, memory_bytes: int) -> None:
        """Start with an empty matrix; its memory is only used as rows arrive.

        Raises:
            ConfigError: the memory does not hold two rows.
        """
        self.capacity = count_rows(num_columns, memory_bytes)
        if self.capacity < 2:
            raise ConfigError(
                f"{memory_bytes} bytes do not hold two rows of {num_columns} values and what their products take"
            )
        self._rows = np.empty((self.capacity, num_columns), np.float32)
        self._num_kept = 0
        self._num_rows, self._energy, self._error = 0, 0.0, 0.0

    @property
    def num_rows(self) -> int:
        """Number of rows added so far."""
        return self._num_rows

    def add(self, rows: np.ndarray) -> None:
        """Add rows (M×D float32)."""
        self._num_rows += len(rows)
        while len(rows):
            if self._num_kept == self.capacity:
                self._halve()
            fitting, rows = np.split(rows, [self.capacity - self._num_kept])
            self._rows[self._num_kept : self._num_kept + len(fitting)] = fitting
            self._energy += float(np.square(fitting, dtype=np.float64).sum())
            self._num_kept += len(fitting)

    def spectrum(self, num_vectors: int) -> Spectrum:
        """Singular values and leading vectors of all rows added so far.

        Raises:
            ConfigError: the rows span fewer dimensions than `num_vectors`.
        """
        rows = self._rows[: self._num_kept]
        squares, basis = _decompose(rows)
        # what came after the last halving is beside little else, and makes no leading value
        values = np.sqrt(squares[: self.capacity // 2] if self._num_rows > self.capacity else squares)
        rank = int((values > RANK_TOLERANCE * values[0]).sum()) if len(values) else 0
        if num_vectors > rank:
            raise ConfigError(
                f"{num_vectors} singular vectors asked for, but the {self._num_rows} rows span only {rank} dimensions"
            )
        vectors = np.empty((num_vectors, rows.shape[1]), np.float32)
        if _is_wide(rows):
            for columns in _chunks(rows.shape[1], len(rows)):
                vectors[:, columns] = (
                    basis[:, :num_vectors].T @ rows[:, columns].astype(np.float64) / values[:num_vectors, None]
                )
        else:
            vectors[:] = basis[:, :num_vectors].T
        return Spectrum(values, vectors, self._num_rows, self._energy, self._error)

    def _halve(self) -> None:
        squares, basis = _decompose(self._rows)
        kept = self.capacity // 2
        self._error += float(squares[kept]) if kept < len(squares) else 0.0
        squares, basis = squares[:kept], basis[:, :kept]
        self._num_kept = len(squares)
        if _is_wide(self._rows):
            for columns in _chunks(self._rows.shape[1], self.capacity):
                self._rows[: self._num_kept, columns] = basis.T @ self._rows[:, columns].astype(np.float64)
        else:
            self._rows[: self._num_kept] = np.sqrt(squares)[:, None] * basis.T


def count_rows(num_columns: int, memory_bytes: int) -> int:
    """Number of rows of a float32 matrix that fit into memory together with the workspace for its singular values.

    That is 4 k d + 40 min(k, d)² bytes for k rows and d columns.
    """
    d = num_columns
    if (4 + EIGH_BYTES) * d**2 <= memory_bytes:
        return (memory_bytes - EIGH_BYTES * d**2) // (4 * d)
    return int((sqrt(16 * d**2 + 4 * EIGH_BYTES * memory_bytes) - 4 * d) / (2 * EIGH_BYTES))


def _decompose(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values, descending, and singular vectors as columns: the left ones of a wide matrix, else the right ones.

    From the products of the smaller side, in float64: the squares carry its precision, and the rows are float32.
    """
    num_rows, num_columns = rows.shape
    side = min(rows.shape)
    products = np.zeros((side, side))
    if _is_wide(rows):
        for chunk in _chunks(num_columns, num_rows):
            part = rows[:, chunk].astype(np.float64)
            products += part @ part.T
    else:
        for chunk in _chunks(num_rows, num_columns):
            part = rows[chunk].astype(np.float64)
            products += part.T @ part
    squares, basis = np.linalg.eigh(products)
    return np.maximum(squares[::-1], 0.0), basis[:, ::-1]


def _is_wide(rows: np.ndarray) -> bool:
    return rows.shape[0] <= rows.shape[1]


def _chunks(length: int, other: int) -> list[slice]:
    """Pieces of an axis, each of about CHUNK_BYTES in float64 with the whole other axis."""
    size = max(1, CHUNK_BYTES // (8 * max(1, other)))
    return [slice(start, start + size) for start in range(0, length, size)]
