"""Images given as paths or arrays, and their predictions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import polars as pl

from jaxii.errors import InputError
from jaxii.evaluation.image_records import ImageFiles, Listing, find
from jaxii.prepare.recode import recode

Images = (
    str
    | os.PathLike[str]
    | np.ndarray
    | Sequence[str]
    | Sequence[os.PathLike[str]]
    | Sequence[np.ndarray]
)
# Arrays are encoded only to be decoded again; a higher compression takes longer.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)


@dataclass(frozen=True)
class ImageArrays(ImageFiles):
    """Pixels in memory, treated like PNG files with the same pixels.

    Attributes:
      arrays: uint8 [height, width, 3], RGB.
    """

    arrays: Sequence[np.ndarray] = ()

    def jpeg(self, row: int) -> bytes:
        """Returns an image as `prepare` would store it."""
        pixels = cv2.cvtColor(self.arrays[row], cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".png", pixels, _PNG_OPTIONS)
        return recode(encoded.tobytes(), short_side=self.short_side)


def open_images(images: Images, *, short_side: int) -> ImageFiles:
    """Returns the images as records to predict.

    Args:
      images: A folder, a CSV, a pattern (as `predict --images`); a list of paths; uint8
        [image, height, width, 3]; or a list of uint8 [height, width, 3] of any sizes.
      short_side: Short side that larger images are reduced to, in pixels.

    Raises:
      InputError: If `images` is none of these.
    """
    if isinstance(images, str | os.PathLike):
        listing = find(os.fspath(images))
        return ImageFiles(listing, short_side)
    given = list(cast(Sequence[object], images))
    if all(isinstance(one, str | os.PathLike) for one in given):
        names = [os.fspath(cast(str, one)) for one in given]
        listing = Listing(Path(), names, names, f"{len(names)} images")
        return ImageFiles(listing, short_side)
    names = [f"image {row}" for row in range(len(given))]
    arrays = [_pixels(one, name) for one, name in zip(given, names, strict=True)]
    listing = Listing(Path(), names, names, f"{len(names)} arrays")
    return ImageArrays(listing, short_side, arrays)


def _pixels(one: object, name: str) -> np.ndarray:
    pixels = np.asarray(one)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InputError(
            f"{name} has dtype {pixels.dtype} and shape {list(pixels.shape)}; use "
            "paths, or uint8 arrays [height, width, 3] with values from 0 to 255."
        )
    if not pixels.size:
        raise InputError(f"{name} has no pixels; leave it out.")
    return np.ascontiguousarray(pixels)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The labels of one image, the most probable first.

    Attributes:
      image: Path of the image, or "image N" for array N, counted from 0.
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
