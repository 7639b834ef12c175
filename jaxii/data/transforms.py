"""Turns the bytes of an image into the square of pixels that the network reads.

The decoders and OpenCV release the GIL, so worker threads run in parallel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from jaxii.data.image_decoding import (
    COLOURS,
    TRANSPOSED,
    Pixels,
    damage_as_value_error,
    decode_jpeg,
    decode_other,
    orientation,
    read_exif,
    read_header,
    sniff,
    turned,
)

# At strength 1: least area of a crop as a share of the image, and its largest aspect
# ratio relative to the image's (Szegedy et al. 2015, section 6).
CROP_MIN_AREA = 0.35
ASPECT_RATIO = 4 / 3
CROP_ATTEMPTS = 10
ROTATION_DEGREES = 12.0
SHEAR = 0.1
# Largest factor by which an image shrinks within its repeated edges: scale jitter as
# in detectors (Ghiasi et al. 2021, section 3).
ZOOM_OUT = 2.5
# Degradation like that of web photos: rescaling and recompression.
DEGRADED_PROBABILITY = 0.25
SCALE_DOWN = 3.0
JPEG_QUALITIES = (20, 80)
# Up to this shrink, linear interpolation is as exact as the area average and five to
# ten times as fast in OpenCV; beyond, it is up to 8 dB less exact.
LINEAR_SHRINK = 1.5
# libjpeg-turbo has fast code for the scale 1 and the reciprocals of these.
JPEG_SHRINKS = (8, 4, 2)
# Up to this shrink, a blur before interpolation is nearer to the antialiasing of Pillow
# and torchvision than the area average (46 dB instead of 42 at 1.7, 51 instead of 40 at
# 2.5) and takes half the time.
BLURRED_SHRINK = 3.0
# Taps of that blur up to the shrink `FEW_TAPS_SHRINK`, and beyond it.
FEW_TAPS, FEW_TAPS_SHRINK, MANY_TAPS = 3, 2.0, 5


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, mirror, rotation, shear, zoom and degradation.

    Attributes:
      size_pixels: Side of the resulting square.
      strength: Strength of everything except the mirror, 0 to 2.5. 0 gives the view of
        `EvalTransform`, 1 is usual.
      mirror: Whether half of the images are mirrored left to right.
    """

    size_pixels: int
    strength: float = 1.0
    mirror: bool = True

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> Pixels:
        """Returns a random view [size, size, 3] of an encoded image."""
        view = self.crop(encoded, rng)
        if self.strength > 0:
            view = self._degrade(self._warp(view, rng), rng)
        return np.ascontiguousarray(view)

    def crop(self, encoded: bytes, rng: np.random.Generator) -> Pixels:
        """Returns a random crop [size, size, 3], possibly mirrored."""
        image = read(encoded)
        height, width = image.height, image.width
        top, left, crop_height, crop_width = self._crop(height, width, rng)
        # Decodes at the smallest scale that the crop needs.
        shrink = max(1.0, min(crop_height, crop_width) / self.size_pixels)
        pixels = image.decode(height / shrink, width / shrink)
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        row, column = int(top * y), int(left * x)
        rows, columns = max(1, round(crop_height * y)), max(1, round(crop_width * x))
        view = pixels[row : row + rows, column : column + columns]
        view = resize(view, self.size_pixels, self.size_pixels)
        if self.mirror and rng.random() < 0.5:
            view = cv2.flip(view, 1)
        return view

    def _crop(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of a crop, in pixels."""
        smallest = CROP_MIN_AREA**self.strength
        reach = min(self.strength, 1.0) * math.log(ASPECT_RATIO)
        for _ in range(CROP_ATTEMPTS):
            size, shape, down, across = rng.random(4).tolist()
            area = height * width * (smallest + (1.0 - smallest) * size)
            ratio = width / height * math.exp(reach * (2.0 * shape - 1.0))
            crop_width = round(math.sqrt(area * ratio))
            crop_height = round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(down * (height - crop_height + 1))
                left = int(across * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        return 0, 0, height, width

    def _warp(self, view: Pixels, rng: np.random.Generator) -> Pixels:
        """Rotates, shears and shrinks about the centre."""
        turn, shear, zoom = rng.random(3).tolist()
        angle = math.radians(ROTATION_DEGREES * self.strength * (2 * turn - 1))
        lean = SHEAR * self.strength * (2 * shear - 1)
        scale = ZOOM_OUT ** (self.strength * zoom)
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        # A rotation times a shear times the scale, from the view to its source.
        to_source = ((cosine, cosine * lean - sine), (sine, sine * lean + cosine))
        centre = (self.size_pixels - 1) / 2
        matrix = np.array([(x, y, centre * (1 - x - y)) for x, y in to_source])
        return cv2.warpAffine(
            view,
            matrix,
            (self.size_pixels, self.size_pixels),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            # Mirrored edges would show parts of objects again (configs/README.md).
            borderMode=cv2.BORDER_REPLICATE,
        )

    def _degrade(self, view: Pixels, rng: np.random.Generator) -> Pixels:
        """Rescales and recompresses some images."""
        probability = DEGRADED_PROBABILITY * self.strength
        scaled, compressed, scale, quality = rng.random(4)
        if scaled < probability:
            side = max(4, round(self.size_pixels / SCALE_DOWN**scale))
            view = resize(view, side, side)
            view = resize(view, self.size_pixels, self.size_pixels)
        if compressed < probability:
            lowest, highest = JPEG_QUALITIES
            encoded = simplejpeg.encode_jpeg(
                np.ascontiguousarray(view),
                quality=round(lowest + quality * (highest - lowest)),
            )
            view = simplejpeg.decode_jpeg(encoded, "RGB")
        return view


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The whole image or its middle, resized to a square.

    The aspect ratio is not kept, because objects at the edges have labels, too. The
    literature evaluates multi-label classifiers in the same way (Ridnik et al. 2021,
    ASL, code).

    Attributes:
      size_pixels: Side of the resulting square.
      crop_share: Share of each side of the image that the middle keeps, in (0, 1].
    """

    size_pixels: int
    crop_share: float = 1.0

    def __call__(self, encoded: bytes) -> Pixels:
        """Returns the view [size, size, 3] of an encoded image."""
        least = self.size_pixels / self.crop_share
        pixels = read(encoded).decode(least, least)
        rows, columns = (
            _middle(length, self.crop_share) for length in pixels.shape[:2]
        )
        view = pixels[rows, columns]
        return np.ascontiguousarray(resize(view, self.size_pixels, self.size_pixels))

    def describe(self) -> Mapping[str, object]:
        """Returns this view's parameters, and its steps in words, exact for OpenCV."""
        size, share = self.size_pixels, self.crop_share
        least = int(size / share)
        scales = ", ".join(f"1/{shrink}" for shrink in JPEG_SHRINKS)
        return {
            "side_pixels": size,
            "crop_share": share,
            "jpeg_shrinks": JPEG_SHRINKS,
            "linear_shrink": LINEAR_SHRINK,
            "blurred_shrink": BLURRED_SHRINK,
            "few_taps": FEW_TAPS,
            "few_taps_shrink": FEW_TAPS_SHRINK,
            "many_taps": MANY_TAPS,
            "how": [
                f"The image is upright 8-bit RGB with H rows and W columns. {COLOURS}",
                f"A JPEG is decoded at the smallest of the scales {scales} that leaves "
                f"ceil(H * scale) >= {least} rows and ceil(W * scale) >= {least} "
                "columns (OpenCV: IMREAD_REDUCED_COLOR_8 and so on; libjpeg: "
                "scale_denom), or at full size if none does. Other formats are decoded "
                "at full size. The result has h rows and w columns.",
                f"The centre is cropped: rows = max(1, round({share:g} * h)) and "
                f"columns = max(1, round({share:g} * w)), rounding halves to even; the "
                "first row is floor((h - rows) / 2) and the first column is "
                "floor((w - columns) / 2).",
                f"It is resized to {size} x {size} regardless of its aspect ratio, "
                f"with r_y = rows / {size}, r_x = columns / {size} and r = max(r_y, "
                "r_x). If both r_y and r_x are 1, it is unchanged. If r > "
                f"{BLURRED_SHRINK:g}, it is averaged over areas (OpenCV: INTER_AREA) "
                f"along the sides that are longer than {size}, and then interpolated "
                f"linearly along the other sides. If {LINEAR_SHRINK:g} < r <= "
                f"{BLURRED_SHRINK:g}, it is blurred by a Gaussian with standard "
                "deviations sqrt(max(r_y^2 - 1, 0.001) / 6) and sqrt(max(r_x^2 - 1, "
                f"0.001) / 6) pixels, {FEW_TAPS} taps for r <= {FEW_TAPS_SHRINK:g} and "
                f"{MANY_TAPS} taps otherwise, and mirrored edges (OpenCV: "
                "GaussianBlur), and then interpolated linearly. If r <= "
                f"{LINEAR_SHRINK:g}, it is interpolated linearly (OpenCV: "
                "INTER_LINEAR).",
                "Nothing else is done; the program normalises the pixels.",
            ],
        }


def thumbnail(encoded: bytes, longest_side: int) -> bytes:
    """Returns a JPEG of a whole image whose sides are at most `longest_side` pixels.

    Raises:
      ValueError: If the bytes are not an image.
    """
    image = read(encoded)
    shrink = max(1.0, max(image.height, image.width) / longest_side)
    height, width = (max(1, round(n / shrink)) for n in (image.height, image.width))
    small = resize(image.decode(height, width), height, width)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=80)


