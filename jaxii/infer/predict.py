"""From pictures in a folder to the labels of each: nothing but a workdir is needed.

Comes after `evaluate` has fitted the decoders, and ends in a submission.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from jax.sharding import Mesh

from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.files import AnyPath, write_beside, write_json
from jaxii.infer.decoders import Decode
from jaxii.infer.evaluate import gather
from jaxii.infer.models import Batches, Predict
from jaxii.train.mesh import divided, to_devices

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
HEADER = ("image_id", "labels")


@dataclass(frozen=True)
class Files:
    """Pictures on disk as a source of records without labels.

    Attributes:
      paths: one file an image; None where there is none, which reads as damaged.
    """

    paths: tuple[AnyPath | None, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        path = self.paths[row]
        try:
            encoded = b"" if path is None else path.read_bytes()
        except OSError:
            encoded = b""
        return {
            "image": encoded,
            "label_ids": np.zeros(0, np.int32),
            "label_confidences": np.zeros(0, np.float32),
            "label_sources": np.zeros(0, np.uint8),
            "slice_id": 0,
        }


def find_pictures(folder: AnyPath) -> dict[str, AnyPath]:
    """Returns image id -> file of every picture of a folder, in the order of ids.

    Raises:
      InputError: no such folder, no picture in it, or two pictures with one id.
    """
    if not folder.is_dir():
        raise InputError(f"--images={folder} is not a folder; give one with pictures.")
    found: dict[str, AnyPath] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (p.stem, p.suffix)):
        if path.suffix.lower() not in PICTURES:
            continue
        if path.stem in found:
            raise InputError(
                f"{found[path.stem].name} and {path.name} share the id {path.stem}; "
                "rename one of them."
            )
        found[path.stem] = path
    if not found:
        raise InputError(
            f"--images={folder} has no picture; files may end in {', '.join(PICTURES)}."
        )
    return found


def read_ids(path: AnyPath) -> list[str]:
    """Returns the image ids of a sample submission, in its order.

    Raises:
      InputError: no such file, another header, no id, or one twice.
    """
    if not path.is_file():
        raise InputError(
            f"--ids={path} is not a file; give a CSV with image_id,labels."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"--ids={path} cannot be read as CSV ({error}); it must be UTF-8 text with "
            "the header image_id,labels."
        ) from error
    if not rows or rows[0][:1] != ["image_id"]:
        found = ",".join(rows[0]) if rows else "nothing"
        raise InputError(
            f"{path} starts with {found!r}; its header has to be image_id,labels."
        )
    ids = [row[0] for row in rows[1:] if row]
    if not ids:
        raise InputError(f"--ids={path} lists no image; give one id a row.")
    if len(set(ids)) < len(ids):
        twice = next(i for i, number in Counter(ids).items() if number > 1)
        raise InputError(f"{path} lists {twice} more than once; list every id once.")
    return ids


class Answers:
    """Collects the answers of a pass over a split or a list of files, by row.

    Args:
      num_rows: images.
      decode: probabilities and embeddings of a batch to label ids.
    """

    def __init__(self, num_rows: int, decode: Decode):
        self._labels: list[np.ndarray | None] = [None] * num_rows
        self._decode = decode

    def add(
        self, probs: np.ndarray, embedding: np.ndarray | None, rows: np.ndarray
    ) -> None:
        """Takes a batch; row -1 is padding."""
        kept = np.flatnonzero(rows >= 0)
        embedding = None if embedding is None else embedding[kept]
        answers = self._decode(probs[kept], embedding)
        for row, answer in zip(rows[kept], answers, strict=True):
            self._labels[row] = answer

    def complete(self, fallback: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
        """Returns every row's labels, and the rows that had to take the fallback."""
        empty = [row for row, labels in enumerate(self._labels) if labels is None]
        return [fallback if x is None else x for x in self._labels], empty


def answer(
    predict: Predict,
    batches: Batches,
    *,
    num_rows: int,
    decode: Decode,
    mesh: Mesh,
    on_progress: Callable[[int, int, str], None],
) -> Answers:
    """Runs the network over batches of pictures and decodes each.

    Args:
      predict: images to probabilities and embedding.
      batches: of `eval_batches(..., mask_damaged=True)`.
      num_rows: pictures in all.
      decode: the decoder.
      mesh: the devices.
      on_progress: called with (pictures done, pictures in all, "predict").

    Returns:
      The answers; those of damaged pictures are missing.
    """
    answers, done = Answers(num_rows, decode), 0
    for batch in batches:
        sent = to_devices(
            {name: batch[name] for name in ("images", "index", "mask")}, divided(mesh)
        )
        probs, embedding = predict(sent["images"])
        rows = np.where(gather(sent["mask"]) > 0, gather(sent["index"]), -1)
        embedding = None if embedding is None else gather(embedding)
        answers.add(gather(probs), embedding, rows)
        done = min(done + len(rows), num_rows)
        on_progress(done, num_rows, "predict")
    return answers


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

    def rows(file):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for image_id, ids in zip(image_ids, labels, strict=True):
            if not len(ids):
                raise ValueError(f"image {image_id} has no label to submit")
            writer.writerow([image_id, " ".join(codes[i] for i in ids)])

    # First, so that no submission is ever without it.
    write_json(path.with_name(path.name + ".provenance.json"), provenance)
    write_beside(path, rows)
