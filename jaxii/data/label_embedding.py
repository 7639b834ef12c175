"""Label embedding: the factorised PMI matrix of the training labels.

The embedding loss pulls an image's embedding towards the sum of its labels' vectors.
The embedding decoder ranks labels by cosine similarity.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float, Float32, Int, Shaped

from jaxii.errors import InputError
from jaxii.storage import at, write_beside

# Up to this many classes, exact eigenvectors are computed, in a few seconds.
EXACT_MAX_CLASSES = 2000
# Columns per product; fewer are bound by the memory traffic of the matrix.
_BLOCK = 64
# PMI spectra are flat: for 1,024 of 7,178 eigenpairs, 2 vectors per pair keep 98.8 % of
# the exact energy, 2.25 keep 99.4 %. Small spaces need a few powers of the matrix.
_VECTORS_A_PAIR, _MIN_BLOCKS = 2.25, 8


@dataclass(frozen=True)
class LabelEmbedding:
    """Vectors of the classes and statistics of their factorisation.

    Attributes:
      vectors: Zero for a class that never occurs together with another.
      eigenvalues: Largest magnitude first; 0 beyond the rank of the PMI matrix.
      explained_energy: Sum of the squared eigenvalues as a share of the PMI matrix's
        squared Frobenius norm, 0 to 1.
      num_images: Images with at least one label.
      num_pairs: Pairs of classes that occur together.
      num_isolated: Classes whose vector is zero.
      options: The arguments and the method of `label_embedding`.
      provenance: The argument of `save`.
    """

    vectors: Float32[np.ndarray, "class embed"]
    eigenvalues: Float32[np.ndarray, " embed"]
    explained_energy: float
    num_images: int
    num_pairs: int
    num_isolated: int
    options: Mapping[str, object]
    provenance: Mapping[str, object] = field(default_factory=dict)


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
    """Embeds classes by their co-occurrence: U_k sqrt(|S_k|) of the PMI matrix.

    Memory: num_classes^2 float32, and a few times num_classes x (dim + 128). The
    eigenvectors are exact up to 2,000 classes and randomised beyond.

    Args:
      offsets: Image i has the labels label_ids[offsets[i]:offsets[i + 1]]; repetitions
        count once.
      label_ids: Class ids, 0 to num_classes - 1.
      dim: Length of a vector, 1 to num_classes.
      positive: Whether negative PMI becomes 0 (PPMI).
      context_smoothing: Exponent of the context's class frequencies, in (0, 1]; 1
        smooths nothing, 0.75 is usual.
      seed: Seed of the randomised factorisation.

    Raises:
      InputError: If a number is out of range.

    Source: the 2018 recipe (full SVD of the PMI matrix, 1,024 of 7,178 dimensions);
      smoothing and PPMI from Levy, Goldberg and Dagan 2015, sections 2.1 and 3.2.
    """
    check_options(num_classes, dim, context_smoothing)
    together, counts, num_images = cooccurrence(offsets, label_ids, num_classes)
    matrix = pmi(
        together,
        counts,
        num_images,
        positive=positive,
        context_smoothing=context_smoothing,
    )
    exact = num_classes <= EXACT_MAX_CLASSES
    eigenvalues, vectors = _embed(matrix, dim, exact=exact, seed=seed)
    energy = float(np.sum(matrix.data**2))
    captured = float(np.sum(eigenvalues.astype(np.float64) ** 2))
    return LabelEmbedding(
        vectors=vectors,
        eigenvalues=eigenvalues,
        explained_energy=min(captured / energy, 1.0) if energy else 0.0,
        num_images=num_images,
        num_pairs=together.nnz // 2,
        num_isolated=int(np.sum(np.diff(matrix.indptr) == 0)),
        options={
            "num_classes": num_classes,
            "dim": dim,
            "positive": positive,
            "context_smoothing": context_smoothing,
            "seed": seed,
            "method": "exact" if exact else "randomised",
        },
    )


def _embed(
    matrix: scipy.sparse.csr_array, dim: int, *, exact: bool, seed: int
) -> tuple[Float32[np.ndarray, " embed"], Float32[np.ndarray, "class embed"]]:
    vectors = np.zeros((len(matrix.indptr) - 1, dim), np.float32)
    eigenvalues = np.zeros(dim, np.float32)
    # Isolated classes would only add eigenvalues of 0.
    linked = np.flatnonzero(np.diff(matrix.indptr))
    if len(linked):
        kept, square = min(dim, len(linked)), matrix[linked][:, linked]
        values, basis = factorise(square, kept, exact=exact, seed=seed)
        vectors[linked, :kept] = basis * np.sqrt(np.abs(values))
        eigenvalues[:kept] = values
    return eigenvalues, vectors


def check_options(num_classes: int, dim: int, context_smoothing: float) -> None:
    """Raises InputError if an argument of `label_embedding` is out of range."""
    if not 1 <= dim <= num_classes:
        raise InputError(
            f"dim={dim} is out of range for a label embedding of {num_classes} "
            f"classes; use 1 to {num_classes}"
        )
    if not 0.0 < context_smoothing <= 1.0:
        raise InputError(
            f"context_smoothing={context_smoothing} is out of range; use a number "
            "above 0 and at most 1"
        )


def save(
    path: str | os.PathLike[str],
    embedding: LabelEmbedding,
    provenance: Mapping[str, object],
) -> None:
    """Writes an embedding as .npz, atomically.

    Args:
      path: Ends in .npz; an existing file is replaced.
      embedding: The embedding.
      provenance: JSON values that identify the counted labels.

    Raises:
      InputError: If the path does not end in .npz.
    """
    path = at(path)
    if path.suffix != ".npz":
        raise InputError(
            f"the label embedding file {path} does not end in .npz; use a name that "
            "does"
        )
    vectors, eigenvalues = embedding.vectors, embedding.eigenvalues
    facts = vars(embedding) | {"provenance": dict(provenance)}
    del facts["vectors"], facts["eigenvalues"]
    record = np.array(json.dumps(facts, sort_keys=True))

    def write(file: BinaryIO) -> None:
        np.savez(file, vectors=vectors, eigenvalues=eigenvalues, record=record)

    write_beside(path, write, binary=True)


def load(path: str | os.PathLike[str]) -> LabelEmbedding:
    """Reads an embedding that `save` wrote.

    Raises:
      InputError: If the file is missing or is not a label embedding.
    """
    try:
        with np.load(io.BytesIO(at(path).read_bytes()), allow_pickle=False) as arrays:
            record = json.loads(str(arrays["record"]))
            return LabelEmbedding(
                vectors=arrays["vectors"], eigenvalues=arrays["eigenvalues"], **record
            )
    except FileNotFoundError as error:
        raise InputError(f"label embedding {path} does not exist") from error
    except Exception as error:
        raise InputError(
            f"{path} is not a label embedding; compute it again"
        ) from error


def nearest(
    vectors: Shaped[np.ndarray, "class embed"], class_id: int, k: int
) -> list[tuple[int, float]]:
    """Returns the k classes of highest cosine similarity as (class, cosine).

    The highest cosine comes first. The class itself and classes with a zero vector are
    left out. If the class has a zero vector, the list is empty.
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


