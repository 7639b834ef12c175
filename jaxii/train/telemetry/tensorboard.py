"""TensorBoard's files, written without TensorFlow: curves, images, text, HPARAMS.

Names of labels, files and domains may be any text, so text for Markdown is escaped.
"""

import os
import string
import time
import unicodedata
from collections.abc import Mapping
from os import PathLike
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jaxii.console import is_shown
from jaxii.storage import Mirror, at, names_in
from jaxii.train.telemetry.images import Images, png
from jaxii.train.telemetry.trackers import RESULT_SPLITS, Facts, result_name

# protobuf makes these at run time.
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
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def as_markdown(text: str) -> str:
    """Escapes a text for Markdown and HTML, in one line.

    Possible syntax becomes character references. Right-to-left text is isolated, so
    that it does not reorder the text beside it.
    """
    shown = []
    for character in text:
        if not is_shown(character):
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
    """Returns a Markdown table of two columns of escaped text."""
    lines = [head, ("---", "---")]
    lines += [(as_markdown(name), as_markdown(text)) for name, text in rows.items()]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


class TensorBoard:
    """Writes `WORKDIR/tensorboard/`; to a bucket at evaluations and at the end.

    Args:
      workdir: Workdir of the run.
      facts: Name, settings and description of the run.
      start_step: Updates done before; later events of an earlier process are purged.
    """

    def __init__(self, workdir: str | PathLike[str], facts: Facts, *, start_step: int):
        home = at(workdir) / FOLDER
        before = len(names_in(home)) if home.exists() else 0
        self._files = Mirror(home)
        # tensorboardX's SummaryWriter queues events, so `flush` could come too early.
        # TensorBoard reads files in the order of their names. A count comes first, as
        # the time in the name gives a wrong order if the clock was set back.
        self._writer = EventsWriter(
            str(self._files.path / f"events.{before:05}"), f".{os.getpid()}"
        )
        if before:
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

    def images(self, step: int, name: str, images: Images) -> None:
        """Shows the grid of images, and the captions as a table."""
        height, width = images.pixels.shape[:2]
        encoded = png(images.pixels)
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        value = Summary.Value(tag=name, image=image)
        self._write(step, summary=Summary(value=[value]))
        rows = {str(i): caption for i, caption in enumerate(images.captions, 1)}
        self._text(step, name, as_table(rows, ("image", "labels")))

    def result(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures of the HPARAMS page."""
        self.scalars(step, figures)
        self._write(step, summary=self._end)

    def flush(self) -> None:
        """Flushes and uploads."""
        self._writer.flush()
        self._files.push()

    def close(self) -> None:
        """Flushes, uploads and closes."""
        self._writer.close()
        self._files.close()

    def _text(self, step: int, name: str, markdown: str) -> None:
        self._write(step, summary=summary.text(name, markdown))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
