"""Label embedding: the PMI matrix of the training labels, factorised.

The embedding loss draws an image's embedding to the sum of its labels' vectors; the
embedding decoder ranks labels by their cosine with it.
"""

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float, Float32, Int, Shaped

from jaxii.errors import InputError
from jaxii.storage import at, write_beside

# Exact eigenvectors of so many classes take a few seconds at most.
EXACT_MAX_CLASSES = 2000
# A product with fewer columns is bound by the memory traffic of the matrix.
_BLOCK = 64
# PMI spectra are flat: a space of 2 vectors per eigenpair keeps 98.8 % of the exact
# energy of 1,024 of 7,178 pairs, one of 2.25 keeps 99.4 %. At least a few blocks, as
# the space grows by powers of the matrix.
_VECTORS_A_PAIR, _MIN_BLOCKS = 2.25, 8


@dataclass(frozen=True)
class LabelEmbedding:
    """Vectors of the classes, and how they were computed.

    Attributes:
      vectors: Zero for a class that never occurs together with another one.
      eigenvalues: Of the PMI matrix, largest magnitude first; 0 beyond its rank.
      explained_energy: Sum of the squared eigenvalues over the squared Frobenius norm
        of the PMI matrix, 0 to 1.
      num_images: Images with at least one label.
      num_pairs: Pairs of classes that occur together.
      num_isolated: Classes whose vector is zero.
      options: Arguments of `label_embedding`, and the method it chose.
      provenance: Recorded by the caller of `save`.
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
    """Embeds classes by their co-occurrence: E = U_k sqrt(|S_k|) of the PMI matrix.

    Memory: num_classes squared float32, and num_classes x (dim + 128) a few times. The
    eigenvectors are exact up to 2,000 classes and randomised beyond.

    Args:
      offsets: Image i has the labels label_ids[offsets[i]:offsets[i + 1]]; repetitions
        within an image count once.
      label_ids: Class indices, 0 to num_classes - 1.
      num_classes: 1 or more.
      dim: Length of a vector, 1 to num_classes.
      positive: Whether negative PMI becomes 0 (PPMI).
      context_smoothing: Exponent of the class frequencies on the context side, in
        (0, 1]; 1 disables smoothing, 0.75 is usual.
      seed: Of the randomised factorisation.

    Raises:
      InputError: If a number is out of range, or labels do not fit the classes.

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
    linked, eigenvalues, vectors = _embed(matrix, dim, exact=exact, seed=seed)
    return LabelEmbedding(
        vectors=vectors,
        eigenvalues=eigenvalues,
        explained_energy=_share(eigenvalues, matrix),
        num_images=num_images,
        num_pairs=together.nnz // 2,
        num_isolated=num_classes - linked,
        options={
            "num_classes": num_classes,
            "dim": dim,
            "positive": positive,
            "context_smoothing": context_smoothing,
            "seed": seed,
            "method": "exact" if exact else "randomised",
        },
    )


def check_options(num_classes: int, dim: int, context_smoothing: float) -> None:
    """Raises InputError if an argument of `label_embedding` is out of range."""
    if not 1 <= dim <= num_classes:
        raise InputError(
            f"dim={dim} of the label embedding with {num_classes} classes; use 1 to "
            f"{num_classes}"
        )
    if not 0.0 < context_smoothing <= 1.0:
        raise InputError(
            f"context_smoothing={context_smoothing}; use a number above 0 and up to 1"
        )


def _share(eigenvalues, matrix) -> float:
    energy = float(np.sum(matrix.data**2))
    captured = float(np.sum(eigenvalues.astype(np.float64) ** 2))
    return min(captured / energy, 1.0) if energy else 0.0


def _embed(matrix, dim, *, exact, seed):
    """Returns the number of linked classes, the eigenvalues, and all vectors."""
    # Isolated classes would only add eigenvalues of 0.
    linked = np.flatnonzero(np.diff(matrix.indptr))
    vectors = np.zeros((matrix.shape[0], dim), np.float32)
    eigenvalues = np.zeros(dim, np.float32)
    if len(linked):
        kept = min(dim, len(linked))
        square = matrix[linked][:, linked]
        values, basis = factorise(square, kept, exact=exact, seed=seed)
        vectors[linked, :kept] = basis * np.sqrt(np.abs(values))
        eigenvalues[:kept] = values
    return len(linked), eigenvalues, vectors


def save(
    path: str | os.PathLike[str],
    embedding: LabelEmbedding,
    provenance: Mapping[str, Any],
) -> None:
    """Writes an embedding as .npz, atomically.

    Args:
      path: Ends in .npz; an existing file is replaced.
      embedding: The embedding.
      provenance: JSON values, such as the split whose labels were counted.

    Raises:
      InputError: If the path does not end in .npz.
    """
    path = at(path)
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

    def write(file):
        np.savez(
            file,
            vectors=embedding.vectors,
            eigenvalues=embedding.eigenvalues,
            record=np.array(text),
        )

    write_beside(path, write, binary=True)


