"""Label embedding: the PMI matrix of the training labels, factorised.

`pmi` makes the matrix from an index of labels; the vectors go to the embedding loss,
which draws an image's embedding to the sum of its labels' vectors, and to the decoder
that ranks labels by their cosine with it.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped

from jaxii.data.eigenpairs import factorise
from jaxii.data.pmi import cooccurrence, pmi
from jaxii.errors import InputError
from jaxii.storage import at, write_beside

# Up to here the exact eigenvectors cost a few seconds at most.
EXACT_MAX_CLASSES = 2000


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
    """Refuses what `label_embedding` cannot do, before anything is counted.

    Raises:
      InputError: a number out of range.
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


def _share(eigenvalues, matrix) -> float:
    energy = float(np.sum(matrix.data**2))
    captured = float(np.sum(eigenvalues.astype(np.float64) ** 2))
    return min(captured / energy, 1.0) if energy else 0.0


def _embed(matrix, dim, *, exact, seed):
    """Returns how many classes have company, the eigenvalues, the vectors of all."""
    # A class without company would only add eigenvalues of 0.
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
    """Writes an embedding as .npz, under its name only when it is complete.

    Args:
      path: where to; an older file is replaced.
      embedding: what to write.
      provenance: JSON values: which split's labels were counted, the labels' hash.

    Raises:
      InputError: a path that does not end in .npz.
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
      InputError: no such file, or not a label embedding.
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
