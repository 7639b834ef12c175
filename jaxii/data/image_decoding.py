"""Decodes JPEG, PNG and WebP files to upright RGB pixels and refuses damaged files.

OpenCV silently fills the missing half of a truncated JPEG with grey, so JPEG files are
decoded by libjpeg-turbo, whose warnings are checked.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8

Pixels = UInt8[np.ndarray, "height width 3"]

# Describes `decode_jpeg`, `decode_other` and `turned`; written to exports.
COLOURS = (
    "Its EXIF orientation is applied, grey is repeated over the three channels, the "
    "upper 8 of 16 bits are kept, and transparency is composited on white. The inks "
    "of a CMYK JPEG are stored inverted, so RGB = CMY * K / 255."
)
_ORIENTATION_TAG = 0x0112
# The orientations that swap rows and columns.
TRANSPOSED = (5, 6, 7, 8)
# Most scans of a JPEG; encoders write up to about 20. A scan takes a few bytes and
# costs a pass over all pixels: a malicious file of 4 MB takes minutes to decode.
MAX_SCANS = 100
# Bounds of the search for the end of an image that other data follows. A malicious file
# of the most bytes takes a few seconds.
_MOST_SEGMENTS, _MOST_BYTES = 10_000, 2**26
# The start of a segment. Below C0, and from D0 to D7, markers have no content.
_SEGMENT = re.compile(b"\xff[\xc0-\xcf\xd8-\xfe]")
# Warnings of libjpeg about images that are complete. Extraneous bytes before a restart
# marker (D0 to D7) are pixels that libjpeg could not place, so these are not harmless.
_HARMLESS_WARNINGS = re.compile(
    "extraneous bytes before marker 0x(?!d[0-7])|unknown JFIF revision"
)
# Pixels converted to RGB at a time: conversion needs several times their memory.
_BAND_PIXELS = 1 << 20
# WebP has no checksum. Pixel data ends in this many zeros only if the rest of the data
# was never written.
_WEBP_ZEROS = 64


@contextmanager
def damage_as_value_error(kind: str) -> Iterator[None]:
    """Turns errors of the decoders and parsers into ValueError.

    Raises:
      MemoryError: If OpenCV runs out of memory.
    """
    try:
        yield
    except (cv2.error, struct.error, IndexError) as error:
        if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
            raise MemoryError(error.err) from error
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"damaged {kind.upper()} ({reason[-1] if reason else type(error).__name__})"
        ) from error


def sniff(data: bytes) -> str:
    """Returns "jpeg", "png" or "webp".

    Raises:
      ValueError: If the format is another one; the message names it if known.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    others = {
        b"GIF8": "a GIF",
        b"BM": "a BMP",
        b"II*\x00": "a TIFF",
        b"MM\x00*": "a TIFF",
        b"<": "HTML or XML text",
        b"version https://git-lfs": "a Git LFS pointer",
    }
    found = next((v for k, v in others.items() if data.startswith(k)), "not an image")
    if data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        found = "an AVIF or HEIC"
    found = found if data else "an empty file"
    raise ValueError(f"{found}; only JPEG, PNG and WebP are supported")


def orientation(exif: bytes) -> int:
    """Returns the EXIF orientation in a TIFF structure, 1 to 8; 1 if it has none.

    Source: EXIF 2.32, section 4.6.4 (tag 0x0112), in TIFF 6.0 byte order.
    """
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(order + "H", exif, start)
    for i in range(count):
        entry = start + 2 + 12 * i
        if entry + 12 > len(exif):
            break
        tag, _, _, value = struct.unpack_from(order + "HHIH", exif, entry)
        if tag == _ORIENTATION_TAG:
            return value if 1 <= value <= 8 else 1
    return 1