def _middle(length: int, share: float) -> slice:
    side = max(1, round(length * share))
    first = (length - side) // 2
    return slice(first, first + side)


@dataclass(frozen=True)
class Image:
    """An encoded image whose header has been read; see `read`.

    Attributes:
      height: Rows of the upright image.
      width: Columns of the upright image.
      color: Colour space of a JPEG.
      turn: EXIF orientation.
      pixels: The upright pixels; None for a JPEG, which is not decoded yet.
    """

    encoded: bytes
    height: int
    width: int
    color: str
    turn: int
    pixels: Pixels | None

    def decode(self, height: float, width: float) -> Pixels:
        """Decodes to upright RGB at the scale of `decoded_size`.

        Returns:
          Pixels [rows, columns, 3], rows >= height and columns >= width if the image is
          large enough.

        Raises:
          ValueError: If the file is damaged.
        """
        if self.pixels is not None:
            return self.pixels
        rows, columns = decoded_size(self.height, self.width, int(height), int(width))
        stored = (columns, rows) if self.turn in TRANSPOSED else (rows, columns)
        pixels, _ = decode_jpeg(self.encoded, self.color, stored)
        # OpenCV refuses negative strides.
        return np.ascontiguousarray(turned(pixels, self.turn))


def decoded_size(
    height: int, width: int, fewest_rows: int, fewest_columns: int
) -> tuple[int, int]:
    """Returns the size of a JPEG at the smallest sufficient scale of 1/8, 1/4, 1/2, 1.

    The other eighths are smaller, but libjpeg-turbo decodes them more slowly.
    """
    for shrink in JPEG_SHRINKS:
        rows, columns = -(-height // shrink), -(-width // shrink)
        if rows >= fewest_rows and columns >= fewest_columns:
            return rows, columns
    return height, width


def read(encoded: bytes) -> Image:
    """Reads the size of an image, and the pixels of all but a JPEG.

    Colours, transparency and orientation are resolved as in `recode`, so recoding does
    not change the look of an image.

    Raises:
      ValueError: If the bytes are not an image, or the image is damaged.
    """
    kind = sniff(encoded)
    with damage_as_value_error(kind):
        turn = orientation(read_exif(encoded, kind))
        if kind != "jpeg":
            pixels = np.ascontiguousarray(turned(decode_other(encoded, kind), turn))
            height, width, _ = pixels.shape
            return Image(encoded, height, width, "", turn, pixels)
        height, width, color = read_header(encoded, kind)
        if turn in TRANSPOSED:
            height, width = width, height
        return Image(encoded, height, width, color, turn, None)


def resize(
    pixels: Pixels, height: int, width: int
) -> UInt8[np.ndarray, "height2 width2 channel"]:
    """Resizes linearly, with antialiasing for a shrink above `LINEAR_SHRINK`.

    Up to `BLURRED_SHRINK`, pixels are blurred first. The variances of the blur and of
    linear interpolation, 1/6, sum to shrink^2 / 6, the variance of the triangle filter
    of Pillow and torchvision, which is two result pixels wide. Beyond it, areas are
    averaged along the sides that shrink.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    shrink = max(down, across)
    method = cv2.INTER_AREA if shrink > BLURRED_SHRINK else cv2.INTER_LINEAR
    if LINEAR_SHRINK < shrink <= BLURRED_SHRINK:
        taps = FEW_TAPS if shrink <= FEW_TAPS_SHRINK else MANY_TAPS
        # OpenCV replaces a standard deviation of 0 by the other one.
        x, y = (math.sqrt(max(s * s - 1.0, 1e-3) / 6.0) for s in (across, down))
        pixels = cv2.GaussianBlur(pixels, (taps, taps), sigmaX=x, sigmaY=y)
    if method == cv2.INTER_AREA and min(down, across) < 1.0:
        # OpenCV does not average areas if one of the sides grows.
        smaller = min(width, pixels.shape[1]), min(height, pixels.shape[0])
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
        method = cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)
