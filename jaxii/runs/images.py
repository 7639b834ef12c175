"""Images given as paths, files in memory or pixels, and their predictions."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import cv2
import numpy as np
import polars as pl
from jax.sharding import Mesh

from jaxii.config import Config
from jaxii.decoding.decoders import Decode
from jaxii.errors import InputError
from jaxii.evaluation.image_records import ImageFiles, Listing, find
from jaxii.evaluation.predictions import Answer, answer
from jaxii.evaluation.predictor import Predict
from jaxii.prepare.recode import recode
from jaxii.runs import assembly

# Largest number of images that cannot be read that an error names.
MOST_NAMED = 10
# Pixels are encoded only to be decoded again; a higher compression takes longer.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)
# Modes of PIL images, and the mode of the PNG file that they are saved as. Older
# versions of Pillow read grey images of 16 bits as "I".
_MODES = {
    **{mode: mode for mode in ("1", "L", "LA", "P", "I;16", "RGB", "RGBA")},
    **{"I": "I;16", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"},
}
_ALLOWED = (
    "use paths, or uint8 arrays [height, width, 3] with values from 0 to 255, PIL "
    "images, or the bytes of JPEG, PNG or WebP files"
)


@runtime_checkable
class PilImage(Protocol):
    """An image of Pillow, which jaxii does not import."""

    info: dict[Any, Any]

    @property
    def mode(self) -> str:
        """The type of the pixels."""
        ...

    def convert(self, mode: str) -> "PilImage":
        """Returns a copy with another type of pixels."""
        ...

    def save(self, fp: Any, format: str, **options: Any) -> None:
        """Writes the image to a file."""
        ...


Image = str | os.PathLike[str] | bytes | np.ndarray | PilImage
Images = Image | Sequence[Image]


@dataclass(frozen=True)
class GivenImages(ImageFiles):
    """Images of any kind, each treated like a file with the same pixels.

    Attributes:
      given: Paths, encoded images, PIL images, or uint8 [height, width, 3], RGB.
    """

    given: Sequence[Image] = ()

    def jpeg(self, row: int) -> bytes:
        """Returns an image as `prepare` would store it.

        Raises:
          ValueError: If the image is damaged; the text is the reason.
        """
        one = self.given[row]
        if isinstance(one, str | os.PathLike):
            return super().jpeg(row)
        if isinstance(one, PilImage):
            one = _png(one)
        elif isinstance(one, np.ndarray):
            pixels = cv2.cvtColor(one, cv2.COLOR_RGB2BGR)
            one = cv2.imencode(".png", pixels, _PNG_OPTIONS)[1].tobytes()
        return recode(one, short_side=self.short_side)


def open_images(images: object, *, short_side: int) -> ImageFiles:
    """Returns the images as records to predict.

    Args:
      images: See `Run.predict_proba`.
      short_side: Short side that larger images are reduced to, in pixels.

    Raises:
      InputError: If `images` or one of them is of another kind.
    """
    if isinstance(images, str | os.PathLike):
        listing = find(os.fspath(cast(str, images)))
        return ImageFiles(listing, short_side)
    several = _listed(images)
    given = [_checked(one, f"image {row}") for row, one in enumerate(several)]
    names = [
        os.fspath(one) if isinstance(one, str | os.PathLike) else f"image {row}"
        for row, one in enumerate(given)
    ]
    listing = Listing(Path(), names, names, f"{len(names)} images")
    return GivenImages(listing, short_side, given)


def answers(
    source: ImageFiles, predict: Predict, config: Config, mesh: Mesh, decode: Decode
) -> Iterator[Answer]:
    """Yields the answer of every image in order, as long as all can be read.

    Raises:
      InputError: After the last image, if some cannot be read; names the first ones.
    """
    count, named = 0, list[str]()
    for given in answer(
        predict,
        assembly.file_batches(config, source),
        num_rows=len(source),
        mesh=mesh,
        decode=decode,
        fault=source.fault,
    ):
        if given.fault:
            count += 1
            if count <= MOST_NAMED:
                name = source.listing.shown(given.row)
                named.append(f"{name} cannot be used: {given.fault}")
        elif not count:
            yield given
    if count:
        if count > MOST_NAMED:
            named.append(f"{count - MOST_NAMED} more cannot be used")
        raise InputError(
            f"{'; '.join(named)}; leave {'it' if count == 1 else 'them'} out."
        )


def _listed(images: object) -> list[object]:
    """Returns the given images, or the one that is given alone."""
    if isinstance(images, bytes | PilImage) or getattr(images, "ndim", 0) == 3:
        return [images]
    try:
        return list(cast(Iterable[object], images))
    except TypeError as error:
        raise InputError(
            f"images is of type {type(images).__name__}; {_ALLOWED}."
        ) from error


def _checked(one: object, name: str) -> Image:
    """Returns one image, if it can be of use.

    Raises:
      InputError: If it is not of a type in `Image`, or has other pixels.
    """
    if isinstance(one, str | os.PathLike | bytes):
        return cast(Image, one)
    if isinstance(one, PilImage):
        if one.mode not in _MODES:
            raise InputError(
                f"{name} is a PIL image of mode {one.mode}; convert it to RGB first."
            )
        return one
    if not hasattr(one, "__array__"):
        raise InputError(f"{name} is of type {type(one).__name__}; {_ALLOWED}.")
    pixels = np.asarray(one)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(
            f"{name} has dtype {pixels.dtype} and shape {list(pixels.shape)}; "
            f"{_ALLOWED}."
        )
    if not pixels.size:
        raise InputError(f"{name} has no pixels; leave it out.")
    return np.ascontiguousarray(pixels)


def _png(image: PilImage) -> bytes:
    """Returns a PNG file with the pixels of a PIL image and its EXIF data.

    The EXIF data is kept because it has the orientation.

    Raises:
      ValueError: If Pillow reads the pixels only now, and the file is damaged.
    """
    kept = {"exif": image.info.get("exif", b""), "icc_profile": None}
    file = io.BytesIO()
    try:
        if image.mode != _MODES[image.mode]:
            image = image.convert(_MODES[image.mode])
        image.save(file, "PNG", compress_level=1, **kept)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"damaged PIL image ({error})") from error
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The labels of one image, the most probable first.

    Attributes:
      image: Path of the image, or "image N" without one, with N counted from 0.
      labels: Codes of the labels.
      names: Names of the labels.
      scores: Probabilities of the labels, not calibrated.
    """

    image: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    scores: tuple[float, ...]


class Predictions(tuple[Prediction, ...]):
    """The predictions of some images, in the order given."""

    __slots__ = ()

    def to_frame(self) -> pl.DataFrame:
        """Returns one row per image: image, labels, names and scores."""
        return pl.DataFrame(
            {
                "image": [row.image for row in self],
                "labels": [list(row.labels) for row in self],
                "names": [list(row.names) for row in self],
                "scores": [list(row.scores) for row in self],
            },
            schema={
                "image": pl.String,
                "labels": pl.List(pl.String),
                "names": pl.List(pl.String),
                "scores": pl.List(pl.Float64),
            },
        )