def read_header(data: bytes, kind: str) -> tuple[int, int, str]:
    """Returns height and width as stored, and the colour space of a JPEG.

    The start of the file is enough.

    Raises:
      ValueError: If a JPEG has no header. For other errors and formats, see
        `damage_as_value_error`.
    """
    if kind == "jpeg":
        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except KeyError as error:  # simplejpeg found no colour space
            raise ValueError("truncated or damaged JPEG (no image header)") from error
        except ValueError as error:
            raise ValueError(f"truncated or damaged JPEG ({error})") from error
        return int(height), int(width), str(color)
    if kind == "png":
        width, height = struct.unpack_from(">II", data, 16)
        return height, width, ""
    chunk = data[12:16]
    if chunk == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    else:
        width, height = struct.unpack_from("<HH", data, 26)
        width, height = width & 0x3FFF, height & 0x3FFF
    return height, width, ""


def read_exif(data: bytes, kind: str) -> bytes:
    """Returns the TIFF structure of a file's EXIF data, b"" if it has none."""
    if kind == "jpeg":
        # Walking the segments takes a few microseconds; searching the bytes is slower.
        position, last = 2, len(data) - 4
        while position <= last and data[position] == 0xFF:
            marker = data[position + 1]
            if marker == 0xFF:
                position += 1
                continue
            if marker == 0xDA:
                break
            end = position + 2 + (data[position + 2] << 8 | data[position + 3])
            if marker == 0xE1 and data.startswith(b"Exif\x00\x00", position + 4):
                return data[position + 10 : end]
            position = end
        return b""
    for name, body in _chunks(data, kind):
        if name in (b"eXIf", b"EXIF"):
            return body.removeprefix(b"Exif\x00\x00")
    return b""


def _chunks(data: bytes, kind: str):
    """Yields (name, body) of each chunk; raises ValueError if the file is truncated."""
    position = 8 if kind == "png" else 12
    end = len(data)
    if kind == "webp":
        (size,) = struct.unpack_from("<I", data, 4)
        if size + 8 > len(data):
            raise ValueError("truncated WEBP")
        end = size + 8
    while position + 8 <= end:
        if kind == "png":
            length, name = struct.unpack_from(">I4s", data, position)
            step = 12 + length
        else:
            name, length = struct.unpack_from("<4sI", data, position)
            step = 8 + length + length % 2
        if position + step - (kind == "webp" and length % 2) > len(data):
            raise ValueError(f"truncated {kind.upper()}")
        yield name, data[position + 8 : position + 8 + length]
        if name == b"IEND":
            return
        position += step
    if kind == "png":
        raise ValueError("truncated PNG")


