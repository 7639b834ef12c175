"""Images on disk as records without labels, seen as prepared ones are.

Comes after `listing`; the pipeline reads it. Each file goes through `recode`, as
`prepare` sends it: turned upright by EXIF, CMYK and transparency resolved, reduced, and
refused where it is damaged. A model sees an image alike in training and here.
"""

from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]

from jaxii.data.transforms import EvalTransform, read
from jaxii.evaluation.listing import Listing
from jaxii.prepare import image_files
from jaxii.prepare.recode import recode

THUMBNAIL_PIXELS = 240
_THUMBNAIL_QUALITY = 80


@dataclass(frozen=True)
class ImageFiles:
    """Satisfies `RandomAccess`, but that damaged images raise ValueError.

    Attributes:
      listing: which files.
      short_side: pixels, as for `recode`.
      central_share: of an image that a network sees, as for `EvalTransform`.
    """

    listing: Listing
    short_side: int
    central_share: float = 1.0

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, row: SupportsIndex, /) -> dict[str, Any]:
        return {
            "image": self.jpeg(row.__index__()),
            "label_ids": np.zeros(0, np.int32),
            "label_confidences": np.zeros(0, np.float32),
            "label_sources": np.zeros(0, np.uint8),
            "slice_id": 0,
        }

    def jpeg(self, row: int) -> bytes:
        """Returns an image as `prepare` would have stored it.

        Raises:
          ValueError: the fault of the file, in a few words.
        """
        if not self.listing.names[row]:
            raise ValueError("no file of this id")
        encoded = image_files.read(self.listing.path(row))
        return recode(encoded, short_side=self.short_side)

    def fault(self, row: int) -> str:
        """Returns why an image that was found damaged cannot be used."""
        try:
            self.jpeg(row)
        except ValueError as error:
            return str(error)
        return "could not be read at first, and can be now; predict it again"

    def thumbnail(self, row: int) -> bytes:
        """Returns a small JPEG of what a network sees of an image; it may be smaller
        than `THUMBNAIL_PIXELS`, where the image is.

        Raises:
          ValueError: the fault of the file, in a few words.
        """
        encoded = self.jpeg(row)
        image = read(encoded)
        side = max(1, round(min(image.height, image.width) * self.central_share))
        view = EvalTransform(
            size_pixels=min(THUMBNAIL_PIXELS, side), central_share=self.central_share
        )
        return simplejpeg.encode_jpeg(view(encoded), quality=_THUMBNAIL_QUALITY)