def load(path: str | os.PathLike[str]) -> LabelEmbedding:
    """Reads what `save` wrote.

    Raises:
      InputError: If the file is missing or not a label embedding.
    """
    try:
        with np.load(io.BytesIO(at(path).read_bytes()), allow_pickle=False) as arrays:
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
      vectors: Of all classes.
      class_id: The class whose neighbours are returned.
      k: Most neighbours. Classes with zero vectors have none and are none.
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
    """Counts the images in which two classes occur together.

    Args:
      offsets: As in `label_embedding`.
      label_ids: As in `label_embedding`.
      num_classes: 1 or more.

    Returns:
      The symmetric counts [class, class] with an empty diagonal; the number of images
      of each class; the number of images with at least one label.

    Raises:
      InputError: If a label id is outside the classes, or offsets do not fit.
    """
    lengths = np.diff(offsets)
    if len(offsets) == 0 or offsets[0] != 0 or np.any(lengths < 0):
        raise InputError("offsets of labels must begin with 0 and never decrease")
    if offsets[-1] != len(label_ids):
        raise InputError(f"offsets end at {offsets[-1]}, but {len(label_ids)} labels")
    if len(label_ids) and not 0 <= label_ids.min() <= label_ids.max() < num_classes:
        raise InputError(
            f"label ids {label_ids.min()} to {label_ids.max()} with {num_classes} "
            f"classes; use 0 to {num_classes - 1}"
        )
    ones = np.ones(len(label_ids), np.int32)
    images = scipy.sparse.csr_array(
        (ones, label_ids.astype(np.int32), _narrow(offsets)),
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
      counts: c, the number of images of each class.
      num_images: n.
      positive: Whether to drop negative values.
      context_smoothing: a; the context's c_j becomes proportional to c_j^a with the
        same sum. The mean of both directions keeps the matrix symmetric.
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


def _narrow(offsets: np.ndarray) -> np.ndarray:
    """Returns offsets as int32 if they fit, which halves SciPy's memory."""
    small = len(offsets) == 0 or offsets[-1] < np.iinfo(np.int32).max
    return offsets.astype(np.int32 if small else np.int64)


def factorise(
    matrix: scipy.sparse.csr_array, dim: int, *, exact: bool, seed: int = 0
) -> tuple[Shaped[np.ndarray, " embed"], Shaped[np.ndarray, "class embed"]]:
    """Returns the eigenpairs of largest magnitude of a symmetric matrix.

    Args:
      matrix: [class, class], symmetric, possibly indefinite.
      dim: Number of eigenpairs, 1 to the number of classes.
      exact: Whether to compute exact float64 eigenvectors; otherwise float32 ones by
        block Lanczos, with 2.25 matrix-vector products per pair. Memory: the dense
        matrix and 2.25 x dim vectors, float32.
      seed: Of the random block.

    Returns:
      Eigenvalues, largest magnitude first, and eigenvectors in columns, each with its
      largest component positive.

    Source: Golub and Underwood 1977, "The block Lanczos method for computing
      eigenvalues"; Musco and Musco 2015, algorithm 2, on how few products it takes.
    """
    blocks = max(math.ceil(_VECTORS_A_PAIR * dim / _BLOCK), _MIN_BLOCKS)
    # A space of full size is no cheaper than the exact solution.
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
    # Dense: BLAS is faster than the sparse product already at 1 % of the entries.
    dense = matrix.astype(np.float32).toarray()
    size = blocks * _BLOCK
    # Vectors are rows, so that the first ones are contiguous in memory.
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
        # Noise extends the space if the products are linearly dependent.
        block += noise * rng.standard_normal(block.shape, dtype=np.float32)
        # Rounding errors of a three-term recurrence would reintroduce earlier
        # directions: each block is orthogonalised against all, twice.
        for _ in range(2):
            block = _orthonormal(block - (block @ space[:end].T) @ space[:end])
    # Reads the lower triangle.
    values, turn = scipy.linalg.eigh(small, driver="evd", overwrite_a=True)
    largest = _largest(values, dim)
    return values[largest], space.T @ turn[:, largest]


def _largest(values: Float[np.ndarray, " pair"], dim: int) -> np.ndarray:
    return np.argsort(-np.abs(values), kind="stable")[:dim]


def _orthonormal(
    rows: Float32[np.ndarray, "vector class"],
) -> Float32[np.ndarray, "vector class"]:
    """Returns an orthonormal basis of the rows, by Cholesky QR in float64."""
    wide = rows.astype(np.float64)
    for _ in range(2):
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        gram = wide @ wide.T
        # Regularises nearly equal rows; the second pass corrects the error.
        gram[np.diag_indices_from(gram)] += 1e-14 * len(gram)
        lower = scipy.linalg.cholesky(gram, lower=True)
        wide = scipy.linalg.solve_triangular(lower, wide, lower=True)
    return wide.astype(np.float32)
