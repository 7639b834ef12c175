"""Decoders turn probabilities or embeddings of images into sets of labels.

Each returns decisions [batch, class], True where the label is predicted. `Decoders`
holds the parameters that are fitted on one split.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from jaxii.decoding.calibration import Calibration, calibrate
from jaxii.decoding.expected_f import best_sizes, expected_f2_of
from jaxii.decoding.label_shift import frequencies
from jaxii.decoding.thresholds import (
    DEFAULT_THRESHOLDS,
    DecoderChoice,
    choose,
    class_thresholds,
)
from jaxii.errors import InputError, nearest
from jaxii.metrics import streaming
from jaxii.metrics.f_beta import Numbers, as_array, check_beta
from jaxii.metrics.streaming import Accumulators
from jaxii.storage import AnyPath, write_beside

# The first is the default: it beats `threshold` in most runs that were tested on a
# held-out domain (configs/README.md).
NAMES = ("expected_f2", "threshold", "per_class", "top_k", "embedding")
# `expected_f2` shrinks calibrated logits by this factor (`Calibration.tempered`).
# Networks are overconfident on new domains, more so after longer training, and labels
# that occur together are more probable than independence implies (configs/README.md).
CONFIDENCE = 0.8
# Maps probabilities [batch, class] and the embedding [batch, embed] or None to the
# label ids of each image, the most probable first.
Decode = Callable[[np.ndarray, np.ndarray | None], list[np.ndarray]]
# Number of images in a batch of `sums_of`.
_BATCH = 256


def threshold_decoder(
    scores: Float[np.ndarray, "batch class"],
    *,
    threshold: float | Float[np.ndarray, " class"],
    at_least_one: bool = False,
) -> Bool[np.ndarray, "batch class"]:
    """Returns the labels whose probability is at least the threshold.

    Args:
        scores: probabilities in [0, 1]; NaN counts as 0.
        threshold: in [0, 1], one for all classes or one per class; compared as float32,
            as on the device.
        at_least_one: whether to predict the top label if none reaches the threshold.

    Returns:
        True where the label is predicted.
    """
    scores = np.nan_to_num(scores.astype(np.float32), nan=0.0)
    chosen = scores >= np.float32(threshold)
    if at_least_one and scores.shape[1] > 0:
        empty = np.flatnonzero(~chosen.any(axis=1))
        chosen[empty, scores[empty].argmax(axis=1)] = True
    return chosen


def top_k_decoder(
    scores: Float[np.ndarray, "batch class"], *, k: int | Int[np.ndarray, " batch"]
) -> Bool[np.ndarray, "batch class"]:
    """Returns the k labels with the highest scores; ties go to the lower id.

    Args:
        scores: probabilities or cosines.
        k: labels per image, one number for all or one per image, at least 1; limited
            to the number of classes.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: If k is below 1.
    """
    if np.min(k, initial=1) < 1:
        raise InputError(f"k={k} labels per image; use at least 1")
    scores = np.where(np.isnan(scores), -np.inf, scores)
    if not scores.size:
        return np.zeros(scores.shape, bool)
    ks = np.broadcast_to(np.minimum(k, scores.shape[1]), len(scores))[:, None]
    places = np.unique(ks) - 1
    kth = np.take_along_axis(-np.partition(-scores, places, axis=1), ks - 1, axis=1)
    above = scores > kth
    ties = scores == kth
    room = ks - above.sum(axis=1, keepdims=True)
    return above | (ties & (np.cumsum(ties, axis=1) <= room))


def embedding_decoder(
    embedding: Float[np.ndarray, "batch embed"],
    *,
    label_embeddings: Float[np.ndarray, "class embed"],
    k: int,
) -> Bool[np.ndarray, "batch class"]:
    """Returns the k labels whose embeddings have the highest cosine with the image's.

    Args:
        embedding: predicted embeddings, of any norm.
        label_embeddings: one vector per class; a zero vector has cosine 0.
        k: labels per image, at least 1.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: If k is below 1.
    """
    return top_k_decoder(_unit(embedding) @ _unit(label_embeddings).T, k=k)


def expected_f2_decoder(
    scores: Float[np.ndarray, "batch class"],
) -> Bool[np.ndarray, "batch class"]:
    """Returns the nonempty set of labels with the largest expected F2 for each image.

    Args:
        scores: calibrated probabilities in [0, 1]; NaN counts as 0.

    Returns:
        True where the label is chosen. Ties in probability go to the lower id, ties in
        expected F2 to the smaller set.

    Source: Ye, Chai, Lee, Chieu 2012, "Optimizing F-measures: a tale of two
        approaches", section 4; Dembczynski et al. 2011 for the sum over labels.
    """
    scores = np.nan_to_num(scores, nan=0.0)
    return top_k_decoder(scores, k=best_sizes(scores))


def label_lists(
    chosen: Bool[np.ndarray, "batch class"],
    scores: Float[np.ndarray, "batch class"] | None = None,
) -> list[Int[np.ndarray, " label"]]:
    """Returns each image's label ids, by descending score if scores are given."""
    if scores is None:
        return [np.flatnonzero(row) for row in chosen]
    lists: list[Int[np.ndarray, " label"]] = []
    for row, score in zip(chosen, scores, strict=True):
        ids = np.flatnonzero(row)
        lists.append(ids[np.argsort(-score[ids], kind="stable")])
    return lists


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Parameters of all decoders.

    Attributes:
      choice: the threshold of `threshold`, and k of `top_k` and `embedding`.
      class_thresholds: one threshold per class, for `per_class`.
      calibration: calibration of the probabilities; `expected_f2` uses it tempered.
      frequencies: frequency of each label, estimated by calibrated probabilities.
      label_embeddings: one vector per class, for `embedding`; None without it.
      expected_f2_offsets: decoder -> mean F2 minus mean expected F2 on the images of
        the fit; empty until measured.
    """

    choice: DecoderChoice
    class_thresholds: Float[np.ndarray, " class"]
    calibration: Calibration
    frequencies: Float64[np.ndarray, " class"]
    label_embeddings: Float[np.ndarray, "class embed"] | None = None
    expected_f2_offsets: Mapping[str, float] = field(default_factory=dict[str, float])

    def names(self, *, has_head: bool) -> tuple[str, ...]:
        """Returns the names of usable decoders; `embedding` needs an embedding head."""
        if has_head and self.choice.embedding_k is not None:
            return NAMES
        return tuple(name for name in NAMES if name != "embedding")

    def check(self, name: str, possible: Sequence[str]) -> None:
        """Checks that a decoder is usable.

        Args:
          name: one of `NAMES`.
          possible: the usable decoders, from `names`.

        Raises:
          InputError: If there is no such decoder, or it needs an embedding head that is
            missing.
        """
        if name not in NAMES:
            raise InputError(
                f"{name!r} is not a decoder; {nearest(name, possible)}use one of "
                f"{', '.join(possible)}."
            )
        if name not in possible:
            raise InputError(
                f"--decoder={name} needs the embedding head in this stage and in the "
                f"evaluated stage; use one of {', '.join(possible)}, or evaluate an "
                "earlier --stage."
            )

    def answer(self, name: str) -> Decode:
        """Returns the function that decodes label ids with one decoder."""

        def decode(probs: np.ndarray, embedding: np.ndarray | None) -> list[np.ndarray]:
            chosen = self.decisions([name], probs, embedding)[name]
            return label_lists(chosen, probs)

        return decode

    def decisions(
        self,
        names: Iterable[str],
        probs: Float[np.ndarray, "batch class"],
        embedding: Float[np.ndarray, "batch embed"] | None,
    ) -> dict[str, Bool[np.ndarray, "batch class"]]:
        """Returns the decisions of each decoder, with at least one label per image.

        Args:
          names: the decoders, from `names`.
          probs: the network's probabilities.
          embedding: the network's embeddings; None without the head.
        """
        vectors, k = self.label_embeddings, self.choice.embedding_k
        ways: dict[str, Callable[[], Bool[np.ndarray, "batch class"]]] = {
            "threshold": lambda: threshold_decoder(
                probs, threshold=self.choice.threshold, at_least_one=True
            ),
            "per_class": lambda: threshold_decoder(
                probs, threshold=self.class_thresholds, at_least_one=True
            ),
            "top_k": lambda: top_k_decoder(probs, k=self.choice.top_k),
            "expected_f2": lambda: expected_f2_decoder(
                self.calibration.tempered(self.frequencies, CONFIDENCE)(probs)
            ),
        }
        if embedding is not None and vectors is not None and k is not None:
            ways["embedding"] = lambda: embedding_decoder(
                embedding, label_embeddings=vectors, k=k
            )
        return {name: ways[name]() for name in names}

    def expected_f2(
        self,
        name: str,
        probs: Float[np.ndarray, "batch class"],
        chosen: Bool[np.ndarray, "batch class"],
    ) -> Float64[np.ndarray, " batch"]:
        """Returns the expected F2 of decisions; use only its mean over images.

        The expected F2 by calibrated probabilities is biased, because `expected_f2_of`
        assumes independent labels. The decoder's offset is added, so that the mean over
        the images of the fit equals their mean F2.

        Args:
          name: name of the decoder.
          probs: the network's probabilities.
          chosen: decisions of the decoder.

        Source: Guillory et al. 2021, "Predicting with confidence on unseen
            distributions", section 3 (difference of confidences).
        """
        expected = expected_f2_of(self.calibration(probs), chosen)
        return expected + self.expected_f2_offsets.get(name, 0.0)

    def parameter(self, name: str) -> dict[str, float | int | None]:
        """Returns the parameter of a decoder by name; empty if it has none."""
        parameters: dict[str, dict[str, float | int | None]] = {
            "threshold": {"threshold": self.choice.threshold},
            "top_k": {"k": self.choice.top_k},
            "embedding": {"k": self.choice.embedding_k},
        }
        return parameters.get(name, {})

    def save(self, path: AnyPath) -> None:
        """Atomically writes all but the label embedding, which has its own file."""
        k = self.choice.embedding_k

        def write(file: BinaryIO) -> None:
            np.savez(
                file,
                threshold=np.float64(self.choice.threshold),
                top_k=np.int64(self.choice.top_k),
                embedding_k=np.int64(0 if k is None else k),
                class_thresholds=self.class_thresholds,
                slopes=self.calibration.slopes,
                intercepts=self.calibration.intercepts,
                frequencies=self.frequencies,
                offset_names=np.array([*self.expected_f2_offsets], dtype=str),
                offsets=np.array([*self.expected_f2_offsets.values()], np.float64),
            )

        write_beside(path, write, binary=True)


def load(
    path: AnyPath, label_embeddings: Float[np.ndarray, "class embed"] | None
) -> Decoders:
    """Reads what `save` wrote.

    Args:
      path: the file.
      label_embeddings: label embeddings of the same workdir; None without them.

    Raises:
      InputError: If the file is missing or does not hold decoders.
    """
    try:
        # Opened here because NumPy does not close a file that it cannot read.
        opened = cast(BinaryIO, path.open("rb"))
        with opened as file, np.load(file, allow_pickle=False) as arrays:
            _check_numbers(arrays)
            return Decoders(
                choice=DecoderChoice(
                    threshold=float(arrays["threshold"]),
                    top_k=int(arrays["top_k"]),
                    embedding_k=int(arrays["embedding_k"]) or None,
                ),
                class_thresholds=arrays["class_thresholds"],
                calibration=Calibration(arrays["slopes"], arrays["intercepts"]),
                frequencies=arrays["frequencies"],
                label_embeddings=label_embeddings,
                expected_f2_offsets=dict(
                    zip(
                        arrays["offset_names"].tolist(),
                        arrays["offsets"].tolist(),
                        strict=True,
                    )
                ),
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} does not hold the decoders of a run, or another version of jaxii "
            f"wrote it ({error}); run evaluate with the same --workdir first."
        ) from error


def _check_numbers(arrays: Mapping[str, np.ndarray]) -> None:
    """Checks that parameters are in range.

    Raises:
      ValueError: If a threshold is outside [0, 1], a number is not finite, or k < 1.
    """
    for name in ("slopes", "intercepts", "frequencies", "offsets"):
        if not np.all(np.isfinite(arrays[name])):
            raise ValueError(f"{name} has a non-finite value")
    for name in ("threshold", "class_thresholds"):
        # NaN fails both comparisons.
        if not np.all((arrays[name] >= 0.0) & (arrays[name] <= 1.0)):
            raise ValueError(f"{name} is outside [0, 1]")
    if arrays["top_k"] < 1 or arrays["embedding_k"] < 0:
        raise ValueError("top_k is below 1 or embedding_k is below 0")


def fit(
    probs: Numbers,
    targets: Numbers,
    beta: float = 2.0,
    *,
    decoder: str = "threshold",
) -> Callable[[Numbers], np.ndarray]:
    """Fits a decoder on images with labels.

    Args:
      probs: probabilities in [0, 1], [image, class].
      targets: 1 or true where the label is present, [image, class].
      beta: beta of the F-beta to maximise, finite and above 0.
      decoder: "threshold", "per_class", "top_k" (at most 100 labels per image) or
        "expected_f2".

    Returns:
      A function from probabilities [image, class] to decisions of the same shape, True
      where the label is predicted; at least one label per image.

    Raises:
      InputError: If the decoder is unknown or does not maximise F-beta of this beta,
        beta is not finite and above 0, the arrays are empty or differ in shape, or a
        number is outside [0, 1]. The returned function checks its numbers, too.
    """
    names = tuple(name for name in NAMES if name != "embedding")
    if decoder not in names:
        raise InputError(
            f"decoder={decoder!r} is not supported; use one of {', '.join(names)}."
        )
    check_beta(beta)
    if decoder == "expected_f2" and beta != 2:
        raise InputError(
            f"expected_f2 maximises F2, but beta={beta}; use beta=2 or another decoder."
        )
    probs, targets = as_array(probs), as_array(targets)
    if probs.ndim != 2 or probs.shape != targets.shape or not probs.size:
        raise InputError(
            f"probs has shape {probs.shape} and targets has shape {targets.shape}; use "
            "two arrays of the same shape [image, class] with at least one image."
        )
    num_classes = probs.shape[1]
    _check_probs(np.asarray(probs), num_classes)
    acc = sums_of(probs, targets, beta)
    fitted = fit_decoders(acc, choose(acc), label_embeddings=None)

    def decode(probs: Numbers) -> np.ndarray:
        given = np.asarray(probs)
        _check_probs(given, num_classes)
        return fitted.decisions([decoder], given, None)[decoder]

    return decode


def _check_probs(probs: np.ndarray, num_classes: int) -> None:
    """Raises InputError if an array is not [image, class] of probabilities."""
    if probs.ndim != 2 or probs.shape[1] != num_classes:
        raise InputError(
            f"probs has shape {probs.shape}; use shape [image, {num_classes}], with "
            "the classes of the fit."
        )
    # NaN fails both comparisons.
    outside = probs[~((probs >= 0.0) & (probs <= 1.0))]
    if outside.size:
        raise InputError(
            f"probs has {outside.size} values outside [0, 1], such as {outside[0]}; "
            "use probabilities (apply a sigmoid to logits)."
        )


def sums_of(
    probs: np.ndarray | jax.Array, targets: np.ndarray | jax.Array, beta: float = 2.0
) -> Accumulators:
    """Returns the sums that decoders are fitted on; see `fit` for the arguments."""
    acc = streaming.empty(probs.shape[1], DEFAULT_THRESHOLDS, beta)
    for start in range(0, len(probs), _BATCH):
        batch = slice(start, start + _BATCH)
        scores, present = np.asarray(probs[batch]), np.asarray(targets[batch])
        rest = ((0, _BATCH - len(scores)), (0, 0))
        acc = _update(
            acc,
            jnp.asarray(np.pad(scores, rest), jnp.float32),
            jnp.asarray(np.pad(present, rest)),
            None,
            jnp.arange(_BATCH) < len(scores),
        )
    return jax.device_get(acc)


_update: Callable[..., Accumulators] = jax.jit(streaming.update, donate_argnums=0)


def fit_decoders(
    acc: Accumulators,
    choice: DecoderChoice,
    *,
    label_embeddings: Float[np.ndarray, "class embed"] | None,
) -> Decoders:
    """Fits every decoder on one split.

    Args:
      acc: the sums of the split.
      choice: threshold and k, from `thresholds.choose`.
      label_embeddings: one vector per class; None without an embedding head.
    """
    histogram = np.asarray(acc.sums.histogram)
    calibration = calibrate(histogram, acc.thresholds)
    return Decoders(
        choice=choice,
        class_thresholds=class_thresholds(acc, choice.threshold),
        calibration=calibration,
        frequencies=frequencies(histogram, acc.thresholds, calibration),
        label_embeddings=label_embeddings,
    )


def _unit(rows: Float[np.ndarray, "row embed"]) -> Float[np.ndarray, "row embed"]:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
