"""The contact sheets of `predict` and `suspects`: HTML files with images and labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from jaxii.console import visible
from jaxii.data.labels import Vocabulary
from jaxii.evaluation.predictions import Answer, Facts
from jaxii.evaluation.provenance import Provenance
from jaxii.report.formatting import count, percent, short
from jaxii.report.page import templates
from jaxii.storage import AnyPath, write_text

MOST_SHOWN = 500
MOST_DAMAGED_LISTED = 200
# Labels of an image that are visible before its list is expanded.
_FIRST_LABELS = 5


class Label(NamedTuple):
    """A label of an image, with its probability as text and as the width of a bar."""

    name: str
    score: str
    percent: float
    kind: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image of a page; `image` is a JPEG, empty if the file is damaged or gone."""

    name: str
    image: bytes
    labels: Sequence[Label]
    fault: str = ""
    given: Sequence[str] = ()


def _label(name: str, prob: float, kind: str = "") -> Label:
    return Label(visible(name), short(prob), round(100 * prob, 1), kind)


class Sheet:
    """Collects the content of a contact sheet and writes it.

    Shows at most `MOST_SHOWN` images, evenly spaced. Memory: the thumbnails shown.

    Args:
      num_images: Total number of images, at least 1.
      name: Returns the name of a row's image.
      vocabulary: The labels.
      thumbnail: Returns a small JPEG of a row's image.
    """

    def __init__(
        self,
        num_images: int,
        name: Callable[[int], str],
        vocabulary: Vocabulary,
        thumbnail: Callable[[int], bytes],
    ):
        self._num_images = num_images
        self._name = name
        self._vocabulary = vocabulary
        self._thumbnail = thumbnail
        shown = min(num_images, MOST_SHOWN)
        self._rows = {i * num_images // shown for i in range(shown)}
        self._tiles: list[Tile] = []
        self._damaged: list[tuple[str, str]] = []
        self._num_damaged = self._num_labels = 0

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yields the answers unchanged and keeps what the sheet shows."""
        for given in answers:
            self._num_labels += len(given.label_ids)
            self._num_damaged += bool(given.fault)
            if given.fault and len(self._damaged) < MOST_DAMAGED_LISTED:
                name = visible(self._name(given.row))
                self._damaged.append((name, visible(given.fault)))
            if given.row in self._rows:
                self._tiles.append(self._tile(given))
            yield given

    def write(self, path: AnyPath, facts: Facts) -> None:
        """Writes the page atomically."""
        write_text(path, self.render(facts))

    def render(self, facts: Facts) -> str:
        """Returns the page as HTML."""
        whole = self._num_images - self._num_damaged
        template = templates().get_template("sheet.html.j2")
        return template.render(
            run=visible(facts.run),
            provenance=facts.provenance,
            caveats=[visible(caveat) for caveat in facts.provenance.caveats()],
            decoder=facts.decoder_words,
            expected_f2=facts.expected_f2,
            constant_names=[visible(name) for name in facts.constant_names],
            title=visible(facts.source.rstrip("/").rpartition("/")[2]) or "/",
            source=visible(facts.source),
            num_images=count(self._num_images),
            num_shown=count(len(self._tiles)),
            has_all=len(self._tiles) == self._num_images,
            num_damaged=count(self._num_damaged),
            damaged_share=percent(self._num_damaged / self._num_images),
            has_damaged=self._num_damaged > 0,
            damaged=self._damaged,
            num_unlisted=self._num_damaged - len(self._damaged),
            labels_each=short(self._num_labels / max(whole, 1)),
            tiles=self._tiles,
            first_labels=_FIRST_LABELS,
        )

    def _tile(self, given: Answer) -> Tile:
        labels = [
            _label(self._vocabulary.descriptions[i], float(given.probs[i]))
            for i in given.label_ids
        ]
        jpeg = b""
        if not given.fault:
            # A file that was deleted is shown without an image.
            with suppress(ValueError):
                jpeg = self._thumbnail(given.row)
        name, fault = visible(self._name(given.row)), visible(given.fault)
        return Tile(name=name, image=jpeg, labels=labels, fault=fault)


@dataclass(frozen=True, kw_only=True)
class SuspectImage:
    """An image with labels that may be wrong or missing.

    Attributes:
      labels: (name, whether the image has the label, score), most suspect first.
      given: Names of all labels that the image has.
      jpeg: A small copy of the image; empty if it cannot be read.
    """

    image_id: str
    labels: Sequence[tuple[str, bool, float]]
    given: Sequence[str]
    jpeg: bytes


def render_suspects(
    images: Sequence[SuspectImage],
    *,
    title: str,
    run: str,
    provenance: Provenance,
    num_found: int,
) -> str:
    """Returns the contact sheet of suspects as HTML; shows at most `MOST_SHOWN` images.

    Args:
      images: The most suspect first.
      run: Names of the runs that predicted the images.
      provenance: Provenance of these runs.
      num_found: Number of suspects, including those that are not listed.
    """
    tiles = [
        Tile(
            name=visible(image.image_id),
            image=image.jpeg,
            labels=[
                _label(name, score, "wrong" if is_given else "missing")
                for name, is_given, score in image.labels
            ],
            given=[visible(name) for name in image.given],
        )
        for image in images[:MOST_SHOWN]
    ]
    return (
        templates()
        .get_template("suspects.html.j2")
        .render(
            title=visible(title),
            run=visible(run),
            provenance=provenance,
            caveats=[visible(caveat) for caveat in provenance.caveats()],
            num_found=count(num_found),
            num_labels=count(sum(len(image.labels) for image in images)),
            num_images=count(len(images)),
            num_shown=count(len(tiles)),
            tiles=tiles,
        )
    )
