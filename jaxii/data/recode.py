"""Any picture a person has -> the JPEG that is stored: upright, RGB, at a short side.

`recode` takes the bytes of a JPEG, PNG or WebP file and gives JPEG bytes; preparation
(`shards`) calls it once an image, and training later decodes what it made. A damaged
file is refused by name: OpenCV fills the missing half of a truncated JPEG with grey in
silence, so that JPEG files are decoded by libjpeg-turbo and its warnings are read.
"""

import struct
import threading

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from jaxii.data.images import decoded_size

# Pixels; what `prepare` reduces to unless it is told otherwise.
SHORT_SIDE = 256
MAX_PIXELS = 120_000_000
# A decoded 100-megapixel picture is 300 MB: such pictures are taken one at a time.
LARGE_PIXELS = 24_000_000
# At 1.5 linear interpolation is within 1 dB of the area average in its distance from
# a Lanczos filter, in a sixth of the time; at 1.75 it is 3 dB behind on noise.
LINEAR_SHRINK = 1.55
_LARGE = threading.Semaphore(1)
# What a file that is whole ends with.
_LAST = {"jpeg": b"\xff\xd9", "png": b"IEND"}
_ORIENTATION_TAG = 0x0112
# libjpeg warns of these too, and the picture is whole.
_HARMLESS_WARNINGS = ("extraneous bytes before marker", "unknown JFIF revision")


def recode(data: bytes, *, short_side: int = SHORT_SIDE, quality: int = 92) -> bytes:
    """Returns the picture as an upright RGB JPEG.

    Args:
      data: a whole JPEG, PNG or WebP file, up to 120 megapixels; what it is, is told
        from its first bytes, not from its name.
      short_side: pixels; a larger picture is reduced to it, no smaller one enlarged.
      quality: of the JPEG that is written, 1 to 100.

    Returns:
      JPEG bytes: the given ones where nothing needs to change.

    Raises:
      ValueError: the fault, in a few words: what it is instead of a picture, truncated,
        damaged, or too large.
    """
    kind = sniff(data)
    try:
        height, width, color = _header(data, kind)
        if not height * width:
            raise ValueError(f"damaged {kind.upper()} ({width}x{height} pixels)")
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"{width}x{height} pixels; at most {MAX_PIXELS // 10**6} megapixels "
                "are read"
            )
        if height * width > LARGE_PIXELS:
            with _LARGE:
                return _recode(data, kind, height, width, color, short_side, quality)
        return _recode(data, kind, height, width, color, short_side, quality)
    except (cv2.error, struct.error, IndexError, MemoryError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"damaged {kind.upper()} ({reason[-1] if reason else type(error).__name__})"
        ) from error


def size(data: bytes) -> tuple[int, int]:
    """Returns height and width of a picture that `recode` takes."""
    height, width, _ = _header(data, sniff(data))
    return height, width


def probe(data: bytes, size_bytes: int) -> tuple[int, int]:
    """Returns height and width from the start and the end of a file, without pixels.

    Args:
      data: the start of a file, large enough for its header, and its end.
      size_bytes: of the whole file.

    Raises:
      ValueError: as `recode`; of what is between start and end nothing is known.
    """
    kind = sniff(data)
    try:
        height, width, _ = _header(data, kind)
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


