import io
import struct
import tracemalloc
import zlib

import bad_images
import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from jaxii.data import image_decoding
from jaxii.prepare.recode import recode


def scene(height=60, width=80):
    """Returns four quarters of different colours, which distinguish all rotations."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (220, 40, 40)
    image[: height // 2, width // 2 :] = (40, 200, 60)
    image[height // 2 :, : width // 2] = (50, 60, 210)
    image[height // 2 :, width // 2 :] = (230, 220, 60)
    return Image.fromarray(image)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    assert color == "YCbCr"
    image = simplejpeg.decode_jpeg(data)
    assert image.shape == (height, width, 3)
    return image


def difference(data, expected):
    return np.abs(decoded(data).astype(int) - np.asarray(expected).astype(int)).mean()


def test_a_small_upright_jpeg_keeps_its_bytes():
    data = encoded(scene(), quality=90)
    assert recode(data, short_side=60) is data


def test_a_larger_image_is_reduced_to_the_short_side():
    assert decoded(recode(encoded(scene(300, 450)), short_side=64)).shape == (64, 96, 3)


def test_a_tall_image_is_reduced_to_the_short_side():
    assert decoded(recode(encoded(scene(450, 300)), short_side=64)).shape == (96, 64, 3)


def test_a_reduced_image_looks_the_same():
    small = recode(encoded(scene(480, 640), quality=95), short_side=60)
    assert difference(small, scene(60, 80)) < 3


def test_a_small_image_is_not_enlarged():
    data = recode(encoded(scene(20, 30), "PNG"), short_side=64)
    assert decoded(data).shape == (20, 30, 3)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    image = scene()
    data = encoded(image, quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert difference(recode(data), upright) < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_of_other_formats_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(scene(), kind, exif=exif, lossless=True)
    upright = scene().transpose(Image.Transpose.ROTATE_270)
    assert difference(recode(data), upright) < 3


def test_a_png_under_any_name_is_read():
    assert difference(recode(encoded(scene(), "PNG")), scene()) < 3


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_is_read(lossless):
    data = encoded(scene(), "WEBP", lossless=lossless, quality=95)
    assert difference(recode(data), scene()) < 4


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA"])
def test_every_png_mode_becomes_rgb(mode):
    image = scene().quantize(4) if mode == "P" else scene().convert(mode)
    assert difference(recode(encoded(image, "PNG")), image.convert("RGB")) < 12


def test_sixteen_bit_png_is_scaled_to_eight():
    grey = np.asarray(scene().convert("L")).astype(np.uint16) * 257
    data = cv2.imencode(".png", grey)[1].tobytes()
    assert difference(recode(data), scene().convert("L").convert("RGB")) < 3


def test_transparent_is_white():
    image = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    assert decoded(recode(encoded(image, "PNG"))).min() > 250


GREYS = {1: 1, 2: 1, 4: 4, 8: 60, 16: 15_420}


@pytest.mark.parametrize("depth", GREYS)
def test_the_transparent_value_of_a_grey_png_is_white(depth):
    grey, other = GREYS[depth], GREYS[depth] - 1
    image = decoded(recode(png_of([grey], [other], depth=depth, transparent=[grey])))
    scale = 255 / (2**depth - 1)
    np.testing.assert_allclose(image[:8], 255, atol=3)
    np.testing.assert_allclose(image[-8:], other * scale, atol=3)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_an_rgb_png_is_white(depth):
    step = 2**depth // 256
    colour, other = [step * 9, step * 80, step * 200], [step * 9, step * 81, step * 200]
    data = png_of(colour, other, depth=depth, transparent=colour)
    image = decoded(recode(data))
    np.testing.assert_allclose(image[:8], 255, atol=3)
    np.testing.assert_allclose(image[-8, 0], [9, 81, 200], atol=3)


@pytest.mark.parametrize("mode", ["P", "LA"])
def test_a_transparent_palette_entry_and_grey_alpha_are_white(mode):
    if mode == "P":
        image = Image.new("P", (20, 20), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        data = encoded(image, "PNG", transparency=1)
    else:
        data = encoded(Image.new("LA", (20, 20), (60, 0)), "PNG")
    assert decoded(recode(data)).min() > 250


def png_of(upper, lower, *, depth, transparent):
    """Returns a PNG of two halves, 16 rows each, with one transparent colour."""

    def chunk(name, body):
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    def row(colour):
        bits = "".join(f"{value:0{depth}b}" for value in colour * 16)
        return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    kind = 0 if len(upper) == 1 else 2
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 32, depth, kind, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(upper)}H", *transparent)),
            chunk(b"IDAT", zlib.compress(row(upper) * 16 + row(lower) * 16)),
            chunk(b"IEND", b""),
        ]
    )


def test_grey_jpeg_becomes_rgb():
    grey = scene().convert("L")
    assert difference(recode(encoded(grey, quality=95)), grey.convert("RGB")) < 3


@pytest.mark.parametrize("size", [(60, 80), (480, 640)])
def test_cmyk_jpeg_becomes_rgb(size):
    data = encoded(scene(*size).convert("CMYK"), quality=95)
    assert difference(recode(data, short_side=60), scene()) < 4


def test_progressive_jpeg_is_reduced():
    data = encoded(scene(480, 640), quality=95, progressive=True)
    assert difference(recode(data, short_side=60), scene()) < 3


@pytest.mark.parametrize("lost", [2, 100, 0.5])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_refused(kind, lost):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    end = len(data) - (lost if lost >= 1 else int(lost * len(data)))
    with pytest.raises(ValueError, match="truncated"):
        recode(data[:end])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("length", [12, 18, 30])
def test_a_file_cut_in_its_header_is_refused(kind, length):
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        recode(encoded(scene(), kind)[:length])


def test_a_truncated_large_jpeg_is_refused():
    data = encoded(scene(600, 800), quality=95)
    with pytest.raises(ValueError, match="truncated JPEG"):
        recode(data[: len(data) // 2], short_side=64)


def test_stray_bytes_before_the_end_marker_are_forgiven():
    data = encoded(scene(), quality=95)
    data = data[:-2] + bytes(20) + data[-2:]
    assert difference(recode(data), scene()) < 4


def test_a_png_with_damaged_pixels_is_refused():
    data = bytearray(encoded(scene(), "PNG"))
    middle = data.index(b"IDAT") + 12
    data[middle : middle + 20] = bytes(20)
    with pytest.raises(ValueError, match="damaged PNG"):
        recode(bytes(data))


def test_a_jpeg_of_many_scans_is_refused_before_decoding():
    most = bad_images.many_scans(image_decoding.MAX_SCANS - 1, 64)
    assert decoded(recode(most)).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="20,001 scans; at most 100 are read"):
        recode(bad_images.many_scans(20_000, 10_000))


def video(num_scans):
    """Returns the start of an MP4 file that contains the bytes of a scan by chance."""
    return b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08 and video " * num_scans


@pytest.mark.parametrize("progressive", [False, True])
def test_data_after_a_jpeg_has_no_scans(progressive):
    options = {"progressive": progressive, "restart_marker_blocks": 2}
    data = encoded(scene(600, 800), exif=b"Exif\0\0" + video(200), **options)
    assert decoded(recode(data + video(200))).shape == (256, 341, 3)


def test_scans_after_what_is_no_end_of_a_jpeg_are_counted():
    data = bad_images.many_scans(20_000, 64)
    start, rest = data[:2], data[2:]
    comment = b"\xff\xfe\0\x04\xff\xd9"
    for more in (comment, b"\xff\xfe\0\0", b"\xff\xd0\xff\x01\xff\0", comment * 20_000):
        with pytest.raises(ValueError, match="20,001 scans; at most 100 are read"):
            recode(start + more + rest + video(0))


def test_a_webp_whose_pixels_were_not_all_written_is_refused():
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "WEBP")
    half = len(data) // 2
    with pytest.raises(ValueError, match="its pixels end in zeros"):
        recode(data[:half] + bytes(len(data) - half))


def test_of_an_animation_without_frames_the_still_image_is_read():
    control = bad_images.chunk(b"acTL", struct.pack(">II", 9, 0))
    data = bad_images.with_header(encoded(scene(), "PNG"), more=control)
    assert difference(recode(data), scene()) < 3


def test_sixteen_bits_and_alpha_take_little_more_memory_than_the_pixels():
    side = 3000
    header = bad_images.png_header(side, side, depth=16, color=6)
    rows = zlib.compress(bytes((8 * side + 1) * side), 1)
    data = bad_images.png(header, bad_images.chunk(b"IDAT", rows))
    tracemalloc.start()
    image_decoding.decode_other(data, "png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The pixels that OpenCV decodes, the returned pixels, and a band.
    assert peak < side * side * (8 + 3) + 40_000_000


def test_a_hundred_megapixels_are_read():
    data = simplejpeg.encode_jpeg(
        np.zeros((10_000, 10_000, 1), np.uint8), colorspace="GRAY"
    )
    assert decoded(recode(data)).shape == (256, 256, 3)


def test_more_than_the_limit_is_refused_before_decoding():
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (20_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="megapixels"):
        recode(header)