def cooccurrence(
    offsets: Int[np.ndarray, " image_plus_1"],
    label_ids: Int[np.ndarray, " entry"],
    num_classes: int,
) -> tuple[scipy.sparse.csr_array, Int[np.ndarray, " class"], int]:
    """Counts the images in which each pair of classes occurs together.

    Returns:
      The symmetric counts [class, class] with an empty diagonal; the images of each
      class; the number of images with at least one label.

    Raises:
      InputError: If a label id is out of range.
    """
    lengths = np.diff(offsets)
    if len(label_ids) and not 0 <= label_ids.min() <= label_ids.max() < num_classes:
        raise InputError(
            f"label ids range from {label_ids.min()} to {label_ids.max()}, but there "
            f"are {num_classes} classes; use ids from 0 to {num_classes - 1}"
        )
    ones = np.ones(len(label_ids), np.int32)
    # SciPy computes with the wider of both index types; int32 halves the memory.
    small = len(label_ids) < np.iinfo(np.int32).max
    starts = offsets.astype(np.int32 if small else np.int64)
    images = scipy.sparse.csr_array(
        (ones, label_ids.astype(np.int32), starts),
        shape=(len(lengths), num_classes),
    )
    images.sum_duplicates()
    images.data[:] = 1
    counts = np.bincount(images.indices, minlength=num_classes)
    together = scipy.sparse.coo_array(images.T @ images)
    row, column = together.coords
    off_diagonal = row != column
    together = scipy.sparse.csr_array(
        (together.data[off_diagonal], (row[off_diagonal], column[off_diagonal])),
        shape=(num_classes, num_classes),
    )
    together.sort_indices()
    return together, counts, int(np.count_nonzero(lengths))


def pmi(
    together: scipy.sparse.csr_array,
    counts: Int[np.ndarray, " class"],
    num_images: int,
    *,
    positive: bool = False,
    context_smoothing: float = 1.0,
) -> scipy.sparse.csr_array:
    """Returns log(C_ij n / (c_i c_j)) where C_ij > 0, and 0 elsewhere: [class, class].

    Args:
      together: C, from `cooccurrence`.
      counts: c, the images of each class.
      num_images: n.
      positive: Whether negative values are dropped.
      context_smoothing: The exponent a; the context's c_j becomes proportional to
        c_j^a with an unchanged sum. The mean of both directions keeps the matrix
        symmetric.
    """
    pairs = scipy.sparse.coo_array(together)
    row, column = pairs.coords
    with np.errstate(divide="ignore"):
        log_counts = np.log(counts.astype(np.float64))
    smoothed = log_counts
    if context_smoothing != 1.0:
        seen = counts > 0
        shift = np.log(counts.sum()) - np.log(
            np.sum(counts[seen].astype(np.float64) ** context_smoothing)
        )
        smoothed = 0.5 * (log_counts + context_smoothing * log_counts + shift)
    values = np.log(pairs.data.astype(np.float64)) + np.log(max(num_images, 1))
    values -= smoothed[row] + smoothed[column]
    if positive:
        values = np.maximum(values, 0.0)
    matrix = scipy.sparse.csr_array((values, (row, column)), shape=together.shape)
    matrix.eliminate_zeros()
    return matrix