def decode_jpeg(data: bytes, color: str, size: tuple[int, int]) -> tuple[Pixels, bool]:
    """Decodes a JPEG at the smallest scale that gives at least `size`.

    Args:
      data: The file.
      color: The colour space from `read_header`.
      size: Fewest rows and columns, as stored.

    Returns:
      The pixels as stored, and whether the decoder gave no warning.

    Raises:
      ValueError: If the file is truncated or damaged, or has more than `MAX_SCANS`.
    """
    num_scans = _num_scans(data)
    if num_scans > MAX_SCANS:
        raise ValueError(
            f"a JPEG with {num_scans:,} scans; at most {MAX_SCANS} are read"
        )
    clean = True
    space = "CMYK" if color in ("CMYK", "YCCK") else "RGB"
    kwargs = {"colorspace": space, "min_height": size[0], "min_width": size[1]}
    try:
        image = simplejpeg.decode_jpeg(data, strict=True, **kwargs)
    except ValueError as error:
        if not _HARMLESS_WARNINGS.search(str(error)):
            word = "truncated" if "remature end" in str(error) else "damaged"
            raise ValueError(f"{word} JPEG ({error})") from error
        # libjpeg reports the last warning only, which may hide a missing end.
        if b"\xff\xd9" not in data[-4096:]:
            raise ValueError("truncated JPEG (no end marker)") from error
        try:
            image, clean = simplejpeg.decode_jpeg(data, strict=False, **kwargs), False
        except ValueError as worse:
            raise ValueError(f"damaged JPEG ({worse})") from worse
    if space == "CMYK":
        # Adobe and other encoders store inks inverted.
        ink = image[..., :3].astype(np.uint16) * image[..., 3:]
        image = (ink // 255).astype(np.uint8)
    return image, clean


def _num_scans(data: bytes) -> int:
    """Returns the number of scans of the first image in a JPEG file.

    Segments are read as libjpeg reads them, so data after the image is not counted,
    such as the video of a motion photo. The result may be too large if it is at most
    `MAX_SCANS` or if the end of the image is not found.
    """
    most = data.count(b"\xff\xda")
    if most <= MAX_SCANS:
        return most
    position, num_scans = 2, 0
    for _ in range(_MOST_SEGMENTS):
        found = _SEGMENT.search(data, position, _MOST_BYTES)
        if found is None:
            break
        if found[0] == b"\xff\xd9":
            return num_scans
        num_scans += found[0] == b"\xff\xda"
        start = found.end()
        # libjpeg reads the two bytes of the length even if it is 0.
        position = start + max(2, int.from_bytes(data[start : start + 2], "big"))
    return most


def decode_other(data: bytes, kind: str) -> Pixels:
    """Decodes a PNG or WebP file to the pixels as stored, on white.

    Raises:
      ValueError: If the file is truncated or damaged. See also `damage_as_value_error`.
    """
    transparent = b""
    # Iterates to the end, because a missing end is an error.
    for name, body in _chunks(data, kind):
        if name == b"tRNS":
            transparent = body
        elif name in (b"VP8 ", b"VP8L") and not body[-_WEBP_ZEROS:].strip(b"\0"):
            raise ValueError("damaged WEBP (its pixels end in zeros)")
    still = _without_animation(data) if kind == "png" else data
    image = cv2.imdecode(np.frombuffer(still, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError(f"damaged {kind.upper()} (its pixels cannot be decoded)")
    image = np.asarray(image).reshape(*image.shape[:2], -1)
    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return image[..., ::-1]
    if kind != "png" or image.shape[-1] != 1 or len(transparent) != 2:
        transparent = b""
    pixels = np.empty((*image.shape[:2], 3), np.uint8)
    rows = max(1, _BAND_PIXELS // image.shape[1])
    for top in range(0, len(image), rows):
        band = image[top : top + rows]
        if transparent:
            band = np.concatenate([band, _grey_alpha(data, band, transparent)], axis=-1)
        pixels[top : top + rows] = _on_white(band)
    return pixels


def _without_animation(data: bytes) -> bytes:
    """Returns a PNG file without its animation, which OpenCV may decode to black.

    The result is the image that viewers without animation show.
    """
    if b"acTL" not in data:
        return data
    kept, place = [data[:8]], 8
    for name, body in _chunks(data, "png"):
        end = place + 12 + len(body)
        if name not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _on_white(
    image: Shaped[np.ndarray, "height width channel"],
) -> UInt8[np.ndarray, "height width colour"]:
    """Converts BGR or grey, with or without alpha, to 8-bit RGB or grey on white."""
    if image.dtype == np.uint16:
        image = (image // 256).astype(np.uint8)
    if image.shape[-1] in (2, 4):
        alpha = image[..., -1:].astype(np.uint16)
        ink = image[..., :-1] * alpha + 255 * (255 - alpha)
        image = ((ink + 127) // 255).astype(np.uint8)
    return image[..., ::-1]


def _grey_alpha(
    data: bytes,
    grey: Shaped[np.ndarray, "height width 1"],
    transparent: bytes,
) -> Shaped[np.ndarray, "height width 1"]:
    """Returns the alpha channel of a grey PNG with a transparent value.

    OpenCV applies a transparent value only in colour and palette images.

    Source: PNG specification, third edition, section 11.3.1.1.
    """
    depth = data[24]
    value = int.from_bytes(transparent, "big") % (1 << depth)
    # OpenCV scales values of 1, 2 and 4 bits to 8 bits.
    stretch = 255 // ((1 << depth) - 1) if depth < 8 else 1
    opaque = np.iinfo(grey.dtype).max
    return np.where(grey == value * stretch, 0, opaque).astype(grey.dtype)


def turned(
    image: Pixels, turn: int
) -> UInt8[np.ndarray, "upright_height upright_width 3"]:
    """Returns stored pixels upright, given their EXIF orientation."""
    if turn in TRANSPOSED:
        image = image.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        image = image[::-1]
    if turn in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
