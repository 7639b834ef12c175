"""The largest eigenpairs of a symmetric matrix, exactly or by a randomised iteration.

Between `pmi`, which makes the matrix, and `embedding`, which makes vectors of them.
"""

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Shaped

_OVERSAMPLING = 128
_POWER_ITERATIONS = 2
_FILTER_DEGREE = 4


def factorise(
    matrix: scipy.sparse.csr_array, dim: int, *, exact: bool, seed: int = 0
) -> tuple[Shaped[np.ndarray, " embed"], Shaped[np.ndarray, "class embed"]]:
    """Returns the eigenpairs of largest magnitude of a symmetric matrix.

    Args:
      matrix: [class, class], symmetric, possibly indefinite.
      dim: how many, 1 to the number of classes.
      exact: float64 eigenvectors; otherwise float32 ones by subspace iteration from a
        random block, 12 products of the matrix with dim + 128 columns.
      seed: of the random block.

    Returns:
      Eigenvalues, largest magnitude first, and eigenvectors in columns, each with its
      largest component positive.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3; the filter is
      that of Zhou, Saad, Tiago and Chelikowsky 2006.
    """
    if exact:
        values, basis = scipy.linalg.eigh(matrix.toarray())
    else:
        values, basis = _randomised(matrix, dim, seed)
    largest = np.argsort(-np.abs(values), kind="stable")[:dim]
    values, basis = values[largest], basis[:, largest]
    peaks = np.argmax(np.abs(basis), axis=0)
    signs = np.where(basis[peaks, np.arange(dim)] < 0.0, -1.0, 1.0)
    return values, basis * signs.astype(basis.dtype)


def _randomised(
    matrix: scipy.sparse.csr_array, dim: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    # Dense: BLAS is faster than the sparse product already at 1 % of the entries.
    dense = matrix.astype(np.float32).toarray()
    num_columns = min(dim + _OVERSAMPLING, len(dense))
    rng = np.random.default_rng(seed)
    block = rng.standard_normal((len(dense), num_columns), dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        # Pivoted L spans the same space, well conditioned, for a tenth of QR's cost.
        block = _unit_lower(dense @ block)
    values, basis = _ritz(dense, block)
    cut = _magnitude_of_rank(dense, num_columns, rng)
    if num_columns == len(dense) or cut <= 1e-5 * abs(values[0]):
        return values, basis
    # PMI spectra are flat: plain iteration would need dozens of products to tell the
    # last wanted eigenvalue from its neighbours. The large ones have converged; they
    # are taken out, or they would drown the others in float32.
    large = int(np.count_nonzero(np.abs(values) > 3.0 * cut))
    found = basis[:, :large]
    rest = dense - (found * values[:large]) @ found.T
    filtered = _filtered(rest, basis[:, large:], cut)
    return _ritz(dense, np.hstack([found, filtered]))


def _magnitude_of_rank(dense: np.ndarray, rank: int, rng: np.random.Generator) -> float:
    """About the rank-th largest |eigenvalue|, by stochastic Lanczos quadrature."""
    num_probes, num_steps = 8, 60
    now = rng.standard_normal((len(dense), num_probes), dtype=np.float32)
    now /= np.linalg.norm(now, axis=0)
    before, off = np.zeros_like(now), np.zeros(num_probes, np.float32)
    diagonal, off_diagonal = [], []
    for _ in range(min(num_steps, len(dense))):
        new = dense @ now - off * before
        diagonal.append(np.sum(now * new, axis=0))
        new -= diagonal[-1] * now
        off = np.linalg.norm(new, axis=0)
        off_diagonal.append(off)
        before, now = now, new / np.maximum(off, np.float32(1e-30))
    places, weights = [], []
    for probe in range(num_probes):
        nodes, turn = scipy.linalg.eigh_tridiagonal(
            np.array(diagonal, np.float64)[:, probe],
            np.array(off_diagonal, np.float64)[:-1, probe],
        )
        places.append(np.abs(nodes))
        weights.append(turn[0] ** 2)
    place, weight = np.concatenate(places), np.concatenate(weights)
    order = np.argsort(-place)
    reached = np.cumsum(weight[order]) * (len(dense) / num_probes)
    return float(place[order][min(np.searchsorted(reached, rank), len(order) - 1)])


def _filtered(dense: np.ndarray, block: np.ndarray, cut: float) -> np.ndarray:
    """T(2 A^2 / cut^2 - 1) times the block, T a Chebyshev polynomial.

    Eigenvalues within the cut stay as they are, on both sides of 0; those beyond grow
    exponentially with the root of their distance.
    """

    def product(columns: np.ndarray) -> np.ndarray:
        return (2.0 / cut**2) * (dense @ (dense @ columns)) - columns

    before, current = block, product(block)
    for _ in range(_FILTER_DEGREE - 1):
        before, current = current, 2.0 * product(current) - before
    return current


def _ritz(dense: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best eigenpairs within the span of a block, largest magnitude first."""
    block = _orthonormal(block)
    small = (block.T @ (dense @ block)).astype(np.float64)
    values, turn = scipy.linalg.eigh(0.5 * (small + small.T))
    order = np.argsort(-np.abs(values), kind="stable")
    return (
        values[order].astype(np.float32),
        block @ turn[:, order].astype(np.float32),
    )


def _unit_lower(block: np.ndarray) -> np.ndarray:
    factors = scipy.linalg.lu(block, permute_l=True, check_finite=False)
    return np.asarray(factors[0])


def _orthonormal(block: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns: Cholesky QR, twice for float32's sake."""
    block = _unit_lower(block / np.linalg.norm(block, axis=0))
    for _ in range(2):
        gram = (block.T @ block).astype(np.float64)
        # Keeps Cholesky going where columns coincide; the second pass mends the rest.
        gram[np.diag_indices_from(gram)] += 1e-7 * np.trace(gram) / len(gram)
        upper = scipy.linalg.cholesky(gram).astype(np.float32)
        block = scipy.linalg.solve_triangular(upper.T, block.T, lower=True).T
    return np.ascontiguousarray(block)
