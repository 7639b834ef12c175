"""Which labels go together: co-occurrence counts of an index, and their PMI.

Comes after the index of the training labels; `embedding` factorises the matrix.
"""

import numpy as np
import scipy.sparse
from jaxtyping import Int

from jaxii.errors import InputError


def cooccurrence(
    offsets: Int[np.ndarray, " image_plus_1"],
    label_ids: Int[np.ndarray, " entry"],
    num_classes: int,
) -> tuple[scipy.sparse.csr_array, Int[np.ndarray, " class"], int]:
    """Counts in how many images two classes occur together.

    Args:
      offsets: as in `label_embedding`.
      label_ids: as in `label_embedding`.
      num_classes: 1 or more.

    Returns:
      The symmetric counts [class, class] with nothing stored on the diagonal; the
      images of each class; the number of images with at least one label (an image
      without labels says nothing about what goes together).

    Raises:
      InputError: a label id outside the classes, or offsets that do not fit.
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
      together: C, as `cooccurrence` returns it.
      counts: c, the images of each class.
      num_images: n.
      positive: drops the negative values.
      context_smoothing: a; the context's c_j becomes proportional to c_j^a with an
        unchanged sum. The mean of both directions is taken, which keeps the matrix
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


def _narrow(offsets: np.ndarray) -> np.ndarray:
    """SciPy computes with the wider of its index types; int32 halves the memory."""
    small = len(offsets) == 0 or offsets[-1] < np.iinfo(np.int32).max
    return offsets.astype(np.int32 if small else np.int64)
