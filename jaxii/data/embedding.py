"""Label embedding: the PMI matrix of the training labels, factorised.

`pmi` makes the matrix from an index of labels; the vectors go to the embedding loss,
which draws an image's embedding to the sum of its labels' vectors, and to the decoder
that ranks labels by their cosine with it.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float32, Int, Shaped

from jaxii.data.pmi import cooccurrence, pmi
from jaxii.errors import InputError

# Up to here the exact eigenvectors cost a few seconds at most.
EXACT_MAX_CLASSES = 2000
_OVERSAMPLING = 128
_POWER_ITERATIONS = 2
_FILTER_DEGREE = 4


@dataclass(frozen=True)
class LabelEmbedding:
    """Vectors of the classes, and how they came about.

    Attributes:
      vectors: zero for a class that never occurs together with another one.
      eigenvalues: of the PMI matrix, largest magnitude first; 0 beyond its rank.
      explained_energy: sum of the squared eigenvalues over the squared Frobenius norm
        of the PMI matrix, 0 to 1.
      num_images: images with at least one label.
      num_pairs: pairs of classes that occur together.
      num_isolated: classes whose vector is zero.
      options: what `label_embedding` was called with, and the method it chose.
      provenance: what the caller of `save` recorded.
    """

    vectors: Float32[np.ndarray, "class embed"]
    eigenvalues: Float32[np.ndarray, " embed"]
    explained_energy: float
    num_images: int
    num_pairs: int
    num_isolated: int
    options: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)


def label_embedding(
    offsets: Int[np.ndarray, " image_plus_1"],
    label_ids: Int[np.ndarray, " entry"],
    num_classes: int,
    *,
    dim: int,
    positive: bool = False,
    context_smoothing: float = 1.0,
    seed: int = 0,
) -> LabelEmbedding:
    """Embeds the classes by which of them occur together: E = U_k sqrt(|S_k|) of PMI.

    Memory: num_classes squared float32, and num_classes x (dim + 128) a few times. The
    eigenvectors are exact up to 2,000 classes and randomised beyond.

    Args:
      offsets: image i has the labels label_ids[offsets[i]:offsets[i + 1]]; repetitions
        within an image count once.
      label_ids: class indices, 0 to num_classes - 1.
      num_classes: 1 or more.
      dim: length of a vector, 1 to num_classes.
      positive: negative PMI becomes 0 (PPMI).
      context_smoothing: exponent of the class frequencies on the context side, above 0
        up to 1; 1 smooths nothing, 0.75 is usual.
      seed: of the randomised factorisation; the same seed gives the same vectors.

    Raises:
      InputError: a number out of range, or labels that do not fit the classes.

    Source: the 2018 recipe (full SVD of the PMI matrix, 1,024 of 7,178 dimensions);
      smoothing and PPMI from Levy, Goldberg and Dagan 2015, sections 2.1 and 3.2.
    """
    if not 1 <= dim <= num_classes:
        raise InputError(
            f"dim={dim} of the label embedding with {num_classes} classes; use 1 to "
            f"{num_classes}"
        )
    if not 0.0 < context_smoothing <= 1.0:
        raise InputError(
            f"context_smoothing={context_smoothing}; use a number above 0 and up to 1"
        )
    together, counts, num_images = cooccurrence(offsets, label_ids, num_classes)
    matrix = pmi(
        together,
        counts,
        num_images,
        positive=positive,
        context_smoothing=context_smoothing,
    )
    # A class without company would only add eigenvalues of 0.
    linked = np.flatnonzero(np.diff(matrix.indptr))
    exact = num_classes <= EXACT_MAX_CLASSES
    vectors = np.zeros((num_classes, dim), np.float32)
    eigenvalues = np.zeros(dim, np.float32)
    if len(linked):
        square = matrix[linked][:, linked]
        kept = min(dim, len(linked))
        values, basis = factorise(square, kept, exact=exact, seed=seed)
        vectors[linked, :kept] = basis * np.sqrt(np.abs(values))
        eigenvalues[:kept] = values
    energy = float(np.sum(matrix.data**2))
    captured = float(np.sum(eigenvalues.astype(np.float64) ** 2))
    return LabelEmbedding(
        vectors=vectors,
        eigenvalues=eigenvalues,
        explained_energy=min(captured / energy, 1.0) if energy else 0.0,
        num_images=num_images,
        num_pairs=together.nnz // 2,
        num_isolated=num_classes - len(linked),
        options={
            "num_classes": num_classes,
            "dim": dim,
            "positive": positive,
            "context_smoothing": context_smoothing,
            "seed": seed,
            "method": "exact" if exact else "randomised",
        },
    )


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


def save(
    path: str | os.PathLike[str],
    embedding: LabelEmbedding,
    provenance: Mapping[str, Any],
) -> None:
    """Writes an embedding as .npz, under its name only when it is complete.

    Args:
      path: where to; an older file is replaced.
      embedding: what to write.
      provenance: JSON values: which split's labels were counted, the labels' hash.

    Raises:
      InputError: a path that does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path} for the label embedding; use a name ending in .npz")
    record = {
        "explained_energy": embedding.explained_energy,
        "num_images": embedding.num_images,
        "num_pairs": embedding.num_pairs,
        "num_isolated": embedding.num_isolated,
        "options": embedding.options,
        "provenance": dict(provenance),
    }
    text = json.dumps(record, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                vectors=embedding.vectors,
                eigenvalues=embedding.eigenvalues,
                record=np.array(text),
            )
        # mkstemp's files are private.
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> LabelEmbedding:
    """Reads what `save` wrote.

    Raises:
      InputError: no such file, or not a label embedding.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            record = json.loads(str(arrays["record"]))
            return LabelEmbedding(
                vectors=arrays["vectors"], eigenvalues=arrays["eigenvalues"], **record
            )
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; no label embedding there") from error
    except Exception as error:
        raise InputError(f"{path} is not a label embedding; make it anew") from error


def nearest(
    vectors: Shaped[np.ndarray, "class embed"], class_id: int, k: int
) -> list[tuple[int, float]]:
    """Returns the classes with the most similar vectors: (class, cosine), best first.

    Args:
      vectors: of all classes.
      class_id: the class whose neighbours are asked for; it is not among them.
      k: how many; fewer come back where fewer classes have a vector, and none for a
        class whose own vector is zero.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    usable = lengths > 0.0
    if not usable[class_id]:
        return []
    cosines = vectors @ vectors[class_id] / np.where(usable, lengths, 1.0)
    cosines = cosines / lengths[class_id]
    usable[class_id] = False
    order = np.argsort(np.where(usable, -cosines, np.inf), kind="stable")
    order = order[: min(k, int(usable.sum()))]
    return [(int(place), float(cosines[place])) for place in order]
