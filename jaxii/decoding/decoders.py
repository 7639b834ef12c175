"""Decoders: from probabilities or embeddings of images to sets of labels.

Each takes scores [batch, class] and returns decisions, True where the label is
predicted. `Decoders` holds what was fitted for them on one split.
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
from jaxii.errors import InputError
from jaxii.metrics import streaming
from jaxii.metrics.streaming import Accumulators
from jaxii.storage import AnyPath, write_beside

# The first is the default: ahead of one threshold on every held-out domain that was
# tried (configs/README.md).
NAMES = ("expected_f2", "threshold", "per_class", "top_k", "embedding")
# The part of what an image shows that `expected_f2` believes. A network is too sure of
# images from elsewhere, the more so the longer it trained, and labels that occur
# together are more probable than independent ones (configs/README.md).
CONFIDENCE = 0.8
# Probabilities [batch, class] and embedding [batch, embed] or None to the label ids of
# each image, the most probable first, never none.
Decode = Callable[[np.ndarray, np.ndarray | None], list[np.ndarray]]
# Images in a batch of `fit`.
_BATCH = 256


def threshold_decoder(
    scores: Float[np.ndarray, "batch class"],
    *,
    threshold: float | Float[np.ndarray, " class"],
    at_least_one: bool = False,
) -> Bool[np.ndarray, "batch class"]:
    """Returns the labels whose probability is at least the threshold.

    Args:
        scores: probabilities in [0, 1]; NaN is never predicted.
        threshold: in [0, 1], one or one a class; compared as float32, as on the
            device.
        at_least_one: give the most probable label where none reaches the threshold.

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
    """Returns the k labels of the highest scores; of equal ones, those of lower id.

    Args:
        scores: probabilities or cosines.
        k: labels an image, one number or one an image, at least 1; all of them where
            there are fewer.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: k below 1.
    """
    if np.min(k, initial=1) < 1:
        raise InputError(f"k={k} labels an image; at least 1 is allowed; raise k")
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
        embedding: predicted embeddings, of any length.
        label_embeddings: one vector a class; a zero vector has cosine 0.
        k: labels an image, at least 1.

    Returns:
        True where the label is predicted.

    Raises:
        InputError: k below 1.
    """
    return top_k_decoder(_unit(embedding) @ _unit(label_embeddings).T, k=k)


def expected_f2_decoder(
    scores: Float[np.ndarray, "batch class"],
) -> Bool[np.ndarray, "batch class"]:
    """Returns, for each image, the set of at least one label of largest expected F2.

    Args:
        scores: calibrated probabilities in [0, 1]; NaN counts as 0.

    Returns:
        True where the label is chosen. Of equal probabilities that of the lower id is
        taken first, of sets of equal worth the smallest.

    Source: Ye, Chai, Lee, Chieu 2012, "Optimizing F-measures: a tale of two
        approaches", section 4; Dembczynski et al. 2011 for the sum over labels.
    """
    scores = np.nan_to_num(scores, nan=0.0)
    return top_k_decoder(scores, k=best_sizes(scores))


def label_lists(
    chosen: Bool[np.ndarray, "batch class"],
    scores: Float[np.ndarray, "batch class"] | None = None,
) -> list[Int[np.ndarray, " label"]]:
    """Returns each image's predicted ids, by falling score if scores are given."""
    if scores is None:
        return [np.flatnonzero(row) for row in chosen]
    lists: list[Int[np.ndarray, " label"]] = []
    for row, score in zip(chosen, scores, strict=True):
        ids = np.flatnonzero(row)
        lists.append(ids[np.argsort(-score[ids], kind="stable")])
    return lists


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Every decoder's parameters.

    Attributes:
      choice: one threshold for all classes, one k for all images.
      class_thresholds: a threshold a class, for `per_class`.
      calibration: of the probabilities; `expected_f2` takes them tempered.
      frequencies: how often each label occurs, by calibrated probabilities.
      label_embeddings: for `embedding`.
      expected_f2_offsets: decoder -> the mean F2 on labelled images, those of the fit,
        minus the mean that the probabilities expect there; empty until measured.
    """

    choice: DecoderChoice
    class_thresholds: Float[np.ndarray, " class"]
    calibration: Calibration
    frequencies: Float64[np.ndarray, " class"]
    label_embeddings: Float[np.ndarray, "class embed"] | None = None
    expected_f2_offsets: Mapping[str, float] = field(default_factory=dict[str, float])

    def names(self, *, has_head: bool) -> tuple[str, ...]:
        """Returns the decoders that can answer, given an embedding head or none."""
        if has_head and self.choice.embedding_k is not None:
            return NAMES
        return tuple(name for name in NAMES if name != "embedding")

    def check(self, name: str, possible: Sequence[str]) -> None:
        """Refuses a decoder that cannot answer.

        Args:
          name: of `NAMES`.
          possible: of `names`.

        Raises:
          InputError: If the embedding head is missing.
        """
        if name not in possible:
            raise InputError(
                f"--decoder={name} needs the embedding head, here and in the evaluated "
                f"stage; use one of {', '.join(possible)}, or evaluate an earlier "
                "--stage."
            )

    def answer(self, name: str) -> Decode:
        """Returns one decoder as a function that gives label ids."""

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
        """Returns what each decoder predicts, at least one label an image.

        Args:
          names: of `names`.
          probs: the network's probabilities.
          embedding: its embeddings, where it has the head.
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
        """Returns the F2 to expect of decisions; its mean over images is meaningful.

        That of calibrated probabilities is biased, because `expected_f2_of` takes
        labels as independent. The decoder's offset is added: the mean over the images
        of the fit is their F2.

        Args:
          name: the decoder.
          probs: the network's probabilities.
          chosen: what the decoder predicts.

        Source: Guillory et al. 2021, "Predicting with confidence on unseen
            distributions", section 3 (difference of confidences).
        """
        expected = expected_f2_of(self.calibration(probs), chosen)
        return expected + self.expected_f2_offsets.get(name, 0.0)

    def parameter(self, name: str) -> dict[str, float | int | None]:
        """Returns the one parameter of a decoder by name; the others have none."""
        parameters: dict[str, dict[str, float | int | None]] = {
            "threshold": {"threshold": self.choice.threshold},
            "top_k": {"k": self.choice.top_k},
            "embedding": {"k": self.choice.embedding_k},
        }
        return parameters.get(name, {})

    def save(self, path: AnyPath) -> None:
        """Writes all but the label embedding, which has a file; whole or not at all."""
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
      label_embeddings: of the same workdir, where it has them.

    Raises:
      InputError: no such file, or not one of decoders.
    """
    try:
        # NumPy leaves a file open that it opened and could not read.
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
            f"{path} does not hold the decoders of a run ({error}); run evaluate with "
            "the same --workdir first."
        ) from error


def _check_numbers(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses parameters that no fit gives.

    Raises:
      ValueError: a threshold outside [0, 1], a number that is not finite, no label.
    """
    for name in ("slopes", "intercepts", "frequencies", "offsets"):
        if not np.all(np.isfinite(arrays[name])):
            raise ValueError(f"{name} has a number that is not finite")
    for name in ("threshold", "class_thresholds"):
        # NaN is in no range.
        if not np.all((arrays[name] >= 0.0) & (arrays[name] <= 1.0)):
            raise ValueError(f"{name} is outside [0, 1]")
    if arrays["top_k"] < 1 or arrays["embedding_k"] < 0:
        raise ValueError("a number of labels is below 1")