def sniff(data: bytes) -> str:
    """Returns "jpeg", "png" or "webp".

    Raises:
      ValueError: the bytes are none of them; says what they look like.
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
    found = next((v for k, v in others.items() if data.startswith(k)), "no picture")
    if data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        found = "an AVIF or HEIC"
    found = found if data else "an empty file"
    raise ValueError(f"{found}; JPEG, PNG and WebP are read")


def orientation(exif: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8, of a TIFF structure; 1 if it has none.

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


def _recode(data, kind, height, width, color, short_side, quality) -> bytes:
    turn = orientation(_exif(data, kind))
    if kind == "jpeg":
        size = decoded_size(height, width, short_side, short_side)
        image, clean = _decode_jpeg(data, color, size)
        small = min(height, width) <= short_side
        if small and clean and turn == 1 and color in ("YCbCr", "RGB"):
            return data
    else:
        image = _decode_other(data, kind)
    image = _turn(_reduce(image, height, width, short_side), turn)
    # A picture that small already has no colour detail to spare.
    subsampling = "420" if min(height, width) > short_side else "444"
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorsubsampling=subsampling
    )


def _header(data: bytes, kind: str) -> tuple[int, int, str]:
    if kind == "jpeg":
        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except KeyError as error:  # how simplejpeg says that it found no colour space
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


def _exif(data: bytes, kind: str) -> bytes:
    if kind == "jpeg":
        position = 2
        while position + 4 <= len(data) and data[position] == 0xFF:
            marker = data[position + 1]
            if marker == 0xFF:
                position += 1
                continue
            (length,) = struct.unpack_from(">H", data, position + 2)
            body = data[position + 4 : position + 2 + length]
            if marker == 0xE1 and body[:6] == b"Exif\x00\x00":
                return body[6:]
            if marker == 0xDA:
                break
            position += 2 + length
        return b""
    for name, body in _chunks(data, kind):
        if name in (b"eXIf", b"EXIF"):
            return body.removeprefix(b"Exif\x00\x00")
    return b""


def _chunks(data: bytes, kind: str):
    """Yields (name, body) of a PNG or WebP file; ValueError where it ends early."""
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


def _decode_jpeg(
    data: bytes, color: str, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "height width 3"], bool]:
    """Returns the pixels, and whether the decoder had nothing to complain of."""
    clean = True
    space = "CMYK" if color in ("CMYK", "YCCK") else "RGB"
    kwargs = {"colorspace": space, "min_height": size[0], "min_width": size[1]}
    try:
        image = simplejpeg.decode_jpeg(data, strict=True, **kwargs)
    except ValueError as error:
        if not any(warning in str(error) for warning in _HARMLESS_WARNINGS):
            word = "truncated" if "remature end" in str(error) else "damaged"
            raise ValueError(f"{word} JPEG ({error})") from error
        # Only the last warning is told: a harmless one may hide a missing end.
        if b"\xff\xd9" not in data[-4096:]:
            raise ValueError("truncated JPEG (no end marker)") from error
        image, clean = simplejpeg.decode_jpeg(data, strict=False, **kwargs), False
    if space == "CMYK":
        # Adobe's convention, the one in use: stored inverted.
        ink = image[..., :3].astype(np.uint16) * image[..., 3:]
        image = (ink // 255).astype(np.uint8)
    return image, clean


def _decode_other(data: bytes, kind: str) -> UInt8[np.ndarray, "height width 3"]:
    for _ in _chunks(data, kind):
        pass  # walks to the end: a missing one is an error
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError(f"damaged {kind.upper()} (its pixels cannot be decoded)")
    if image.dtype == np.uint16:
        image = (np.asarray(image) // 256).astype(np.uint8)
    image = image.reshape(*image.shape[:2], -1)
    channels = image.shape[-1]
    if channels in (2, 4):
        # Transparent is white, as on a page.
        alpha = image[..., -1:].astype(np.uint16)
        ink = image[..., :-1] * alpha + 255 * (255 - alpha)
        image = ((ink + 127) // 255).astype(np.uint8)
    if image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    return image[..., ::-1]


def _reduce(image, height: int, width: int, short_side: int):
    # By the size of the file: a scaled decode has rounded its own.
    scale = short_side / min(height, width)
    if scale >= 1.0:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrink = min(image.shape[:2]) / min(size)
    method = cv2.INTER_AREA if shrink > LINEAR_SHRINK else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=method)


def _turn(image, turn: int):
    if turn in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        image = image[::-1]
    if turn in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
