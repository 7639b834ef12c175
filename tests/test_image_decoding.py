"""Tests detection of a file's format and orientation."""

import cv2
import numpy as np
import pytest

from jaxii.data.image_decoding import damage_as_value_error, orientation, sniff


def test_big_endian_exif_is_read():
    header = b"MM\x00*\x00\x00\x00\x08\x00\x01"
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x08\x00\x00"
    assert orientation(header + entry) == 8


@pytest.mark.parametrize("exif", [b"", b"II*\x00", b"II*\x00\xff\xff\xff\xff", b"xx"])
def test_damaged_exif_counts_as_upright(exif):
    assert orientation(exif) == 1


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"GIF89a...", "a GIF"),
        (b"<html>", "HTML"),
        (b"hello", "not an image"),
    ],
)
def test_other_files_are_told_by_name(data, what):
    with pytest.raises(ValueError, match=what):
        sniff(data)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(1 << 55),
        lambda: cv2.resize(np.zeros((1, 1), np.uint8), (1 << 30, 1 << 24)),
    ],
)
def test_want_of_memory_is_no_damage_of_an_image(allocate):
    with pytest.raises(MemoryError), damage_as_value_error("png"):
        allocate()
