"""TensorBoard's files, written without TensorFlow: curves, images, words, HPARAMS.

Names of labels, files and domains may be any text: what TensorBoard shows as Markdown
is escaped here, character by character.
"""

import os
import string
import time
import unicodedata
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jaxii.storage import Mirror, at, names_in
from jaxii.train.telemetry.images import png
from jaxii.train.telemetry.trackers import RESULT_SPLITS, Facts, result_name

# Made at run time from a description, where no type checker finds them.
Event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

FOLDER = "tensorboard"
LAYOUT = {
    "objective": {
        "loss by term": ["Multiline", [r"train/loss/.*"]],
        "weight by term": ["Multiline", [r"train/weight/.*"]],
    }
}
_PLAIN = frozenset(string.ascii_letters + string.digits + " ")
# They reorder what comes after them, and have no place in a name.
_REORDERING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
# Controls, line breaks, and what stands for bytes that are no UTF-8.
_UNSHOWN = frozenset(("Cc", "Zl", "Zp", "Cs"))
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def as_markdown(text: str) -> str:
    """Returns Markdown (and HTML) that shows a text as it is, in one line.

    What could be syntax becomes a character reference. Text that runs from right to
    left is isolated, so that it does not reorder what stands beside it.
    """
    shown = []
    for character in text:
        if character in _REORDERING or unicodedata.category(character) in _UNSHOWN:
            shown.append(f"&#92;u{ord(character):04x}")
        elif character in _PLAIN or character > "\x7f":
            shown.append(character)
        else:
            shown.append(f"&#{ord(character)};")
    joined = "".join(shown)
    if any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text):
        return f"{_ISOLATE}{joined}{_END_ISOLATE}"
    return joined


def as_table(rows: Mapping[str, str], head: tuple[str, str]) -> str:
    """Returns a Markdown table of two columns that shows any text as it is."""
    lines = [head, ("---", "---")]
    lines += [(as_markdown(name), as_markdown(text)) for name, text in rows.items()]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


class TensorBoard:
    """Writes `WORKDIR/tensorboard/`; in a bucket at evaluations and at the end.

    Args:
      workdir: of the run.
      facts: what it is.
      start_step: steps done already; what an earlier process wrote after it is purged.
    """

    def __init__(self, workdir: str | PathLike[str], facts: Facts, *, start_step: int):
        home = at(workdir) / FOLDER
        goes_on = home.exists() and bool(names_in(home))
        self._files = Mirror(home)
        # Not tensorboardX's SummaryWriter: its own queue makes a flush come too early.
        # The name that it makes is the same for all that is opened in one second.
        self._writer = EventsWriter(
            str(self._files.path / "events"), f".{os.getpid()}.{start_step}"
        )
        if goes_on:
            self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))
        metrics = {result_name(split): 0.0 for split in RESULT_SPLITS}
        experiment, start, self._end = summary.hparams(dict(facts.settings), metrics)
        for value in (experiment, start, summary.custom_scalars(LAYOUT)):
            self._write(0, summary=value)
        self._text(start_step, "run", as_table(facts.about, ("run", "")))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, value))

    def images(
        self,
        step: int,
        name: str,
        pixels: UInt8[np.ndarray, "height width 3"],
        captions: Sequence[str],
    ) -> None:
        """Shows the images as one, and the captions as a table."""
        height, width = pixels.shape[:2]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png(pixels)
        )
        value = Summary.Value(tag=name, image=image)
        self._write(step, summary=Summary(value=[value]))
        rows = {str(i): caption for i, caption in enumerate(captions, 1)}
        self._text(step, name, as_table(rows, ("image", "labels")))

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures of the HPARAMS page."""
        self.scalars(step, figures)
        self._write(step, summary=self._end)

    def flush(self) -> None:
        """Writes out what is held back, and uploads it."""
        self._writer.flush()
        self._files.push()

    def close(self) -> None:
        """Writes and uploads the rest."""
        self._writer.close()
        self._files.close()

    def _text(self, step: int, name: str, markdown: str) -> None:
        self._write(step, summary=summary.text(name, markdown))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