def factorise(
    matrix: scipy.sparse.csr_array, dim: int, *, exact: bool, seed: int = 0
) -> tuple[Shaped[np.ndarray, " embed"], Shaped[np.ndarray, "class embed"]]:
    """Returns the eigenpairs of largest magnitude of a symmetric matrix.

    Args:
      matrix: [class, class], symmetric, possibly indefinite.
      dim: Number of eigenpairs, 1 to the number of classes.
      exact: Whether to return float64 eigenvectors; otherwise float32 ones by block
        Lanczos with 2.25 matrix-vector products per eigenpair. Memory: the dense
        matrix and 2.25 x dim vectors, float32.
      seed: Seed of the random block.

    Returns:
      Eigenvalues, largest magnitude first, and eigenvectors in columns, each with a
      positive largest component.

    Source: Golub and Underwood 1977, "The block Lanczos method for computing
      eigenvalues"; Musco and Musco 2015, algorithm 2, on the number of products.
    """
    blocks = max(math.ceil(_VECTORS_A_PAIR * dim / _BLOCK), _MIN_BLOCKS)
    # A Lanczos space of full size is no cheaper than exact eigenvectors.
    if exact or blocks * _BLOCK >= len(matrix.indptr) - 1:
        values, basis = scipy.linalg.eigh(matrix.toarray())
        if not exact:
            values, basis = values.astype(np.float32), basis.astype(np.float32)
        largest = _largest(values, dim)
        values, basis = values[largest], basis[:, largest]
    else:
        values, basis = _lanczos(matrix, dim, blocks, seed)
    peaks = np.argmax(np.abs(basis), axis=0)
    signs = np.where(basis[peaks, np.arange(dim)] < 0.0, -1.0, 1.0)
    return values, basis * signs.astype(basis.dtype)


def _lanczos(
    matrix: scipy.sparse.csr_array, dim: int, blocks: int, seed: int
) -> tuple[Float32[np.ndarray, " embed"], Float32[np.ndarray, "class embed"]]:
    # BLAS is faster than sparse products from 1 % of nonzero entries.
    dense = matrix.astype(np.float32).toarray()
    size = blocks * _BLOCK
    # Vectors are rows, so the first n of them are contiguous.
    space = np.empty((size, len(dense)), np.float32)
    small = np.zeros((size, size), np.float32)
    noise = np.float32(1e-5 * np.linalg.norm(dense) / len(dense))
    rng = np.random.default_rng(seed)
    block = _orthonormal(rng.standard_normal((_BLOCK, len(dense)), dtype=np.float32))
    for start in range(0, size, _BLOCK):
        end = start + _BLOCK
        space[start:end] = block
        block = block @ dense
        small[start:end, :end] = block @ space[:end].T
        # Noise adds directions where the products add none.
        block += noise * rng.standard_normal(block.shape, dtype=np.float32)
        # A three-term recurrence loses orthogonality by rounding: each block is made
        # orthogonal to all earlier ones, and again after scaling.
        for _ in range(2):
            block = _orthonormal(block - (block @ space[:end].T) @ space[:end])
    # `eigh` reads the lower triangle.
    values, turn = scipy.linalg.eigh(small, driver="evd", overwrite_a=True)
    largest = _largest(values, dim)
    return values[largest], space.T @ turn[:, largest]


def _largest(values: Float[np.ndarray, " pair"], dim: int) -> np.ndarray:
    return np.argsort(-np.abs(values), kind="stable")[:dim]


def _orthonormal(
    rows: Float32[np.ndarray, "vector class"],
) -> Float32[np.ndarray, "vector class"]:
    """Returns an orthonormal basis of rows by Cholesky QR in float64."""
    wide = rows.astype(np.float64)
    for _ in range(2):
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        gram = wide @ wide.T
        # Keeps `gram` positive definite if rows are nearly parallel; the second pass
        # corrects the error.
        gram[np.diag_indices_from(gram)] += 1e-14 * len(gram)
        lower = scipy.linalg.cholesky(gram, lower=True)
        wide = scipy.linalg.solve_triangular(lower, wide, lower=True)
    return wide.astype(np.float32)
