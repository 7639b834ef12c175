"""Predicts the labels of images and writes them as a submission or JSON lines.

Answers are written as they arrive, so memory does not grow with the number of images.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxii.console import OnProgress, no_progress
from jaxii.data.labels import Vocabulary
from jaxii.decoding.decoders import Decode, Decoders, label_lists
from jaxii.evaluation.draft import Draft
from jaxii.evaluation.evaluator import gather
from jaxii.evaluation.predictor import Batches, Predict, predicted
from jaxii.evaluation.provenance import Provenance
from jaxii.storage import AnyPath, write_beside, write_json

HEADER = ("image_id", "labels")
# Minimum probability of the labels in `scores` of JSON lines.
SCORE_FLOOR = 0.01
# Maximum number of labels of the constant prediction that a message names.
MOST_NAMED = 10
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The prediction for one image.

    Attributes:
      row: row of the image in its listing.
      label_ids: chosen labels, the most probable first; empty for a damaged image.
      probs: uncalibrated probabilities; meaningless for a damaged image.
      fault: why the image is damaged; "" if it is not.
    """

    row: int
    label_ids: Int[np.ndarray, " label"]
    probs: Float[np.ndarray, " class"]
    fault: str


@dataclass
class ExpectedF2:
    """Decodes images and sums the expected F2 of the predictions.

    Attributes:
      decoders: fitted decoders and their calibration.
      name: name of the decoder in use.
      error: error of the mean, from `HeldOut.expected_f2_error`; None if unknown.
    """

    decoders: Decoders
    name: str
    error: float | None
    total: float = 0.0
    num_images: int = 0

    def decode(
        self, probs: np.ndarray, embedding: np.ndarray | None
    ) -> list[np.ndarray]:
        """Returns the label ids of each image; see `decoders.Decode`."""
        chosen = self.decoders.decisions([self.name], probs, embedding)[self.name]
        expected = self.decoders.expected_f2(self.name, probs, chosen)
        self.total += float(expected.sum())
        self.num_images += len(probs)
        return label_lists(chosen, probs)

    def to_json(self) -> dict[str, float | None]:
        """Returns the mean over images, limited to [0, 1], and its error."""
        mean = self.total / max(self.num_images, 1)
        return {"mean": min(max(mean, 0.0), 1.0), "error": self.error}

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.to_json()['mean']:.2f}{error}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts that all answers share.

    Attributes:
      source: the images, as the user named them.
      run: description of the checkpoint.
      constant: codes of the best constant prediction (`decoding.constant`), used for
        damaged images in a submission.
      constant_names: names of these labels.
      parameter: parameter of the decoder by name; empty if it has none.
      expected_f2: complete after the last image; None without a calibration.
    """

    source: str
    run: str
    provenance: Provenance
    constant: Sequence[str]
    constant_names: Sequence[str]
    decoder: str
    parameter: Mapping[str, float | int | None]
    expected_f2: ExpectedF2 | None = None

    def record(self) -> dict[str, Any]:
        """Returns the provenance and expected F2 that are written beside answers."""
        record = self.provenance.to_json()
        if self.expected_f2 is not None:
            record["expected_f2"] = self.expected_f2.to_json()
        return record

    @property
    def decoder_words(self) -> str:
        """The decoder with its parameter."""
        words = "".join(
            f" {value}" if name == self.decoder else f" ({name} {value})"
            for name, value in self.parameter.items()
        )
        return self.decoder + words


def decode_nothing(probs: np.ndarray, embedding: np.ndarray | None) -> list[np.ndarray]:
    """Returns no label for any image, for callers that need only probabilities."""
    return [np.zeros(0, np.int64)] * len(probs)


def answer(
    predict: Predict,
    batches: Batches,
    *,
    num_rows: int,
    mesh: Mesh,
    first_row: int = 0,
    decode: Decode = decode_nothing,
    fault: Callable[[int], str] = lambda row: "damaged",
    on_progress: OnProgress = no_progress,
) -> Iterator[Answer]:
    """Yields the answer for every image in order, including damaged ones.

    Args:
      predict: returns probabilities and embedding of images.
      batches: from `eval_batches(..., mask_damaged=True)`.
      num_rows: number of images, with those before `first_row`.
      first_row: row of the first image of `batches`.
      fault: returns why the image of a masked row is damaged.
      on_progress: called with (images done, `num_rows`, "predict").
    """
    done, fields = first_row, ("images", "index", "mask")
    needed = ({name: batch[name] for name in fields} for batch in batches)
    for batch, probs, embedding in predicted(predict, needed, mesh):
        probs, rows, mask = gather(probs), gather(batch["index"]), gather(batch["mask"])
        whole = np.flatnonzero(mask > 0)
        embedding = None if embedding is None else gather(embedding)[whole]
        labels = dict(zip(whole, decode(probs[whole], embedding), strict=True))
        for place in np.flatnonzero(rows >= 0):
            row = first_row + int(rows[place])
            yield Answer(
                row=row,
                label_ids=labels.get(place, np.zeros(0, np.int64)),
                probs=probs[place],
                fault="" if place in labels else fault(row),
            )
        done = min(done + len(rows), num_rows)
        on_progress(done, num_rows, "predict")


def fallback_labels(
    codes: Sequence[str], vocabulary: Vocabulary
) -> Int[np.ndarray, " label"]:
    """Returns label ids of the best constant prediction, for damaged images."""
    index = vocabulary.index
    return np.array([index[code] for code in codes])


def shortened(names: Sequence[str]) -> str:
    """Returns at most `MOST_NAMED` names and the number of the others, as text."""
    others = len(names) - MOST_NAMED
    more = f" and {others} more" if others > 0 else ""
    return ", ".join(names[:MOST_NAMED]) + more


def write_submission(
    path: AnyPath,
    image_ids: Sequence[str],
    labels: Iterable[np.ndarray],
    vocabulary: Vocabulary,
    record: Callable[[], Mapping[str, Any]],
    draft: Draft | None = None,
) -> None:
    """Writes `image_id,labels` and, beside it, the provenance, atomically.

    Args:
      labels: label ids of each image that `draft` does not have yet, at least one.
      record: returns JSON for `<path>.provenance.json`; called after the last image.
      draft: keeps the rows until all are known; None does not keep them.

    Raises:
      ValueError: If an image has no label, or the lengths differ.
    """
    codes = vocabulary.codes

    def line(image_id: str, ids: np.ndarray) -> str:
        if not len(ids):
            raise ValueError(f"image {image_id} has no label to submit")
        chosen: list[int] = ids.tolist()
        return _csv_line([_encodable(image_id), " ".join(codes[i] for i in chosen)])

    image_ids = image_ids[draft.num_rows if draft else 0 :]
    lines = (line(*given) for given in zip(image_ids, labels, strict=True))
    _write_with_provenance(path, lines, record, draft, header=_csv_line(HEADER))


def write_json_lines(
    path: AnyPath,
    image_ids: Sequence[str],
    names: Sequence[str],
    answers: Iterable[Answer],
    vocabulary: Vocabulary,
    facts: Facts,
    draft: Draft | None = None,
) -> None:
    """Writes one JSON object per image and, beside them, the provenance, atomically.

    An object has `image_id`, `file`, `decoder`, `labels` (code, name and score of the
    chosen labels, the most probable first) and `scores` (code to score of every label
    of at least `SCORE_FLOOR`). A damaged image has `error`, and no labels or scores.

    Args:
      names: names of the files.
      answers: one per image that `draft` does not have yet, in the same order.
      facts: decoder and provenance of the answers.
      draft: keeps the rows until all are known; None does not keep them.

    Raises:
      ValueError: If the lengths differ.
    """

    def line(image_id: str, name: str, given: Answer) -> str:
        fields = {"image_id": image_id, "file": name, "decoder": facts.decoder}
        fields |= _fields(given, vocabulary)
        # Names that are not UTF-8 have lone surrogates; JSON has escapes for them.
        return _encodable(json.dumps(fields, ensure_ascii=False, allow_nan=False))

    rest = slice(draft.num_rows if draft else 0, None)
    images = zip(image_ids[rest], names[rest], answers, strict=True)
    lines = (line(*image) + "\n" for image in images)
    _write_with_provenance(path, lines, facts.record, draft)


def _fields(given: Answer, vocabulary: Vocabulary) -> dict[str, Any]:
    if given.fault:
        return {"labels": [], "scores": {}, "error": given.fault}
    codes, probs = vocabulary.codes, given.probs

    def score(label_id: int) -> float:
        return round(float(probs[label_id]), _DIGITS)

    likely = np.flatnonzero(probs >= SCORE_FLOOR)
    likely = likely[np.argsort(-probs[likely], kind="stable")]
    names = vocabulary.descriptions
    chosen: list[int] = given.label_ids.tolist()
    labels = [{"code": codes[i], "name": names[i], "score": score(i)} for i in chosen]
    return {"labels": labels, "scores": {codes[i]: score(i) for i in likely.tolist()}}


def _write_with_provenance(
    path: AnyPath,
    lines: Iterable[str],
    record: Callable[[], Mapping[str, Any]],
    draft: Draft | None,
    *,
    header: str = "",
) -> None:
    if draft is not None:
        lines = draft.completed(lines)

    def write_all(file: TextIO) -> None:
        file.write(header)
        file.writelines(lines)
        # Written before the answers get their name, so that none lack provenance.
        write_json(path.with_name(path.name + ".provenance.json"), record())

    write_beside(path, write_all)
    if draft is not None:
        draft.remove()


def _csv_line(cells: Sequence[str]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
