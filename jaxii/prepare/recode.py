"""Converts image files to the JPEG files that are stored: upright, RGB and reduced."""

import struct
import threading
from collections.abc import Mapping

import cv2
import numpy as np
import simplejpeg

from jaxii.data.image_decoding import (
    COLOURS,
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
from jaxii.data.transforms import JPEG_SHRINKS, decoded_size

# Default short side of stored images, in pixels.
SHORT_SIDE = 256
MAX_PIXELS = 120_000_000
# Larger images are decoded one at a time: 100 megapixels take 300 MB.
LARGE_PIXELS = 24_000_000
# Up to this shrink, interpolation is linear. At 1.5, its distance from a Lanczos filter
# is within 1 dB of the area average's, in a sixth of the time; at 1.75 it is 3 dB worse
# on noise.
LINEAR_SHRINK = 1.55
JPEG_QUALITY = 92
_LARGE = threading.Semaphore(1)
# End markers of complete files.
_LAST = {"jpeg": b"\xff\xd9", "png": b"IEND"}


def recode(data: bytes, *, short_side: int = SHORT_SIDE) -> bytes:
    """Returns the image as an upright RGB JPEG.

    Args:
      data: A JPEG, PNG or WebP file, up to 120 megapixels. Its first bytes decide the
        format.
      short_side: Short side that larger images are reduced to, in pixels; smaller
        images keep their size.

    Returns:
      JPEG bytes; `data` itself if nothing needs to change.

    Raises:
      ValueError: If the file is not an image, truncated, damaged or too large; the
        message is a short description of the fault.
    """
    return recode_and_decode(data, short_side=short_side)[0]


def recode_and_decode(data: bytes, *, short_side: int) -> tuple[bytes, Pixels]:
    """Returns the result of `recode`, and the pixels of the image before encoding."""
    kind = sniff(data)
    with damage_as_value_error(kind):
        height, width, color = read_header(data, kind)
        if not height * width:
            raise ValueError(f"damaged {kind.upper()} ({width}x{height} pixels)")
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"{width}x{height} pixels; at most {MAX_PIXELS // 10**6} megapixels "
                "are read"
            )
        if height * width > LARGE_PIXELS:
            with _LARGE:
                return _recode(data, kind, height, width, color, short_side)
        return _recode(data, kind, height, width, color, short_side)


def describe(short_side: int) -> Mapping[str, object]:
    """Returns the parameters of `recode` and its steps in words."""
    scales = ", ".join(f"1/{shrink}" for shrink in JPEG_SHRINKS)
    return {
        "short_side_pixels": short_side,
        "jpeg_shrinks": JPEG_SHRINKS,
        "linear_shrink": LINEAR_SHRINK,
        "jpeg_quality": JPEG_QUALITY,
        "how": [
            "These steps are applied once, to the original file; the view is made "
            "from the resulting JPEG.",
            f"A JPEG that is upright, neither grey nor CMYK, and has a short side of "
            f"at most {short_side} pixels is kept unchanged.",
            "Any other image is converted to upright 8-bit RGB with H rows and W "
            f"columns. {COLOURS}",
            f"If S = min(H, W) is above {short_side}, the image is reduced: a JPEG is "
            f"decoded at the smallest of the scales {scales} and 1 that leaves at "
            f"least {short_side} rows and columns; other formats are decoded at full "
            "size. The result, with h rows and w columns, is resized to "
            f"round(W * {short_side} / S) columns and round(H * {short_side} / S) rows "
            f"by area averaging (OpenCV: INTER_AREA) if min(h, w) / {short_side} is "
            f"above {LINEAR_SHRINK:g}, otherwise by linear interpolation (OpenCV: "
            "INTER_LINEAR).",
            f"The image is saved as a JPEG of quality {JPEG_QUALITY} by libjpeg-turbo "
            "with its fast DCT (simplejpeg); chroma is 4:2:0 if the image was reduced, "
            "otherwise 4:4:4. With other encoders, pixels differ by one or two levels "
            "of 255 on average.",
        ],
    }


def size(data: bytes) -> tuple[int, int]:
    """Returns the height and width in the header of an image file."""
    height, width, _ = read_header(data, sniff(data))
    return height, width


def probe(data: bytes, size_bytes: int) -> tuple[int, int]:
    """Returns height and width, given the start and the end of a file.

    Args:
      data: The start of the file, with its header, followed by its end.
      size_bytes: Size of the whole file.

    Raises:
      ValueError: As for `recode`. Damage between start and end is not found.
    """
    kind = sniff(data)
    try:
        height, width, _ = read_header(data, kind)
        if kind == "webp":
            (size,) = struct.unpack_from("<I", data, 4)
            is_whole = size + 8 <= size_bytes
        else:
            is_whole = _LAST[kind] in data[-4096:]
    except (struct.error, IndexError) as error:
        raise ValueError(f"damaged {kind.upper()} ({error})") from error
    if not is_whole:
        raise ValueError(f"truncated {kind.upper()} (no end marker)")
    return height, width


def _recode(
    data: bytes, kind: str, height: int, width: int, color: str, short_side: int
) -> tuple[bytes, Pixels]:
    turn = orientation(read_exif(data, kind))
    if kind == "jpeg":
        size = decoded_size(height, width, short_side, short_side)
        image, clean = decode_jpeg(data, color, size)
        small = min(height, width) <= short_side
        if small and clean and turn == 1 and color in ("YCbCr", "RGB"):
            return data, image
    else:
        image = decode_other(data, kind)
    image = _reduce(image, height, width, short_side)
    image = np.ascontiguousarray(turned(image, turn))
    # Small images keep their full colour resolution.
    subsampling = "420" if min(height, width) > short_side else "444"
    encoded = simplejpeg.encode_jpeg(
        image, quality=JPEG_QUALITY, colorsubsampling=subsampling
    )
    return encoded, image


def _reduce(image, height: int, width: int, short_side: int):
    # Uses the size in the file, because scaled decoding rounds sizes.
    scale = short_side / min(height, width)
    if scale >= 1.0:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrink = min(image.shape[:2]) / min(size)
    method = cv2.INTER_AREA if shrink > LINEAR_SHRINK else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=method)
