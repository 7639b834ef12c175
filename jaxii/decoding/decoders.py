"""All decoders with their parameters: fitted on one split, kept in a file, applied.

Before it: the sums of the split that may be seen. After it: `scores` compares their
answers on every split, `predict` gives those of one. Probabilities of an image go in,
its labels come out; none comes out empty.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

from jaxii.decoding.calibration import Calibration, calibrate
from jaxii.decoding.decode import (
    embedding_decoder,
    label_lists,
    threshold_decoder,
    top_k_decoder,
)
from jaxii.decoding.expected_f import expected_f2_decoder
from jaxii.decoding.label_shift import frequencies
from jaxii.decoding.thresholds import DecoderChoice, class_thresholds
from jaxii.errors import InputError
from jaxii.metrics.streaming import Accumulators
from jaxii.storage import AnyPath, write_beside

NAMES = (
    "threshold",
    "per_class",
    "top_k",
    "embedding",
    "expected_f2",
)
# Probabilities [batch, class] and embedding [batch, embed] or None to the label ids of
# each image, the most probable first, never none.
Decode = Callable[[np.ndarray, np.ndarray | None], list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Every decoder's parameters.

    Attributes:
      choice: one threshold for all classes, one k for all images.
      class_thresholds: a threshold a class, for `per_class`.
      calibration: of the probabilities that `expected_f2` takes.
      frequencies: how often each label occurs, by calibrated probabilities.
      label_embeddings: for `embedding`.
    """

    choice: DecoderChoice
    class_thresholds: Float[np.ndarray, " class"]
    calibration: Calibration
    frequencies: Float64[np.ndarray, " class"]
    label_embeddings: Float[np.ndarray, "class embed"] | None = None

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

        def decode(probs, embedding):
            chosen = self.answers([name], probs, embedding)[name]
            return label_lists(chosen, probs)

        return decode

    def answers(
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
            "expected_f2": lambda: expected_f2_decoder(self.calibration(probs)),
        }
        if embedding is not None and vectors is not None and k is not None:
            ways["embedding"] = lambda: embedding_decoder(
                embedding, label_embeddings=vectors, k=k
            )
        return {name: ways[name]() for name in names}

    def parameter(self, name: str) -> dict[str, float | int | None]:
        """Returns the one parameter of a decoder by name; the others have none."""
        return {
            "threshold": {"threshold": self.choice.threshold},
            "top_k": {"k": self.choice.top_k},
            "embedding": {"k": self.choice.embedding_k},
        }.get(name, {})

    def save(self, path: AnyPath) -> None:
        """Writes all but the label embedding, which has a file; whole or not at all."""
        k = self.choice.embedding_k
        arrays = {
            "threshold": np.float64(self.choice.threshold),
            "top_k": np.int64(self.choice.top_k),
            "embedding_k": np.int64(0 if k is None else k),
            "class_thresholds": self.class_thresholds,
            "slopes": self.calibration.slopes,
            "intercepts": self.calibration.intercepts,
            "frequencies": self.frequencies,
        }
        write_beside(path, lambda file: np.savez(file, **arrays), binary=True)


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
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
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
    for name in ("slopes", "intercepts", "frequencies"):
        if not np.all(np.isfinite(arrays[name])):
            raise ValueError(f"{name} has a number that is not finite")
    for name in ("threshold", "class_thresholds"):
        # NaN is in no range.
        if not np.all((arrays[name] >= 0.0) & (arrays[name] <= 1.0)):
            raise ValueError(f"{name} is outside [0, 1]")
    if arrays["top_k"] < 1 or arrays["embedding_k"] < 0:
        raise ValueError("a number of labels is below 1")


def fit(
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