def fit(
    probs: np.ndarray | jax.Array,
    targets: np.ndarray | jax.Array,
    beta: float = 2.0,
    *,
    decoder: str = "threshold",
) -> Callable[[np.ndarray | jax.Array], np.ndarray]:
    """Fits a decoder on images with labels.

    Args:
      probs: probabilities in [0, 1], [image, class].
      targets: 1 or true where the label is present, [image, class].
      beta: of the F-beta that is maximised, above 0.
      decoder: "threshold", "per_class", "top_k" or "expected_f2".

    Returns:
      A function from probabilities [image, class] to decisions of the same shape, True
      where the label is predicted; at least one label an image.

    Raises:
      InputError: If the decoder is unknown or does not maximise F-beta of this beta, or
        the arrays are empty or differ in shape.
    """
    names = tuple(name for name in NAMES if name != "embedding")
    if decoder not in names:
        raise InputError(f"decoder={decoder!r}; use one of {', '.join(names)}.")
    if decoder == "expected_f2" and beta != 2:
        raise InputError(
            f"expected_f2 maximises F2 and beta={beta}; use beta=2 or another decoder."
        )
    if probs.shape != targets.shape or not probs.size:
        raise InputError(
            f"probs of shape {probs.shape} and targets of shape {targets.shape}; give "
            "two arrays of the same shape [image, class] with at least one image."
        )
    acc = sums_of(probs, targets, beta)
    fitted = fit_decoders(acc, choose(acc), label_embeddings=None)

    def decode(probs: np.ndarray | jax.Array) -> np.ndarray:
        return fitted.decisions([decoder], np.asarray(probs), None)[decoder]

    return decode


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
      choice: threshold and k, as `thresholds` chooses them.
      label_embeddings: one vector a class, where a stage has the head.
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
