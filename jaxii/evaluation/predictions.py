"""From images to the labels of each, one after the other, and the files of them.

Comes after `evaluate` has fitted the decoders, and ends in a submission or JSON lines.
Answers are written as they come: memory does not grow with the number of images.
"""

import csv
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxii.data.labels import Vocabulary
from jaxii.decoding.decoders import Decode
from jaxii.distributed.mesh import divided, to_devices
from jaxii.evaluation.evaluator import gather
from jaxii.evaluation.predictor import Batches, Predict
from jaxii.evaluation.provenance import Provenance
from jaxii.storage import AnyPath, write_beside, write_json

HEADER = ("image_id", "labels")
# The least probability that JSON lines tell of a label that was not chosen.
SCORE_FLOOR = 0.01
_DIGITS = 5
# They turn the text around them, and make x.gpj of a name that ends in .exe.
_BIDI_CONTROLS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one image.

    Attributes:
      row: of the image in its listing.
      label_ids: the labels it is given, the most probable first; of a damaged image
        none.
      probs: the network's probabilities, before a decoder calibrates them; of a damaged
        image they mean nothing.
      fault: why the image cannot be used; "" where it can.
    """

    row: int
    label_ids: Int[np.ndarray, " label"]
    probs: Float[np.ndarray, " class"]
    fault: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is said of all images together.

    Attributes:
      source: what was predicted, as a person named it.
      run: the checkpoint, in words.
      provenance: of the answers.
      caveats: what a reader has to know before.
      constant: codes of the labels that a submission gives damaged images: the most
        frequent ones of training, as many as gave the best F2 on the split that chose
        the thresholds. Of answers that do not look at the image it is the best.
      constant_names: their names.
      decoder: the name of the one that chooses.
      parameter: its parameter by name; empty where it has none.
    """

    source: str
    run: str
    provenance: Provenance
    caveats: Sequence[str]
    constant: Sequence[str]
    constant_names: Sequence[str]
    decoder: str = ""
    parameter: Mapping[str, float | int | None] = field(
        default_factory=dict[str, float | int | None]
    )

    @property
    def decoder_words(self) -> str:
        """The decoder with its parameter."""
        words = "".join(
            f" {value}" if name == self.decoder else f" ({name} {value})"
            for name, value in self.parameter.items()
        )
        return self.decoder + words


def answer(
    predict: Predict,
    batches: Batches,
    *,
    num_rows: int,
    decode: Decode,
    fault: Callable[[int], str],
    mesh: Mesh,
    on_progress: Callable[[int, int, str], None],
) -> Iterator[Answer]:
    """Yields the answer for every image, in order, damaged ones too.

    Args:
      predict: images to probabilities and embedding.
      batches: of `eval_batches(..., mask_damaged=True)`.
      num_rows: images in all.
      decode: the decoder.
      fault: row of an image that was masked to what is wrong with it.
      mesh: the devices.
      on_progress: called with (images done, images in all, "predict").
    """
    done = 0
    for batch in batches:
        sent = to_devices(
            {name: batch[name] for name in ("images", "index", "mask")}, divided(mesh)
        )
        probs, embedding = predict(sent["images"])
        probs, rows, mask = gather(probs), gather(sent["index"]), gather(sent["mask"])
        whole = np.flatnonzero(mask > 0)
        embedding = None if embedding is None else gather(embedding)[whole]
        labels = dict(zip(whole, decode(probs[whole], embedding), strict=True))
        for place in np.flatnonzero(rows >= 0):
            row = int(rows[place])
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
    """Returns the label ids that a submission gives an image that cannot be used.

    Args:
      codes: of the best constant prediction.
      vocabulary: gives the ids.
    """
    index = vocabulary.index()
    return np.array([index[code] for code in codes])


def write_submission(
    path: AnyPath,
    image_ids: Sequence[str],
    labels: Iterable[np.ndarray],
    vocabulary: Vocabulary,
    provenance: Mapping[str, Any],
) -> None:
    """Writes `image_id,labels` and, beside it, the provenance; whole or not at all.

    Args:
      path: the CSV file.
      image_ids: one an image.
      labels: label ids of each image; none is empty.
      vocabulary: gives the codes.
      provenance: as JSON, to `<path>.provenance.json`.

    Raises:
      ValueError: an image without a label, or as many images as not labels.
    """
    codes = vocabulary.codes

    def rows(file: TextIO) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for image_id, ids in zip(image_ids, labels, strict=True):
            if not len(ids):
                raise ValueError(f"image {image_id} has no label to submit")
            chosen: list[int] = ids.tolist()
            row = [_encodable(image_id), " ".join(codes[i] for i in chosen)]
            writer.writerow(row)

    _write_with_provenance(path, rows, provenance)


def write_json_lines(
    path: AnyPath,
    image_ids: Sequence[str],
    names: Sequence[str],
    answers: Iterable[Answer],
    vocabulary: Vocabulary,
    facts: Facts,
) -> None:
    """Writes one JSON object an image and, beside them, the provenance.

    An object has `image_id`, `file`, `decoder`, `labels` (what the decoder gives: code,
    name and score, the most probable first) and `scores` (code to score of every label
    from `SCORE_FLOOR` on, chosen or not). A damaged image has `error` and no labels:
    nothing that was not seen in it is said of it.

    Args:
      path: the file; it is there whole or not at all.
      image_ids: one an image.
      names: of the files.
      answers: one an image, in the same order.
      vocabulary: gives codes and names.
      facts: with the decoder that chose and the provenance of the answers.

    Raises:
      ValueError: as many images as not answers.
    """

    def rows(file: TextIO) -> None:
        for image_id, name, given in zip(image_ids, names, answers, strict=True):
            fields = {"image_id": image_id, "file": name, "decoder": facts.decoder}
            fields |= _fields(given, vocabulary)
            # An escape of a lone surrogate, as names that are no UTF-8 have, is JSON.
            line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
            file.write(_encodable(line) + "\n")

    _write_with_provenance(path, rows, facts.provenance.to_json())


def visible(name: str) -> str:
    """Returns a name as text that a person can see: what would not show, is escaped."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in ("Cc", "Cs") or letter in _BIDI_CONTROLS
        else letter
        for letter in name
    )


def _fields(given: Answer, vocabulary: Vocabulary) -> dict[str, Any]:
    if given.fault:
        return {"labels": [], "scores": {}, "error": given.fault}
    codes, probs = vocabulary.codes, given.probs
    told = np.flatnonzero(probs >= SCORE_FLOOR)
    told = told[np.argsort(-probs[told], kind="stable")]
    chosen: list[int] = given.label_ids.tolist()
    labels = [
        {
            "code": codes[i],
            "name": vocabulary.descriptions[i],
            "score": round(float(probs[i]), _DIGITS),
        }
        for i in chosen
    ]
    listed: list[int] = told.tolist()
    scores = {codes[i]: round(float(probs[i]), _DIGITS) for i in listed}
    return {"labels": labels, "scores": scores}


def _write_with_provenance(
    path: AnyPath, write: Callable[[TextIO], None], provenance: Mapping[str, Any]
) -> None:
    def write_all(file: TextIO) -> None:
        write(file)
        # Before the file has its name, so that no answers are ever without it.
        write_json(path.with_name(path.name + ".provenance.json"), provenance)

    write_beside(path, write_all)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
