"""From the bytes of one picture to the square of pixels that the network sees.

Comes after `sources` (bytes) and inside `pipeline` (one call an example, in worker
threads: the decoders and OpenCV release the interpreter lock).
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

Pixels = UInt8[np.ndarray, "height width channel"]

# A crop of this much of the picture and this shape, as Szegedy et al. 2015 (section 6)
# and every ImageNet recipe since; the smallest area is a choice of the configuration.
ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random resized crop and mirror.

    Attributes:
      size_pixels: side of the square that comes out.
      min_area: smallest share of the picture's area that a crop covers, in (0, 1].
      mirror: whether half of the pictures are mirrored left to right.
    """

    size_pixels: int
    min_area: float = 0.25
    mirror: bool = True

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> Pixels:
        """Returns a random view [size, size, 3] of an encoded picture."""
        picture = read(encoded)
        height, width = picture.height, picture.width
        top, left, crop_height, crop_width = self._crop(height, width, rng)
        # Only as many pixels are decoded as the crop needs at its final size.
        shrink = max(1.0, min(crop_height, crop_width) / self.size_pixels)
        pixels = picture.decode(height / shrink, width / shrink)
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        row, column = int(top * y), int(left * x)
        rows, columns = max(1, round(crop_height * y)), max(1, round(crop_width * x))
        view = pixels[row : row + rows, column : column + columns]
        view = resize(view, self.size_pixels, self.size_pixels)
        if self.mirror and rng.random() < 0.5:
            view = view[:, ::-1]
        return np.ascontiguousarray(view)

    def _crop(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        for _ in range(CROP_ATTEMPTS):
            area = height * width * rng.uniform(self.min_area, 1.0)
            ratio = np.exp(rng.uniform(*np.log(ASPECT_RATIOS)))
            crop_width = round(np.sqrt(area * ratio))
            crop_height = round(np.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(0, height - crop_height + 1))
                left = int(rng.integers(0, width - crop_width + 1))
                return top, left, crop_height, crop_width
        return central_square(height, width)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The central square, resized: the same for every run.

    Attributes:
      size_pixels: side of the square that comes out.
      central_share: side of the square that is cut out, as a share of the short side.
    """

    size_pixels: int
    central_share: float = 1.0

    def __call__(self, encoded: bytes) -> Pixels:
        """Returns the central view [size, size, 3] of an encoded picture."""
        picture = read(encoded)
        side = min(picture.height, picture.width) * self.central_share
        shrink = max(1.0, side / self.size_pixels)
        pixels = picture.decode(picture.height / shrink, picture.width / shrink)
        rows, columns, _ = pixels.shape
        top, left, side, _ = central_square(rows, columns, self.central_share)
        view = pixels[top : top + side, left : left + side]
        return np.ascontiguousarray(resize(view, self.size_pixels, self.size_pixels))


def central_square(
    height: int, width: int, share: float = 1.0
) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of the central square, in pixels."""
    side = max(1, round(min(height, width) * share))
    return (height - side) // 2, (width - side) // 2, side, side


@dataclass(frozen=True)
class Picture:
    """An encoded picture whose header has been read; see `read`.

    Attributes:
      encoded: its bytes.
      height: rows.
      width: columns.
      pixels: all of it, where the format cannot be decoded at a smaller scale.
    """

    encoded: bytes
    height: int
    width: int
    pixels: Pixels | None

    def decode(self, height: float, width: float) -> Pixels:
        """Decodes to RGB at the smallest scale that is large enough.

        Args:
          height: fewest rows that are of use.
          width: fewest columns that are of use.

        Returns:
          Pixels [rows, columns, 3]; rows >= height and columns >= width where the
          picture has so many.

        Raises:
          ValueError: the bytes are damaged.
        """
        if self.pixels is not None:
            return self.pixels
        return simplejpeg.decode_jpeg(
            self.encoded, "RGB", min_height=int(height), min_width=int(width)
        )


def read(encoded: bytes) -> Picture:
    """Reads the size of a picture; of anything but a plain JPEG also the pixels.

    Raises:
      ValueError: the bytes are no picture.
    """
    if simplejpeg.is_jpeg(encoded):
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        if colorspace not in ("CMYK", "YCCK"):
            return Picture(encoded, int(height), int(width), None)
    pixels = None
    if encoded:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        raise ValueError("not a picture that can be decoded")
    return Picture(encoded, pixels.shape[0], pixels.shape[1], pixels)


def resize(
    pixels: Pixels, height: int, width: int
) -> UInt8[np.ndarray, "height2 width2 channel"]:
    """Resizes with area averaging when shrinking, linearly when growing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] > height or pixels.shape[1] > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)
