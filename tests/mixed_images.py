"""A folder of realistic images: several formats, rotated, damaged, odd names.

Shared by the tests of `predict` and by its rehearsal in `benchmarks`.
"""

import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

# EXIF orientation -> transposition of an upright image for storage with it.
STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
NAMES = (
    "<script>alert(1)<script>",
    "a \"quoted\" & 'single' name",
    "smile 😀 👩‍🚀",
    "صورة عربية",
    "תמונה",
    "turned \u202egpj",
    "comma, comma",
    "line\nbreak",
    "cafe\u0301",
)
NO_UTF8 = "no utf-8 \udcff"


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    copy = image.convert("RGBA")
    copy.putalpha(255)
    return copy


def turned(image: Image.Image, orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(STORED[orientation](image), kind, exif=exif, **options)


def by_opencv(image: Image.Image, suffix: str, *options: int) -> bytes:
    pixels = np.asarray(image)[..., ::-1]
    return cv2.imencode(suffix, pixels, options)[1].tobytes()


def in_16_bits(image: Image.Image) -> bytes:
    pixels = np.asarray(image)[..., ::-1].astype(np.uint16) * 257
    return cv2.imencode(".png", pixels)[1].tobytes()


# Encoding -> suffix, bytes of an upright RGB image, whether it keeps the colours.
WHOLE = {
    "JPEG": (".jpg", lambda x: saved(x, "JPEG", quality=95), True),
    "JPEG progressive": (
        ".jpeg",
        lambda x: saved(x, "JPEG", quality=95, progressive=True, subsampling=0),
        True,
    ),
    "JPEG by OpenCV": (".JPG", lambda x: by_opencv(x, ".jpg"), True),
    "JPEG grey": (".jpg", lambda x: saved(x.convert("L"), "JPEG"), False),
    "JPEG CMYK": (
        ".jpg",
        lambda x: saved(x.convert("CMYK"), "JPEG", quality=95),
        True,
    ),
    **{
        f"JPEG EXIF {turn}": (
            ".jpg",
            lambda x, turn=turn: turned(x, turn, "JPEG", quality=95),
            True,
        )
        for turn in STORED
    },
    "PNG": (".png", lambda x: saved(x, "PNG"), True),
    "PNG by OpenCV": (".PNG", lambda x: by_opencv(x, ".png"), True),
    "PNG alpha": (".png", lambda x: saved(with_alpha(x), "PNG"), True),
    "PNG palette": (".png", lambda x: saved(x.quantize(256), "PNG"), True),
    "PNG 16 bit": (".png", in_16_bits, True),
    "PNG EXIF 6": (".png", lambda x: turned(x, 6, "PNG"), True),
    "PNG named .jpg": (".jpg", lambda x: saved(x, "PNG"), True),
    "WebP": (".webp", lambda x: saved(x, "WEBP", quality=90), True),
    "WebP lossless": (".webp", lambda x: saved(x, "WEBP", lossless=True), True),
    "WebP alpha": (".webp", lambda x: saved(with_alpha(x), "WEBP"), True),
    "WebP EXIF 8": (".webp", lambda x: turned(x, 8, "WEBP", quality=90), True),
}


def without_size(image: Image.Image) -> bytes:
    """Returns a PNG whose header declares 0 x 0 pixels, with a correct checksum."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    encoded = saved(image, "PNG")
    return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]


def cut(encoded: bytes) -> bytes:
    return encoded[: len(encoded) // 2]


# Damage -> suffix and bytes.
DAMAGED = {
    "JPEG cut": (".jpg", lambda x: cut(saved(x, "JPEG"))),
    "JPEG without its end": (".jpg", lambda x: saved(x, "JPEG")[:-300]),
    "JPEG of a header": (".jpg", lambda x: saved(x, "JPEG")[:20]),
    "PNG cut": (".png", lambda x: cut(saved(x, "PNG"))),
    "WebP cut": (".webp", lambda x: cut(saved(x, "WEBP"))),
    "empty": (".jpg", lambda x: b""),
    "text": (".png", lambda x: b"not an image at all\n"),
    "HTML": (".jpg", lambda x: b"<!doctype html><title>404 Not Found</title>"),
    "GIF": (".jpg", lambda x: saved(x.quantize(64), "GIF")),
    "no pixels": (".png", without_size),
}


@dataclass(frozen=True)
class Written:
    """An image file.

    Attributes:
      name: Path below the folder.
      kind: A key of WHOLE or DAMAGED.
      scene: Index of the image that it shows.
    """

    name: str
    kind: str
    scene: int

    @property
    def is_damaged(self) -> bool:
        return self.kind in DAMAGED


def write(
    folder: Path, scenes: list[Image.Image], num_files: int, num_damaged: int
) -> list[Written]:
    """Writes files of all kinds, in folders three deep; returns them by name, sorted.

    Args:
      folder: Created.
      scenes: Upright RGB images, used in turn.
      num_files: Number of files.
      num_damaged: Number of damaged files among them, evenly spaced.
    """
    damaged = {i * num_files // num_damaged for i in range(num_damaged)}
    whole_kinds, faults = itertools.cycle(WHOLE), itertools.cycle(DAMAGED)
    written = []
    for i in range(num_files):
        kind = next(faults if i in damaged else whole_kinds)
        suffix, encode = (DAMAGED if i in damaged else WHOLE)[kind][:2]
        scene = i // len(WHOLE) % len(scenes)
        where = ("", "a/", "a/b/", "c d/")[i % 4]
        odd = f" {NAMES[i // 4 % len(NAMES)]}" if i % 4 == 3 else ""
        name = f"{where}{(i * 7919) % num_files:05d}{odd}{suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(scenes[scene]))
        written.append(Written(name, kind, scene))
    return sorted(written, key=lambda one: one.name)
